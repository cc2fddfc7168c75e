//! A case of attention on every machine at hand: the CPU's instruction sets, and CUDA in the emulator or on a GPU.
//!
//! In the emulator every step runs in both orders of fibres and blocks, on the CPU with one thread and with three; the
//! first of the two over a pool of heads and tokens, the second over one of tokens and heads; with equal bits.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use quayline_gpu_kernels::{Cpu, Cuda, Dtype, Isa, KvOrder, KvStorage};

use crate::attending::{Case, Sequence, Step, attend, compare, quantise, step};
use crate::common::{self, Random, bits, cpus};
use crate::emulator::{self, Emulator};

/// Bits of an output and of its LSE.
pub(crate) type Found = (Vec<u32>, Vec<u32>);

/// The orders of a pool, one for each of two runs that must give the same bits.
pub(crate) const ORDERS: [KvOrder; 2] = [KvOrder::Hnd, KvOrder::Nhd];

/// The emulator in both orders; none where there is no compiler.
pub(crate) fn machines(dtype: Dtype) -> Vec<(Cuda, Arc<Emulator>)> {
    [false, true].into_iter().filter_map(|descending| emulator::cuda(dtype, descending)).collect()
}

/// On a GPU, the same again, which must give the same bits.
pub(crate) fn repeat(name: &str, cuda: &Cuda, case: &Case, step: &Step<Cuda>, found: &Found) {
    for repeat in 0..emulator::repeats() {
        let again = attend(cuda, case, step);
        assert!((bits(&again.0), bits(&again.1)) == *found, "{name}: other bits in repeat {repeat}");
    }
}

/// The case's sequences, as its cache keeps them.
pub(crate) fn sequences(name: &str, case: &Case) -> (Vec<Sequence>, Random) {
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    let mut sequences: Vec<Sequence> =
        case.lengths.iter().map(|&lengths| case.sequence(&mut random, lengths)).collect();
    if case.storage != KvStorage::Same {
        sequences.iter_mut().for_each(|sequence| quantise(case, sequence));
    }
    (sequences, random)
}

/// Runs a case on both machines and holds it to the bound.
pub(crate) fn check(name: &str, case: &Case) {
    let (sequences, mut random) = sequences(name, case);
    check_cpu(name, case, &sequences, &mut random, cpus());
    check_cuda(name, case, &sequences, &mut random);
}

/// Whether the CPU runs cases at full length.
pub(crate) fn full_cases() -> bool {
    std::env::var_os("QUAYLINE_FULL_CASES").is_some()
}

/// The same for lengths that an emulator takes hours for: on a GPU, or on the best of the CPU when asked for.
pub(crate) fn check_full(name: &str, case: &Case) {
    if !emulator::on_gpu() && !full_cases() {
        return;
    }
    let name = format!("{name} at full length");
    let (sequences, mut random) = sequences(&name, case);
    if full_cases() {
        let best = Cpu::detect().unwrap().isa();
        let cpus = [1, 3].map(|threads| common::cpu(threads, best));
        check_cpu(&name, case, &sequences, &mut random, cpus.into_iter());
    }
    if emulator::on_gpu() {
        check_cuda(&name, case, &sequences, &mut random);
    }
}

/// Activations are f32, so the sums of f32 are all that is lost.
fn check_cpu(
    name: &str,
    case: &Case,
    sequences: &[Sequence],
    random: &mut Random,
    cpus: impl Iterator<Item = Cpu>,
) {
    let mut of_isa: Option<(Isa, Found)> = None;
    for (cpu, order) in cpus.zip(ORDERS.into_iter().cycle()) {
        let case = &Case { order, ..case.clone() };
        let name = format!("{name} on {cpu:?}");
        let (out, lse) = attend(&cpu, case, &step(&cpu, case, sequences, random));
        let found = (bits(&out), bits(&lse));
        match &of_isa {
            Some((isa, first)) if *isa == cpu.isa() => {
                assert!(
                    *first == found,
                    "{name}: the number of threads or the pool's order shows in the bits"
                );
            }
            _ => {
                let allowed = common::attention_error(&cpu, case.dtype, 1e-4);
                compare(&name, case, sequences, (&out, &lse), allowed, random);
                of_isa = Some((cpu.isa(), found));
            }
        }
    }
}

fn check_cuda(name: &str, case: &Case, sequences: &[Sequence], random: &mut Random) {
    let mut first: Option<Found> = None;
    for ((cuda, emulator), order) in machines(case.dtype).into_iter().zip(ORDERS) {
        let case = &Case { order, ..case.clone() };
        let step = step(&cuda, case, sequences, random);
        emulator.bank_conflicts.store(0, Ordering::Relaxed);
        let (out, lse) = attend(&cuda, case, &step);
        assert_eq!(
            emulator.bank_conflicts.load(Ordering::Relaxed),
            0,
            "{name}: conflicts of banks in ldmatrix"
        );
        let found = (bits(&out), bits(&lse));
        repeat(name, &cuda, case, &step, &found);
        match &first {
            Some(first) => {
                assert!(*first == found, "{name}: the order of threads or of the pool shows in the bits")
            }
            None => {
                compare(name, case, sequences, (&out, &lse), f64::INFINITY, random);
                first = Some(found);
            }
        }
    }
}

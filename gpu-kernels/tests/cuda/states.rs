//! Attention in parts and in other company, on both machines: states merged in any order (case 18 of
//! `attention.rs`), and bits that depend on a sequence alone (case 19).

use std::fmt;

use quayline_gpu_kernels::{Dtype, Heads, Ops, Scores};

use crate::attending::{Case, LAYER, Sequence, Step, attend, compare, step, write};
use crate::cases::{full_cases, machines, sequences};
use crate::common::{self, Random, attention_error, bits, cpus, half_ulp};
use crate::emulator;

#[test]
fn case_18_a_shared_prefix_in_levels() {
    for shared in [256, 2048] {
        if shared == 256 || full_cases() {
            for cpu in cpus() {
                let allowed = |in_f32| attention_error(&cpu, Dtype::Bf16, in_f32);
                shared_prefix(&cpu, shared, allowed(1e-4), 1e-6);
            }
        }
        if shared == 256 || emulator::on_gpu() {
            // An order rounds what two merges make to the stored type, and all values are below 1.
            let apart = 4.0 * half_ulp(Dtype::Bf16);
            machines(Dtype::Bf16)
                .iter()
                .for_each(|(cuda, _)| shared_prefix(cuda, shared, f64::INFINITY, apart));
        }
    }
}

/// Attention over two and three parts of contexts that begin alike, merged in every order: within the bound of one
/// attention over all (`allowed` besides), and orders at most `apart`.
fn shared_prefix<O: Ops + fmt::Debug>(ops: &O, shared: usize, allowed: f64, apart: f64) {
    let case = Case::new((8, 2, 128), 16, &[(1, shared + 17), (17, shared + 37)]);
    let (mut sequences, mut random) = sequences("18", &case);
    let kv = case.heads.kv * case.heads.dim;
    let prefix = [&sequences[0].k, &sequences[0].v].map(|x| x[..shared * kv].to_vec());
    sequences[1].k[..shared * kv].copy_from_slice(&prefix[0]);
    sequences[1].v[..shared * kv].copy_from_slice(&prefix[1]);
    for cuts in [vec![0, shared], vec![0, 64, shared]] {
        let parts: Vec<_> =
            (0..cuts.len()).map(|level| state(ops, &case, &sequences, &cuts[level..], &mut random)).collect();
        let mut merged: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
        for order in orders(parts.len()) {
            let found = merge(ops, &case, order.iter().map(|&level| &parts[level]));
            let what = format!("18 {ops:?}: parts from {cuts:?} merged in the order {order:?}");
            compare(&what, &case, &sequences, (&found.0, &found.1), allowed, &mut random);
            merged.push(found);
            for (x, first) in merged[merged.len() - 1].0.iter().zip(&merged[0].0) {
                common::close(*x, f64::from(*first), apart, || what.clone());
            }
        }
    }
}

/// All orders of so many.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let longer = |shorter: Vec<usize>| (0..count).map(move |last| [&shorter[..], &[last]].concat());
    let all = (0..count).fold(vec![Vec::new()], |orders, _| orders.into_iter().flat_map(longer).collect());
    let once = |order: &Vec<usize>| (0..count).all(|level| order.contains(&level));
    all.into_iter().filter(once).collect()
}

/// Output and LSE over the part from the first cut to the next. Up to the last cut all sequences have the same tokens
/// there, so all queries are one span, which sees them whole; after it each sees its own, causally.
fn state<O: Ops>(
    ops: &O,
    case: &Case,
    sequences: &[Sequence],
    cuts: &[usize],
    random: &mut Random,
) -> (Vec<f32>, Vec<f32>) {
    let kv = case.heads.kv * case.heads.dim;
    let part = |s: &Sequence, to: usize| {
        let cut = |x: &[f32]| x[cuts[0] * kv..to * kv].to_vec();
        Sequence { k: cut(&s.k), v: cut(&s.v), context: to - cuts[0], ..s.clone() }
    };
    let parts: Vec<_> = match cuts.get(1) {
        Some(&to) => {
            let q: Vec<f32> = sequences.iter().flat_map(|s| s.q.iter().copied()).collect();
            let queries = sequences.iter().map(|s| s.queries).sum();
            vec![Sequence { q, queries, ..part(&sequences[0], to) }]
        }
        None => sequences.iter().map(|s| part(s, s.context)).collect(),
    };
    let Step { pool, batch, q, rows, .. } = &step(ops, case, &parts, random);
    let mut out = ops.tensor(*rows, case.heads.query * case.heads.dim).unwrap();
    let mut lse = ops.floats(&vec![f32::NAN; rows * case.heads.query]).unwrap();
    let scores = Scores { causal: cuts.len() == 1, ..Scores::default() };
    ops.attend(pool, LAYER, batch, q, case.attention(), scores, &mut out, Some(&mut lse)).unwrap();
    (ops.read(&out).unwrap().into_owned(), ops.read_floats(&lse).unwrap())
}

/// States made one, each with what was made of those before it.
fn merge<'a, O: Ops>(
    ops: &O,
    case: &Case,
    states: impl Iterator<Item = &'a (Vec<f32>, Vec<f32>)>,
) -> (Vec<f32>, Vec<f32>) {
    let Heads { query, dim, .. } = case.heads;
    let on = |(out, lse): &(Vec<f32>, Vec<f32>)| {
        (write(ops, lse.len() / query, query * dim, out), ops.floats(lse).unwrap())
    };
    let (out, lse) = states
        .map(on)
        .reduce(|(mut a, mut lse_a), (b, lse_b)| {
            ops.merge_states((&mut a, &mut lse_a), (&b, &lse_b), query).unwrap();
            (a, lse_a)
        })
        .unwrap();
    (ops.read(&out).unwrap().into_owned(), ops.read_floats(&lse).unwrap())
}

#[test]
fn merging_nothing_changes_nothing() {
    cpus().for_each(|cpu| merge_nothing(&cpu));
    machines(Dtype::Bf16).iter().for_each(|(cuda, _)| merge_nothing(cuda));
}

fn merge_nothing<O: Ops>(ops: &O) {
    let none = f32::NEG_INFINITY;
    let mut a = write(ops, 3, 4, &[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let b = write(ops, 3, 4, &[0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0]);
    let (mut lse_a, lse_b) =
        (ops.floats(&[0.5, none, none]).unwrap(), ops.floats(&[none, 2.0, none]).unwrap());
    ops.merge_states((&mut a, &mut lse_a), (&b, &lse_b), 1).unwrap();
    assert_eq!(*ops.read(&a).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(ops.read_floats(&lse_a).unwrap(), [0.5, 2.0, none]);
}

#[test]
fn case_19_bits_do_not_depend_on_company_chunks_pages_or_splits() {
    // The other cases compare the two orders of threads; these alternate.
    let plain = |heads| Case::new(heads, 16, &[(330, 330)]);
    let shaped = Case { softcap: Some(3.0), slopes: true, sinks: true, ..plain((4, 2, 64)) };
    let window = Case { window: Some(100), ..plain((4, 2, 256)) };
    for (seed, case) in [plain((8, 2, 64)), plain((7, 1, 128)), window, shaped].iter().enumerate() {
        let seed = seed as u64;
        if let Some((cuda, _)) = emulator::cuda(case.dtype, seed % 2 == 1) {
            bits_of_its_own(&cuda, case, seed);
        }
        cpus().for_each(|cpu| bits_of_its_own(&cpu, case, seed));
    }
}

/// The last queries of a part of a sequence, alone and between strangers, on other pages.
fn bits_of_its_own<O: Ops>(ops: &O, case: &Case, seed: u64) {
    let mut random = Random::new(190 + seed);
    let whole = case.sequence(&mut random, case.lengths[0]);
    let (width, kv) = (case.heads.query * case.heads.dim, case.heads.kv * case.heads.dim);
    let reference = attend(ops, case, &step(ops, case, std::slice::from_ref(&whole), &mut random)).0;
    for (queries, context, block_size) in [(1, 330, 16), (1, 257, 8), (3, 256, 32), (70, 300, 5)] {
        let part = Sequence {
            q: whole.q[(context - queries) * width..context * width].to_vec(),
            k: whole.k[..context * kv].to_vec(),
            v: whole.v[..context * kv].to_vec(),
            context,
            queries,
        };
        for company in [0, 3] {
            let lengths: Vec<_> = (0..company).map(|i| (1 + 40 * (i % 2), 90 + 170 * i)).collect();
            let mut sequences: Vec<_> = lengths.iter().map(|&n| case.sequence(&mut random, n)).collect();
            let start: usize = lengths.iter().map(|n| n.0).sum();
            sequences.push(part.clone());
            let case = Case { block_size, ..case.clone() };
            let out = attend(ops, &case, &step(ops, &case, &sequences, &mut random)).0;
            let expected = &reference[(context - queries) * width..context * width];
            let found = &out[start * width..(start + queries) * width];
            assert!(bits(found) == bits(expected), "{case:?}: {queries} of {context} with {company} others");
        }
    }
}

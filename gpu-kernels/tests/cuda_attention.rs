//! Attention on the CPU, on every instruction set of this machine, and on CUDA in the emulator: twenty cases that have
//! broken kernels elsewhere, at sizes that an emulator takes, against softmax in f64 (`common/attending.rs`).
//!
//! In the emulator every step runs in both orders of fibres and blocks, on the CPU with one thread and with three, with
//! equal bits.
#![cfg(unix)]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "a test: small numbers, a panic is the report, and the emulator is a library of C++"
)]

#[path = "common/attending.rs"]
mod attending;
mod common;
#[path = "common/emulator.rs"]
mod emulator;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use attending::{Case, LAYER, Sequence, Step, append, attend, compare, quantise, row, step, write};
use common::{Random, bits, cpus};
use emulator::Emulator;
use half::bf16;
use quayline_gpu_kernels::cuda::{KvPool, Tensor};
use quayline_gpu_kernels::{
    Attention, BatchInput, Cuda, Dtype, Error, Heads, Isa, KvShape, KvStorage, Ops, Scores, Span,
};

/// Bits of an output and of its LSE.
type Found = (Vec<u32>, Vec<u32>);

/// The emulator in both orders; none where there is no compiler.
fn machines(dtype: Dtype) -> Vec<(Cuda, Arc<Emulator>)> {
    [false, true].into_iter().filter_map(|descending| emulator::cuda(dtype, descending)).collect()
}

/// On a GPU, the same again, which must give the same bits.
fn repeat(name: &str, cuda: &Cuda, case: &Case, step: &Step<Cuda>, found: &Found) {
    for repeat in 0..emulator::repeats() {
        let again = attend(cuda, case, step);
        assert!((bits(&again.0), bits(&again.1)) == *found, "{name}: other bits in repeat {repeat}");
    }
}

/// Runs a case on both machines and holds it to the bound.
fn check(name: &str, case: &Case) {
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    let mut sequences: Vec<Sequence> =
        case.lengths.iter().map(|&lengths| case.sequence(&mut random, lengths)).collect();
    if case.storage != KvStorage::Same {
        sequences.iter_mut().for_each(|sequence| quantise(case, sequence));
    }
    check_cpu(name, case, &sequences, &mut random);
    check_cuda(name, case, &sequences, &mut random);
}

/// Activations are f32, so the sums of f32 are all that is lost.
fn check_cpu(name: &str, case: &Case, sequences: &[Sequence], random: &mut Random) {
    let mut of_isa: Option<(Isa, Found)> = None;
    for cpu in cpus() {
        let name = format!("{name} on {cpu:?}");
        let (out, lse) = attend(&cpu, case, &step(&cpu, case, sequences, random));
        let found = (bits(&out), bits(&lse));
        match &of_isa {
            Some((isa, first)) if *isa == cpu.isa() => {
                assert!(*first == found, "{name}: the number of threads shows in the bits");
            }
            _ => {
                compare(&name, case, sequences, (&out, &lse), 1e-4, random);
                of_isa = Some((cpu.isa(), found));
            }
        }
    }
}

fn check_cuda(name: &str, case: &Case, sequences: &[Sequence], random: &mut Random) {
    let mut first: Option<Found> = None;
    for (cuda, emulator) in machines(case.dtype) {
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
            Some(first) => assert!(*first == found, "{name}: the order of threads shows in the bits"),
            None => {
                compare(name, case, sequences, (&out, &lse), f64::INFINITY, random);
                first = Some(found);
            }
        }
    }
}

#[test]
fn case_01_page_edges_and_no_context() {
    check("1", &Case::decode((32, 8, 128), 16, &[0, 1, 15, 16, 17, 31, 32, 33]));
}

#[test]
fn case_02_groups_of_seven() {
    check("2", &Case::decode((28, 4, 128), 16, &[1, 97, 2048]));
}

#[test]
fn case_03_groups_above_a_tile() {
    check("3 a", &Case::decode((64, 4, 128), 64, &[513, 1023]));
    check("3 b", &Case::decode((64, 1, 128), 64, &[513, 1023]));
    check("3 c", &Case::decode((100, 1, 64), 16, &[70]));
}

#[test]
fn case_04_many_heads_and_small_pages_in_f16() {
    let case = Case::decode((32, 32, 128), 8, &[300, 40]);
    check("4", &Case { dtype: Dtype::F16, ..case });
}

#[test]
fn case_05_all_lengths_of_a_small_head() {
    // All up to a tile and a bit, and around every later page.
    let lengths: Vec<usize> = (1..=300).filter(|n| *n < 70 || n % 16 < 2).collect();
    check("5", &Case::decode((14, 2, 64), 16, &lengths));
}

#[test]
fn case_06_window_and_cap_with_a_head_of_256() {
    let case = Case::decode((16, 8, 256), 32, &[95, 96, 97, 300]);
    check("6", &Case { window: Some(96), softcap: Some(50.0), ..case });
    let case = Case::new((4, 2, 256), 32, &[(40, 97), (70, 200)]);
    check("6 prefill", &Case { window: Some(96), softcap: Some(2.0), ..case });
}

#[test]
fn case_07_heads_between_the_sizes() {
    for dim in [80, 96, 112, 192, 17, 8, 1] {
        check(&format!("7 {dim}"), &Case::new((4, 2, dim), 16, &[(1, 300), (30, 77)]));
    }
}

#[test]
fn case_08_ragged_prompts() {
    let lengths = [1, 2, 63, 64, 65, 127, 128, 129, 300].map(|n| (n, n));
    check("8", &Case::new((4, 1, 128), 16, &lengths));
    check("8 small", &Case::new((6, 2, 64), 16, &lengths));
}

#[test]
fn case_09_chunks_of_prompts() {
    check("9", &Case::new((4, 2, 128), 16, &[(17, 600), (64, 700), (1, 1), (70, 139)]));
}

#[test]
fn case_10_more_queries_than_context() {
    check("10", &Case::new((4, 2, 64), 16, &[(235, 2), (5, 3), (7, 0)]));
}

#[test]
fn case_11_mixed_batch() {
    let mut random = Random::new(11);
    let lengths: Vec<_> = (0..32)
        .map(|i| if i % 16 == 0 { (17, 200 + random.below(400)) } else { (1, 10 + random.below(60)) })
        .collect();
    check("11", &Case::new((8, 2, 64), 16, &lengths));
}

#[test]
fn case_12_one_long_and_many_short() {
    check("12", &Case::decode((8, 2, 128), 16, &[5000, 60, 61, 62, 63, 64, 65]));
}

#[test]
fn case_13_a_chunk_far_into_a_prompt() {
    check("13", &Case::new((2, 1, 128), 16, &[(40, 4100)]));
}

#[test]
fn case_15_eight_bit_caches() {
    for dim in [64, 128, 256, 80] {
        let tensor = KvStorage::Fp8 { key_scale: 0.01, value_scale: 0.005 };
        for storage in [tensor, KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
            let case = Case::new((4, 2, dim), 16, &[(1, 54), (1, 300), (20, 90)]);
            check(&format!("15 {dim} {storage:?}"), &Case { storage, ..case });
        }
    }
    // Scales so small that numbers are cut at 448.
    let storage = KvStorage::Fp8 { key_scale: 0.002, value_scale: 0.001 };
    check("15 cut", &Case { storage, ..Case::decode((4, 2, 64), 16, &[70]) });
    for storage in [KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
        let f16 = Case { dtype: Dtype::F16, storage, ..Case::decode((4, 2, 128), 16, &[70]) };
        check(&format!("15 f16 {storage:?}"), &f16);
    }
}

#[test]
fn case_16_sinks_and_a_window() {
    let case = Case::decode((16, 2, 64), 16, &[0, 1, 127, 128, 129, 600]);
    check("16", &Case { window: Some(128), sinks: true, ..case });
    check("16 prefill", &Case { window: Some(20), sinks: true, ..Case::new((4, 2, 64), 16, &[(50, 90)]) });
}

#[test]
fn case_17_alibi_and_trees_of_drafts() {
    check("17", &Case { slopes: true, ..Case::decode((40, 40, 128), 16, &[129]) });
    check("17 prefill", &Case { slopes: true, ..Case::new((8, 8, 64), 16, &[(40, 100)]) });
    check(
        "17 tree",
        &Case { tree: true, ..Case::new((4, 2, 128), 16, &[(8, 300), (8, 8), (40, 41), (3, 1)]) },
    );
}

/// A test of both machines: of the CPU in f32, and of the emulator.
macro_rules! on_both {
    ($test:ident, $dtype:expr) => {{
        cpus().for_each(|cpu| $test(&cpu));
        machines($dtype).iter().for_each(|(cuda, _)| $test(cuda));
    }};
}

#[test]
fn case_18_a_shared_prefix_in_levels() {
    on_both!(shared_prefix, Dtype::Bf16);
}

fn shared_prefix<O: Ops>(ops: &O) {
    let case = Case::new((8, 2, 128), 16, &[(1, 317), (17, 337)]);
    let mut random = Random::new(18);
    let (heads, width) = (case.heads.query, case.heads.query * case.heads.dim);
    let sequences: Vec<_> = case.lengths.iter().map(|&n| case.sequence(&mut random, n)).collect();
    let (flat, flat_lse) = attend(ops, &case, &step(ops, &case, &sequences, &mut random));
    for cuts in [vec![0, 256], vec![0, 64, 256]] {
        let mut whole: Option<(O::Tensor, O::Floats)> = None;
        for (level, &from) in cuts.iter().enumerate() {
            // A level is a context of its own; only the last is causal, the others are seen whole.
            let last = level + 1 == cuts.len();
            let part = |s: &Sequence| {
                let to = if last { s.context } else { cuts[level + 1] };
                let kv = case.heads.kv * case.heads.dim;
                let cut = |x: &[f32]| x[from * kv..to * kv].to_vec();
                Sequence { k: cut(&s.k), v: cut(&s.v), context: to - from, ..s.clone() }
            };
            let parts: Vec<_> = sequences.iter().map(part).collect();
            let step = step(ops, &case, &parts, &mut random);
            let mut out = ops.tensor(step.rows, width).unwrap();
            let mut lse = ops.floats(&vec![f32::NAN; step.rows * heads]).unwrap();
            let scores = Scores { causal: last, ..Scores::default() };
            let Step { pool, batch, q, .. } = &step;
            ops.attend(pool, LAYER, batch, q, case.attention(), scores, &mut out, Some(&mut lse)).unwrap();
            match &mut whole {
                Some((a, lse_a)) => ops.merge_states((a, lse_a), (&out, &lse), heads).unwrap(),
                None => whole = Some((out, lse)),
            }
        }
        let (out, lse) = whole.unwrap();
        for (found, flat) in ops.read(&out).unwrap().iter().zip(&flat) {
            assert!((found - flat).abs() <= 0.01, "{cuts:?}: {found}, flat {flat}");
        }
        for (found, flat) in ops.read_floats(&lse).unwrap().iter().zip(&flat_lse) {
            assert!((found - flat).abs() <= 1e-3, "{cuts:?}: LSE {found}, flat {flat}");
        }
    }
}

#[test]
fn merging_nothing_changes_nothing() {
    on_both!(merge_nothing, Dtype::Bf16);
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

#[test]
fn case_20_padding_of_a_captured_step() {
    for (cuda, _) in machines(Dtype::Bf16) {
        let mut random = Random::new(20);
        let case = Case::decode((4, 2, 64), 16, &[40, 3, 0, 0]);
        let sequences: Vec<_> = case.lengths.iter().map(|&n| case.sequence(&mut random, n)).collect();
        let mut step = step(&cuda, &case, &sequences, &mut random);
        let width = 2 * 64;
        // Rows that stand for nobody: slot -1, no context. They write no page and give zeros.
        let before = attend(&cuda, &case, &step).0;
        append(&cuda, &mut step.pool, step.shape, &[-1; 4], &vec![9.0; 4 * width], &vec![9.0; 4 * width]);
        let after = attend(&cuda, &case, &step).0;
        assert_eq!(bits(&before), bits(&after));
        assert!(after[2 * 4 * 64..].iter().all(|&x| x == 0.0));
    }
}

#[test]
fn of_equal_slots_the_last_token_wins() {
    for (cuda, _) in machines(Dtype::Bf16) {
        let mut random = Random::new(21);
        let case = Case::decode((2, 1, 64), 4, &[4]);
        let sequence = case.sequence(&mut random, (1, 4));
        let mut step = step(&cuda, &case, std::slice::from_ref(&sequence), &mut random);
        let before = attend(&cuda, &case, &step).0;
        // Every slot once with something else, then with what it had: found by reading what attention sees.
        let slots: Vec<i64> = (0..12).flat_map(|slot| [slot, slot]).collect();
        let first = vec![3.0; 64];
        let both: Vec<f32> =
            (0..12).flat_map(|slot| [vec![slot as f32 * 0.5; 64], first.clone()].concat()).collect();
        append(&cuda, &mut step.pool, step.shape, &slots, &both, &both);
        let after = attend(&cuda, &case, &step).0;
        assert_ne!(bits(&before), bits(&after));
        assert!(after.iter().all(|&x| x == 3.0), "{after:?}");
    }
}

#[test]
fn case_14_a_pool_beyond_32_bits() {
    for (cuda, emulator) in machines(Dtype::Bf16) {
        let (block_size, kv, dim) = (16, 8, 128);
        // K of a layer has more than 2^31 elements; only the pages in use are ever touched.
        let blocks = (1 << 31) / (block_size * kv * dim) + 9;
        let shape =
            KvShape { layers: 1, blocks, block_size, kv_heads: kv, head_dim: dim, dtype: Dtype::Bf16 };
        emulator.lazy.store(true, Ordering::Relaxed);
        let Ok(mut pool) = cuda.kv_pool(shape) else {
            eprintln!("skipped: no address space for a pool of 2^31 elements");
            return;
        };
        let case = Case::decode((8, 8, 128), block_size, &[20]);
        let sequence = case.sequence(&mut Random::new(14), (1, 20));
        let pages = [blocks as u32 - 1, blocks as u32 - 8];
        let slots: Vec<i64> = (0..20)
            .map(|t| i64::from(pages[t / block_size]) * block_size as i64 + (t % block_size) as i64)
            .collect();
        append(&cuda, &mut pool, shape, &slots, &sequence.k, &sequence.v);
        let batch = BatchInput {
            positions: &[19],
            slots: &[-1],
            spans: &[Span { query_start: 0, query_len: 1, context_len: 20 }],
            block_tables: &pages,
            block_size,
        };
        let q = write(&cuda, 1, 8 * dim, &sequence.q);
        let mut out = cuda.tensor(1, 8 * dim).unwrap();
        let batch = cuda.batch(batch).unwrap();
        cuda.attention(&pool, 0, &batch, &q, case.attention(), &mut out).unwrap();
        let out = cuda.read(&out).unwrap();
        for head in 0..8 {
            for (found, exact) in out[head * dim..].iter().zip(row(&case, &sequence, 0, head).exact) {
                common::close(*found, exact, 0.01, || format!("head {head}"));
            }
        }
    }
}

#[test]
fn copied_and_saved_blocks_read_as_their_source() {
    for storage in [KvStorage::Same, KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
        for (cuda, _) in machines(Dtype::Bf16) {
            let mut random = Random::new(22);
            let case = Case { storage, ..Case::decode((4, 2, 24), 6, &[30]) };
            let sequence = case.sequence(&mut random, (1, 30));
            let mut step = step(&cuda, &case, std::slice::from_ref(&sequence), &mut random);
            let before = attend(&cuda, &case, &step).0;
            let blocks = step.pool.shape().blocks as u32;
            let mut saved = vec![
                vec![0; cuda.kv_block_bytes_stored(step.pool.shape(), storage).unwrap()];
                blocks as usize
            ];
            for (block, bytes) in (0..).zip(&mut saved) {
                cuda.save_block(&step.pool, block, bytes).unwrap();
            }
            // Each copy reads what the one before wrote: all blocks become the first.
            let round: Vec<_> = (0..blocks).map(|block| (block, (block + 1) % blocks)).collect();
            cuda.copy_blocks(&mut step.pool, &round).unwrap();
            let mut first = saved[0].clone();
            for block in 0..blocks {
                cuda.save_block(&step.pool, block, &mut first).unwrap();
                assert!(first == saved[0], "{storage:?}: block {block} of {blocks}");
            }
            for (block, bytes) in (0..).zip(&saved) {
                cuda.load_block(&mut step.pool, block, bytes).unwrap();
            }
            assert_eq!(bits(&attend(&cuda, &case, &step).0), bits(&before), "{storage:?}");
            assert!(cuda.load_block(&mut step.pool, blocks, &first).is_err());
            assert!(cuda.save_block(&step.pool, 0, &mut first[1..]).is_err());
        }
    }
}

/// One step of append and attention over tensors that stay: by itself, or recorded.
#[test]
fn case_20_a_recorded_step_is_replayed_for_other_contexts() {
    for (cuda, emulator) in machines(Dtype::Bf16) {
        let mut random = Random::new(23);
        let (block_size, blocks, rows, heads) = (16, 60, 8, Heads { query: 4, kv: 2, dim: 64 });
        let shape = KvShape { layers: 1, blocks, block_size, kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 };
        let mut pool = cuda.kv_pool(shape).unwrap();
        let all: Vec<i64> = (0..(blocks * block_size) as i64).collect();
        let old: Vec<f32> = (0..all.len() * 128).map(|_| random.float()).collect();
        append(&cuda, &mut pool, shape, &all, &old, &old);
        let attention = Attention { heads, scale: 0.125, window: None };
        let tables: Vec<u32> = (0..rows as u32 * 30).map(|i| i % 60).collect();
        let spans = |contexts: [u32; 8]| {
            (0..).zip(contexts).map(|(row, context_len)| Span { query_start: row, query_len: 1, context_len })
        };
        let x = |random: &mut Random, cols: usize| -> Vec<f32> {
            (0..rows * cols).map(|_| bf16::from_f32(random.float()).to_f32()).collect()
        };
        let slots = |live: i64| -> Vec<i64> { (0..8).map(|i| if i < live { i * 7 } else { -1 }).collect() };
        let input = |contexts: [u32; 8], slots: Vec<i64>| (spans(contexts).collect::<Vec<_>>(), slots);
        let as_batch = |(spans, slots): &(Vec<Span>, Vec<i64>)| -> BatchInput<'static> {
            BatchInput {
                positions: &[0; 8],
                slots: slots.clone().leak(),
                spans: spans.clone().leak(),
                block_tables: tables.clone().leak(),
                block_size,
            }
        };
        let mut batch = cuda.fixed_batch(as_batch(&input([5; 8], slots(8)))).unwrap();
        let mut q = write(&cuda, rows, 256, &x(&mut random, 256));
        let mut k = write(&cuda, rows, 128, &x(&mut random, 128));
        let mut out = cuda.tensor(rows, 256).unwrap();
        let run = |cuda: &Cuda, pool: &mut KvPool, batch: &_, q: &Tensor, k: &Tensor, out: &mut Tensor| {
            cuda.append(pool, 0, batch, k, k)?;
            cuda.attention(pool, 0, batch, q, attention, out)
        };
        run(&cuda, &mut pool, &batch, &q, &k, &mut out).unwrap();
        let graph = cuda.capture(|cuda| run(cuda, &mut pool, &batch, &q, &k, &mut out)).unwrap();
        for (contexts, live) in
            [([5; 8], 8), ([470, 3, 17, 300, 1, 0, 0, 0], 5), ([1, 0, 0, 0, 0, 0, 0, 480], 8)]
        {
            let step = input(contexts, slots(live));
            batch.refill(as_batch(&step)).unwrap();
            cuda.write(&mut q, &x(&mut random, 256)).unwrap();
            cuda.write(&mut k, &x(&mut random, 128)).unwrap();
            cuda.write(&mut out, &vec![f32::NAN; rows * 256]).unwrap();
            graph.replay().unwrap();
            let replayed = bits(&cuda.read(&out).unwrap());
            // The same step, not recorded; appending again changes nothing.
            let fresh = cuda.batch(as_batch(&step)).unwrap();
            run(&cuda, &mut pool, &fresh, &q, &k, &mut out).unwrap();
            assert!(replayed == bits(&cuda.read(&out).unwrap()), "{contexts:?} {emulator:?}");
        }
        // Not for other spans, and not for blocks and slots that the pool lacks.
        let mut wrong = input([5; 8], slots(8));
        wrong.0[7].query_len = 0;
        assert!(matches!(
            batch.refill(as_batch(&wrong)),
            Err(Error::Shape { dimension: "queries of a span", found: 0, expected: 1, .. })
        ));
        let beyond = input([5; 8], vec![(blocks * block_size) as i64; 8]);
        assert!(matches!(
            batch.refill(as_batch(&beyond)),
            Err(Error::TooLarge { dimension: "slot", found: 960, max: 959, .. })
        ));
        let refused = cuda.capture(|cuda| cuda.read(&q).map(drop)).unwrap_err();
        assert!(refused.to_string().contains("may not download 4096 bytes"), "{refused}");
        // What the recording uses stays when nobody has it any more, and only as long as the recording.
        let held = emulator.allocations();
        drop((batch, q, k, out));
        if !emulator::on_gpu() {
            assert_eq!(emulator.allocations(), held);
        }
        graph.replay().unwrap();
        drop(graph);
        if !emulator::on_gpu() {
            assert!(emulator.allocations() < held);
        }
    }
}

/// Prompts by the kernel for Hopper: within the bound, whatever the order of threads.
fn check_hopper(name: &str, case: &Case) {
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    let mut sequences: Vec<Sequence> =
        case.lengths.iter().map(|&lengths| case.sequence(&mut random, lengths)).collect();
    if case.storage != KvStorage::Same {
        sequences.iter_mut().for_each(|sequence| quantise(case, sequence));
    }
    let mut first: Option<Found> = None;
    for (cuda, emulator) in machines(case.dtype) {
        emulator.hopper.store(true, Ordering::Relaxed);
        emulator.shared_bytes_max.store(227 << 10, Ordering::Relaxed);
        let cuda = cuda.with_fast_prompts(true);
        let step = step(&cuda, case, &sequences, &mut random);
        let (out, lse) = attend(&cuda, case, &step);
        let launches = emulator.hopper_launches.load(Ordering::Relaxed);
        assert_eq!(launches, u64::from(!emulator::on_gpu()), "{name}: another kernel ran");
        let found = (bits(&out), bits(&lse));
        repeat(name, &cuda, case, &step, &found);
        match &first {
            Some(first) => assert!(*first == found, "{name}: the order of threads shows in the bits"),
            None => {
                compare(name, case, &sequences, (&out, &lse), f64::INFINITY, &mut random);
                first = Some(found);
            }
        }
    }
}

#[test]
fn hopper_cases_08_and_09_ragged_prompts_and_chunks() {
    check_hopper("hopper 8", &Case::new((4, 1, 128), 16, &[(1, 1), (2, 2), (40, 40), (129, 129), (3, 70)]));
    check_hopper("hopper 9", &Case::new((4, 2, 128), 16, &[(17, 300), (64, 140), (1, 1), (70, 139)]));
}

#[test]
fn hopper_cases_02_to_07_groups_pages_and_heads() {
    check_hopper("hopper 2", &Case::new((7, 1, 64), 64, &[(20, 150), (9, 9)]));
    check_hopper("hopper 4", &Case { dtype: Dtype::F16, ..Case::new((2, 2, 128), 128, &[(70, 257)]) });
    for dim in [8, 40, 80, 112] {
        check_hopper("hopper 7", &Case::new((4, 2, dim), 8, &[(30, 77)]));
    }
    check_hopper("hopper large pages", &Case::new((4, 2, 64), 256, &[(30, 300)]));
}

#[test]
fn hopper_cases_06_10_and_16_windows_sinks_and_nothing_to_see() {
    let window = Case::new((4, 2, 64), 32, &[(50, 400)]);
    check_hopper("hopper 6", &Case { window: Some(96), softcap: Some(5.0), ..window });
    check_hopper("hopper 10", &Case::new((4, 2, 64), 16, &[(35, 2), (17, 0)]));
    let sinks = Case::new((4, 2, 64), 16, &[(50, 90)]);
    check_hopper("hopper 16", &Case { window: Some(20), sinks: true, ..sinks });
}

#[test]
fn hopper_case_15_eight_bit_caches() {
    let tensor = KvStorage::Fp8 { key_scale: 0.01, value_scale: 0.005 };
    for (dtype, storage) in [
        (Dtype::Bf16, tensor),
        (Dtype::Bf16, KvStorage::Fp8PerHead),
        (Dtype::Bf16, KvStorage::Int8PerHead),
        (Dtype::F16, tensor),
        (Dtype::F16, KvStorage::Fp8PerHead),
        (Dtype::F16, KvStorage::Int8PerHead),
    ] {
        let name = |what| format!("hopper 15 {what} {dtype} {storage:?}");
        let case =
            |heads, block_size, lengths| Case { dtype, storage, ..Case::new(heads, block_size, lengths) };
        // Three tiles, so that both stages are used twice; pages of which a tile has many, and one of two tiles.
        check_hopper(&name("pages"), &case((4, 2, 128), 16, &[(20, 300), (9, 9), (17, 0)]));
        let window = case((2, 1, 40), 256, &[(40, 400)]);
        check_hopper(&name("window"), &Case { window: Some(70), softcap: Some(5.0), sinks: true, ..window });
    }
}

#[test]
fn moved_tokens_read_as_their_source() {
    for block_size in [5, 16, 32] {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            cpus().for_each(|cpu| moved_tokens(&cpu, dtype, block_size));
        }
        machines(Dtype::Bf16).iter().for_each(|(cuda, _)| moved_tokens(cuda, Dtype::Bf16, block_size));
    }
}

fn moved_tokens<O: Ops>(ops: &O, dtype: Dtype, block_size: usize) {
    let shape = KvShape { layers: 3, blocks: 3, block_size, kv_heads: 2, head_dim: 24, dtype };
    let count = 3 * block_size;
    let slots: Vec<i64> = (0..count as i64).collect();
    let x = |from: &dyn Fn(usize) -> usize| -> Vec<f32> {
        (0..count * 48).map(|i| (from(i / 48) * 48 + i % 48) as f32).collect()
    };
    for storage in [KvStorage::Same, KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
        let mut pool = ops.kv_pool_stored(shape, storage).unwrap();
        append(ops, &mut pool, shape, &slots, &x(&|slot| slot), &x(&|slot| count + slot));
        // A branch of a tree goes to where the sequence goes on; another sequence has its own.
        let lists: [&[(u64, u64)]; 3] = [&[(6, 5), (8, 6), (9, 8)], &[], &[(14, 0)]];
        ops.copy_slots(&mut pool, &lists).unwrap();
        let moved = [14, 1, 2, 3, 4, 6, 8, 7, 9, 9];
        let now = |slot: usize| moved.get(slot).copied().unwrap_or(slot);
        let mut expected = ops.kv_pool_stored(shape, storage).unwrap();
        append(ops, &mut expected, shape, &slots, &x(&now), &x(&|slot| count + now(slot)));
        let mut bytes = [(); 2].map(|()| vec![0; ops.kv_block_bytes_stored(shape, storage).unwrap()]);
        for block in 0..3 {
            ops.save_block(&pool, block, &mut bytes[0]).unwrap();
            ops.save_block(&expected, block, &mut bytes[1]).unwrap();
            assert!(bytes[0] == bytes[1], "{dtype} {storage:?}, block {block} of {block_size} tokens");
        }
        let beyond = ops.copy_slots(&mut pool, &[&[(count as u64, 0)]]);
        assert!(matches!(beyond, Err(Error::TooLarge { dimension: "slot", found, .. }) if found == count));
        assert!(ops.copy_slots(&mut pool, &[&[(1, 2)], &[(2, 3)]]).is_err(), "a slot of two lists");
    }
}

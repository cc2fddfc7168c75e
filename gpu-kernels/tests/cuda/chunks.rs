//! Prompts on Hopper whose contexts are longer than a chunk: one block adds chunks up, or several and a merge do, and
//! the bits are the same. Chunks are short here, but for one test.

use std::sync::atomic::{AtomicU64, Ordering};

use quayline_gpu_kernels::{Attention, BatchInput, Cuda, Dtype, Heads, KvShape, KvStorage, Ops, Span};

use crate::attending::{Case, Sequence, append, attend, compare, step, write};
use crate::cases::{Found, machines, repeat, sequences};
use crate::common::{Random, bits};
use crate::emulator::{self, Emulator};

/// Hopper with so many multiprocessors.
fn hopper(cuda: Cuda, emulator: &Emulator, multiprocessors: u32) -> Cuda {
    emulator.hopper.store(true, Ordering::Relaxed);
    emulator.shared_bytes_max.store(227 << 10, Ordering::Relaxed);
    emulator.multiprocessors.store(multiprocessors, Ordering::Relaxed);
    cuda.with_fast_prompts(true)
}

/// On one multiprocessor, where a block adds up all chunks of its rows; on nine, where some give out several; on many,
/// with a block for each chunk: within the bound, and with equal bits.
fn check(name: &str, chunk: u32, case: &Case) {
    let (sequences, mut random) = sequences(name, case);
    let mut first: Option<Found> = None;
    for multiprocessors in [1, 9, 132] {
        for (cuda, emulator) in machines(case.dtype) {
            let cuda = hopper(cuda, &emulator, multiprocessors).with_hopper_chunk(chunk);
            let step = step(&cuda, case, &sequences, &mut random);
            let (out, lse) = attend(&cuda, case, &step);
            if !emulator::on_gpu() {
                let launches = |of: &AtomicU64| of.load(Ordering::Relaxed);
                assert_eq!(launches(&emulator.hopper_launches), 1, "{name}: another kernel ran");
                let merges = launches(&emulator.merge_launches);
                match multiprocessors {
                    1 => assert_eq!(merges, 0, "{name}: a block adds up all of its chunks"),
                    132 => assert_eq!(merges, 1, "{name}: each chunk has a block"),
                    _ => {}
                }
            }
            let found = (bits(&out), bits(&lse));
            repeat(name, &cuda, case, &step, &found);
            match &first {
                Some(first) => {
                    assert!(*first == found, "{name}: other bits on {multiprocessors} multiprocessors")
                }
                None => {
                    compare(name, case, &sequences, (&out, &lse), f64::INFINITY, &mut random);
                    first = Some(found);
                }
            }
        }
    }
}

#[test]
fn two_and_three_chunks_beside_one() {
    // The last tile has 12 rows; of the first sequence, rows up to 255 see nothing of the second chunk.
    let lengths = [(60, 290), (70, 700), (20, 60), (9, 0)];
    check("chunks", 256, &Case::new((4, 2, 64), 16, &lengths));
    check("chunks of 128", 128, &Case { dtype: Dtype::F16, ..Case::new((2, 1, 128), 64, &[(70, 300)]) });
}

#[test]
fn windows_caps_and_sinks() {
    // A tile of 64 tokens and a window of 20: its first rows see only the first of its chunks, its last only the last.
    let case = Case::new((4, 2, 64), 32, &[(64, 410), (30, 600)]);
    check("a window", 128, &Case { window: Some(20), ..case.clone() });
    check("sinks", 256, &Case { sinks: true, ..case.clone() });
    check("all", 128, &Case { window: Some(150), softcap: Some(5.0), sinks: true, ..case });
    // A row that sees nothing has its sink alone.
    check("nothing to see", 128, &Case { sinks: true, ..Case::new((4, 2, 64), 16, &[(160, 150), (17, 0)]) });
}

#[test]
fn caches_of_eight_bits() {
    let tensor = KvStorage::Fp8 { key_scale: 0.01, value_scale: 0.005 };
    for (dtype, storage, dim) in [
        (Dtype::Bf16, tensor, 64),
        (Dtype::F16, tensor, 128),
        (Dtype::Bf16, KvStorage::Fp8PerHead, 128),
        (Dtype::F16, KvStorage::Int8PerHead, 64),
    ] {
        let case = Case { dtype, storage, sinks: true, ..Case::new((4, 2, dim), 16, &[(30, 300), (9, 9)]) };
        check(&format!("{dtype} {storage:?}"), 128, &case);
    }
}

#[test]
fn the_length_that_chunks_have_at_first() {
    let case = Case::new((1, 1, 64), 64, &[(17, 8192 + 200)]);
    let (sequences, mut random) = sequences("real", &case);
    let mut found = Vec::new();
    for (multiprocessors, merges) in [(1, 0), (132, 1)] {
        let Some((cuda, emulator)) = emulator::cuda(Dtype::Bf16, false) else { return };
        let cuda = hopper(cuda, &emulator, multiprocessors);
        let (out, lse) = attend(&cuda, &case, &step(&cuda, &case, &sequences, &mut random));
        compare("real", &case, &sequences, (&out, &lse), f64::INFINITY, &mut random);
        assert!(emulator::on_gpu() || emulator.merge_launches.load(Ordering::Relaxed) == merges);
        found.push((bits(&out), bits(&lse)));
    }
    assert!(found[0] == found[1]);
}

/// The bits of a sequence's last rows, among others: of its output, and of its LSE.
fn last_rows(cuda: &Cuda, case: &Case, sequences: &[Sequence], which: usize, rows: usize) -> Found {
    let (out, lse) = attend(cuda, case, &step(cuda, case, sequences, &mut Random::new(5)));
    let end: usize = sequences[..=which].iter().map(|sequence| sequence.queries).sum();
    let of = |x: &[f32], width: usize| bits(&x[(end - rows) * width..end * width]);
    (of(&out, case.heads.query * case.heads.dim), of(&lse, case.heads.query))
}

#[test]
fn the_bits_of_a_row_depend_on_nothing_beside_it() {
    let plain = Case::new((4, 2, 64), 16, &[(90, 640), (33, 700), (20, 50)]);
    for case in [Case { window: Some(200), sinks: true, ..plain.clone() }, plain] {
        let (all, _) = sequences("beside", &case);
        let width = case.heads.query * case.heads.dim;
        // Its last rows alone: others of a tile, whose window begins in another tile of positions.
        let own = Sequence { q: all[0].q[63 * width..].to_vec(), queries: 27, ..all[0].clone() };
        for (cuda, emulator) in machines(case.dtype) {
            let mut cuda = hopper(cuda, &emulator, 4).with_hopper_chunk(256);
            let expected = last_rows(&cuda, &case, &all[..1], 0, 27);
            for multiprocessors in [2, 40] {
                cuda = hopper(cuda, &emulator, multiprocessors);
                for (name, sequences, which) in [
                    ("first of three", all.clone(), 0),
                    ("last of three", vec![all[1].clone(), all[2].clone(), all[0].clone()], 2),
                    ("the last 27 of a prompt", vec![own.clone()], 0),
                    (
                        "the last 27 of a prompt, with others",
                        vec![all[2].clone(), own.clone(), all[1].clone()],
                        1,
                    ),
                ] {
                    let found = last_rows(&cuda, &case, &sequences, which, 27);
                    assert!(
                        found == expected,
                        "{name}, {multiprocessors} multiprocessors, {:?}",
                        case.window
                    );
                }
            }
        }
    }
}

#[test]
fn a_recorded_step_has_room_for_all_chunks() {
    let (heads, block_size) = (Heads { query: 2, kv: 2, dim: 64 }, 16);
    let shape = KvShape { layers: 1, blocks: 50, block_size, kv_heads: 2, head_dim: 64, dtype: Dtype::Bf16 };
    let attention = Attention { heads, scale: 0.125, window: None };
    for multiprocessors in [1, 40] {
        let Some((cuda, emulator)) = emulator::cuda(Dtype::Bf16, false) else { return };
        let cuda = hopper(cuda, &emulator, multiprocessors).with_hopper_chunk(128);
        let mut random = Random::new(7);
        let mut pool = cuda.kv_pool(shape).unwrap();
        let slots: Vec<i64> = (0..800).collect();
        let kv: Vec<f32> = (0..800 * 128).map(|_| random.float()).collect();
        append(&cuda, &mut pool, shape, &slots, &kv, &kv);
        let q: Vec<f32> = (0..40 * 128).map(|_| random.float()).collect();
        let (q, mut out) = (write(&cuda, 40, 128, &q), cuda.tensor(40, 128).unwrap());
        let tables: Vec<u32> = (0..50).chain((0..50).rev()).collect();
        let steps = [[20, 20], [800, 30], [0, 800], [800, 799], [129, 128]].map(|contexts: [u32; 2]| {
            let span =
                |i: u32| Span { query_start: 20 * i, query_len: 20, context_len: contexts[i as usize] };
            [0, 1].map(span)
        });
        let (positions, slots) = ([0; 40], [-1; 40]);
        let input = |spans| BatchInput {
            positions: &positions,
            slots: &slots,
            spans,
            block_tables: &tables,
            block_size,
        };
        let mut batch = cuda.fixed_batch(input(&steps[0])).unwrap();
        cuda.attention(&pool, 0, &batch, &q, attention, &mut out).unwrap();
        let graph = cuda.capture(|cuda| cuda.attention(&pool, 0, &batch, &q, attention, &mut out)).unwrap();
        for step in &steps {
            batch.refill(input(step)).unwrap();
            graph.replay().unwrap();
            let replayed = bits(&cuda.read(&out).unwrap());
            let fresh = cuda.batch(input(step)).unwrap();
            cuda.attention(&pool, 0, &fresh, &q, attention, &mut out).unwrap();
            assert!(
                replayed == bits(&cuda.read(&out).unwrap()),
                "{step:?}, {multiprocessors} multiprocessors"
            );
        }
    }
}

//! The paged memory below attention, on both machines: large pools (case 14 of `attention.rs`), blocks and slots
//! that are copied, swapped and appended to, and recorded steps over them (case 20).

use std::sync::atomic::Ordering;

use half::bf16;
use quayline_gpu_kernels::cuda::{KvPool, Tensor};
use quayline_gpu_kernels::{
    Attention, BatchInput, Cuda, Dtype, Error, Heads, KvOrder, KvShape, KvStorage, Ops, Span,
};

use crate::attending::{Case, append, attend, row, step, write};
use crate::cases::{ORDERS, machines};
use crate::common::{self, Random, bits, cpus};
use crate::emulator;

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

#[test]
fn blocks_come_back_from_the_host_whatever_goes_with_them() {
    for storage in [KvStorage::Same, KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
        cpus().for_each(|cpu| blocks_come_back(&cpu, storage));
        for (cuda, emulator) in machines(Dtype::Bf16) {
            let launches = || emulator.early_launches.load(Ordering::Relaxed);
            let before = launches();
            blocks_come_back(&cuda, storage);
            // Six calls with blocks to copy; scales are a part of their own.
            let parts = if storage == KvStorage::Same { 1 } else { 2 };
            assert!(emulator::on_gpu() || launches() - before == 6 * parts, "{storage:?}");
        }
    }
}

fn blocks_come_back<O: Ops>(ops: &O, storage: KvStorage) {
    let mut random = Random::new(24);
    let shape =
        KvShape { layers: 3, blocks: 7, block_size: 6, kv_heads: 2, head_dim: 24, dtype: Dtype::Bf16 };
    let mut pool = ops.kv_pool_stored(shape, storage).unwrap();
    let bytes = ops.kv_block_bytes_stored(shape, storage).unwrap();
    let mut any = || -> Vec<u8> { (0..bytes).map(|_| random.next() as u8).collect() };
    let (contents, other): (Vec<_>, Vec<_>) = (0..7).map(|_| (any(), any())).unzip();
    let load = |pool: &mut O::KvPool, blocks: &[u32], from: &[Vec<u8>]| {
        let list: Vec<_> = blocks.iter().map(|&block| (block, &from[block as usize][..])).collect();
        ops.load_blocks(pool, &list)
    };
    let save = |pool: &O::KvPool, blocks: &[u32]| {
        let mut found = vec![vec![0; bytes]; blocks.len()];
        let mut list: Vec<_> = blocks.iter().copied().zip(found.iter_mut().map(|b| &mut b[..])).collect();
        ops.save_blocks(pool, &mut list).map(|()| found)
    };
    load(&mut pool, &[3, 0, 6, 1, 5, 2, 4], &contents).unwrap();
    assert!(save(&pool, &[0, 1, 2, 3, 4, 5, 6]).unwrap() == contents, "{storage:?}");
    // Some of them, in another order, and one twice: reading is not refused.
    let some = save(&pool, &[5, 2, 5]).unwrap();
    assert!([&some[0], &some[1], &some[2]] == [&contents[5], &contents[2], &contents[5]], "{storage:?}");
    load(&mut pool, &[6, 2], &other).unwrap();
    let mut one = vec![0; bytes];
    ops.save_block(&pool, 2, &mut one).unwrap();
    assert!(one == other[2], "{storage:?}");
    // Nothing is nothing to do, and what is refused has written nothing.
    load(&mut pool, &[], &other).unwrap();
    assert!(save(&pool, &[]).unwrap().is_empty());
    assert!(load(&mut pool, &[0, 1, 0], &other).is_err());
    assert!(ops.load_blocks(&mut pool, &[(0, &other[0]), (7, &other[1])]).is_err());
    assert!(ops.load_blocks(&mut pool, &[(0, &other[0]), (1, &other[1][1..])]).is_err());
    let mut kept = contents.clone();
    (kept[2], kept[6]) = (other[2].clone(), other[6].clone());
    assert!(save(&pool, &[0, 1, 2, 3, 4, 5, 6]).unwrap() == kept, "{storage:?}");
}

#[test]
fn more_blocks_than_go_over_at_once() {
    for (cuda, emulator) in machines(Dtype::Bf16) {
        // 4 MiB each, and 16 MiB go at once.
        let shape = KvShape {
            layers: 2,
            blocks: 5,
            block_size: 256,
            kv_heads: 16,
            head_dim: 128,
            dtype: Dtype::Bf16,
        };
        let bytes = cuda.kv_block_bytes(shape).unwrap();
        assert_eq!(bytes, 4 << 20);
        let mut pool = cuda.kv_pool(shape).unwrap();
        let contents: Vec<Vec<u8>> =
            (0..5_u8).map(|block| (0..bytes).map(|i| (i / 5) as u8 ^ block).collect()).collect();
        let list: Vec<_> = (0..5).rev().map(|block| (block as u32, &contents[block][..])).collect();
        cuda.load_blocks(&mut pool, &list).unwrap();
        let mut found = vec![vec![0; bytes]; 5];
        let mut list: Vec<_> = (0..).zip(found.iter_mut().map(|bytes| &mut bytes[..])).collect();
        cuda.save_blocks(&pool, &mut list).unwrap();
        assert!(found == contents);
        assert!(emulator::on_gpu() || emulator.early_launches.load(Ordering::Relaxed) == 4);
    }
}

#[test]
fn a_block_lies_in_the_order_asked_for() {
    cpus().for_each(|cpu| block_lies_in_order(&cpu, true));
    machines(Dtype::Bf16).iter().for_each(|(cuda, _)| block_lies_in_order(cuda, false));
}

/// V, and K where it is not `in_panels`, are what the order says, and heads are padded to 16 elements.
fn block_lies_in_order<O: Ops>(ops: &O, in_panels: bool) {
    let (heads, tokens, dim, wide) = (3, 32, 8, 16);
    let shape = KvShape {
        layers: 1,
        blocks: 2,
        block_size: tokens,
        kv_heads: heads,
        head_dim: dim,
        dtype: Dtype::Bf16,
    };
    let number = |token: usize, head: usize, i: usize| ((token * heads + head) * dim + i) as f32 / 8.0;
    let x: Vec<f32> = (0..tokens * heads * dim)
        .map(|at| bf16::from_f32(number(at / dim / heads, at / dim % heads, at % dim)).to_f32())
        .collect();
    let minus: Vec<f32> = x.iter().map(|x| -x).collect();
    let slots: Vec<i64> = (tokens as i64..2 * tokens as i64).collect();
    for order in ORDERS {
        let mut pool = ops.kv_pool_ordered(shape, KvStorage::Same, order).unwrap();
        append(ops, &mut pool, shape, &slots, &minus, &x);
        let mut bytes = vec![0; ops.kv_block_bytes(shape).unwrap()];
        assert_eq!(bytes.len(), 2 * heads * tokens * wide * 2);
        ops.save_block(&pool, 1, &mut bytes).unwrap();
        let all: Vec<f32> =
            bytes.as_chunks::<2>().0.iter().map(|&two| bf16::from_le_bytes(two).to_f32()).collect();
        let (k, v) = all.split_at(all.len() / 2);
        for (token, head) in (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head))) {
            let at = match order {
                KvOrder::Hnd => head * tokens + token,
                KvOrder::Nhd => token * heads + head,
            };
            let [k, v] = [k, v].map(|page| &page[at * wide..][..dim]);
            let from = (token * heads + head) * dim;
            assert_eq!(*v, x[from..from + dim], "{order:?}: V of token {token}, head {head}");
            if !in_panels {
                assert_eq!(*k, minus[from..from + dim], "{order:?}: K of token {token}, head {head}");
            }
        }
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
    let storages = [KvStorage::Same, KvStorage::Fp8PerHead, KvStorage::Int8PerHead];
    for (storage, order) in storages.into_iter().flat_map(|storage| ORDERS.map(|order| (storage, order))) {
        let mut pool = ops.kv_pool_ordered(shape, storage, order).unwrap();
        append(ops, &mut pool, shape, &slots, &x(&|slot| slot), &x(&|slot| count + slot));
        // A branch of a tree goes to where the sequence goes on; another sequence has its own.
        let lists: [&[(u64, u64)]; 3] = [&[(6, 5), (8, 6), (9, 8)], &[], &[(14, 0)]];
        ops.copy_slots(&mut pool, &lists).unwrap();
        let moved = [14, 1, 2, 3, 4, 6, 8, 7, 9, 9];
        let now = |slot: usize| moved.get(slot).copied().unwrap_or(slot);
        let mut expected = ops.kv_pool_ordered(shape, storage, order).unwrap();
        append(ops, &mut expected, shape, &slots, &x(&now), &x(&|slot| count + now(slot)));
        let mut bytes = [(); 2].map(|()| vec![0; ops.kv_block_bytes_stored(shape, storage).unwrap()]);
        for block in 0..3 {
            ops.save_block(&pool, block, &mut bytes[0]).unwrap();
            ops.save_block(&expected, block, &mut bytes[1]).unwrap();
            assert!(
                bytes[0] == bytes[1],
                "{dtype} {storage:?} {order:?}, block {block} of {block_size} tokens"
            );
        }
        let beyond = ops.copy_slots(&mut pool, &[&[(count as u64, 0)]]);
        assert!(matches!(beyond, Err(Error::TooLarge { dimension: "slot", found, .. }) if found == count));
        assert!(ops.copy_slots(&mut pool, &[&[(1, 2)], &[(2, 3)]]).is_err(), "a slot of two lists");
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

//! Attention on the emulator: twenty cases that have broken kernels elsewhere, at sizes that an emulator takes,
//! against softmax in f64.
//!
//! The bound is FlashAttention-3's: at most twice the error of a plain evaluation that rounds scores, weights and
//! results to the stored type. Pages are shuffled, unused slots and the output start as what is no number, and every
//! step runs in both orders of fibres and blocks, with equal bits.
#![cfg(unix)]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "a test: small numbers, a panic is the report, and the emulator is a library of C++"
)]

mod common;
#[path = "common/emulator.rs"]
mod emulator;

use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};

use common::{Random, bits};
use emulator::Emulator;
use half::{bf16, f16};
use quayline_gpu_kernels::cuda::{Floats, KvPool, KvStorage, Scores, Tensor};
use quayline_gpu_kernels::{Attention, BatchInput, Cuda, Dtype, Error, Heads, KvShape, Ops, Span};

/// One sequence: queries, keys and values as stored, and how many of its last tokens this step computes.
#[derive(Clone)]
struct Sequence {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    context: usize,
    queries: usize,
}

#[derive(Clone, Debug)]
struct Case {
    heads: Heads,
    dtype: Dtype,
    block_size: usize,
    /// Queries and context of each sequence.
    lengths: Vec<(usize, usize)>,
    window: Option<u32>,
    softcap: Option<f32>,
    slopes: bool,
    sinks: bool,
    tree: bool,
    storage: KvStorage,
}

impl Case {
    fn new(heads: (usize, usize, usize), block_size: usize, lengths: &[(usize, usize)]) -> Self {
        Self {
            heads: Heads { query: heads.0, kv: heads.1, dim: heads.2 },
            dtype: Dtype::Bf16,
            block_size,
            lengths: lengths.to_vec(),
            window: None,
            softcap: None,
            slopes: false,
            sinks: false,
            tree: false,
            storage: KvStorage::Same,
        }
    }

    fn decode(heads: (usize, usize, usize), block_size: usize, contexts: &[usize]) -> Self {
        let lengths: Vec<_> = contexts.iter().map(|&context| (1, context)).collect();
        Self::new(heads, block_size, &lengths)
    }

    fn attention(&self) -> Attention {
        Attention { heads: self.heads, scale: 1.0 / (self.heads.dim as f32).sqrt(), window: self.window }
    }

    fn stored(&self, x: f32) -> f32 {
        if self.dtype == Dtype::F16 { f16::from_f32(x).to_f32() } else { bf16::from_f32(x).to_f32() }
    }

    fn slope(&self, head: usize) -> f32 {
        if self.slopes { 0.5_f32.powi(head as i32 % 8 + 1) } else { 0.0 }
    }

    fn sink(head: usize) -> f32 {
        head as f32 * 0.25 - 1.0
    }

    /// Token `query` of a span sees token `key` of it: its ancestors in a binary tree of drafts.
    fn tree_sees(query: usize, key: usize) -> bool {
        let mut at = query + 1;
        while at > key + 1 {
            at /= 2;
        }
        at == key + 1
    }

    fn sees(&self, sequence: &Sequence, query: usize, key: usize) -> bool {
        let position = (sequence.context + query) as i64 - sequence.queries as i64;
        let own = sequence.context.saturating_sub(sequence.queries);
        let inside = self.window.is_none_or(|window| key as i64 > position - i64::from(window));
        let before =
            if self.tree { key < own || Self::tree_sees(query, key - own) } else { key as i64 <= position };
        inside && before
    }

    fn sequence(&self, random: &mut Random, (queries, context): (usize, usize)) -> Sequence {
        let mut floats = |n: usize, size: f32| {
            let x: Vec<f32> = (0..n).map(|_| self.stored(random.float() * size)).collect();
            x
        };
        let Heads { query, kv, dim } = self.heads;
        let mut sequence = Sequence {
            q: floats(queries * query * dim, 3.0),
            k: floats(context * kv * dim, 2.0),
            v: floats(context * kv * dim, 1.0),
            context,
            queries,
        };
        // Blocks before all windows may have been given to somebody else.
        let unseen = self.window.map_or(0, |window| (context + 1).saturating_sub(queries + window as usize));
        sequence.k[..unseen * kv * dim].fill(f32::NAN);
        sequence.v[..unseen * kv * dim].fill(f32::NAN);
        sequence
    }
}

/// The exact result of one query and head, its LSE, and what a plain evaluation in the stored type gives.
struct Row {
    exact: Vec<f64>,
    lse: f64,
    plain: Vec<f64>,
}

fn row(case: &Case, sequence: &Sequence, query: usize, head: usize) -> Row {
    let Heads { query: heads, kv, dim } = case.heads;
    let kv_head = head / (heads / kv);
    let q = &sequence.q[(query * heads + head) * dim..][..dim];
    let position = (sequence.context + query) as f64 - sequence.queries as f64;
    let shape = |score: f64, key: usize| {
        let score = score * f64::from(case.attention().scale);
        let cap = case.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
        cap + f64::from(case.slope(head)) * (key as f64 - position)
    };
    let seen: Vec<usize> = (0..sequence.context).filter(|&key| case.sees(sequence, query, key)).collect();
    let at = |key: usize| (key * kv + kv_head) * dim;
    // FP8: what is stored is what was appended, to within rounding; both sides start from what is stored.
    let keys: Vec<f64> = seen
        .iter()
        .map(|&key| {
            let k = &sequence.k[at(key)..][..dim];
            q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
        })
        .collect();
    let sink = case.sinks.then(|| f64::from(Case::sink(head)));
    let weigh = |scores: &[f64]| {
        let most = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let total: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - most).exp());
        (weights.iter().map(|w| w / total).collect::<Vec<_>>(), most + total.ln())
    };
    let average = |weights: &[f64]| -> Vec<f64> {
        let of = |i: usize| {
            weights.iter().zip(&seen).map(|(w, &key)| w * f64::from(sequence.v[at(key) + i])).sum::<f64>()
        };
        (0..dim).map(of).collect()
    };
    let rounded = |x: f64| f64::from(case.stored(x as f32));
    let scores: Vec<f64> = keys.iter().zip(&seen).map(|(&s, &key)| shape(s, key)).collect();
    let plain: Vec<f64> = keys.iter().zip(&seen).map(|(&s, &key)| rounded(shape(rounded(s), key))).collect();
    let (weights, lse) = weigh(&scores);
    let plain_weights: Vec<f64> = weigh(&plain).0.iter().map(|&w| rounded(w)).collect();
    let lse = if seen.is_empty() && sink.is_none() { f64::NEG_INFINITY } else { lse };
    let plain = average(&plain_weights).iter().map(|&x| rounded(x)).collect();
    Row { exact: average(&weights), lse, plain }
}

/// A pool with the sequences' keys and values on shuffled pages, and the step's batch over it.
struct Step {
    pool: KvPool,
    batch: <Cuda as Ops>::Batch,
    q: Tensor,
}

const LAYER: usize = 1;

fn write(cuda: &Cuda, rows: usize, cols: usize, elements: &[f32]) -> Tensor {
    let mut x = cuda.tensor(rows, cols).unwrap();
    cuda.write(&mut x, elements).unwrap();
    x
}

/// Appends rows to slots of the last layer; the others stay as they are.
fn append(cuda: &Cuda, pool: &mut KvPool, block_size: usize, slots: &[i64], k: &[f32], v: &[f32]) {
    let width = pool.shape().kv_heads * pool.shape().head_dim;
    let positions = vec![0; slots.len()];
    let batch = BatchInput { positions: &positions, slots, spans: &[], block_tables: &[], block_size };
    let batch = cuda.batch(batch).unwrap();
    let (k, v) = (write(cuda, slots.len(), width, k), write(cuda, slots.len(), width, v));
    cuda.append(pool, pool.shape().layers - 1, &batch, &k, &v).unwrap();
}

/// Fills all slots of the last layer with what is no number: one block by appending, the others by copies of its bytes.
fn poison(cuda: &Cuda, pool: &mut KvPool, storage: KvStorage) {
    let KvShape { blocks, block_size, kv_heads, head_dim, .. } = pool.shape();
    let slots: Vec<i64> = (0..block_size as i64).collect();
    let nothing = vec![f32::NAN; block_size * kv_heads * head_dim];
    append(cuda, pool, block_size, &slots, &nothing, &nothing);
    let mut bytes = vec![0; cuda.kv_block_bytes_stored(pool.shape(), storage).unwrap()];
    cuda.save_block(pool, 0, &mut bytes).unwrap();
    (1..blocks as u32).for_each(|block| cuda.load_block(pool, block, &bytes).unwrap());
}

fn step(cuda: &Cuda, case: &Case, sequences: &[Sequence], random: &mut Random) -> Step {
    let Heads { query, kv, dim } = case.heads;
    let block_size = case.block_size;
    let of = |sequence: &Sequence| sequence.context.div_ceil(block_size);
    let blocks = 2 + sequences.iter().map(of).sum::<usize>();
    let shape = KvShape { layers: 2, blocks, block_size, kv_heads: kv, head_dim: dim, dtype: case.dtype };
    let mut pool = cuda.kv_pool_stored(shape, case.storage).unwrap();
    poison(cuda, &mut pool, case.storage);

    let mut free: Vec<u32> = (0..blocks as u32).collect();
    random.shuffle(&mut free);
    let blocks_max = sequences.iter().map(of).max().unwrap_or(0) + random.below(2);
    let mut tables = vec![u32::MAX; sequences.len() * blocks_max];
    let (mut spans, mut slots) = (Vec::new(), Vec::new());
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (index, sequence) in sequences.iter().enumerate() {
        let table = &mut tables[index * blocks_max..][..of(sequence)];
        table.fill_with(|| free.pop().unwrap());
        for token in 0..sequence.context {
            slots
                .push(i64::from(table[token / block_size]) * block_size as i64 + (token % block_size) as i64);
        }
        k.extend_from_slice(&sequence.k);
        v.extend_from_slice(&sequence.v);
        spans.push(Span {
            query_start: (q.len() / (query * dim)) as u32,
            query_len: sequence.queries as u32,
            context_len: sequence.context as u32,
        });
        q.extend_from_slice(&sequence.q);
    }
    append(cuda, &mut pool, block_size, &slots, &k, &v);
    let rows = q.len() / (query * dim);
    let batch = BatchInput {
        positions: &vec![0; rows],
        slots: &vec![-1; rows],
        spans: &spans,
        block_tables: &tables,
        block_size,
    };
    Step { pool, batch: cuda.batch(batch).unwrap(), q: write(cuda, rows, query * dim, &q) }
}

/// Output and LSE of all rows.
fn attend(cuda: &Cuda, case: &Case, step: &Step) -> (Vec<f32>, Vec<f32>) {
    let Heads { query, dim, .. } = case.heads;
    let rows = step.q.rows();
    let mut out = write(cuda, rows, query * dim, &vec![f32::NAN; rows * query * dim]);
    let mut lse = cuda.floats(&vec![f32::NAN; rows * query]).unwrap();
    let per_head = |of: &dyn Fn(usize) -> f32| -> Floats {
        cuda.floats(&(0..query).map(of).collect::<Vec<_>>()).unwrap()
    };
    let slopes = case.slopes.then(|| per_head(&|head| case.slope(head)));
    let sinks = case.sinks.then(|| per_head(&Case::sink));
    let words = case.lengths.iter().map(|&(queries, _)| queries.div_ceil(32)).max().unwrap_or(1).max(1);
    let mut mask = Vec::new();
    for &(queries, _) in &case.lengths {
        for query in 0..queries {
            let mut row = vec![0_u32; words];
            for key in (0..queries).filter(|&key| Case::tree_sees(query, key)) {
                row[key / 32] |= 1 << (key % 32);
            }
            mask.extend(row);
        }
    }
    let mask = case.tree.then(|| cuda.tree_mask(&mask, words).unwrap());
    let scores = Scores {
        causal: true,
        softcap: case.softcap,
        slopes: slopes.as_ref(),
        sinks: sinks.as_ref(),
        mask: mask.as_ref(),
    };
    let Step { pool, batch, q } = step;
    cuda.attend(pool, LAYER, batch, q, case.attention(), scores, &mut out, Some(&mut lse)).unwrap();
    (cuda.read(&out).unwrap().into_owned(), cuda.read_floats(&lse).unwrap())
}

/// The emulator in both orders; none where there is no compiler.
fn machines(dtype: Dtype) -> Vec<(Cuda, Arc<Emulator>)> {
    [false, true].into_iter().filter_map(|descending| emulator::cuda(dtype, descending)).collect()
}

/// On a GPU, the same again, which must give the same bits.
fn repeat(name: &str, cuda: &Cuda, case: &Case, step: &Step, found: &(Vec<u32>, Vec<u32>)) {
    for repeat in 0..emulator::repeats() {
        let again = attend(cuda, case, step);
        assert!((bits(&again.0), bits(&again.1)) == *found, "{name}: other bits in repeat {repeat}");
    }
}

/// Runs a case and holds it to the bound.
fn check(name: &str, case: &Case) {
    let mut random = Random::new(name.bytes().map(u64::from).sum());
    let mut sequences: Vec<Sequence> =
        case.lengths.iter().map(|&lengths| case.sequence(&mut random, lengths)).collect();
    if case.storage != KvStorage::Same {
        sequences.iter_mut().for_each(|sequence| quantise(case, sequence));
    }
    let mut first: Option<(Vec<u32>, Vec<u32>)> = None;
    for (cuda, emulator) in machines(case.dtype) {
        let step = step(&cuda, case, &sequences, &mut random);
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
                compare(name, case, &sequences, &out, &lse, &mut random);
                first = Some(found);
            }
        }
    }
}

/// What the pool keeps of keys and values: E4M3 with the scale of the case, or whole numbers.
fn quantise(case: &Case, sequence: &mut Sequence) {
    let dim = case.heads.dim;
    for (which, x) in [&mut sequence.k, &mut sequence.v].into_iter().enumerate() {
        for head in x.chunks_mut(dim) {
            let largest = head.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let scale = match case.storage {
                KvStorage::Fp8 { key_scale, value_scale } => [key_scale, value_scale][which],
                KvStorage::Int8PerHead => {
                    let scale = largest / 127.0;
                    head.iter_mut().for_each(|x| *x = (*x / scale).round_ties_even() * scale);
                    continue;
                }
                _ => largest / 448.0,
            };
            head.iter_mut().for_each(|x| *x = e4m3(*x / scale) * scale);
        }
    }
}

/// The nearest E4M3 of all, in ascending order; ties go to the even one.
fn e4m3(x: f32) -> f32 {
    static ALL: LazyLock<Vec<f32>> = LazyLock::new(|| {
        let of = |bits: u8| match (i32::from(bits >> 3), f32::from(bits & 7)) {
            (0, fraction) => fraction / 8.0 * 2.0_f32.powi(-6),
            (exponent, fraction) => (1.0 + fraction / 8.0) * 2.0_f32.powi(exponent - 7),
        };
        (0..0x7f).map(of).collect()
    });
    let size = x.abs();
    let above = ALL.partition_point(|&y| y < size).min(ALL.len() - 1);
    let apart = |bits: usize| (ALL[bits] - size).abs();
    let nearest = (above.saturating_sub(1)..=above)
        .min_by(|&a, &b| apart(a).total_cmp(&apart(b)).then((a & 1).cmp(&(b & 1))))
        .unwrap();
    ALL[nearest].copysign(x)
}

fn compare(name: &str, case: &Case, sequences: &[Sequence], out: &[f32], lse: &[f32], random: &mut Random) {
    let Heads { query: heads, dim, .. } = case.heads;
    let (mut worst, mut plain_worst, mut start) = (0.0_f64, 0.0_f64, 0);
    for (index, sequence) in sequences.iter().enumerate() {
        // The edges of each sequence, and some rows in between.
        let samples = if sequence.queries == 0 { 0 } else { 6 };
        for sample in 0..samples {
            let query = [0, sequence.queries - 1, random.below(sequence.queries)][sample % 3];
            let head = [0, heads - 1, random.below(heads)][random.below(3)];
            let Row { exact, lse: exact_lse, plain } = row(case, sequence, query, head);
            let found = &out[((start + query) * heads + head) * dim..][..dim];
            let what =
                || format!("{name}: sequence {index} {:?}, query {query}, head {head}", case.lengths[index]);
            for i in 0..dim {
                assert!(found[i].is_finite(), "{}: element {i} is {}", what(), found[i]);
                worst = worst.max((f64::from(found[i]) - exact[i]).abs());
                plain_worst = plain_worst.max((plain[i] - exact[i]).abs());
                assert!(
                    exact_lse > f64::NEG_INFINITY || found[i] == 0.0,
                    "{}: nothing seen gives zeros",
                    what()
                );
            }
            let found = f64::from(lse[(start + query) * heads + head]);
            let close = found == exact_lse || (found - exact_lse).abs() < 1e-3;
            assert!(close, "{}: LSE {found}, exact {exact_lse}", what());
        }
        start += sequence.queries;
    }
    assert!(
        worst <= 2.0 * plain_worst + 1e-6,
        "{name}: off by {worst:e}, a plain evaluation by {plain_worst:e}"
    );
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

#[test]
fn case_18_a_shared_prefix_in_levels() {
    let case = Case::new((8, 2, 128), 16, &[(1, 317), (17, 337)]);
    let mut random = Random::new(18);
    for (cuda, _) in machines(case.dtype) {
        let (heads, width) = (case.heads.query, case.heads.query * case.heads.dim);
        let sequences: Vec<_> = case.lengths.iter().map(|&n| case.sequence(&mut random, n)).collect();
        let (flat, flat_lse) = attend(&cuda, &case, &step(&cuda, &case, &sequences, &mut random));
        for cuts in [vec![0, 256], vec![0, 64, 256]] {
            let mut whole: Option<(Tensor, Floats)> = None;
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
                let step = step(&cuda, &case, &parts, &mut random);
                let rows = step.q.rows();
                let mut out = cuda.tensor(rows, width).unwrap();
                let mut lse = cuda.floats(&vec![f32::NAN; rows * heads]).unwrap();
                let scores = Scores { causal: last, ..Scores::default() };
                let attention = case.attention();
                cuda.attend(
                    &step.pool,
                    LAYER,
                    &step.batch,
                    &step.q,
                    attention,
                    scores,
                    &mut out,
                    Some(&mut lse),
                )
                .unwrap();
                match &mut whole {
                    Some((a, lse_a)) => cuda.merge_states((a, lse_a), (&out, &lse), heads).unwrap(),
                    None => whole = Some((out, lse)),
                }
            }
            let (out, lse) = whole.unwrap();
            for (found, flat) in cuda.read(&out).unwrap().iter().zip(&flat) {
                assert!((found - flat).abs() <= 0.01, "{cuts:?}: {found}, flat {flat}");
            }
            for (found, flat) in cuda.read_floats(&lse).unwrap().iter().zip(&flat_lse) {
                assert!((found - flat).abs() <= 1e-3, "{cuts:?}: LSE {found}, flat {flat}");
            }
        }
    }
}

#[test]
fn merging_nothing_changes_nothing() {
    for (cuda, _) in machines(Dtype::Bf16) {
        let none = f32::NEG_INFINITY;
        let mut a = write(&cuda, 3, 4, &[1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let b = write(&cuda, 3, 4, &[0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0]);
        let (mut lse_a, lse_b) =
            (cuda.floats(&[0.5, none, none]).unwrap(), cuda.floats(&[none, 2.0, none]).unwrap());
        cuda.merge_states((&mut a, &mut lse_a), (&b, &lse_b), 1).unwrap();
        assert_eq!(*cuda.read(&a).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(cuda.read_floats(&lse_a).unwrap(), [0.5, 2.0, none]);
    }
}

#[test]
fn case_19_bits_do_not_depend_on_company_chunks_pages_or_splits() {
    // The other cases compare the two orders of threads; these alternate.
    let cases = [((8, 2, 64), None), ((7, 1, 128), None), ((4, 2, 256), Some(100))];
    for (seed, (heads, window)) in cases.into_iter().enumerate() {
        let mut random = Random::new(190 + seed as u64);
        let tokens = 330;
        let case = Case { window, ..Case::new(heads, 16, &[(tokens, tokens)]) };
        let whole = case.sequence(&mut random, (tokens, tokens));
        let width = case.heads.query * case.heads.dim;
        if let Some((cuda, _)) = emulator::cuda(case.dtype, seed % 2 == 1) {
            let reference =
                attend(&cuda, &case, &step(&cuda, &case, std::slice::from_ref(&whole), &mut random)).0;
            // The last queries of a part of the sequence, alone and between strangers, on other pages.
            for (queries, context, block_size) in [(1, 330, 16), (1, 257, 8), (3, 256, 32), (70, 300, 5)] {
                let kv = case.heads.kv * case.heads.dim;
                let part = Sequence {
                    q: whole.q[(context - queries) * width..context * width].to_vec(),
                    k: whole.k[..context * kv].to_vec(),
                    v: whole.v[..context * kv].to_vec(),
                    context,
                    queries,
                };
                for company in [0, 3] {
                    let lengths: Vec<_> = (0..company).map(|i| (1 + 40 * (i % 2), 90 + 170 * i)).collect();
                    let mut sequences: Vec<_> =
                        lengths.iter().map(|&n| case.sequence(&mut random, n)).collect();
                    let start: usize = lengths.iter().map(|n| n.0).sum();
                    sequences.push(part.clone());
                    let case = Case { block_size, ..case.clone() };
                    let out = attend(&cuda, &case, &step(&cuda, &case, &sequences, &mut random)).0;
                    let expected = &reference[(context - queries) * width..context * width];
                    let found = &out[start * width..(start + queries) * width];
                    assert!(
                        bits(found) == bits(expected),
                        "{heads:?}: {queries} of {context} with {company} others"
                    );
                }
            }
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
        append(&cuda, &mut step.pool, 16, &[-1; 4], &vec![9.0; 4 * width], &vec![9.0; 4 * width]);
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
        append(&cuda, &mut step.pool, 4, &slots, &both, &both);
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
        append(&cuda, &mut pool, block_size, &slots, &sequence.k, &sequence.v);
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
        append(&cuda, &mut pool, block_size, &all, &old, &old);
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
    let mut first: Option<(Vec<u32>, Vec<u32>)> = None;
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
                compare(name, case, &sequences, &out, &lse, &mut random);
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
    for storage in [KvStorage::Same, KvStorage::Fp8PerHead, KvStorage::Int8PerHead] {
        for (cuda, _) in machines(Dtype::Bf16) {
            let shape = KvShape {
                layers: 3,
                blocks: 3,
                block_size: 5,
                kv_heads: 2,
                head_dim: 24,
                dtype: Dtype::Bf16,
            };
            let mut pool = cuda.kv_pool_stored(shape, storage).unwrap();
            let slots: Vec<i64> = (0..15).collect();
            let x = |from: &dyn Fn(usize) -> usize| -> Vec<f32> {
                (0..15 * 48).map(|i| (from(i / 48) * 48 + i % 48) as f32).collect()
            };
            append(&cuda, &mut pool, 5, &slots, &x(&|slot| slot), &x(&|slot| 15 + slot));
            // A branch of a tree goes to where the sequence goes on; another sequence has its own.
            let lists: [&[(u64, u64)]; 3] = [&[(6, 5), (8, 6), (9, 8)], &[], &[(14, 0)]];
            cuda.copy_slots(&mut pool, &lists).unwrap();
            let now = |slot| [14, 1, 2, 3, 4, 6, 8, 7, 9, 9, 10, 11, 12, 13, 14][slot];
            let mut expected = cuda.kv_pool_stored(shape, storage).unwrap();
            append(&cuda, &mut expected, 5, &slots, &x(&now), &x(&|slot| 15 + now(slot)));
            let mut bytes = [(); 2].map(|()| vec![0; cuda.kv_block_bytes_stored(shape, storage).unwrap()]);
            for block in 0..3 {
                cuda.save_block(&pool, block, &mut bytes[0]).unwrap();
                cuda.save_block(&expected, block, &mut bytes[1]).unwrap();
                assert!(bytes[0] == bytes[1], "{storage:?}, block {block}");
            }
            assert!(matches!(
                cuda.copy_slots(&mut pool, &[&[(15, 0)]]),
                Err(Error::TooLarge { dimension: "slot", found: 15, .. })
            ));
            assert!(cuda.copy_slots(&mut pool, &[&[(1, 2)], &[(2, 3)]]).is_err(), "a slot of two lists");
        }
    }
}

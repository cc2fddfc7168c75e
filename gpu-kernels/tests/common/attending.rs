//! Attention as any implementation of the operators computes it, and softmax in f64 to hold it against.
//!
//! The bound is FlashAttention-3's (arXiv 2407.08608): at most twice the error of a plain evaluation that rounds
//! scores, weights and results to the stored type. Pages are shuffled, unused slots and the output start as what is no
//! number.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::LazyLock;

use half::{bf16, f16};
use quayline_gpu_kernels::{
    Attention, BatchInput, Dtype, Heads, KvOrder, KvShape, KvStorage, Ops, Scores, Span,
};

use crate::common::Random;

/// One sequence: queries, keys and values as stored, and how many of its last tokens this step computes.
#[derive(Clone)]
pub(crate) struct Sequence {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) context: usize,
    pub(crate) queries: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) heads: Heads,
    pub(crate) dtype: Dtype,
    pub(crate) block_size: usize,
    /// Queries and context of each sequence.
    pub(crate) lengths: Vec<(usize, usize)>,
    pub(crate) window: Option<u32>,
    pub(crate) softcap: Option<f32>,
    pub(crate) slopes: bool,
    pub(crate) sinks: bool,
    pub(crate) tree: bool,
    pub(crate) storage: KvStorage,
    pub(crate) order: KvOrder,
}

impl Case {
    pub(crate) fn new(heads: (usize, usize, usize), block_size: usize, lengths: &[(usize, usize)]) -> Self {
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
            order: KvOrder::Hnd,
        }
    }

    pub(crate) fn decode(heads: (usize, usize, usize), block_size: usize, contexts: &[usize]) -> Self {
        let lengths: Vec<_> = contexts.iter().map(|&context| (1, context)).collect();
        Self::new(heads, block_size, &lengths)
    }

    pub(crate) fn attention(&self) -> Attention {
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

    pub(crate) fn sequence(&self, random: &mut Random, (queries, context): (usize, usize)) -> Sequence {
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
pub(crate) struct Row {
    pub(crate) exact: Vec<f64>,
    lse: f64,
    plain: Vec<f64>,
}

pub(crate) fn row(case: &Case, sequence: &Sequence, query: usize, head: usize) -> Row {
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
pub(crate) struct Step<O: Ops> {
    pub(crate) shape: KvShape,
    pub(crate) pool: O::KvPool,
    pub(crate) batch: O::Batch,
    pub(crate) q: O::Tensor,
    /// Tokens of the step.
    pub(crate) rows: usize,
}

pub(crate) const LAYER: usize = 1;

pub(crate) fn write<O: Ops>(ops: &O, rows: usize, cols: usize, elements: &[f32]) -> O::Tensor {
    let mut x = ops.tensor(rows, cols).unwrap();
    ops.write(&mut x, elements).unwrap();
    x
}

/// Appends rows to slots of the last layer; the others stay as they are.
pub(crate) fn append<O: Ops>(
    ops: &O,
    pool: &mut O::KvPool,
    shape: KvShape,
    slots: &[i64],
    k: &[f32],
    v: &[f32],
) {
    let (width, block_size) = (shape.kv_heads * shape.head_dim, shape.block_size);
    let positions = vec![0; slots.len()];
    let batch = BatchInput { positions: &positions, slots, spans: &[], block_tables: &[], block_size };
    let batch = ops.batch(batch).unwrap();
    let (k, v) = (write(ops, slots.len(), width, k), write(ops, slots.len(), width, v));
    ops.append(pool, shape.layers - 1, &batch, &k, &v).unwrap();
}

/// Fills all slots of the last layer with what is no number: one block by appending, the others by copies of its bytes.
fn poison<O: Ops>(ops: &O, pool: &mut O::KvPool, shape: KvShape, storage: KvStorage) {
    let KvShape { blocks, block_size, kv_heads, head_dim, .. } = shape;
    let slots: Vec<i64> = (0..block_size as i64).collect();
    let nothing = vec![f32::NAN; block_size * kv_heads * head_dim];
    append(ops, pool, shape, &slots, &nothing, &nothing);
    let mut bytes = vec![0; ops.kv_block_bytes_stored(shape, storage).unwrap()];
    ops.save_block(pool, 0, &mut bytes).unwrap();
    (1..blocks as u32).for_each(|block| ops.load_block(pool, block, &bytes).unwrap());
}

pub(crate) fn step<O: Ops>(ops: &O, case: &Case, sequences: &[Sequence], random: &mut Random) -> Step<O> {
    step_in(ops, case, sequences, random, |shape| {
        ops.kv_pool_ordered(shape, case.storage, case.order).unwrap()
    })
}

/// The same in a pool that somebody else makes.
pub(crate) fn step_in<O: Ops>(
    ops: &O,
    case: &Case,
    sequences: &[Sequence],
    random: &mut Random,
    pool: impl FnOnce(KvShape) -> O::KvPool,
) -> Step<O> {
    let Heads { query, kv, dim } = case.heads;
    let block_size = case.block_size;
    let of = |sequence: &Sequence| sequence.context.div_ceil(block_size);
    let blocks = 2 + sequences.iter().map(of).sum::<usize>();
    let shape = KvShape { layers: 2, blocks, block_size, kv_heads: kv, head_dim: dim, dtype: case.dtype };
    let mut pool = pool(shape);
    poison(ops, &mut pool, shape, case.storage);

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
    append(ops, &mut pool, shape, &slots, &k, &v);
    let rows = q.len() / (query * dim);
    let batch = BatchInput {
        positions: &vec![0; rows],
        slots: &vec![-1; rows],
        spans: &spans,
        block_tables: &tables,
        block_size,
    };
    Step { shape, pool, batch: ops.batch(batch).unwrap(), q: write(ops, rows, query * dim, &q), rows }
}

/// Output and LSE of all rows.
pub(crate) fn attend<O: Ops>(ops: &O, case: &Case, step: &Step<O>) -> (Vec<f32>, Vec<f32>) {
    let Heads { query, dim, .. } = case.heads;
    let rows = step.rows;
    let mut out = write(ops, rows, query * dim, &vec![f32::NAN; rows * query * dim]);
    let mut lse = ops.floats(&vec![f32::NAN; rows * query]).unwrap();
    let per_head = |of: &dyn Fn(usize) -> f32| -> O::Floats {
        ops.floats(&(0..query).map(of).collect::<Vec<_>>()).unwrap()
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
    let mask = case.tree.then(|| ops.tree_mask(&mask, words).unwrap());
    let scores = Scores {
        causal: true,
        softcap: case.softcap,
        slopes: slopes.as_ref(),
        sinks: sinks.as_ref(),
        mask: mask.as_ref(),
    };
    let Step { pool, batch, q, .. } = step;
    ops.attend(pool, LAYER, batch, q, case.attention(), scores, &mut out, Some(&mut lse)).unwrap();
    (ops.read(&out).unwrap().into_owned(), ops.read_floats(&lse).unwrap())
}

/// What the pool keeps of keys and values: E4M3 with the scale of the case, or whole numbers.
pub(crate) fn quantise(case: &Case, sequence: &mut Sequence) {
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
    static ALL: LazyLock<Vec<f32>> =
        LazyLock::new(|| (0..0x7f).map(|bits| crate::common::e4m3(bits) as f32).collect());
    let size = x.abs();
    let above = ALL.partition_point(|&y| y < size).min(ALL.len() - 1);
    let apart = |bits: usize| (ALL[bits] - size).abs();
    let nearest = (above.saturating_sub(1)..=above)
        .min_by(|&a, &b| apart(a).total_cmp(&apart(b)).then((a & 1).cmp(&(b & 1))))
        .unwrap();
    ALL[nearest].copysign(x)
}

/// The rows of a sequence that are compared: all queries and heads, or where that takes long as many as there is time
/// for, of the edges and in between, head after head.
fn looked_at(queries: usize, heads: usize, cost: usize, random: &mut Random) -> Vec<(usize, usize)> {
    /// Multiplications of the reference for one sequence.
    const WORK: usize = 2_000_000;
    let count = (WORK / cost.max(1)).max(6);
    if queries * heads <= count {
        return (0..queries).flat_map(|query| (0..heads).map(move |head| (query, head))).collect();
    }
    let first = random.below(heads);
    let query = |i: usize, random: &mut Random| [0, queries - 1, random.below(queries)][(i + i / heads) % 3];
    (0..count).map(|i| (query(i, random), (first + i) % heads)).collect()
}

pub(crate) fn compare(
    name: &str,
    case: &Case,
    sequences: &[Sequence],
    (out, lse): (&[f32], &[f32]),
    allowed: f64,
    random: &mut Random,
) {
    let Heads { query: heads, dim, .. } = case.heads;
    let (mut worst, mut plain_worst, mut start) = (0.0_f64, 0.0_f64, 0);
    for (index, sequence) in sequences.iter().enumerate() {
        for (query, head) in looked_at(sequence.queries, heads, sequence.context * dim, random) {
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
        worst <= (2.0 * plain_worst + 1e-6).min(allowed),
        "{name}: off by {worst:e}, a plain evaluation by {plain_worst:e}"
    );
}

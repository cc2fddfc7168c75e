//! Latent attention (MLA) as any implementation of the operators computes it: against softmax in f64, with
//! FlashAttention-3's bound (arXiv 2407.08608), and what appending writes.
#![allow(dead_code, reason = "each test file uses its part")]

use half::{bf16, f16};
use quayline_gpu_kernels::{
    BatchInput, Dtype, Error, KvStorage, Latent, LatentAttention, LatentQuery, LatentShape, Ops, RopeStyle,
    Scores, Span,
};

use crate::common::{Random, close, rounded, store};

pub(crate) fn floats(random: &mut Random, dtype: Dtype, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| rounded(dtype, random.float() * size)).collect()
}

pub(crate) fn tensor<O: Ops>(ops: &O, cols: usize, elements: &[f32]) -> O::Tensor {
    let mut x = ops.tensor(elements.len() / cols, cols).unwrap();
    ops.write(&mut x, elements).unwrap();
    x
}

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) heads: usize,
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    pub(crate) dtype: Dtype,
    pub(crate) storage: KvStorage,
    /// Queries and context of each sequence.
    pub(crate) lengths: Vec<(usize, usize)>,
}

pub(crate) const BLOCK_SIZE: usize = 16;

impl Case {
    fn dim(&self) -> usize {
        self.latent + self.rope
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim() as f32).sqrt()
    }

    fn shape(&self, blocks: usize) -> LatentShape {
        LatentShape {
            layers: 2,
            blocks,
            block_size: BLOCK_SIZE,
            latent_dim: self.latent,
            rope_dim: self.rope,
            dtype: self.dtype,
        }
    }
}

/// A sequence's queries `[queries, heads, dim]` and rows `[context, dim]`.
#[derive(Clone)]
pub(crate) struct Sequence {
    q: Vec<f32>,
    rows: Vec<f32>,
}

/// What the pool keeps of a row: the nearest E4M3, by the rule that the kernel of the other caches is tested with.
fn kept(case: &Case, rows: &mut [f32]) {
    for row in rows.chunks_mut(case.dim()) {
        let largest = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let scale = match case.storage {
            KvStorage::Same => continue,
            KvStorage::Fp8 { key_scale, .. } => key_scale,
            _ => largest / 448.0,
        };
        for x in row {
            let size = (*x / scale).abs().min(448.0);
            let step = 2.0_f32.powi((size.log2().floor() as i32).max(-6) - 3);
            *x = ((size / step).round_ties_even() * step * scale).copysign(*x);
        }
    }
}

/// A query head's latent, exact and as a plain evaluation in the stored type gives it, and the exact LSE.
fn reference(
    case: &Case,
    sequence: &Sequence,
    query: usize,
    head: usize,
    (queries, context): (usize, usize),
) -> [Vec<f64>; 3] {
    let dim = case.dim();
    let q = &sequence.q[(query * case.heads + head) * dim..][..dim];
    let seen = (context + query + 1).saturating_sub(queries).min(context);
    let rows: Vec<&[f32]> = sequence.rows.chunks(dim).take(seen).collect();
    let round = |x: f64| f64::from(rounded(case.dtype, x as f32));
    let dot = |row: &[f32]| q.iter().zip(row).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>();
    let scores: Vec<f64> = rows.iter().map(|row| dot(row) * f64::from(case.scale())).collect();
    let plain: Vec<f64> = rows.iter().map(|row| round(round(dot(row)) * f64::from(case.scale()))).collect();
    let weigh = |scores: &[f64]| {
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
        (scores.iter().map(|s| (s - most).exp() / total).collect::<Vec<_>>(), most + total.ln())
    };
    let average = |weights: &[f64]| -> Vec<f64> {
        let of = |i: usize| rows.iter().zip(weights).map(|(row, w)| w * f64::from(row[i])).sum::<f64>();
        (0..case.latent).map(of).collect()
    };
    let (weights, lse) = weigh(&scores);
    let plain: Vec<f64> = weigh(&plain).0.into_iter().map(round).collect();
    let lse = if seen == 0 { f64::NEG_INFINITY } else { lse };
    [average(&weights), average(&plain).into_iter().map(round).collect(), vec![lse]]
}

pub(crate) fn pool<O: Latent>(ops: &O, case: &Case, blocks: usize) -> O::KvPool {
    ops.latent_pool(case.shape(blocks), case.storage).unwrap()
}

/// Appends whole rows to slots of layer 1, as they are.
pub(crate) fn append<O: Latent>(ops: &O, case: &Case, pool: &mut O::KvPool, slots: &[i64], rows: &[f32]) {
    let part = |from: usize, to: usize| -> Vec<f32> {
        rows.chunks(case.dim()).flat_map(|row| row[from..to].to_vec()).collect()
    };
    let positions = vec![0; slots.len()];
    let input =
        BatchInput { positions: &positions, slots, spans: &[], block_tables: &[], block_size: BLOCK_SIZE };
    let batch = ops.batch(input).unwrap();
    let latent = tensor(ops, case.latent, &part(0, case.latent));
    let rope = tensor(ops, case.rope, &part(case.latent, case.dim()));
    ops.append_latent(pool, 1, &batch, &latent, &rope, None, None).unwrap();
}

/// The bytes of the first block of a new pool after rows went to slots of layer 1.
pub(crate) fn appended<O: Latent>(ops: &O, case: &Case, slots: &[i64], rows: &[f32]) -> Vec<u8> {
    let mut pool = pool(ops, case, 1);
    append(ops, case, &mut pool, slots, rows);
    let mut bytes = vec![0; ops.latent_block_bytes(case.shape(1), case.storage).unwrap()];
    ops.save_block(&pool, 0, &mut bytes).unwrap();
    bytes
}

/// Output and LSE of all sequences, on shuffled pages whose unused slots are no numbers.
pub(crate) fn attend<O: Latent>(
    ops: &O,
    case: &Case,
    sequences: &[Sequence],
    random: &mut Random,
) -> (Vec<f32>, Vec<f32>) {
    attend_in(ops, case, sequences, random, |shape| ops.latent_pool(shape, case.storage).unwrap())
}

/// The same in a pool that somebody else makes.
pub(crate) fn attend_in<O: Latent>(
    ops: &O,
    case: &Case,
    sequences: &[Sequence],
    random: &mut Random,
    pool: impl FnOnce(LatentShape) -> O::KvPool,
) -> (Vec<f32>, Vec<f32>) {
    let blocks_of = |context: usize| context.div_ceil(BLOCK_SIZE);
    let blocks = 1 + case.lengths.iter().map(|&(_, context)| blocks_of(context)).sum::<usize>();
    let mut pool = pool(case.shape(blocks));
    let all: Vec<i64> = (0..(blocks * BLOCK_SIZE) as i64).collect();
    append(ops, case, &mut pool, &all, &vec![f32::NAN; all.len() * case.dim()]);
    let mut free: Vec<u32> = (0..blocks as u32).collect();
    random.shuffle(&mut free);
    let blocks_max = case.lengths.iter().map(|&(_, context)| blocks_of(context)).max().unwrap();
    let (mut tables, mut spans, mut slots) =
        (vec![u32::MAX; case.lengths.len() * blocks_max], Vec::new(), Vec::new());
    let mut start = 0;
    for (index, &(queries, context)) in case.lengths.iter().enumerate() {
        let table = &mut tables[index * blocks_max..][..blocks_of(context)];
        table.fill_with(|| free.pop().unwrap());
        let slot = |t: usize| i64::from(table[t / BLOCK_SIZE]) * BLOCK_SIZE as i64 + (t % BLOCK_SIZE) as i64;
        slots.extend((0..context).map(slot));
        spans.push(Span { query_start: start, query_len: queries as u32, context_len: context as u32 });
        start += queries as u32;
    }
    let rows: Vec<f32> = sequences.iter().flat_map(|sequence| sequence.rows.clone()).collect();
    append(ops, case, &mut pool, &slots, &rows);
    let tokens = start as usize;
    let part = |from: usize, to: usize| -> Vec<f32> {
        let heads = sequences.iter().flat_map(|sequence| sequence.q.chunks(case.dim()));
        heads.flat_map(|head| head[from..to].to_vec()).collect()
    };
    let q = tensor(ops, case.heads * case.latent, &part(0, case.latent));
    let q_rope = tensor(ops, case.heads * case.rope, &part(case.latent, case.dim()));
    let input = BatchInput {
        positions: &vec![0; tokens],
        slots: &vec![-1; tokens],
        spans: &spans,
        block_tables: &tables,
        block_size: BLOCK_SIZE,
    };
    let batch = ops.batch(input).unwrap();
    let mut out = tensor(ops, case.heads * case.latent, &vec![f32::NAN; tokens * case.heads * case.latent]);
    let mut lse = ops.floats(&vec![f32::NAN; tokens * case.heads]).unwrap();
    let query = LatentQuery { latent: &q, rope: &q_rope };
    let attention = LatentAttention { heads: case.heads, scale: case.scale(), window: None };
    ops.attend_latent(&pool, 1, &batch, query, attention, Scores::default(), &mut out, Some(&mut lse))
        .unwrap();
    (ops.read(&out).unwrap().into_owned(), ops.read_floats(&lse).unwrap())
}

/// Random sequences of a case, with what the pool keeps of their rows.
pub(crate) fn sequences(case: &Case, random: &mut Random) -> Vec<Sequence> {
    let of = |&(queries, context): &(usize, usize)| {
        let q = floats(random, case.dtype, queries * case.heads * case.dim(), 3.0);
        let mut rows = floats(random, case.dtype, context * case.dim(), 2.0);
        kept(case, &mut rows);
        Sequence { q, rows }
    };
    case.lengths.iter().map(of).collect()
}

/// Holds output and LSE against softmax in f64: at most twice the error of a plain evaluation (arXiv 2407.08608).
pub(crate) fn compare(
    name: &str,
    case: &Case,
    sequences: &[Sequence],
    (out, lse): (&[f32], &[f32]),
    random: &mut Random,
) {
    let (mut worst, mut plain_worst, mut row) = (0.0_f64, 0.0_f64, 0);
    for (sequence, &lengths) in sequences.iter().zip(&case.lengths) {
        for query in 0..lengths.0 {
            for head in [0, case.heads - 1, random.below(case.heads)] {
                let [exact, plain, exact_lse] = reference(case, sequence, query, head, lengths);
                let at = (row + query) * case.heads + head;
                for (i, &found) in out[at * case.latent..][..case.latent].iter().enumerate() {
                    assert!(
                        found.is_finite(),
                        "{name} {lengths:?}: query {query}, head {head}, {i}: {found}"
                    );
                    worst = worst.max((f64::from(found) - exact[i]).abs());
                    plain_worst = plain_worst.max((plain[i] - exact[i]).abs());
                }
                let found = f64::from(lse[at]);
                let same = found == exact_lse[0] || (found - exact_lse[0]).abs() < 1e-3;
                assert!(same, "{name} {lengths:?}: LSE {found}, exact {}", exact_lse[0]);
            }
        }
        row += lengths.0;
    }
    assert!(
        worst <= 2.0 * plain_worst + 1e-6,
        "{name}: off by {worst:e}, a plain evaluation by {plain_worst:e}"
    );
}

pub(crate) fn case(heads: usize, (latent, rope): (usize, usize), lengths: &[(usize, usize)]) -> Case {
    Case { heads, latent, rope, dtype: Dtype::Bf16, storage: KvStorage::Same, lengths: lengths.to_vec() }
}

pub(crate) fn decoding_over_page_edges_and_no_context(check: impl Fn(&str, &Case)) {
    check("decode", &case(16, (512, 64), &[(1, 0), (1, 1), (1, 16), (1, 33), (1, 300)]));
    check("f16", &Case { dtype: Dtype::F16, ..case(16, (512, 64), &[(1, 70)]) });
}

pub(crate) fn many_heads_and_several_tokens(check: impl Fn(&str, &Case)) {
    check("many heads", &case(128, (512, 64), &[(1, 70)]));
    check("several tokens", &case(20, (512, 64), &[(3, 40), (5, 2), (2, 2)]));
}

pub(crate) fn contexts_are_cut_and_merged(check: impl Fn(&str, &Case)) {
    check("cut", &case(4, (512, 64), &[(1, 1300), (1, 20)]));
}

pub(crate) fn smaller_latents(check: impl Fn(&str, &Case)) {
    for dims in [(256, 32), (40, 8), (8, 64)] {
        check(&format!("{dims:?}"), &case(5, dims, &[(1, 40), (3, 35)]));
    }
}

pub(crate) fn latents_of_eight_bits(check: impl Fn(&str, &Case)) {
    for storage in [KvStorage::Fp8 { key_scale: 0.01, value_scale: 1.0 }, KvStorage::Fp8PerHead] {
        check(&format!("{storage:?}"), &Case { storage, ..case(20, (512, 64), &[(1, 54), (2, 300)]) });
        let f16 = Case { storage, dtype: Dtype::F16, ..case(5, (96, 16), &[(1, 54)]) };
        check(&format!("f16 {storage:?}"), &f16);
    }
}

pub(crate) fn appending_norms_rotates_and_keeps_to_its_slots<O: Latent>(
    dtype: Dtype,
    style: RopeStyle,
    ops: &O,
) {
    let mut random = Random::new(3);
    let case = Case { dtype, ..case(1, (512, 64), &[]) };
    let (latent, rope) = (floats(&mut random, dtype, 3 * 512, 2.0), floats(&mut random, dtype, 3 * 64, 2.0));
    let weight = floats(&mut random, dtype, 512, 1.0);
    let angles: Vec<f32> = (0..4 * 32).map(|_| random.float() * 3.0).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
    let table = ops.rope_table(&cos, &sin, 64, style).unwrap();
    let norm = ops.weight(store(Dtype::F32, &[512], &weight, 0).source).unwrap();
    let positions = [3, 1, 0];
    let input = BatchInput {
        positions: &positions,
        slots: &[17, -1, 2],
        spans: &[],
        block_tables: &[],
        block_size: BLOCK_SIZE,
    };
    let batch = ops.batch(input).unwrap();
    let mut pool = pool(ops, &case, 2);
    let (l, r) = (tensor(ops, 512, &latent), tensor(ops, 64, &rope));
    ops.append_latent(&mut pool, 1, &batch, &l, &r, Some((&norm, 1e-6)), Some(&table)).unwrap();

    let mut bytes = vec![0; ops.latent_block_bytes(case.shape(2), case.storage).unwrap()];
    for (block, token, slot) in [(0, 2, 2), (1, 0, 1)] {
        ops.save_block(&pool, block, &mut bytes).unwrap();
        let all: Vec<f32> = bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| {
                if dtype == Dtype::F16 {
                    f16::from_le_bytes(b).to_f32()
                } else {
                    bf16::from_le_bytes(b).to_f32()
                }
            })
            .collect();
        let (row, start) = (&latent[token * 512..][..512], (BLOCK_SIZE + slot) * 576);
        let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
        let factor = 1.0 / (squares / 512.0 + 1e-6).sqrt();
        let mut exact: Vec<f64> =
            row.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * factor * f64::from(w)).collect();
        exact.extend(rope[token * 64..][..64].iter().map(|&x| f64::from(x)));
        for pair in 0..32 {
            let (a, b) =
                if style == RopeStyle::Halves { (pair, pair + 32) } else { (2 * pair, 2 * pair + 1) };
            let at = positions[token] as usize * 32 + pair;
            let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
            let (x, y) = (exact[512 + a], exact[512 + b]);
            (exact[512 + a], exact[512 + b]) = (x * c - y * s, x * s + y * c);
        }
        for (i, (&found, exact)) in all[start..].iter().zip(exact).enumerate() {
            close(found, exact, exact.abs() / 250.0 + 1e-6, || format!("{dtype} block {block}, element {i}"));
        }
        let written = all.iter().enumerate().filter(|(_, x)| **x != 0.0);
        assert!(written.clone().all(|(i, _)| (start..start + 576).contains(&i)), "{dtype}: a slot of nobody");
    }
}

pub(crate) fn shapes_that_disagree_are_refused<O: Latent>(ops: &O) {
    let shape = LatentShape {
        layers: 1,
        blocks: 1,
        block_size: 16,
        latent_dim: 512,
        rope_dim: 64,
        dtype: Dtype::Bf16,
    };
    let refused = |shape, storage| ops.latent_pool(shape, storage).map(drop).unwrap_err().to_string();
    let same = KvStorage::Same;
    assert_eq!(
        refused(LatentShape { latent_dim: 520, ..shape }, same),
        "latent_pool: latent_dim is 520, the most allowed is 512"
    );
    assert_eq!(
        refused(LatentShape { rope_dim: 60, ..shape }, same),
        "latent_pool: rope_dim is 60, which is not a positive multiple of 8"
    );
    assert!(refused(shape, KvStorage::Int8PerHead).contains("Int8PerHead"));
    // K and V do not go where latents are, nor latents where K and V are.
    let mut pool = ops.latent_pool(shape, same).unwrap();
    let input = BatchInput { positions: &[0], slots: &[0], spans: &[], block_tables: &[], block_size: 16 };
    let batch = ops.batch(input).unwrap();
    let x = tensor(ops, 576, &[0.0; 576]);
    assert!(matches!(
        ops.append(&mut pool, 0, &batch, &x, &x),
        Err(Error::Shape { dimension: "planes of a layer", found: 1, expected: 2, .. })
    ));
    let (latent, rope) = (tensor(ops, 512, &[0.0; 512]), tensor(ops, 32, &[0.0; 32]));
    assert!(matches!(
        ops.append_latent(&mut pool, 0, &batch, &latent, &rope, None, None),
        Err(Error::Shape { dimension: "width of the key", found: 32, expected: 64, .. })
    ));
}

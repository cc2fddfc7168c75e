//! Paged attention against softmax in f64, and the promise that a query's bits know nothing of its surroundings.

use half::{bf16, f16};
use quayline_gpu_kernels::{Attention, BatchInput, Cpu, Dtype, Heads, KvShape, Ops, Span};

use crate::common::{self, Random, attention_error, bits, close, cpus};

/// One sequence: all its queries, keys and values, `[tokens, heads * dim]`, and which of its tokens this step computes.
#[derive(Clone)]
struct Sequence {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    tokens: usize,
    /// Queries of the step: the last so many tokens.
    queries: usize,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: Heads,
    window: Option<u32>,
    dtype: Dtype,
    block_size: usize,
}

impl Sequence {
    fn random(random: &mut Random, heads: Heads, tokens: usize, queries: usize) -> Self {
        Self {
            q: random.floats(tokens * heads.query * heads.dim),
            k: random.floats(tokens * heads.kv * heads.dim),
            v: random.floats(tokens * heads.kv * heads.dim),
            tokens,
            queries,
        }
    }
}

impl Case {
    fn attention(&self) -> Attention {
        Attention { heads: self.heads, scale: 0.7, window: self.window }
    }
}

/// Puts the sequences into a poisoned pool with shuffled pages and attends the last queries of each in one batch.
/// Answers the rows of each sequence.
fn attend(cpu: &Cpu, case: Case, sequences: &[Sequence], random: &mut Random) -> Vec<Vec<f32>> {
    let Case { heads, dtype, block_size, .. } = case;
    let (width, kv_width) = (heads.query * heads.dim, heads.kv * heads.dim);
    let of = |sequence: &Sequence| sequence.tokens.div_ceil(block_size);
    let blocks = 2 + sequences.iter().map(of).sum::<usize>();
    let shape = KvShape { layers: 2, blocks, block_size, kv_heads: heads.kv, head_dim: heads.dim, dtype };
    let mut pool = cpu.kv_pool(shape).unwrap();
    poison(cpu, &mut pool, shape);

    let mut free: Vec<u32> = (0..blocks as u32).collect();
    random.shuffle(&mut free);
    let blocks_max = sequences.iter().map(of).max().unwrap_or(0) + random.below(2);
    let mut tables = vec![u32::MAX; sequences.len() * blocks_max];
    let (mut spans, mut slots, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (index, sequence) in sequences.iter().enumerate() {
        let table = &mut tables[index * blocks_max..][..of(sequence)];
        table.fill_with(|| free.pop().unwrap());
        for token in 0..sequence.tokens {
            slots.push(table[token / block_size] as i64 * block_size as i64 + (token % block_size) as i64);
            positions.push(token as u32);
        }
        k.extend_from_slice(&sequence.k);
        v.extend_from_slice(&sequence.v);
        let query_start = (q.len() / width) as u32;
        q.extend_from_slice(&sequence.q[(sequence.tokens - sequence.queries) * width..]);
        let (query_len, context_len) = (sequence.queries as u32, sequence.tokens as u32);
        spans.push(Span { query_start, query_len, context_len });
    }
    let write = |rows: usize, cols: usize, elements: &[f32]| {
        let mut x = cpu.tensor(rows, cols).unwrap();
        cpu.write(&mut x, elements).unwrap();
        x
    };
    let all = cpu
        .batch(BatchInput { positions: &positions, slots: &slots, spans: &[], block_tables: &[], block_size })
        .unwrap();
    let (k, v) = (write(slots.len(), kv_width, &k), write(slots.len(), kv_width, &v));
    cpu.append(&mut pool, 1, &all, &k, &v).unwrap();

    let rows = q.len() / width;
    let (positions, slots) = (vec![0; rows], vec![-1; rows]);
    let step =
        BatchInput { positions: &positions, slots: &slots, spans: &spans, block_tables: &tables, block_size };
    let step = cpu.batch(step).unwrap();
    let q = write(rows, width, &q);
    let mut out = cpu.tensor(rows, width).unwrap();
    cpu.write(&mut out, &vec![f32::NAN; rows * width]).unwrap();
    cpu.attention(&pool, 1, &step, &q, case.attention(), &mut out).unwrap();
    let out = cpu.read(&out).unwrap();
    let mut row = 0;
    let of_sequence = |sequence: &Sequence| {
        let rows = &out[row * width..(row + sequence.queries) * width];
        row += sequence.queries;
        rows.to_vec()
    };
    sequences.iter().map(of_sequence).collect()
}

/// Fills every slot with what is no number.
fn poison(cpu: &Cpu, pool: &mut <Cpu as Ops>::KvPool, shape: KvShape) {
    let (tokens, width) = (shape.blocks * shape.block_size, shape.kv_heads * shape.head_dim);
    let slots: Vec<i64> = (0..tokens as i64).collect();
    let batch = BatchInput {
        positions: &vec![0; tokens],
        slots: &slots,
        spans: &[],
        block_tables: &[],
        block_size: shape.block_size,
    };
    let batch = cpu.batch(batch).unwrap();
    let mut x = cpu.tensor(tokens, width).unwrap();
    cpu.write(&mut x, &vec![f32::NAN; tokens * width]).unwrap();
    for layer in 0..shape.layers {
        cpu.append(pool, layer, &batch, &x, &x).unwrap();
    }
}

fn stored(dtype: Dtype, x: f32) -> f64 {
    f64::from(match dtype {
        Dtype::F32 => x,
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
        Dtype::F16 => f16::from_f32(x).to_f32(),
    })
}

/// What query token `token` should give for one head on `cpu`: queries are rounded where pairs of bf16 are multiplied.
fn exact(cpu: &Cpu, case: Case, sequence: &Sequence, token: usize, head: usize) -> Vec<f64> {
    let Heads { query, kv, dim } = case.heads;
    let rounds = cpu.isa().rounds_activations() && case.dtype == Dtype::Bf16;
    let asked = |x: f32| if rounds { stored(Dtype::Bf16, x) } else { f64::from(x) };
    let kv_head = head / (query / kv);
    let start = case.window.map_or(0, |window| (token + 1).saturating_sub(window as usize));
    let at = |position: usize, i: usize| (position * kv + kv_head) * dim + i;
    let scores: Vec<f64> = (start..=token)
        .map(|position| {
            let score: f64 = (0..dim)
                .map(|i| {
                    asked(sequence.q[(token * query + head) * dim + i])
                        * stored(case.dtype, sequence.k[at(position, i)])
                })
                .sum();
            score * f64::from(case.attention().scale)
        })
        .collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    (0..dim)
        .map(|i| {
            let of = |(score, position): (&f64, usize)| {
                (score - most).exp() / total * stored(case.dtype, sequence.v[at(position, i)])
            };
            scores.iter().zip(start..).map(of).sum()
        })
        .collect()
}

fn case(random: &mut Random) -> Case {
    let kv = random.pick(&[1, 2, 3]);
    let heads = Heads {
        query: kv * random.pick(&[1, 1, 2, 3, 4, 5, 6, 7, 8, 50]),
        kv,
        dim: random.pick(&[1, 8, 16, 17, 32, 48, 64, 80, 112, 128, 256]),
    };
    Case {
        heads,
        window: random.pick(&[None, None, Some(1), Some(7), Some(64), Some(100)]),
        dtype: random.pick(&[Dtype::F32, Dtype::Bf16, Dtype::F16]),
        block_size: random.pick(&[1, 2, 5, 8, 16, 32, 64]),
    }
}

#[test]
fn attention_is_right_at_every_edge() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let case = case(&mut random);
        let sequences: Vec<_> = (0..random.below(4))
            .map(|_| {
                let tokens = random.pick(&[0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 130]);
                let queries = random.pick(&[tokens, tokens.min(1), tokens / 2]);
                Sequence::random(&mut random, case.heads, tokens, queries)
            })
            .collect();
        // A sample of (sequence, token, head), the edges of each sequence among them.
        let mut samples = Vec::new();
        for (index, sequence) in sequences.iter().enumerate().filter(|(_, sequence)| sequence.queries > 0) {
            let first = sequence.tokens - sequence.queries;
            for _ in 0..10 {
                let between = first + random.below(sequence.queries);
                let token = random.pick(&[first, sequence.tokens - 1, between]);
                let head = random.below(case.heads.query);
                samples.push((index, token, head));
            }
        }
        for cpu in cpus() {
            let out = attend(&cpu, case, &sequences, &mut random);
            for &(index, token, head) in &samples {
                let first = sequences[index].tokens - sequences[index].queries;
                let at = ((token - first) * case.heads.query + head) * case.heads.dim;
                for (i, exact) in exact(&cpu, case, &sequences[index], token, head).iter().enumerate() {
                    close(out[index][at + i], *exact, attention_error(&cpu, case.dtype, 1e-5), || {
                        format!(
                            "seed {seed} {cpu:?} {case:?}: sequence {index}, token {token}, head {head}, {i}"
                        )
                    });
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_company_chunks_blocks_pages_or_threads() {
    for seed in 200..212 {
        let mut random = Random::new(seed);
        let mut case = case(&mut random);
        let tokens = random.pick(&[3, 64, 65, 150, 260]);
        let whole = Sequence::random(&mut random, case.heads, tokens, tokens);
        let width = case.heads.query * case.heads.dim;
        for isa in common::isas() {
            let reference = attend(&common::cpu(1, isa), case, std::slice::from_ref(&whole), &mut random);
            for threads in 1..=4 {
                let cpu = common::cpu(threads, isa);
                case.block_size = random.pick(&[1, 3, 7, 16, 24, 64]);
                // The last queries only, between strangers.
                let queries = random.pick(&[1, tokens / 2 + 1, tokens]);
                let part = Sequence { queries, ..whole.clone() };
                let before = Sequence::random(&mut random, case.heads, 40, 1);
                let after = Sequence::random(&mut random, case.heads, 9, 9);
                let out = attend(&cpu, case, &[before, part, after], &mut random);
                assert_eq!(
                    bits(&out[1]),
                    bits(&reference[0][(tokens - queries) * width..]),
                    "seed {seed} {cpu:?} {case:?}: the last {queries} of {tokens}"
                );
            }
        }
    }
}

#[test]
fn a_context_cut_among_threads_gives_the_bits_of_one_thread_and_of_a_prompt() {
    for seed in 300..304 {
        let mut random = Random::new(seed);
        let dim = random.pick(&[16, 40, 64]);
        let heads = random.pick(&[Heads { query: 1, kv: 1, dim }, Heads { query: 10, kv: 2, dim }]);
        let window = random.pick(&[None, None, Some(700)]);
        let dtype = random.pick(&[Dtype::F32, Dtype::Bf16, Dtype::F16]);
        let case = Case { heads, window, dtype, block_size: random.pick(&[16, 48, 7]) };
        let tokens = random.pick(&[513, 1024, 1537, 2200]);
        let prompt = Sequence::random(&mut random, heads, tokens, 50);
        let last = Sequence { queries: 1, ..prompt.clone() };
        let width = heads.query * heads.dim;
        for isa in common::isas() {
            let whole = attend(&common::cpu(1, isa), case, std::slice::from_ref(&prompt), &mut random);
            for threads in [1, 2, 3, 7] {
                let cpu = common::cpu(threads, isa);
                let short = Sequence::random(&mut random, heads, 20, 1);
                let out = attend(&cpu, case, &[short, last.clone()], &mut random);
                let at = || format!("seed {seed} {cpu:?} {case:?}, {tokens} tokens");
                assert_eq!(bits(&out[1]), bits(&whole[0][49 * width..]), "{}", at());
                let (head, i) = (random.below(heads.query), random.below(dim));
                let exact = exact(&cpu, case, &last, tokens - 1, head);
                close(out[1][head * dim + i], exact[i], attention_error(&cpu, dtype, 1e-5), at);
            }
        }
    }
}

#[test]
fn queries_without_context_and_rows_without_span_are_zero() {
    for cpu in cpus() {
        let heads = Heads { query: 2, kv: 1, dim: 4 };
        let shape =
            KvShape { layers: 1, blocks: 2, block_size: 4, kv_heads: 1, head_dim: 4, dtype: Dtype::F32 };
        let mut pool = cpu.kv_pool(shape).unwrap();
        poison(&cpu, &mut pool, shape);
        // Row 0 in no span; rows 1..3 of an empty context; rows 3..5 with one position: only the last sees it.
        let spans = [
            Span { query_start: 1, query_len: 2, context_len: 0 },
            Span { query_start: 3, query_len: 2, context_len: 1 },
        ];
        let mut x = cpu.tensor(5, 4).unwrap();
        cpu.write(&mut x, &[2.0; 20]).unwrap();
        let batch = BatchInput {
            positions: &[0; 5],
            slots: &[-1, -1, -1, -1, 4],
            spans: &spans,
            block_tables: &[0, 1],
            block_size: 4,
        };
        let batch = cpu.batch(batch).unwrap();
        cpu.append(&mut pool, 0, &batch, &x, &x).unwrap();
        let mut q = cpu.tensor(5, 8).unwrap();
        cpu.write(&mut q, &[1.0; 40]).unwrap();
        let mut out = cpu.tensor(5, 8).unwrap();
        let attention = Attention { heads, scale: 1.0, window: None };
        cpu.attention(&pool, 0, &batch, &q, attention, &mut out).unwrap();
        let mut expected = vec![0.0; 40];
        expected[32..].fill(2.0);
        assert_eq!(cpu.read(&out).unwrap(), expected, "{cpu:?}");
    }
}

#[test]
fn a_copied_block_reads_as_its_source() {
    for cpu in cpus() {
        let mut random = Random::new(5);
        let heads = Heads { query: 2, kv: 2, dim: 24 };
        let shape =
            KvShape { layers: 3, blocks: 5, block_size: 4, kv_heads: 2, head_dim: 24, dtype: Dtype::Bf16 };
        let mut pool = cpu.kv_pool(shape).unwrap();
        let x = random.floats(4 * 48);
        let mut k = cpu.tensor(4, 48).unwrap();
        cpu.write(&mut k, &x).unwrap();
        let spans = [Span { query_start: 0, query_len: 4, context_len: 4 }];
        let mut outs = Vec::new();
        for (slots, table) in [([8, 9, 10, 11], [2]), ([-1; 4], [1]), ([-1; 4], [3]), ([-1; 4], [4])] {
            let batch = BatchInput {
                positions: &[0; 4],
                slots: &slots,
                spans: &spans,
                block_tables: &table,
                block_size: 4,
            };
            let batch = cpu.batch(batch).unwrap();
            cpu.append(&mut pool, 2, &batch, &k, &k).unwrap();
            cpu.copy_blocks(&mut pool, &[(2, 1), (1, 3)]).unwrap();
            // Out, and in again where another one was: as if it had been copied.
            let mut bytes = vec![0; cpu.kv_block_bytes(shape).unwrap()];
            cpu.save_block(&pool, 2, &mut bytes).unwrap();
            cpu.load_block(&mut pool, 4, &bytes).unwrap();
            assert!(cpu.save_block(&pool, 9, &mut bytes).is_err());
            assert!(cpu.load_block(&mut pool, 2, &bytes[1..]).is_err());
            let mut out = cpu.tensor(4, 48).unwrap();
            let attention = Attention { heads, scale: 1.0, window: None };
            cpu.attention(&pool, 2, &batch, &k, attention, &mut out).unwrap();
            outs.push(cpu.read(&out).unwrap().into_owned());
        }
        assert!(outs[0].iter().any(|&x| x != 0.0));
        assert_eq!(outs[0], outs[1], "{cpu:?}");
        assert_eq!(outs[0], outs[2], "{cpu:?}");
        assert_eq!(outs[0], outs[3], "{cpu:?}");
    }
}

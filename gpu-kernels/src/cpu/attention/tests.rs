//! Attention in pairs of bf16 and on matrix tiles on every machine, with the instructions or without: against f64, and
//! bit by bit between a prompt and its last token alone, in pools of either order. What needs no pairs is tested
//! through the interface, in `tests/cpu/attention.rs`.
#![expect(clippy::cast_possible_truncation, reason = "small counts")]

use half::bf16;

use super::matrix::OnTiles;
use super::*;
use crate::{BatchInput, Cpu, Dtype, Heads, KvOrder, KvShape, KvStorage, Ops, Span};

/// A context of one sequence, `[tokens, heads · dim]`.
struct Case {
    heads: Heads,
    tokens: usize,
    block_size: usize,
    window: Option<u32>,
    storage: KvStorage,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Numbers below 1 that are bf16.
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / 8_388_608.0 - 1.0).to_f32()
    };
    (0..count).map(|_| next()).collect()
}

impl Case {
    fn new((query, kv, dim): (usize, usize, usize), tokens: usize, block_size: usize) -> Self {
        let of = |seed, heads: usize| numbers(seed, tokens * heads * dim);
        Self {
            heads: Heads { query, kv, dim },
            tokens,
            block_size,
            window: None,
            storage: KvStorage::Same,
            q: of(1, query),
            k: of(2, kv),
            v: of(3, kv),
        }
    }

    fn attention(&self) -> Attention {
        Attention { heads: self.heads, scale: 0.37, window: self.window }
    }

    /// The last `queries` rows, in pairs.
    fn last(&self, by: impl Products + Sync, cpu: &Cpu, queries: usize) -> Vec<f32> {
        self.last_in(KvOrder::Hnd, by, cpu, queries)
    }

    /// The same over a pool of this order; slots that hold nothing hold what is no number.
    fn last_in(&self, order: KvOrder, by: impl Products + Sync, cpu: &Cpu, queries: usize) -> Vec<f32> {
        let Heads { query, kv, dim } = self.heads;
        let blocks = self.tokens.div_ceil(self.block_size) + 1;
        let (block_size, slots) = (self.block_size, blocks * self.block_size);
        let shape =
            KvShape { layers: 1, blocks, block_size, kv_heads: kv, head_dim: dim, dtype: Dtype::Bf16 };
        let mut pool = cpu.kv_pool_ordered(shape, self.storage, order).unwrap();
        let span = Span { query_start: 0, query_len: queries as u32, context_len: self.tokens as u32 };
        let tables: Vec<u32> = (0..blocks as u32).rev().collect();
        let mut fill = |tokens: usize, [k, v]: [&[f32]; 2]| {
            let slot = |token: usize| tables[token / block_size] as usize * block_size + token % block_size;
            let slots: Vec<i64> = (0..tokens).map(|token| slot(token) as i64).collect();
            let input = BatchInput {
                positions: &vec![0; tokens],
                slots: &slots,
                spans: &[],
                block_tables: &[],
                block_size,
            };
            let batch = cpu.batch(input).unwrap();
            let [k, v] = [k, v].map(|x| {
                let mut tensor = cpu.tensor(tokens, kv * dim).unwrap();
                cpu.write(&mut tensor, x).unwrap();
                tensor
            });
            cpu.append(&mut pool, 0, &batch, &k, &v).unwrap();
        };
        let nothing = vec![f32::NAN; slots * kv * dim];
        fill(slots, [&nothing, &nothing]);
        fill(self.tokens, [&self.k, &self.v]);
        let input = BatchInput {
            positions: &vec![0; queries],
            slots: &vec![-1; queries],
            spans: &[span],
            block_tables: &tables,
            block_size,
        };
        let batch = cpu.batch(input).unwrap();
        let q =
            Queries { values: &self.q[(self.tokens - queries) * query * dim..], value_dim: dim, others: &[] };
        let shaping = Shaping { causal: true, softcap: None, slopes: None, sinks: None, mask: None };
        let attention = self.attention();
        let step = Step { pool: &pool, layer: 0, batch: &batch, q, attention, shaping, lse: None };
        let mut out = vec![f32::NAN; queries * query * dim];
        let mut memory = Scratch::default();
        attention_by(by, (&cpu.workers, cpu.isa()), &mut memory, step, &mut out);
        out
    }

    /// An element of a row in f64.
    fn exact(&self, token: usize, head: usize, element: usize) -> f64 {
        let Heads { query, kv, dim } = self.heads;
        let row = |position: usize| (position * kv + head / (query / kv)) * dim;
        let first = self.window.map_or(0, |window| (token + 1).saturating_sub(window as usize));
        let of = |position: usize| {
            let q = &self.q[(token * query + head) * dim..][..dim];
            let k = &self.k[row(position)..][..dim];
            let score: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            (score * f64::from(self.attention().scale)).exp()
        };
        let (mut total, mut sum) = (0.0, 0.0);
        for position in first..=token {
            total += of(position);
            sum += of(position) * f64::from(self.v[row(position) + element]);
        }
        sum / total
    }
}

/// Right, and with bits that do not depend on the company.
fn check(by: impl Products + Sync, cpu: &Cpu) {
    let windowed = |case: Case| Case { window: Some(37), ..case };
    let cases = [
        Case::new((7, 1, 64), 131, 16),
        Case::new((2, 2, 17), 66, 5),
        windowed(Case::new((6, 3, 48), 150, 16)),
        windowed(Case::new((1, 1, 80), 99, 32)),
        windowed(Case::new((3, 3, 48), 150, 16)),
        Case::new((5, 5, 32), 70, 48),
        Case::new((8, 4, 64), 90, 32),
        Case::new((12, 1, 128), 3, 16),
    ];
    for case in &cases {
        let Heads { query, dim, .. } = case.heads;
        let all = case.last(by, cpu, case.tokens);
        for (index, &found) in all.iter().enumerate().step_by(13) {
            let (token, head, element) = (index / dim / query, index / dim % query, index % dim);
            let exact = case.exact(token, head, element);
            // Weights are rounded: at most half a unit of the last of their eight bits.
            let apart = (f64::from(found) - exact).abs();
            assert!(apart <= 1.0 / 256.0, "{cpu:?} {token} {head} {element}: {found}, exact {exact}");
        }
        for (queries, order) in [(1, KvOrder::Hnd), (1, KvOrder::Nhd), (case.tokens / 2, KvOrder::Nhd)] {
            let last = case.last_in(order, by, cpu, queries);
            let of_prompt = &all[all.len() - last.len()..];
            assert!(
                last.iter().zip(of_prompt).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{cpu:?}: the last {queries} of {}, {order:?}",
                case.tokens
            );
        }
    }
    let bytes = Case { storage: KvStorage::Int8PerHead, ..Case::new((4, 2, 64), 90, 16) };
    for (index, &found) in bytes.last(by, cpu, 1).iter().enumerate() {
        let exact = bytes.exact(bytes.tokens - 1, index / bytes.heads.dim, index % bytes.heads.dim);
        // Numbers up to 1 in 127 steps, of keys and of values, and weights of eight bits.
        assert!((f64::from(found) - exact).abs() < 0.02, "{cpu:?}: {found}, exact {exact}");
    }
    for window in [None, Some(9)] {
        what_a_row_does_not_see_may_be_no_number(by, cpu, window, (75, 40));
        // So few rows that K and V are read where they lie.
        what_a_row_does_not_see_may_be_no_number(by, cpu, window, (2, 74));
    }
}

/// The values of token `bad` are no numbers: of the last `queries`, those who see it find none, all others the bits
/// that they find without.
fn what_a_row_does_not_see_may_be_no_number(
    by: impl Products + Sync,
    cpu: &Cpu,
    window: Option<u32>,
    (queries, bad): (usize, usize),
) {
    let mut case = Case { window, ..Case::new((3, 1, 32), 75, 16) };
    let all = case.last(by, cpu, queries);
    let of_token = case.heads.query * case.heads.dim;
    case.v[bad * case.heads.dim..][..case.heads.dim].fill(f32::NAN);
    let found = case.last(by, cpu, queries);
    let tokens = case.tokens - queries..;
    for (token, (found, all)) in tokens.zip(found.chunks(of_token).zip(all.chunks(of_token))) {
        let sees = token >= bad && window.is_none_or(|window| token < bad + window as usize);
        let same = found.iter().zip(all).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same != sees, "{cpu:?} {window:?}: token {token}");
        assert!(!sees || found.iter().all(|x| x.is_nan()), "{cpu:?} {window:?}: token {token}");
    }
}

fn cpu(threads: usize, isa: Isa) -> Cpu {
    Cpu::new(std::num::NonZeroUsize::new(threads), Some(isa)).unwrap()
}

#[test]
fn pairs_are_right_and_bits_depend_on_a_row_alone() {
    for isa in Isa::in_pairs() {
        // One thread takes several heads at a time.
        [1, 2].into_iter().for_each(|threads| check(InPairs, &cpu(threads, isa)));
    }
}

#[test]
fn tiles_are_right_and_bits_depend_on_a_row_alone() {
    check(OnTiles(super::super::amx::Emulated), &cpu(2, Isa::Portable));
}

/// The instructions, caught and executed one by one where there are none.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn tiles_of_the_machine_have_the_bits_of_those_in_loops() {
    let cpu = cpu(1, Isa::Portable);
    let case = Case { window: Some(70), ..Case::new((3, 1, 80), 100, 16) };
    let [machine, loops] = [
        case.last(OnTiles(Hardware::or_trapped()), &cpu, 40),
        case.last(OnTiles(super::super::amx::Emulated), &cpu, 40),
    ];
    assert!(machine.iter().zip(&loops).all(|(a, b)| a.to_bits() == b.to_bits()));
}

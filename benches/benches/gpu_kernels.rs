//! The operators on this machine's CPU: matrix products from one token to a whole prompt, and paged attention.
//! Weights are bf16 and take turns, so that they come from memory and not from a cache.
#![expect(clippy::unwrap_used, reason = "a bench whose setup fails has no figure")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quayline_benches::bandwidth::read_gigabytes_per_second;
use quayline_benches::beside::beside;
use quayline_benches::random::Random;
use quayline_gpu_kernels::cpu::{Tensor, Weight};
use quayline_gpu_kernels::{
    Attention, BatchInput, Cpu, Dtype, Heads, KvShape, Ops, Projection, Span, WeightBytes, WeightSource,
};

/// Together these weights are far larger than the last cache.
const WEIGHT_BYTES: usize = 256 << 20;

fn cpu() -> Cpu {
    Cpu::detect().unwrap()
}

/// Numbers from -1 to 1, exact in bf16.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::new(seed, 0);
    (0..count).map(|_| f32::from(i8::try_from(random.below(129)).map_or(64, |n| n) - 64) / 64.0).collect()
}

fn bf16_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes().into_iter().skip(2)).collect()
}

/// As many weights `[outputs, inputs]` as fill [`WEIGHT_BYTES`], the same numbers in all.
fn weights(cpu: &Cpu, outputs: usize, inputs: usize) -> (Vec<f32>, Vec<Weight>) {
    let values = numbers(1, outputs * inputs);
    let copies = (WEIGHT_BYTES / (values.len() * 2)).max(2);
    let bytes: WeightBytes = Arc::new(bf16_bytes(&values).repeat(copies));
    let size = values.len() * 2;
    let one = |copy: usize| WeightSource {
        bytes: Arc::clone(&bytes),
        range: copy * size..(copy + 1) * size,
        dtype: Dtype::Bf16,
        shape: vec![outputs, inputs],
    };
    let all = (0..copies).map(|copy| cpu.weight(one(copy)).unwrap()).collect();
    (values, all)
}

fn activations(cpu: &Cpu, rows: usize, cols: usize, values: &[f32]) -> Tensor {
    let mut tensor = cpu.tensor(rows, cols).unwrap();
    cpu.write(&mut tensor, values).unwrap();
    tensor
}

fn product(cpu: &Cpu, x: &Tensor, weight: &Weight, out: &mut Tensor) {
    cpu.linear(x, &mut [Projection { weight, bias: None, out }]).unwrap();
}

/// Every output of the first and the last row, added up in f64.
fn assert_product(cpu: &Cpu, out: &Tensor, x: &[f32], weight: &[f32], inputs: usize, rows: usize) {
    let outputs = weight.len() / inputs;
    let found = cpu.read(out).unwrap();
    for row in [0, rows - 1] {
        for output in 0..outputs {
            let pairs = x[row * inputs..][..inputs].iter().zip(&weight[output * inputs..][..inputs]);
            let expected: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let difference = (f64::from(found[row * outputs + output]) - expected).abs();
            assert!(difference < 1e-2, "row {row}, output {output}: {difference} from {expected}");
        }
    }
}

fn limits() -> f64 {
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    read_gigabytes_per_second(threads, 128 << 20)
}

fn linear(criterion: &mut Criterion) {
    let cpu = cpu();
    beside(
        "gpu-kernels/linear/1x*",
        &format!("{:.1} GB/s, read with {} threads just now ({:?})", limits(), cpu.threads(), cpu.isa()),
        "oneDNN through PyTorch reached 10 to 23 GB/s of 28 to 36 GB/s on 2 vCPU Sapphire Rapids",
    );
    let mut group = criterion.benchmark_group("gpu-kernels/linear");
    group.sample_size(10);
    for (inputs, outputs) in [(768, 2048), (896, 4864), (2048, 5632)] {
        let (values, weights) = weights(&cpu, outputs, inputs);
        for rows in [1, 8, 32, 128, 512] {
            let x = numbers(2, rows * inputs);
            let tensor = activations(&cpu, rows, inputs, &x);
            let mut out = cpu.tensor(rows, outputs).unwrap();
            product(&cpu, &tensor, &weights[0], &mut out);
            assert_product(&cpu, &out, &x, &values, inputs, rows);
            // One row is bound by bytes read, many rows by arithmetic.
            let flop = 2 * rows * inputs * outputs;
            let bytes = outputs * inputs * 2;
            group.throughput(if rows == 1 {
                Throughput::BytesDecimal(bytes as u64)
            } else {
                Throughput::Elements(flop as u64)
            });
            let mut turn = weights.iter().cycle();
            group.bench_function(format!("{rows}x{inputs}x{outputs}-bf16"), |bencher| {
                bencher.iter(|| product(&cpu, black_box(&tensor), turn.next().unwrap(), &mut out));
            });
        }
    }
    group.finish();
}

/// Spans over one pool: `count` sequences of `context` tokens, each computing its last `queries`.
struct Spans {
    count: usize,
    context: usize,
    queries: usize,
}

const BLOCK: usize = 16;
const HEADS: Heads = Heads { query: 14, kv: 2, dim: 64 };

fn attention(criterion: &mut Criterion) {
    let cpu = cpu();
    beside(
        "gpu-kernels/attention/decode-*",
        &format!("{:.1} GB/s of keys and values, read just now", limits()),
        "none measured in isolation",
    );
    let mut group = criterion.benchmark_group("gpu-kernels/attention");
    group.sample_size(10);
    let cases = [
        ("decode-1x1024", Spans { count: 1, context: 1024, queries: 1 }),
        ("decode-8x1024", Spans { count: 8, context: 1024, queries: 1 }),
        ("decode-32x256", Spans { count: 32, context: 256, queries: 1 }),
        ("prefill-1x512", Spans { count: 1, context: 512, queries: 512 }),
        ("prefill-1x2048", Spans { count: 1, context: 2048, queries: 512 }),
    ];
    for (name, spans) in cases {
        let bytes = spans.count * spans.context * HEADS.kv * HEADS.dim * 2 * 2;
        let pairs = spans.queries * (spans.context - spans.queries) + spans.queries * (spans.queries + 1) / 2;
        let flop = spans.count * pairs * HEADS.query * HEADS.dim * 4;
        group.throughput(if spans.queries == 1 {
            Throughput::BytesDecimal(bytes as u64)
        } else {
            Throughput::Elements(flop as u64)
        });
        let mut run = attend(&cpu, &spans);
        run();
        group.bench_function(name, |bencher| bencher.iter(&mut run));
    }
    group.finish();
}

/// Fills a pool so that every value is its kv head's number plus one: whatever the weights, attention must
/// give it back.
fn attend<'a>(cpu: &'a Cpu, spans: &Spans) -> impl FnMut() + 'a {
    let blocks_each = spans.context.div_ceil(BLOCK);
    let shape = KvShape {
        layers: 1,
        blocks: spans.count * blocks_each + 1,
        block_size: BLOCK,
        kv_heads: HEADS.kv,
        head_dim: HEADS.dim,
        dtype: Dtype::Bf16,
    };
    let mut pool = cpu.kv_pool(shape).unwrap();
    fill(cpu, &mut pool, spans.count * blocks_each * BLOCK);
    let rows = spans.count * spans.queries;
    let each = |span: usize| Span {
        query_start: u32::try_from(span * spans.queries).unwrap(),
        query_len: u32::try_from(spans.queries).unwrap(),
        context_len: u32::try_from(spans.context).unwrap(),
    };
    let all: Vec<Span> = (0..spans.count).map(each).collect();
    let tables: Vec<u32> = (1..=u32::try_from(spans.count * blocks_each).unwrap()).collect();
    let (positions, slots) = (vec![0; rows], vec![-1; rows]);
    let input = BatchInput {
        positions: &positions,
        slots: &slots,
        spans: &all,
        block_tables: &tables,
        block_size: BLOCK,
    };
    let batch = cpu.batch(input).unwrap();
    let width = HEADS.query * HEADS.dim;
    let q = activations(cpu, rows, width, &numbers(3, rows * width));
    let mut out = cpu.tensor(rows, width).unwrap();
    let how = Attention { heads: HEADS, scale: 0.125, window: None };
    let mut checked = false;
    move || {
        cpu.attention(&pool, 0, &batch, &q, how, &mut out).unwrap();
        if !std::mem::replace(&mut checked, true) {
            let found = cpu.read(&out).unwrap();
            for (index, value) in found.iter().enumerate() {
                let head = index % width / HEADS.dim / (HEADS.query / HEADS.kv);
                let expected = if head == 0 { 1.0 } else { 2.0 };
                assert!((value - expected).abs() < 1e-4, "element {index}: {value} is not {expected}");
            }
        }
    }
}

fn fill(cpu: &Cpu, pool: &mut <Cpu as Ops>::KvPool, tokens: usize) {
    let width = HEADS.kv * HEADS.dim;
    let k = activations(cpu, tokens, width, &numbers(4, tokens * width));
    let heads: Vec<f32> = [1.0, 2.0].iter().flat_map(|&head| [head; HEADS.dim]).collect();
    let v = activations(cpu, tokens, width, &heads.repeat(tokens));
    let slots: Vec<i64> = (0..i64::try_from(tokens).unwrap()).map(|slot| slot + BLOCK as i64).collect();
    let positions = vec![0; tokens];
    let input =
        BatchInput { positions: &positions, slots: &slots, spans: &[], block_tables: &[], block_size: BLOCK };
    let batch = cpu.batch(input).unwrap();
    cpu.append(pool, 0, &batch, &k, &v).unwrap();
}

criterion_group!(benches, linear, attention);
criterion_main!(benches);

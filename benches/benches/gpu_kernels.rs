//! The operators on this machine's CPU: matrix products from one token to a whole prompt, paged attention, and what
//! lies between them. Names read `gpu-kernels/operator/shape/backend`; behind each stands its rate beside what the
//! machine can do at most, measured in the same run: reading from where the bytes lie or multiply-adds in registers,
//! whichever takes longer. Weights take turns, so that they come from memory and not from a cache.
#![expect(clippy::unwrap_used, reason = "a bench whose setup fails has no figure")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use criterion::{Criterion, criterion_group, criterion_main};
use quayline_benches::bandwidth::read_gigabytes_per_second;
use quayline_benches::beside::{Work, beside};
use quayline_benches::random::Random;
use quayline_gpu_kernels::cpu::{Tensor, Weight};
use quayline_gpu_kernels::{
    Attention, BatchInput, Cpu, Dtype, Heads, KvShape, Ops, Projection, RopeStyle, Rounding, Span,
    WeightSource,
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

fn source(bytes: Vec<u8>, shape: Vec<usize>) -> WeightSource {
    WeightSource { range: 0..bytes.len(), bytes: Arc::new(bytes), dtype: Dtype::Bf16, shape }
}

/// As many weights `[outputs, inputs]` as fill [`WEIGHT_BYTES`] in bf16, the same numbers in all.
fn weights(cpu: &Cpu, outputs: usize, inputs: usize, rounding: Option<Rounding>) -> (Vec<f32>, Vec<Weight>) {
    let values = numbers(1, outputs * inputs);
    let one = source(bf16_bytes(&values), vec![outputs, inputs]);
    let copies = (WEIGHT_BYTES / (values.len() * 2)).max(2);
    let make = |_| match rounding {
        None => cpu.weight(one.clone()).unwrap(),
        Some(rounding) => cpu.weight_rounded(one.clone(), rounding).unwrap(),
    };
    let all = (0..copies).map(make).collect();
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

/// Samples of each figure; their median counts.
const SAMPLES: usize = 10;

/// Gigabytes a second that this CPU's threads read where each has so many of its own.
fn read_limit(cpu: &Cpu, bytes: usize) -> f64 {
    read_gigabytes_per_second(cpu.threads(), bytes)
}

/// Billions of operations a second that products with such weights could do, were there nothing but multiply-adds.
fn flop_limit(cpu: &Cpu, weights: Dtype) -> f64 {
    let rate = |_| {
        let start = Instant::now();
        let flop = cpu.multiply_add(weights, 400_000);
        flop as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    median((0..9).map(rate).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the machine allows at most, in the unit of `work`, for something that reads `bytes` and computes `flop`: the
/// lower of its two roofs (Williams, Waterman, Patterson, *Roofline*, CACM 2009), which are `read` and `arithmetic`.
fn roof(work: Work, (bytes, flop): (usize, usize), (read, arithmetic): (f64, f64)) -> f64 {
    let (bytes, flop) = (bytes as f64, flop as f64);
    let least = (bytes / read).max(flop / arithmetic);
    match work {
        Work::Bytes(_) => bytes / least,
        Work::Flop(_) => flop / least,
    }
}

/// Prints what the machine can do at this moment, above the figures of an operator.
fn limits(operator: &str, limit: &str, peer: &str) {
    beside(&format!("gpu-kernels/{operator}/*"), limit, peer);
}

/// Times `run` as `gpu-kernels/operator/shape/backend`, and prints its rate beside the limit.
#[expect(clippy::print_stdout, reason = "a bench prints")]
fn bench(
    criterion: &mut Criterion,
    cpu: &Cpu,
    (operator, shape): (&str, &str),
    (work, limit): (Work, f64),
    run: &mut dyn FnMut(),
) {
    // Its answer is checked, also where it is not timed.
    run();
    let mut seconds: Vec<f64> = Vec::new();
    let name = format!("{shape}/{}", cpu.isa());
    let mut group = criterion.benchmark_group(format!("gpu-kernels/{operator}"));
    group.sample_size(SAMPLES);
    group.bench_function(&name, |bencher| {
        bencher.iter_custom(|times| {
            let start = Instant::now();
            (0..times).for_each(|_| run());
            let elapsed = start.elapsed();
            seconds.push(elapsed.as_secs_f64() / times as f64);
            elapsed
        });
    });
    group.finish();
    // Those before were for warming up.
    let counted = seconds.split_off(seconds.len().saturating_sub(SAMPLES));
    if !counted.is_empty() {
        println!("gpu-kernels/{operator}/{name}: {}", work.beside(median(counted), limit));
    }
}

fn linear(criterion: &mut Criterion) {
    let cpu = cpu();
    let read = read_limit(&cpu, 128 << 20);
    let [f32, bf16] = [Dtype::F32, Dtype::Bf16].map(|dtype| flop_limit(&cpu, dtype));
    limits(
        "linear",
        &format!("{read:.1} GB/s, {f32:.0} GFLOP/s of f32, {bf16:.0} of bf16, {} threads", cpu.threads()),
        "oneDNN through PyTorch reached 10 to 23 GB/s of 28 to 36 GB/s on 2 vCPU Sapphire Rapids",
    );
    for (inputs, outputs) in [(768, 2048), (896, 4864), (2048, 5632)] {
        for rounding in [None, Some(Rounding::Int8), Some(Rounding::Fp8), Some(Rounding::Int4)] {
            let (values, weights) = weights(&cpu, outputs, inputs, rounding);
            let stored = match rounding {
                None => "bf16",
                Some(Rounding::Int8) => "int8",
                Some(Rounding::Fp8) => "fp8",
                Some(Rounding::Int4) => "int4",
            };
            for rows in [1, 8, 16, 32, 128, 512] {
                let x = numbers(2, rows * inputs);
                let tensor = activations(&cpu, rows, inputs, &x);
                let mut out = cpu.tensor(rows, outputs).unwrap();
                product(&cpu, &tensor, &weights[0], &mut out);
                if rounding.is_none() {
                    assert_product(&cpu, &out, &x, &values, inputs, rows);
                }
                // Up to some eight rows bytes are the limit, then arithmetic.
                let (bytes, flop) = (weights[0].bytes(), 2 * rows * inputs * outputs);
                let work = if rows <= 8 { Work::Bytes(bytes) } else { Work::Flop(flop) };
                let arithmetic = if rounding.is_none() { bf16 } else { f32 };
                let limit = roof(work, (bytes, flop), (read, arithmetic));
                let mut turn = weights.iter().cycle();
                let shape = format!("{rows}x{inputs}x{outputs}-{stored}");
                bench(criterion, &cpu, ("linear", &shape), (work, limit), &mut || {
                    product(&cpu, black_box(&tensor), turn.next().unwrap(), &mut out);
                });
            }
        }
    }
}

/// The operators whose limit is bytes, on rows that lie in the caches, as they do between products.
fn rows(criterion: &mut Criterion) {
    const WIDTH: usize = 2048;
    const DIM: usize = 64;
    let cpu = cpu();
    let ones = |len: usize| bf16_bytes(&vec![1.0; len]);
    let vector = |len: usize| cpu.weight(source(ones(len), vec![len])).unwrap();
    let table = cpu.table(source(ones(4096 * WIDTH), vec![4096, WIDTH])).unwrap();
    let angles = vec![0.5; 512 * DIM / 2];
    let rope = cpu.rope_table(&angles, &angles, DIM, RopeStyle::Halves).unwrap();
    let heads = Heads { query: WIDTH / DIM, kv: 8, dim: DIM };
    let shape = KvShape {
        layers: 1,
        blocks: 512 / BLOCK,
        block_size: BLOCK,
        kv_heads: 8,
        head_dim: DIM,
        dtype: Dtype::Bf16,
    };
    let mut pool = cpu.kv_pool(shape).unwrap();
    let (norm, head_norm) = (vector(WIDTH), vector(DIM));
    for count in [1, 32, 512] {
        let ids: Vec<u32> = (0..u32::try_from(count).unwrap()).map(|row| row * 7 % 4096).collect();
        let slots: Vec<i64> = (0..i64::try_from(count).unwrap()).collect();
        let positions: Vec<u32> = (0..u32::try_from(count).unwrap()).collect();
        let input = BatchInput {
            positions: &positions,
            slots: &slots,
            spans: &[],
            block_tables: &[],
            block_size: BLOCK,
        };
        let batch = cpu.batch(input).unwrap();
        let x = activations(&cpu, count, WIDTH, &numbers(5, count * WIDTH));
        let mut y = activations(&cpu, count, WIDTH, &numbers(6, count * WIDTH));
        let mut out = activations(&cpu, count, WIDTH, &numbers(7, count * WIDTH));
        let mut k = activations(&cpu, count, 8 * DIM, &numbers(8, count * 8 * DIM));
        let v = activations(&cpu, count, 8 * DIM, &numbers(9, count * 8 * DIM));
        // Bytes of one pass over a tensor of activations.
        let pass = count * WIDTH * 4;
        // One row is the work of one thread.
        let limit = read_gigabytes_per_second(if count == 1 { 1 } else { cpu.threads() }, pass);
        let mut bench = |operator: &str, bytes: usize, run: &mut dyn FnMut()| {
            let shape = format!("{count}x{WIDTH}");
            bench(criterion, &cpu, (operator, &shape), (Work::Bytes(bytes), limit), run);
        };
        bench("embed", pass + pass / 2, &mut || cpu.embed(&table, &ids, &mut out).unwrap());
        assert!(cpu.read(&out).unwrap().iter().all(|&element| element == 1.0), "a table of ones");
        bench("rms_norm", 2 * pass, &mut || cpu.rms_norm(&x, &norm, 1e-5, &mut out).unwrap());
        let squares: f32 = cpu.read(&out).unwrap()[..WIDTH].iter().map(|element| element * element).sum();
        assert!((squares / WIDTH as f32 - 1.0).abs() < 1e-2, "a normed row: {squares}");
        bench("add_rms_norm", 4 * pass, &mut || cpu.add_rms_norm(&mut y, &x, &norm, 1e-5, &mut out).unwrap());
        bench("head_norm", 2 * pass, &mut || cpu.head_norm(&mut y, &head_norm, 1e-5).unwrap());
        bench("rope", 2 * (pass + pass / 4), &mut || cpu.rope(&batch, &rope, &mut y, &mut k, heads).unwrap());
        bench("append", 3 * pass / 4, &mut || cpu.append(&mut pool, 0, &batch, &k, &v).unwrap());
        bench("silu_mul", 3 * pass, &mut || cpu.silu_mul(&x, &x, &mut out).unwrap());
    }
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
    let arithmetic = flop_limit(&cpu, Dtype::F32);
    let limit =
        format!("{arithmetic:.0} GFLOP/s of f32, {} threads, or reading what lies in caches", cpu.threads());
    limits("attention", &limit, "none measured in isolation");
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
        let work = if spans.queries == 1 { Work::Bytes(bytes) } else { Work::Flop(flop) };
        let read = read_limit(&cpu, bytes / cpu.threads());
        let limit = roof(work, (bytes, flop), (read, arithmetic));
        let mut run = attend(&cpu, &spans);
        bench(criterion, &cpu, ("attention", name), (work, limit), &mut run);
    }
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

criterion_group!(benches, linear, attention, rows);
criterion_main!(benches);

//! Where the time of a step goes in which every sequence gets one token: a Llama's operators one after the other, over
//! weights and caches that come from memory. `cargo run --release -p quayline-gpu-kernels --example step [-- [SEQUENCES
//! CONTEXT THREADS int8|int4]]`; by default 16 sequences of 160 tokens of a model with 110 million weights in bf16.

#![expect(clippy::print_stdout, reason = "a program that reports")]
#![expect(clippy::cast_possible_truncation, reason = "small counts")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use quayline_gpu_kernels::cpu::{Batch, KvPool, RopeTable, Tensor, Weight};
use quayline_gpu_kernels::{
    Attention, BatchInput, Cpu, Dtype, Heads, KvShape, Ops, Projection, RopeStyle, Rounding, Span,
    WeightSource,
};

const LAYERS: usize = 12;
const HIDDEN: usize = 768;
const INTERMEDIATE: usize = 2048;
const VOCABULARY: usize = 32000;
const HEADS: Heads = Heads { query: 12, kv: 12, dim: 64 };
const BLOCK_SIZE: usize = 16;
const STEPS: usize = 40;

/// Operators in the order of a layer.
const OPERATORS: [&str; 11] =
    ["norm", "q k v", "rope", "append", "attention", "output", "add norm", "gate up", "silu", "down", "head"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).map(|number| number.parse().expect("a number"));
    let (sequences, context) = (number(0).unwrap_or(16), number(1).unwrap_or(160));
    let cpu = Cpu::new(number(2).and_then(NonZeroUsize::new), None).expect("threads");
    let rounding = arguments.get(3).map(|name| match name.as_str() {
        "int8" => Rounding::Int8,
        name => {
            assert_eq!(name, "int4", "int8 or int4");
            Rounding::Int4
        }
    });
    let mut model = Model::new(&cpu, (sequences, context), rounding);
    let mut steps: Vec<[f64; OPERATORS.len()]> = (0..STEPS).map(|_| model.step(&cpu)).collect();
    // The first ones meet memory that nobody has touched.
    steps.drain(..STEPS / 4);
    steps.sort_by(|a, b| a.iter().sum::<f64>().total_cmp(&b.iter().sum()));
    let (best, middle) = (steps[0], steps[steps.len() / 2]);
    let [all_best, all_middle] = [best, middle].map(|step| step.iter().sum::<f64>());
    println!("{sequences} sequences of {context}, {} threads of {}", cpu.threads(), cpu.isa());
    println!("{:10} {:>9} {:>6} {:>11}", "", "best, ms", "share", "median, ms");
    for (name, (best, middle)) in OPERATORS.iter().zip(best.iter().zip(&middle)) {
        println!("{name:10} {best:9.3} {:5.1}% {middle:11.3}", best / all_best * 100.0);
    }
    println!("{:10} {all_best:9.3} {:6} {all_middle:11.3}", "all", "");
}

struct Layer {
    /// q, k, v, output, gate, up, down.
    matrices: [Weight; 7],
}

struct Model {
    layers: Vec<Layer>,
    head: Weight,
    norm: Weight,
    rope: RopeTable,
    pool: KvPool,
    batch: Batch,
    residual: Tensor,
    normed: Tensor,
    delta: Tensor,
    /// q, k, v and what attention found.
    heads: [Tensor; 4],
    /// gate, up and their product.
    wide: [Tensor; 3],
    logits: Tensor,
}

impl Model {
    fn new(cpu: &Cpu, (sequences, context): (usize, usize), rounding: Option<Rounding>) -> Self {
        let matrix = |out: usize, into: usize| {
            let bytes: Vec<u8> = [0x81, 0x3b].repeat(out * into);
            let range = 0..bytes.len();
            let source =
                WeightSource { bytes: Arc::new(bytes), range, dtype: Dtype::Bf16, shape: vec![out, into] };
            match rounding {
                None => cpu.weight(source).expect("the range fits"),
                Some(rounding) => cpu.weight_rounded(source, rounding).expect("the range fits"),
            }
        };
        let bytes: Vec<u8> = [0x80, 0x3f].repeat(HIDDEN);
        let range = 0..bytes.len();
        let norm = WeightSource { bytes: Arc::new(bytes), range, dtype: Dtype::Bf16, shape: vec![HIDDEN] };
        let tensor = |cols| cpu.tensor(sequences, cols).expect("memory");
        let per = context.div_ceil(BLOCK_SIZE);
        let shape = KvShape {
            layers: LAYERS,
            blocks: sequences * per,
            block_size: BLOCK_SIZE,
            kv_heads: HEADS.kv,
            head_dim: HEADS.dim,
            dtype: Dtype::Bf16,
        };
        let spans: Vec<Span> = (0..sequences as u32)
            .map(|query_start| Span { query_start, query_len: 1, context_len: context as u32 })
            .collect();
        let slots: Vec<i64> = (0..sequences).map(|i| (i * per * BLOCK_SIZE + context - 1) as i64).collect();
        let batch = BatchInput {
            positions: &vec![context as u32 - 1; sequences],
            slots: &slots,
            spans: &spans,
            block_tables: &(0..(sequences * per) as u32).collect::<Vec<_>>(),
            block_size: BLOCK_SIZE,
        };
        let angles = vec![0.5; context * HEADS.dim / 2];
        let width = HEADS.query * HEADS.dim;
        let layer = |_| Layer {
            matrices: [
                matrix(width, HIDDEN),
                matrix(width, HIDDEN),
                matrix(width, HIDDEN),
                matrix(HIDDEN, width),
                matrix(INTERMEDIATE, HIDDEN),
                matrix(INTERMEDIATE, HIDDEN),
                matrix(HIDDEN, INTERMEDIATE),
            ],
        };
        let mut model = Self {
            layers: (0..LAYERS).map(layer).collect(),
            head: matrix(VOCABULARY, HIDDEN),
            norm: cpu.weight(norm).expect("the range fits"),
            rope: cpu.rope_table(&angles, &angles, HEADS.dim, RopeStyle::Halves).expect("shapes agree"),
            pool: cpu.kv_pool(shape).expect("memory"),
            batch: cpu.batch(batch).expect("in range"),
            residual: tensor(HIDDEN),
            normed: tensor(HIDDEN),
            delta: tensor(HIDDEN),
            heads: std::array::from_fn(|_| tensor(width)),
            wide: std::array::from_fn(|_| tensor(INTERMEDIATE)),
            logits: tensor(VOCABULARY),
        };
        cpu.write(&mut model.residual, &vec![0.5; sequences * HIDDEN]).expect("fits");
        model
    }

    /// Milliseconds of each operator in one step.
    fn step(&mut self, cpu: &Cpu) -> [f64; OPERATORS.len()] {
        let Self { layers, head, norm, rope, pool, batch, residual, normed, delta, .. } = self;
        let [q, k, v, attended] = &mut self.heads;
        let [gate, up, gated] = &mut self.wide;
        let mut milliseconds = [0.0; OPERATORS.len()];
        let mut now = Instant::now();
        let mut took = |operator: usize| {
            let then = std::mem::replace(&mut now, Instant::now());
            milliseconds[operator] += (now - then).as_secs_f64() * 1e3;
        };
        let attention = Attention { heads: HEADS, scale: 0.125, window: None };
        let fits = "shapes agree";
        cpu.rms_norm(residual, norm, 1e-6, normed).expect(fits);
        took(0);
        for (index, Layer { matrices: [wq, wk, wv, wo, wgate, wup, wdown] }) in layers.iter().enumerate() {
            cpu.linear(normed, &mut [onto(wq, q), onto(wk, k), onto(wv, v)]).expect(fits);
            took(1);
            cpu.rope(batch, rope, q, k, HEADS).expect(fits);
            took(2);
            cpu.append(pool, index, batch, k, v).expect(fits);
            took(3);
            cpu.attention(pool, index, batch, q, attention, attended).expect(fits);
            took(4);
            cpu.linear(attended, &mut [onto(wo, delta)]).expect(fits);
            took(5);
            cpu.add_rms_norm(residual, delta, norm, 1e-6, normed).expect(fits);
            took(6);
            cpu.linear(normed, &mut [onto(wgate, gate), onto(wup, up)]).expect(fits);
            took(7);
            cpu.silu_mul(gate, up, gated).expect(fits);
            took(8);
            cpu.linear(gated, &mut [onto(wdown, delta)]).expect(fits);
            took(9);
            cpu.add_rms_norm(residual, delta, norm, 1e-6, normed).expect(fits);
            took(6);
        }
        cpu.linear(normed, &mut [onto(head, &mut self.logits)]).expect(fits);
        took(10);
        milliseconds
    }
}

fn onto<'a>(weight: &'a Weight, out: &'a mut Tensor) -> Projection<'a, Cpu> {
    Projection { weight, bias: None, out }
}

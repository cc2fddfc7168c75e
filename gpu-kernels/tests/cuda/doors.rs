//! What the operators refuse: on the CPU and on CUDA (in the emulator, or on a GPU) with the same words, which name the
//! dimension and the values; and then nothing has been written.

use std::fmt::Debug;

use quayline_gpu_kernels::{
    Attention, BatchInput, Cpu, Dtype, Error, Heads, KvShape, KvStorage, Ops, Projection, RopeStyle, Scores,
    Span,
};

use crate::common;
use crate::emulator;

/// Errors of calls that must fail, in words.
struct Doors<'a, O: Ops> {
    ops: &'a O,
    said: Vec<String>,
}

impl<O: Ops> Doors<'_, O> {
    fn refused<T: Debug>(&mut self, result: Result<T, Error>) {
        self.said.push(result.unwrap_err().to_string());
    }

    fn tensor(&self, rows_max: usize, cols: usize, elements: &[f32]) -> O::Tensor {
        let mut x = self.ops.tensor(rows_max, cols).unwrap();
        self.ops.write(&mut x, elements).unwrap();
        x
    }

    /// As many rows of ones as there is room for.
    fn ones(&self, rows: usize, cols: usize) -> O::Tensor {
        self.tensor(rows, cols, &vec![1.0; rows * cols])
    }

    fn weight(&self, shape: &[usize]) -> O::Weight {
        let ones = vec![1.0; shape.iter().product()];
        self.ops.weight(common::store(Dtype::Bf16, shape, &ones, 0).source).unwrap()
    }
}

const INPUT: BatchInput<'_> =
    BatchInput { positions: &[0, 1], slots: &[0, 1], spans: &[], block_tables: &[], block_size: 4 };

const SPAN: Span = Span { query_start: 0, query_len: 2, context_len: 5 };

fn rows<O: Ops>(doors: &mut Doors<'_, O>) {
    let ops = doors.ops;
    let (table, scale, short) = (doors.weight(&[3, 8]), doors.weight(&[8]), doors.weight(&[7]));
    let (x, narrow, mut out) = (doors.ones(3, 8), doors.ones(3, 6), doors.ones(2, 8));
    doors.refused(ops.embed(&table, &[0, 3], &mut out));
    doors.refused(ops.embed(&table, &[0, 1, 2], &mut out));
    doors.refused(ops.embed(&table, &[0], &mut doors.ones(2, 6)));
    doors.refused(ops.embed(&scale, &[0], &mut out));
    doors.refused(ops.gather_rows(&x, &[1, 3], &mut out));
    doors.refused(ops.gather_rows(&x, &[0, 1, 2], &mut out));
    doors.refused(ops.gather_rows(&narrow, &[0], &mut out));
    doors.refused(ops.rms_norm(&x, &scale, 1e-5, &mut out));
    doors.refused(ops.rms_norm(&x, &short, 1e-5, &mut doors.ones(3, 8)));
    doors.refused(ops.rms_norm(&x, &table, 1e-5, &mut doors.ones(3, 8)));
    doors.refused(ops.rms_norm(&narrow, &doors.weight(&[6]), 1e-5, &mut doors.ones(3, 8)));
    let mut residual = doors.ones(2, 8);
    doors.refused(ops.add_rms_norm(&mut residual, &x, &scale, 1e-5, &mut out));
    doors.refused(ops.add_rms_norm(&mut residual, &doors.ones(2, 6), &scale, 1e-5, &mut out));
    doors.refused(ops.head_norm(&mut residual, &short, 1e-5));
    doors.refused(ops.head_norm(&mut residual, &table, 1e-5));
    doors.refused(ops.silu_mul(&x, &narrow, &mut out));
    doors.refused(ops.silu_mul(&x, &doors.ones(2, 8), &mut out));
    doors.refused(ops.silu_mul(&x, &x, &mut out));
    doors.refused(ops.write(&mut out, &[1.0; 9]));
    doors.refused(ops.write(&mut out, &[2.0; 24]));
    for untouched in [&out, &residual] {
        assert_eq!(*ops.read(untouched).unwrap(), [1.0; 16]);
    }
}

fn products<O: Ops>(doors: &mut Doors<'_, O>) {
    let ops = doors.ops;
    let (weight, bias) = (doors.weight(&[3, 8]), doors.weight(&[4]));
    let mut out = doors.ones(2, 3);
    let product = |x: &O::Tensor, weight, bias, out: &mut O::Tensor| {
        ops.linear(x, &mut [Projection { weight, bias, out }])
    };
    let said = [
        product(&doors.ones(2, 6), &weight, None, &mut out),
        product(&doors.ones(2, 8), &weight, None, &mut doors.ones(2, 4)),
        product(&doors.ones(3, 8), &weight, None, &mut out),
        product(&doors.ones(2, 8), &weight, Some(&bias), &mut out),
        product(&doors.ones(2, 8), &bias, None, &mut out),
    ];
    said.into_iter().for_each(|said| doors.refused(said));
    assert_eq!(*ops.read(&out).unwrap(), [1.0; 6]);
    let source = common::store(Dtype::Bf16, &[2, 3], &[0.0; 6], 1).source;
    doors
        .refused(ops.weight(quayline_gpu_kernels::WeightSource { range: 1..12, ..source.clone() }).map(drop));
    doors
        .refused(ops.weight(quayline_gpu_kernels::WeightSource { range: 2..14, ..source.clone() }).map(drop));
    doors.refused(
        ops.weight(quayline_gpu_kernels::WeightSource { shape: vec![usize::MAX, 3], ..source }).map(drop),
    );
}

fn turns<O: Ops>(doors: &mut Doors<'_, O>) {
    let ops = doors.ops;
    doors.refused(ops.rope_table(&[1.0; 6], &[0.0; 5], 4, RopeStyle::Halves).map(drop));
    doors.refused(ops.rope_table(&[1.0; 5], &[0.0; 5], 4, RopeStyle::Halves).map(drop));
    doors.refused(ops.rope_table(&[1.0; 6], &[0.0; 6], 3, RopeStyle::Halves).map(drop));
    let table = ops.rope_table(&[1.0; 6], &[0.0; 6], 4, RopeStyle::Halves).unwrap();
    let heads = Heads { query: 2, kv: 1, dim: 8 };
    let batch = ops.batch(INPUT).unwrap();
    let rope = |batch: &O::Batch, q: usize, k: usize, rows: usize, heads| {
        let (mut q, mut k) = (doors.ones(2, q), doors.ones(rows, k));
        ops.rope(batch, &table, &mut q, &mut k, heads)
    };
    let beyond = ops.batch(BatchInput { positions: &[0, 3], ..INPUT }).unwrap();
    let said = [
        rope(&batch, 16, 8, 2, Heads { query: 3, kv: 2, ..heads }),
        rope(&batch, 4, 2, 2, Heads { dim: 2, ..heads }),
        rope(&batch, 600, 300, 2, Heads { dim: 300, ..heads }),
        rope(&batch, 24, 8, 2, heads),
        rope(&batch, 16, 16, 2, heads),
        rope(&batch, 16, 8, 1, heads),
        rope(&beyond, 16, 8, 2, heads),
    ];
    said.into_iter().for_each(|said| doors.refused(said));
}

fn steps<O: Ops>(doors: &mut Doors<'_, O>) {
    let ops = doors.ops;
    for input in [
        BatchInput { slots: &[0], ..INPUT },
        BatchInput { block_size: 0, ..INPUT },
        BatchInput { spans: &[SPAN], block_tables: &[1], ..INPUT },
        BatchInput { spans: &[SPAN; 2], block_tables: &[0, 1, 0, 1], ..INPUT },
        BatchInput { spans: &[Span { query_len: 3, ..SPAN }], block_tables: &[0, 1], ..INPUT },
        BatchInput { spans: &[SPAN; 2], block_tables: &[0, 1, 0], ..INPUT },
    ] {
        doors.refused(ops.batch(input).map(drop));
    }
}

fn caches<O: Ops>(doors: &mut Doors<'_, O>) {
    let ops = doors.ops;
    let shape = KvShape { layers: 2, blocks: 3, block_size: 4, kv_heads: 2, head_dim: 8, dtype: Dtype::Bf16 };
    doors.refused(ops.kv_pool(KvShape { head_dim: 257, ..shape }).map(drop));
    doors.refused(ops.kv_pool(KvShape { layers: 0, ..shape }).map(drop));
    let mut pool = ops.kv_pool(shape).unwrap();
    let bytes = ops.kv_block_bytes(shape).unwrap();
    let mut block = vec![0; bytes];
    doors.refused(ops.copy_blocks(&mut pool, &[(0, 1), (3, 0)]));
    doors.refused(ops.copy_blocks(&mut pool, &[(0, 7)]));
    let mut other = block.clone();
    doors.refused(ops.save_blocks(&pool, &mut [(0, &mut other[..]), (3, &mut block[..])]));
    doors.refused(ops.load_blocks(&mut pool, &[(0, &other[..]), (4, &block[..])]));
    doors.refused(ops.load_blocks(&mut pool, &[(2, &other[..]), (1, &other[..]), (2, &block[..])]));
    assert!(ops.save_blocks(&pool, &mut [(0, &mut other[..]), (1, &mut block[1..])]).is_err());
    assert!(ops.load_blocks(&mut pool, &[(0, &other[..]), (1, &block[1..])]).is_err());

    let k = doors.ones(2, 16);
    let batch = ops.batch(INPUT).unwrap();
    let beyond = ops.batch(BatchInput { slots: &[12, -1], ..INPUT }).unwrap();
    let far = ops.batch(BatchInput { slots: &[i64::MAX, -1], ..INPUT });
    let other = ops.batch(BatchInput { block_size: 8, ..INPUT }).unwrap();
    doors.refused(ops.append(&mut pool, 2, &batch, &k, &k));
    doors.refused(ops.append(&mut pool, 0, &beyond, &k, &k));
    assert!(far.is_err() || ops.append(&mut pool, 0, &far.unwrap(), &k, &k).is_err());
    doors.refused(ops.append(&mut pool, 0, &other, &k, &k));
    doors.refused(ops.append(&mut pool, 0, &batch, &k, &doors.ones(2, 8)));
    doors.refused(ops.append(&mut pool, 0, &batch, &doors.ones(1, 16), &k));

    let asked = Attention { heads: Heads { query: 4, kv: 2, dim: 8 }, scale: 1.0, window: None };
    let with = |heads| Attention { heads, ..asked };
    let (q, mut out) = (doors.ones(2, 32), doors.ones(2, 32));
    let step = |tables| ops.batch(BatchInput { spans: &[SPAN], block_tables: tables, ..INPUT }).unwrap();
    let (batch, beyond) = (step(&[1, 2]), step(&[1, 3]));
    doors.refused(ops.attention(&pool, 2, &batch, &q, asked, &mut out));
    doors.refused(ops.attention(&pool, 0, &other, &q, asked, &mut out));
    doors.refused(ops.attention(&pool, 0, &beyond, &q, asked, &mut out));
    doors.refused(ops.attention(&pool, 0, &batch, &q, with(Heads { kv: 4, ..asked.heads }), &mut out));
    doors.refused(ops.attention(&pool, 0, &batch, &q, with(Heads { kv: 3, ..asked.heads }), &mut out));
    doors.refused(ops.attention(&pool, 0, &batch, &q, with(Heads { dim: 16, ..asked.heads }), &mut out));
    doors.refused(ops.attention(&pool, 0, &batch, &q, with(Heads { query: 2, ..asked.heads }), &mut out));
    doors.refused(ops.attention(&pool, 0, &batch, &doors.ones(1, 32), asked, &mut out));
    doors.refused(ops.attention(&pool, 0, &batch, &q, asked, &mut doors.ones(2, 16)));
    doors.refused(ops.attention(&pool, 0, &batch, &q, asked, &mut doors.ones(1, 32)));
    for (scale, window) in [(f32::NAN, None), (f32::INFINITY, None), (1.0, Some(0))] {
        let asked = Attention { scale, window, ..asked };
        doors.refused(ops.attention(&pool, 0, &batch, &q, asked, &mut out));
    }
    shaped(doors, (&pool, &batch), &q, asked, &mut out);
    assert_eq!(*ops.read(&out).unwrap(), [1.0; 64]);
    for storage in [
        KvStorage::Fp8 { key_scale: 0.0, value_scale: 1.0 },
        KvStorage::Fp8 { key_scale: 1.0, value_scale: f32::INFINITY },
    ] {
        doors.refused(ops.kv_pool_stored(shape, storage).map(drop));
        assert!(ops.kv_block_bytes_stored(shape, storage).is_err());
    }
}

/// Caps, slopes, sinks, masks and sums of exponentials for two tokens of four heads.
fn shaped<O: Ops>(
    doors: &mut Doors<'_, O>,
    (pool, batch): (&O::KvPool, &O::Batch),
    q: &O::Tensor,
    asked: Attention,
    out: &mut O::Tensor,
) {
    let ops = doors.ops;
    let numbers = |count: usize| ops.floats(&vec![0.5; count]).unwrap();
    let (three, mut seven, mut eight) = (numbers(3), numbers(7), numbers(8));
    let (short, none) = (ops.tree_mask(&[1], 1).unwrap(), Scores::<O>::default());
    let mut attend =
        |scores, lse: Option<&mut O::Floats>| ops.attend(pool, 0, batch, q, asked, scores, out, lse);
    for softcap in [f32::NAN, -1.0, 0.0, f32::INFINITY] {
        doors.refused(attend(Scores { softcap: Some(softcap), ..none }, None));
    }
    doors.refused(attend(Scores { slopes: Some(&three), ..none }, None));
    doors.refused(attend(Scores { sinks: Some(&three), ..none }, None));
    doors.refused(attend(Scores { mask: Some(&short), ..none }, None));
    doors.refused(attend(none, Some(&mut seven)));
    doors.refused(ops.tree_mask(&[1, 2, 3], 2).map(drop));
    let (mut a, b) = (doors.ones(2, 32), doors.ones(2, 32));
    doors.refused(ops.merge_states((&mut a, &mut seven), (&b, &eight), 4));
    doors.refused(ops.merge_states((&mut a, &mut eight), (&b, &seven), 4));
    doors.refused(ops.merge_states((&mut a, &mut eight), (&b, &seven), 3));
    doors.refused(ops.merge_states((&mut a, &mut eight), (&doors.ones(1, 32), &seven), 4));
    doors.refused(ops.merge_states((&mut a, &mut eight), (&doors.ones(2, 16), &seven), 4));
    assert_eq!(*ops.read(&a).unwrap(), [1.0; 64]);
    assert_eq!(
        (ops.read_floats(&seven).unwrap(), ops.read_floats(&eight).unwrap()),
        (vec![0.5; 7], vec![0.5; 8])
    );
}

fn all<O: Ops>(ops: &O) -> Vec<String> {
    let mut doors = Doors { ops, said: Vec::new() };
    rows(&mut doors);
    products(&mut doors);
    turns(&mut doors);
    steps(&mut doors);
    caches(&mut doors);
    doors.said
}

#[test]
fn both_implementations_refuse_the_same_calls_in_the_same_words() {
    let found = all(&Cpu::detect().unwrap());
    assert_eq!(found, SAID);
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    assert_eq!(all(&cuda), found);
}

/// What is wrong with the calls above, in their order.
const SAID: &[&str] = &[
    "embed: token is 3, the most allowed is 2",
    "embed: rows of the output is 3, the most allowed is 2",
    "embed: width of the output is 6, expected 8",
    "embed: dimensions of the weight is 1, expected 2",
    "gather_rows: row is 3, the most allowed is 2",
    "gather_rows: rows of the output is 3, the most allowed is 2",
    "gather_rows: width of the output is 8, expected 6",
    "rms_norm: rows of the output is 3, the most allowed is 2",
    "rms_norm: length of the weight is 7, expected 8",
    "rms_norm: dimensions of the weight is 2, expected 1",
    "rms_norm: width of the output is 8, expected 6",
    "add_rms_norm: rows of delta is 3, expected 2",
    "add_rms_norm: width of delta is 6, expected 8",
    "head_norm: width of x is 8, which is not a positive multiple of 7",
    "head_norm: dimensions of the weight is 2, expected 1",
    "silu_mul: width of up is 6, expected 8",
    "silu_mul: rows of up is 2, expected 3",
    "silu_mul: rows of the output is 3, the most allowed is 2",
    "write: number of elements is 9, which is not a positive multiple of 8",
    "write: rows of the output is 3, the most allowed is 2",
    "linear: in of the weight is 8, expected 6",
    "linear: width of the output is 4, expected 3",
    "linear: rows of the output is 3, the most allowed is 2",
    "linear: length of the weight is 4, expected 3",
    "linear: dimensions of the weight is 1, expected 2",
    "weight [2, 3] of bf16 needs 12 bytes, its range 1..12 of 13 does not hold them",
    "weight [2, 3] of bf16 needs 12 bytes, its range 2..14 of 13 does not hold them",
    "weight [18446744073709551615, 3] of bf16 needs 18446744073709551615 bytes, its range 1..13 of 13 does not hold them",
    "rope_table: length of sin is 5, expected 6",
    "rope_table: length of cos is 5, which is not a positive multiple of 2",
    "rope_table: rotary_dim is 3, which is not a positive multiple of 2",
    "rope: query heads is 3, which is not a positive multiple of 2",
    "rope: rotary_dim is 4, the most allowed is 2",
    "rope: head size is 300, the most allowed is 256",
    "rope: width of q is 24, expected 16",
    "rope: width of k is 16, expected 8",
    "rope: rows of k is 1, expected 2",
    "rope: position is 3, the most allowed is 2",
    "batch: slots is 1, expected 2",
    "batch: block_size is 0, which is not a positive multiple of 1",
    "batch: blocks of a context is 2, the most allowed is 1",
    "batch: query_start of a span (spans ascend and do not overlap) is 0, expected 2",
    "batch: end of a span's queries is 3, the most allowed is 2",
    "batch: length of block_tables is 3, which is not a positive multiple of 2",
    "kv_pool: head_dim is 257, the most allowed is 256",
    "kv_pool: layers is 0, which is not a positive multiple of 1",
    "copy_blocks: source block is 3, the most allowed is 2",
    "copy_blocks: target block is 7, the most allowed is 2",
    "save_blocks: block is 3, the most allowed is 2",
    "load_blocks: block is 4, the most allowed is 2",
    "load_blocks: times that a block is in the list is 2, expected 1",
    "append: layer is 2, the most allowed is 1",
    "append: slot is 12, the most allowed is 11",
    "append: block_size of the batch is 8, expected 4",
    "append: width of v is 8, expected 16",
    "append: rows of k is 1, expected 2",
    "attention: layer is 2, the most allowed is 1",
    "attention: block_size of the batch is 8, expected 4",
    "attention: block is 3, the most allowed is 2",
    "attention: kv heads is 4, expected 2",
    "attention: query heads is 4, which is not a positive multiple of 3",
    "attention: head size is 16, expected 8",
    "attention: width of q is 32, expected 16",
    "attention: rows of q is 1, expected 2",
    "attention: width of the output is 16, expected 32",
    "attention: rows of the output is 2, the most allowed is 1",
    "attention: a scale of NaN is not supported, only a finite one",
    "attention: a scale of inf is not supported, only a finite one",
    "attention: window is 0, which is not a positive multiple of 1",
    "attention: a soft-cap of NaN is not supported, only a finite one above 0",
    "attention: a soft-cap of -1 is not supported, only a finite one above 0",
    "attention: a soft-cap of 0 is not supported, only a finite one above 0",
    "attention: a soft-cap of inf is not supported, only a finite one above 0",
    "attention: number of slopes is 3, expected 4",
    "attention: number of sinks is 3, expected 4",
    "attention: rows of the mask is 1, expected 2",
    "attention: length of the LSE is 7, expected 8",
    "tree_mask: number of words is 3, which is not a positive multiple of 2",
    "merge_states: length of the LSE of a is 7, expected 8",
    "merge_states: length of the LSE of b is 7, expected 8",
    "merge_states: width of a is 32, which is not a positive multiple of 3",
    "merge_states: rows of b is 1, expected 2",
    "merge_states: width of b is 16, expected 32",
    "kv_pool: keys with a scale of 0 is not supported, only a finite one above 0",
    "kv_pool: values with a scale of inf is not supported, only a finite one above 0",
];

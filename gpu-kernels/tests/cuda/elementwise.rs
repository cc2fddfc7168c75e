//! The operators whose limit is bytes, on the emulator and in part on the CPU, against f64.

use std::sync::atomic::Ordering;

use half::{bf16, f16};
use quayline_gpu_kernels::{
    BatchInput, Cuda, Dtype, Error, Gate, HeadNorms, Heads, KvShape, Norm, Ops, RopeStyle,
};

use crate::common::{self, Random, close, cpus, half_ulp, rounded, store};
use crate::emulator;

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

pub(crate) fn tensor<O: Ops>(ops: &O, rows: usize, cols: usize, elements: &[f32]) -> O::Tensor {
    let mut x = ops.tensor(rows, cols).unwrap();
    ops.write(&mut x, elements).unwrap();
    x
}

pub(crate) fn vector<O: Ops>(ops: &O, values: &[f32]) -> O::Weight {
    ops.weight(store(Dtype::F32, &[values.len()], values, 0).source).unwrap()
}

pub(crate) fn matrix(cuda: &Cuda, rows: usize, values: &[f32]) -> <Cuda as Ops>::Weight {
    cuda.weight(store(Dtype::F32, &[rows, values.len() / rows], values, 1).source).unwrap()
}

/// Numbers as they are stored, so that the exact result starts from the same.
pub(crate) fn floats(random: &mut Random, dtype: Dtype, n: usize) -> Vec<f32> {
    (0..n).map(|_| rounded(dtype, random.float())).collect()
}

/// Every element within rounding of the exact one.
fn near(dtype: Dtype, found: &[f32], exact: &[f64], what: &str) {
    near_by(half_ulp(dtype), found, exact, what);
}

/// The same within a share of the exact one. Sums and exponentials are of f32.
fn near_by(share: f64, found: &[f32], exact: &[f64], what: &str) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (i, (&found, &exact)) in found.iter().zip(exact).enumerate() {
        let error = exact.abs() * share * 1.01 + 1e-6;
        close(found, exact, error, || format!("{what}, element {i}"));
    }
}

pub(crate) fn each(mut test: impl FnMut(Dtype, &Cuda, &mut Random)) {
    for (seed, (dtype, descending)) in
        DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]).enumerate()
    {
        let Some((cuda, _)) = emulator::cuda(dtype, descending) else { return };
        test(dtype, &cuda, &mut Random::new(seed as u64));
    }
}

#[test]
fn launches_begin_early_unless_told_otherwise_and_recorded_ones_too() {
    for early in [true, false] {
        let Some((cuda, emulator)) = emulator::cuda(Dtype::Bf16, false) else { return };
        let cuda = cuda.with_early_launches(early);
        let (x, weight) = (tensor(&cuda, 1, 8, &[1.0; 8]), vector(&cuda, &[2.0; 8]));
        let mut out = cuda.tensor(1, 8).unwrap();
        let graph = cuda.capture(|cuda| cuda.rms_norm(&x, &weight, 0.0, &mut out)).unwrap();
        for _ in 0..2 {
            graph.replay().unwrap();
        }
        assert_eq!(*cuda.read(&out).unwrap(), [2.0; 8]);
        if !emulator::on_gpu() {
            assert_eq!(emulator.early_launches.load(Ordering::Relaxed), if early { 2 } else { 0 });
        }
    }
}

#[test]
fn rms_norm_is_right_for_every_width() {
    each(|dtype, cuda, random| {
        for cols in [1, 7, 8, 64, 100, 128, 1000, 1024, 1025, 2048, 2050, 16384] {
            let rows = random.pick(&[0, 1, 3, 9]);
            let x = floats(random, dtype, rows * cols);
            let delta = floats(random, dtype, rows * cols);
            let weight = floats(random, dtype, cols);
            let exact = |x: &[f32]| -> Vec<f64> {
                let row = |row: &[f32]| {
                    let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let factor = 1.0 / (squares / cols as f64 + 1e-5).sqrt();
                    row.iter()
                        .zip(&weight)
                        .map(|(&x, &w)| f64::from(x) * factor * f64::from(w))
                        .collect::<Vec<_>>()
                };
                x.chunks(cols).flat_map(row).collect()
            };
            let w = vector(cuda, &weight);
            let mut out = cuda.tensor(rows, cols).unwrap();
            cuda.rms_norm(&tensor(cuda, rows, cols, &x), &w, 1e-5, &mut out).unwrap();
            near(dtype, &cuda.read(&out).unwrap(), &exact(&x), &format!("rms_norm {rows} x {cols} {dtype}"));

            let mut residual = tensor(cuda, rows, cols, &x);
            cuda.add_rms_norm(&mut residual, &tensor(cuda, rows, cols, &delta), &w, 1e-5, &mut out).unwrap();
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| rounded(dtype, x + d)).collect();
            assert_eq!(*cuda.read(&residual).unwrap(), sum, "{rows} x {cols} {dtype}");
            near(
                dtype,
                &cuda.read(&out).unwrap(),
                &exact(&sum),
                &format!("add_rms_norm {rows} x {cols} {dtype}"),
            );
        }
    });
}

#[test]
fn head_norm_treats_every_head_alone() {
    each(|dtype, cuda, random| {
        for dim in [1, 8, 17, 64, 128, 256] {
            let (rows, heads) = (3, 5);
            let (x, weight) = (floats(random, dtype, rows * heads * dim), floats(random, dtype, dim));
            let mut t = tensor(cuda, rows, heads * dim, &x);
            cuda.head_norm(&mut t, &vector(cuda, &weight), 1e-6).unwrap();
            let exact: Vec<f64> = x
                .chunks(dim)
                .flat_map(|head| {
                    let squares: f64 = head.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let factor = 1.0 / (squares / dim as f64 + 1e-6).sqrt();
                    head.iter().zip(&weight).map(move |(&x, &w)| f64::from(x) * factor * f64::from(w))
                })
                .collect();
            near(dtype, &cuda.read(&t).unwrap(), &exact, &format!("head_norm {dim} {dtype}"));
        }
    });
}

#[test]
fn gated_activations_are_right() {
    each(|dtype, cuda, random| gates_are_right(cuda, dtype, half_ulp(dtype), random));
    cpus().for_each(|cpu| gates_are_right(&cpu, Dtype::Bf16, IN_F32, &mut Random::new(7)));
}

/// What gates of the CPU are right within, of their result.
const IN_F32: f64 = 2e-6;
const OAI: Gate = Gate::SwigluOai { alpha: 1.702, limit: 7.0 };

fn gates_are_right<O: Ops>(ops: &O, dtype: Dtype, share: f64, random: &mut Random) {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gelu_tanh =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
    for (rows, cols) in [(0, 8), (1, 1), (3, 17), (5, 256), (2, 1003)] {
        let wide: Vec<f32> =
            floats(random, dtype, rows * cols).iter().map(|x| rounded(dtype, x * 20.0)).collect();
        let up: Vec<f32> =
            floats(random, dtype, rows * cols).iter().map(|x| rounded(dtype, x * 9.0)).collect();
        let (g, u) = (tensor(ops, rows, cols, &wide), tensor(ops, rows, cols, &up));
        let mut out = ops.tensor(rows, cols).unwrap();
        let exact = |of: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
            wide.iter().zip(&up).map(|(&g, &u)| of(f64::from(g), f64::from(u))).collect()
        };
        let gates: [(Gate, Vec<f64>); 4] = [
            (Gate::Silu, exact(&|x, up| x * sigmoid(x) * up)),
            (Gate::GeluTanh, exact(&|x, up| gelu_tanh(x) * up)),
            (Gate::Gelu, exact(&|x, up| x * normal(x) * up)),
            (
                OAI,
                exact(&|x, up| {
                    let (x, up) = (x.min(7.0), up.clamp(-7.0, 7.0));
                    x * sigmoid(1.702 * x) * (up + 1.0)
                }),
            ),
        ];
        for (gate, exact) in gates {
            ops.gated(gate, &g, &u, &mut out).unwrap();
            let found = ops.read(&out).unwrap();
            for (i, (&found, &exact)) in found.iter().zip(&exact).enumerate() {
                // The error function is right within 1.5e-7 of 1, whatever is left of it.
                let of_erf = if gate == Gate::Gelu { 2e-7 * f64::from((wide[i] * up[i]).abs()) } else { 0.0 };
                let error = exact.abs() * share * 1.01 + of_erf + 1e-6;
                close(found, exact, error, || format!("{gate:?} of {} and {}", wide[i], up[i]));
            }
        }
    }
}

/// The normal distribution function by Simpson's rule over the density.
fn normal(x: f64) -> f64 {
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let end = x.clamp(-9.0, 9.0);
    let (steps, from) = (400, end.abs());
    // The tail beyond |x|, so that small ones keep their digits.
    let step = 9.0 / f64::from(steps);
    let at = |i: i32| density(from + step * f64::from(i));
    let inner: f64 = (1..steps).map(|i| at(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    let tail = (at(0) + inner + at(steps)) * step / 3.0;
    if end < 0.0 { tail } else { 1.0 - tail }
}

#[test]
fn embed_and_gather_take_the_rows_asked_for() {
    each(|dtype, cuda, random| {
        for cols in [1, 8, 50, 1024] {
            let values = floats(random, dtype, 40 * cols);
            let tokens: Vec<u32> = (0..random.below(30)).map(|_| random.below(40) as u32).collect();
            let expected: Vec<f32> =
                tokens.iter().flat_map(|&t| values[t as usize * cols..][..cols].to_vec()).collect();
            let mut out = cuda.tensor(30, cols).unwrap();
            cuda.embed(&matrix(cuda, 40, &values), &tokens, &mut out).unwrap();
            assert_eq!(*cuda.read(&out).unwrap(), expected, "embed {cols}");
            cuda.gather_rows(&tensor(cuda, 40, cols, &values), &tokens, &mut out).unwrap();
            assert_eq!(*cuda.read(&out).unwrap(), expected, "gather_rows {cols}");
            assert!(matches!(
                cuda.embed(&matrix(cuda, 40, &values), &[40], &mut out),
                Err(Error::TooLarge { dimension: "token", found: 40, max: 39, .. })
            ));
        }
    });
}

#[test]
fn rope_turns_pairs_by_their_position() {
    each(|dtype, cuda, random| {
        for (dim, rotary, style) in [
            (64, 64, RopeStyle::Halves),
            (64, 64, RopeStyle::Interleaved),
            (128, 32, RopeStyle::Halves),
            (128, 64, RopeStyle::Interleaved),
            (256, 256, RopeStyle::Halves),
            (17, 8, RopeStyle::Halves),
            (6, 2, RopeStyle::Interleaved),
        ] {
            let heads = Heads { query: 3, kv: 1, dim };
            let positions = [0, 131_071, 7];
            let half = rotary / 2;
            let angle = |position: usize, i: usize| {
                position as f64 * 10_000_f64.powf(-2.0 * i as f64 / rotary as f64)
            };
            // Only the rows in use are filled.
            let table = |of: fn(f64) -> f64| {
                let mut all = vec![f32::NAN; 131_072 * half];
                for p in positions.map(|p| p as usize) {
                    let row = &mut all[p * half..][..half];
                    row.iter_mut().enumerate().for_each(|(i, x)| *x = of(angle(p, i)) as f32);
                }
                all
            };
            let (cos, sin) = (table(f64::cos), table(f64::sin));
            let q = floats(random, dtype, 3 * 3 * dim);
            let k = floats(random, dtype, 3 * dim);
            let exact = |x: &[f32], heads: usize| {
                let mut out: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                for (row, head) in out.chunks_mut(dim).enumerate() {
                    let position = positions[row / heads] as usize;
                    for i in 0..half {
                        let (a, b) =
                            if style == RopeStyle::Halves { (i, i + half) } else { (2 * i, 2 * i + 1) };
                        let (c, s) =
                            (f64::from(cos[position * half + i]), f64::from(sin[position * half + i]));
                        (head[a], head[b]) = (head[a] * c - head[b] * s, head[a] * s + head[b] * c);
                    }
                }
                out
            };
            let table = cuda.rope_table(&cos, &sin, rotary, style).unwrap();
            let batch = BatchInput {
                positions: &positions,
                slots: &[-1; 3],
                spans: &[],
                block_tables: &[],
                block_size: 16,
            };
            let batch = cuda.batch(batch).unwrap();
            let (mut tq, mut tk) = (tensor(cuda, 3, 3 * dim, &q), tensor(cuda, 3, dim, &k));
            cuda.rope(&batch, &table, &mut tq, &mut tk, heads).unwrap();
            near(dtype, &cuda.read(&tq).unwrap(), &exact(&q, 3), &format!("q {dim} {rotary} {style:?}"));
            near(dtype, &cuda.read(&tk).unwrap(), &exact(&k, 1), &format!("k {dim} {rotary} {style:?}"));
        }
    });
}

#[test]
fn a_pool_of_another_type_is_refused() {
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    let shape = KvShape { layers: 1, blocks: 1, block_size: 1, kv_heads: 1, head_dim: 8, dtype: Dtype::F32 };
    assert!(matches!(cuda.kv_pool(shape), Err(Error::Unsupported { what: "a cache of", .. })));
}

#[test]
fn the_fusion_of_norm_rope_and_append_does_what_the_three_do() {
    each(|dtype, cuda, random| fusion_does_what_the_three_do(cuda, dtype, random));
    cpus().for_each(|cpu| fusion_does_what_the_three_do(&cpu, Dtype::Bf16, &mut Random::new(3)));
}

fn fusion_does_what_the_three_do<O: Ops>(ops: &O, dtype: Dtype, random: &mut Random) {
    for (dim, rotary, style) in
        [(64, 64, RopeStyle::Halves), (128, 32, RopeStyle::Interleaved), (24, 8, RopeStyle::Halves)]
    {
        let heads = Heads { query: 6, kv: 2, dim };
        let (tokens, layer) = (5, 1);
        let table: Vec<f32> = (0..10 * rotary / 2).map(|_| random.float()).collect();
        let table = ops.rope_table(&table, &table, rotary, style).unwrap();
        let shape = KvShape { layers: 2, blocks: 3, block_size: 4, kv_heads: 2, head_dim: dim, dtype };
        let input = BatchInput {
            positions: &[0, 9, 3, 4, 5],
            slots: &[11, -1, 0, 7, 2],
            spans: &[],
            block_tables: &[],
            block_size: 4,
        };
        let batch = ops.batch(input).unwrap();
        let weights = [floats(random, dtype, dim), floats(random, dtype, dim)].map(|w| vector(ops, &w));
        let [q, k, v] = [6, 2, 2].map(|n| floats(random, dtype, tokens * n * dim));
        for norms in [None, Some(HeadNorms::<O> { q: &weights[0], k: &weights[1], eps: 1e-6 })] {
            let mut together = ops.kv_pool(shape).unwrap();
            let mut apart = ops.kv_pool(shape).unwrap();
            let mut tq = tensor(ops, tokens, 6 * dim, &q);
            let (tk, tv) = (tensor(ops, tokens, 2 * dim, &k), tensor(ops, tokens, 2 * dim, &v));
            ops.rope_append(&mut together, layer, &batch, &table, norms, &mut tq, &tk, &tv, heads).unwrap();
            assert_eq!(*ops.read(&tk).unwrap(), k, "k stays");

            let (mut aq, mut ak) = (tensor(ops, tokens, 6 * dim, &q), tensor(ops, tokens, 2 * dim, &k));
            if let Some(norms) = norms {
                ops.head_norm(&mut aq, norms.q, norms.eps).unwrap();
                ops.head_norm(&mut ak, norms.k, norms.eps).unwrap();
            }
            ops.rope(&batch, &table, &mut aq, &mut ak, heads).unwrap();
            ops.append(&mut apart, layer, &batch, &ak, &tv).unwrap();
            let what = format!("{dim} {rotary} {style:?} {dtype}");
            let close = |a: &[f32], b: &[f32]| {
                assert_eq!(a.len(), b.len(), "{what}");
                for (a, b) in a.iter().zip(b) {
                    // One rounding against up to three.
                    assert!(
                        (a - b).abs() <= 4.0 * half_ulp(dtype) as f32 * (1.0 + b.abs()),
                        "{what}: {a}, {b}"
                    );
                }
            };
            close(&ops.read(&tq).unwrap(), &ops.read(&aq).unwrap());
            let mut bytes = [(); 2].map(|()| vec![0; ops.kv_block_bytes(shape).unwrap()]);
            for block in 0..3 {
                ops.save_block(&together, block, &mut bytes[0]).unwrap();
                ops.save_block(&apart, block, &mut bytes[1]).unwrap();
                let [a, b] = bytes.each_ref().map(|bytes| {
                    let two = bytes.as_chunks::<2>().0.iter();
                    two.map(|&two| match dtype {
                        Dtype::F16 => f16::from_le_bytes(two).to_f32(),
                        _ => bf16::from_le_bytes(two).to_f32(),
                    })
                    .collect::<Vec<f32>>()
                });
                close(&a, &b);
                assert!(a.iter().any(|&x| x != 0.0));
            }
        }
    }
}

#[test]
fn gemma_norms() {
    each(|dtype, cuda, random| {
        for (cols, gemma) in [(1, false), (7, true), (64, true), (1000, false), (1032, true), (2050, false)] {
            let rows = 3;
            let (x, delta) = (floats(random, dtype, rows * cols), floats(random, dtype, rows * cols));
            let weight = floats(random, dtype, cols);
            let w = vector(cuda, &weight);
            let norm = Norm::<Cuda> { weight: &w, eps: 1e-6, gemma };
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| rounded(dtype, x + d)).collect();
            let exact = |x: &[f32]| -> Vec<f64> {
                let row = |row: &[f32]| {
                    let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let factor = 1.0 / (squares / cols as f64 + 1e-6).sqrt();
                    let offset = if gemma { 1.0 } else { 0.0 };
                    let times = |(&x, &w): (&f32, &f32)| f64::from(x) * factor * (f64::from(w) + offset);
                    row.iter().zip(&weight).map(times).collect::<Vec<_>>()
                };
                x.chunks(cols).flat_map(row).collect()
            };
            let what = format!("{cols} {dtype} gemma {gemma}");
            let (input, deltas) = (tensor(cuda, rows, cols, &x), tensor(cuda, rows, cols, &delta));
            let mut out = cuda.tensor(rows, cols).unwrap();
            cuda.rms_norm_as(&input, norm, &mut out).unwrap();
            near(dtype, &cuda.read(&out).unwrap(), &exact(&x), &what);
            let mut residual = tensor(cuda, rows, cols, &x);
            cuda.add_rms_norm_as(&mut residual, &deltas, norm, &mut out).unwrap();
            assert_eq!(*cuda.read(&residual).unwrap(), sum, "{what}");
            near(dtype, &cuda.read(&out).unwrap(), &exact(&sum), &what);
        }
    });
}

#[test]
fn gemma_norms_on_the_cpu() {
    for cpu in cpus() {
        let mut random = Random::new(5);
        for (cols, gemma) in [(1, true), (7, true), (64, false), (1000, true)] {
            let (x, delta) = (random.floats(3 * cols), random.floats(3 * cols));
            let weight = random.floats(cols);
            let w = vector(&cpu, &weight);
            let norm = Norm { weight: &w, eps: 1e-6, gemma };
            let mut residual = tensor(&cpu, 3, cols, &x);
            let mut out = cpu.tensor(3, cols).unwrap();
            cpu.add_rms_norm_as(&mut residual, &tensor(&cpu, 3, cols, &delta), norm, &mut out).unwrap();
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
            assert_eq!(*cpu.read(&residual).unwrap(), sum);
            let exact: Vec<f64> = sum
                .chunks(cols)
                .flat_map(|row| {
                    let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
                    let factor = 1.0 / (squares / cols as f64 + 1e-6).sqrt();
                    let offset = if gemma { 1.0 } else { 0.0 };
                    let times = move |(&x, &w): (&f32, &f32)| f64::from(x) * factor * (f64::from(w) + offset);
                    row.iter().zip(&weight).map(times)
                })
                .collect();
            let found = cpu.read(&out).unwrap().into_owned();
            near_by(4e-6, &found, &exact, &format!("{cpu:?} {cols} gemma {gemma}"));
            let mut alone = cpu.tensor(3, cols).unwrap();
            cpu.rms_norm_as(&residual, norm, &mut alone).unwrap();
            assert_eq!(common::bits(&cpu.read(&alone).unwrap()), common::bits(&found));
        }
    }
}

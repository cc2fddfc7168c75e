//! The small operators against f64.

use quayline_gpu_kernels::cpu::Tensor;
use quayline_gpu_kernels::{
    BatchInput, Cpu, Dtype, Error, Heads, KvShape, Ops, Projection, RopeStyle, WeightSource,
};

use crate::common::{self, Random, bits, close, cpus, store, vector, weight};

fn tensor(cpu: &Cpu, cols: usize, elements: &[f32]) -> Tensor {
    let mut x = cpu.tensor(elements.len().checked_div(cols).unwrap_or(0), cols).unwrap();
    cpu.write(&mut x, elements).unwrap();
    x
}

#[test]
fn norms_are_right_and_bound_to_their_row() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let (rows, cols) = (random.pick(&[0, 1, 2, 5, 40]), random.pick(&[1, 15, 16, 17, 48, 288, 1000]));
        let (x, delta, w) = (random.floats(rows * cols), random.floats(rows * cols), random.floats(cols));
        let eps = random.pick(&[1e-6, 1e-5, 0.1]);
        for cpu in cpus() {
            let weight = vector(&cpu, &w);
            let mut residual = tensor(&cpu, cols, &x);
            let mut out = cpu.tensor(rows, cols).unwrap();
            cpu.add_rms_norm(&mut residual, &tensor(&cpu, cols, &delta), &weight, eps, &mut out).unwrap();
            let sums = cpu.read(&residual).unwrap().into_owned();
            let expected: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
            assert_eq!(sums, expected, "seed {seed} {cpu:?}");
            let together = cpu.read(&out).unwrap().into_owned();
            for row in 0..rows {
                let of_row = &sums[row * cols..(row + 1) * cols];
                let squares: f64 = of_row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                let scale = 1.0 / (squares / cols as f64 + f64::from(eps)).sqrt();
                for (i, &x) in of_row.iter().enumerate() {
                    close(together[row * cols + i], f64::from(x) * scale * f64::from(w[i]), 4e-6, || {
                        format!("seed {seed} {cpu:?} [{rows}, {cols}] row {row}, {i}")
                    });
                }
                // The plain norm of the sum, alone, is the same.
                let mut alone = cpu.tensor(1, cols).unwrap();
                cpu.rms_norm(&tensor(&cpu, cols, of_row), &weight, eps, &mut alone).unwrap();
                assert_eq!(bits(&cpu.read(&alone).unwrap()), bits(&together[row * cols..(row + 1) * cols]));
            }
            // Heads are rows too.
            let mut heads = tensor(&cpu, 3 * cols, &sums.repeat(3));
            cpu.head_norm(&mut heads, &weight, eps).unwrap();
            assert_eq!(bits(&cpu.read(&heads).unwrap()), bits(&together.repeat(3)), "seed {seed} {cpu:?}");
        }
    }
}

#[test]
fn rope_turns_pairs_by_their_angle() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let heads = Heads { query: random.pick(&[1, 3, 4]), kv: 1, dim: random.pick(&[2, 6, 48, 64, 128]) };
        let half = random.pick(&[1, heads.dim / 2, heads.dim.div_ceil(4).min(heads.dim / 2)]);
        let style = random.pick(&[RopeStyle::Halves, RopeStyle::Interleaved]);
        let tokens = random.pick(&[0, 1, 7, 300]);
        let positions: Vec<u32> = (0..tokens).map(|_| random.below(50) as u32).collect();
        let angle = |position: u32, i: usize| f64::from(position) * 0.37_f64.powi(i as i32);
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..50).flat_map(|p| (0..half).map(move |i| f(angle(p, i)) as f32)).collect()
        };
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        let (q, k) = (random.floats(tokens * heads.query * heads.dim), random.floats(tokens * heads.dim));
        for cpu in cpus() {
            let table = cpu.rope_table(&cos, &sin, 2 * half, style).unwrap();
            let batch = BatchInput {
                positions: &positions,
                slots: &vec![-1; tokens],
                spans: &[],
                block_tables: &[],
                block_size: 1,
            };
            let batch = cpu.batch(batch).unwrap();
            let (width, mut turned_k) = (heads.query * heads.dim, tensor(&cpu, heads.dim, &k));
            let mut turned_q = tensor(&cpu, width, &q);
            cpu.rope(&batch, &table, &mut turned_q, &mut turned_k, heads).unwrap();
            for (found, before) in [(&turned_q, &q), (&turned_k, &k)] {
                let found = cpu.read(found).unwrap();
                let of_token = before.len().checked_div(tokens).unwrap_or(0);
                for (index, (found, before)) in
                    found.chunks(heads.dim).zip(before.chunks(heads.dim)).enumerate()
                {
                    let position = positions[index * heads.dim / of_token];
                    let mut exact: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
                    for i in 0..half {
                        let (a, b) = match style {
                            RopeStyle::Halves => (i, i + half),
                            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                        };
                        let (x, y, (sin, cos)) =
                            (f64::from(before[a]), f64::from(before[b]), angle(position, i).sin_cos());
                        (exact[a], exact[b]) = (x * cos - y * sin, x * sin + y * cos);
                    }
                    for (&found, exact) in found.iter().zip(exact) {
                        close(found, exact, 1e-6, || format!("seed {seed} {cpu:?} {heads:?} {style:?}"));
                    }
                }
            }
        }
    }
}

#[test]
fn silu_is_right_from_end_to_end() {
    let special = [0.0, -0.0, 1.0, -1.0, 87.0, -87.0, 90.0, -90.0, -200.0, 200.0, 1e-30, -1e-30, 3e38, -3e38];
    for len in [1, 15, 16, 17, 1024, 1025, 40_000] {
        let mut random = Random::new(len as u64);
        let mut gate: Vec<f32> = (0..len).map(|_| random.float() * 20.0).collect();
        for (to, from) in gate.iter_mut().zip(special) {
            *to = from;
        }
        let up = random.floats(len);
        for cpu in cpus() {
            let mut out = cpu.tensor(len, 1).unwrap();
            cpu.silu_mul(&tensor(&cpu, 1, &gate), &tensor(&cpu, 1, &up), &mut out).unwrap();
            for (i, &found) in cpu.read(&out).unwrap().iter().enumerate() {
                let (x, y) = (f64::from(gate[i]), f64::from(up[i]));
                let exact = x / (1.0 + (-x).exp()) * y;
                close(found, exact, exact.abs() * 1e-6 + 1e-35, || format!("{cpu:?} silu({x}) * {y}"));
            }
        }
    }
}

#[test]
fn rows_are_fetched_as_they_are() {
    let mut random = Random::new(3);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for cols in [1, 16, 50, 288] {
            let table = random.stored(dtype, &[30, cols]);
            let tokens: Vec<u32> = (0..400).map(|_| random.below(30) as u32).collect();
            for cpu in cpus() {
                let mut out = cpu.tensor(400, cols).unwrap();
                let expected: Vec<f32> = tokens
                    .iter()
                    .flat_map(|&token| table.values[token as usize * cols..][..cols].iter().copied())
                    .collect();
                for weight in [weight(&cpu, &table), cpu.table(table.source.clone()).unwrap()] {
                    cpu.embed(&weight, &tokens, &mut out).unwrap();
                    assert_eq!(cpu.read(&out).unwrap(), expected, "{cpu:?} {dtype} {cols}");
                }
                let mut picked = cpu.tensor(3, cols).unwrap();
                cpu.gather_rows(&out, &[399, 0, 399], &mut picked).unwrap();
                let rows = [399, 0, 399].map(|row| &expected[row * cols..(row + 1) * cols]).concat();
                assert_eq!(cpu.read(&picked).unwrap(), rows, "{cpu:?} {dtype} {cols}");
            }
        }
    }
}

#[test]
fn tables_are_no_matrices_and_heads_are_padded() {
    let cpu = common::cpus().next().unwrap();
    let source = store(Dtype::Bf16, &[2, 3], &[0.0; 6], 1).source;
    let table = cpu.table(source.clone()).unwrap();
    let (x, mut out) = (tensor(&cpu, 3, &[1.0; 3]), tensor(&cpu, 3, &[7.0; 6]));
    let mut projections = [Projection { weight: &table, bias: None, out: &mut out }];
    let error = cpu.linear(&x, &mut projections).unwrap_err();
    assert_eq!(error.to_string(), "linear: packed matrices (this one was made as a table) is 0, expected 1");
    assert!(cpu.table(WeightSource { range: 1..7, shape: vec![3], ..source }).is_err());

    let kv = KvShape { layers: 1, blocks: 2, block_size: 4, kv_heads: 1, head_dim: 4, dtype: Dtype::F16 };
    assert_eq!(cpu.kv_block_bytes(kv).unwrap(), 2 * 4 * 16 * 2, "heads are padded to 16 elements");
    assert!(matches!(cpu.kv_pool(KvShape { blocks: usize::MAX, ..kv }), Err(Error::Memory { .. })));
    assert!(matches!(Cpu::new(None, None), Ok(cpu) if cpu.isa().available()));
}

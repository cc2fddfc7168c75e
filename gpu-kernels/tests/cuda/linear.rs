//! Matrix products on the emulator against sums in f64, and the promise that a row's bits depend on the row alone.

use std::sync::atomic::Ordering;

use quayline_gpu_kernels::{Dtype, Ops, Projection};

use crate::common::{self, Random, close, half_ulp};
use crate::elementwise::{each, floats, matrix, tensor, vector};
use crate::emulator;

#[test]
fn products_are_right_and_a_rows_bits_are_its_own() {
    each(|dtype, cuda, random| {
        for (inner, outer) in [(1, 1), (8, 16), (64, 130), (100, 17), (511, 33), (1030, 200), (2048, 16)] {
            let rows = random.pick(&[1, 2, 15, 16, 17, 40, 65]);
            let x = floats(random, dtype, rows * inner);
            let w = floats(random, dtype, outer * inner);
            let bias = floats(random, dtype, outer);
            let (weight, bias_weight) = (matrix(cuda, outer, &w), vector(cuda, &bias));
            let product = |x: &[f32]| {
                let rows = x.len() / inner;
                let x = tensor(cuda, rows, inner, x);
                let (mut a, mut b) = (cuda.tensor(rows, outer).unwrap(), cuda.tensor(rows, outer).unwrap());
                let mut projections = [
                    Projection { weight: &weight, bias: None, out: &mut a },
                    Projection { weight: &weight, bias: Some(&bias_weight), out: &mut b },
                ];
                cuda.linear(&x, &mut projections).unwrap();
                [cuda.read(&a).unwrap().into_owned(), cuda.read(&b).unwrap().into_owned()]
            };
            let whole = product(&x);
            for (row, x) in x.chunks(inner).enumerate() {
                for (column, w) in w.chunks(inner).enumerate() {
                    let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                    let (exact, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    for (found, exact) in [
                        (whole[0][row * outer + column], exact),
                        (whole[1][row * outer + column], exact + f64::from(bias[column])),
                    ] {
                        close(found, exact, exact.abs() * half_ulp(dtype) * 1.01 + size * 1e-6, || {
                            format!("{rows} x {inner} -> {outer} {dtype}: row {row}, column {column}")
                        });
                    }
                }
            }
            // The last row alone, and among others: other shapes of blocks, the same bits.
            let alone = product(&x[(rows - 1) * inner..]);
            let mut crowd = floats(random, dtype, 70 * inner);
            crowd[69 * inner..].copy_from_slice(&x[(rows - 1) * inner..]);
            let crowd = product(&crowd);
            for which in 0..2 {
                let last = common::bits(&whole[which][(rows - 1) * outer..]);
                assert_eq!(common::bits(&alone[which]), last, "{rows} x {inner} -> {outer} {dtype}");
                assert_eq!(
                    common::bits(&crowd[which][69 * outer..]),
                    last,
                    "{rows} x {inner} -> {outer} {dtype}"
                );
            }
        }
    });
}

/// The kernel of tiles of 128 rows and 256 columns, at their edges, at those of its four stages, and with more tiles
/// than blocks.
#[test]
fn products_for_hopper_are_right() {
    for (seed, (dtype, descending)) in (0..).zip([(Dtype::Bf16, false), (Dtype::F16, true)]) {
        let Some((cuda, emulator)) = emulator::cuda(dtype, descending) else { return };
        emulator.hopper.store(true, Ordering::Relaxed);
        emulator.shared_bytes_max.store(227 << 10, Ordering::Relaxed);
        let (cuda, mut random) = (cuda.with_fast_prompts(true), Random::new(seed));
        // A GPU has so many multiprocessors that a matrix must be wide; of that, some rows are looked at.
        let wide = emulator::on_gpu().then_some((129, 320, 16_900, 16));
        let shapes = [(65, 8, 257, 1), (129, 100, 40, 1), (130, 320, 259, 1), (257, 136, 515, 4)];
        for (rows, inner, outer, every) in shapes.into_iter().chain(wide) {
            let x = floats(&mut random, dtype, rows * inner);
            let w = floats(&mut random, dtype, outer * inner);
            let bias = floats(&mut random, dtype, outer);
            let (weight, bias_weight) = (matrix(&cuda, outer, &w), vector(&cuda, &bias));
            let input = tensor(&cuda, rows, inner, &x);
            let nothing = vec![f32::NAN; rows * outer];
            let [mut plain, mut moved] = [(); 2].map(|()| tensor(&cuda, rows, outer, &nothing));
            let mut projections = [
                Projection { weight: &weight, bias: None, out: &mut plain },
                Projection { weight: &weight, bias: Some(&bias_weight), out: &mut moved },
            ];
            let before = emulator.hopper_launches.load(Ordering::Relaxed);
            cuda.linear(&input, &mut projections).unwrap();
            if !emulator::on_gpu() {
                assert_eq!(
                    emulator.hopper_launches.load(Ordering::Relaxed) - before,
                    2,
                    "another kernel ran"
                );
            }
            let (plain, moved) = (cuda.read(&plain).unwrap(), cuda.read(&moved).unwrap());
            for (row, x) in x.chunks(inner).enumerate().step_by(every) {
                for (column, w) in w.chunks(inner).enumerate() {
                    let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                    let (exact, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let at = row * outer + column;
                    for (found, exact) in [(plain[at], exact), (moved[at], exact + f64::from(bias[column]))] {
                        close(found, exact, exact.abs() * half_ulp(dtype) * 1.01 + size * 1e-6, || {
                            format!("{rows} x {inner} -> {outer} {dtype}: row {row}, column {column}")
                        });
                    }
                }
            }
        }
    }
}

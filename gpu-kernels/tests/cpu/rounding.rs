//! Weights of a checkpoint rounded to small numbers: each within half a step of what it was.

use quayline_gpu_kernels::{Dtype, Ops, Rounding};

use crate::common::{self, Random, close};
use crate::integers::rows;

#[test]
fn rounding_to_fp8_is_within_half_a_step() {
    for seed in 50..70 {
        let mut random = Random::new(seed);
        let shape = (1 + random.below(40), random.pick(&[1, 7, 8, 129, 400]));
        let stored = random.stored(Dtype::Bf16, &[shape.0, shape.1]);
        let cpu = common::cpu(2, random.pick(&common::isas().collect::<Vec<_>>()));
        let found = rows(&cpu, &cpu.weight_rounded(stored.source, Rounding::Fp8).unwrap(), shape);
        for (found, exact) in found.chunks(shape.1).zip(stored.values.chunks(shape.1)) {
            let largest = exact.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            for (found, exact) in found.iter().zip(exact) {
                // Three bits of fraction, and below 2^-6 of 448 steps of 2^-9.
                let step = (exact.abs() / 8.0).max(largest / 448.0 / 512.0);
                close(*found, f64::from(*exact), f64::from(step) * 0.501, || format!("seed {seed}"));
            }
        }
    }
}

#[test]
fn rounding_is_within_half_a_step() {
    for seed in 30..50 {
        let mut random = Random::new(seed);
        let shape = (1 + random.below(40), random.pick(&[1, 7, 8, 96, 127, 128, 129, 400]));
        let dtype = random.pick(&[Dtype::F32, Dtype::Bf16, Dtype::F16]);
        let stored = random.stored(dtype, &[shape.0, shape.1]);
        let cpu = common::cpu(2, random.pick(&common::isas().collect::<Vec<_>>()));
        for (rounding, group, steps) in [(Rounding::Int8, shape.1, 127.0), (Rounding::Int4, 128, 8.0)] {
            let weight = cpu.weight_rounded(stored.source.clone(), rounding).unwrap();
            let found = rows(&cpu, &weight, shape);
            for (row, (found, exact)) in found.chunks(shape.1).zip(stored.values.chunks(shape.1)).enumerate()
            {
                for (found, exact) in found.chunks(group).zip(exact.chunks(group)) {
                    let largest = exact.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
                    // On the side of four bits that reaches less far, the last step is lost.
                    let step = largest / steps * if rounding == Rounding::Int4 { 2.0 } else { 1.0 };
                    for (found, exact) in found.iter().zip(exact) {
                        let allowed = f64::from(step) * 0.501;
                        close(*found, f64::from(*exact), allowed, || {
                            format!("seed {seed} {rounding:?} row {row}")
                        });
                    }
                }
            }
        }
    }
}

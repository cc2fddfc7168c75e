//! Rows and weights of one byte an element on the CPU, with all instructions that this machine has.

use quayline_gpu_kernels::{Cpu, Dtype};

use crate::common::{Random, cpus};
use crate::quantised;

fn each(test: impl Fn(Dtype, &Cpu, &mut Random)) {
    cpus().for_each(|cpu| test(Dtype::F32, &cpu, &mut Random::new(3)));
}

#[test]
fn norms_to_one_byte() {
    each(quantised::norms_to_one_byte);
}

#[test]
fn bytes_with_one_scale_and_with_one_per_output() {
    each(quantised::bytes_with_one_scale_and_with_one_per_output);
}

#[test]
fn what_does_not_fit_is_refused() {
    cpus().for_each(|cpu| quantised::what_does_not_fit_is_refused(&cpu));
}

//! Mixtures of experts and adapters on the CPU, with all instructions that this machine has and weights of all types.

use quayline_gpu_kernels::{Cpu, Dtype};

use crate::common::{Random, cpus};
use crate::grouped;

fn each(test: impl Fn(Dtype, &Cpu, &mut Random)) {
    for cpu in cpus() {
        for (seed, dtype) in (0..).zip([Dtype::F32, Dtype::Bf16, Dtype::F16]) {
            test(dtype, &cpu, &mut Random::new(seed));
        }
    }
}

#[test]
fn the_best_experts_are_chosen() {
    each(grouped::the_best_experts_are_chosen);
}

#[test]
fn pairs_have_the_bits_of_a_product_with_all_experts() {
    each(grouped::pairs_have_the_bits_of_a_product_with_all_experts);
}

#[test]
fn adapters_change_their_rows_alone() {
    each(grouped::adapters_change_their_rows_alone);
}

#[test]
fn numbers_that_do_not_fit_are_refused() {
    cpus().for_each(|cpu| grouped::numbers_that_do_not_fit_are_refused(&cpu));
}

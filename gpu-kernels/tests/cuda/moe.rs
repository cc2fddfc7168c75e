//! Mixtures of experts and adapters on the emulator.

use quayline_gpu_kernels::Dtype;

use crate::emulator::{self, each};
use crate::grouped;

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
    let Some((cuda, _)) = emulator::cuda(Dtype::Bf16, false) else { return };
    grouped::numbers_that_do_not_fit_are_refused(&cuda);
}

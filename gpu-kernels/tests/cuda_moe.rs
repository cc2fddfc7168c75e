//! Mixtures of experts and adapters on the emulator.
#![cfg(unix)]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    reason = "a test: small numbers, a panic is the report, and the emulator is a library of C++"
)]

mod common;
#[path = "common/emulator.rs"]
mod emulator;
#[path = "common/grouped.rs"]
mod grouped;

use emulator::each;
use quayline_gpu_kernels::Dtype;

#[test]
fn the_best_experts_are_chosen() {
    each(grouped::the_best_experts_are_chosen);
}

#[test]
fn experts_give_what_their_weights_alone_give() {
    each(grouped::experts_give_what_their_weights_alone_give);
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

//! Draft verification on the emulator.

use quayline_gpu_kernels::{Cuda, Dtype};

use crate::emulator;
use crate::verifying;

fn machines() -> Vec<Cuda> {
    [false, true].into_iter().filter_map(|d| emulator::cuda(Dtype::Bf16, d)).map(|(cuda, _)| cuda).collect()
}

#[test]
fn walks_of_chains_and_trees_are_those_of_the_host() {
    machines().iter().for_each(verifying::walks_of_chains_and_trees_are_those_of_the_host);
}

#[test]
fn without_distributions_the_tokens_are_those_of_sampling_one_at_a_time() {
    machines()
        .iter()
        .for_each(verifying::without_distributions_the_tokens_are_those_of_sampling_one_at_a_time);
}

#[test]
fn the_first_token_is_distributed_as_the_target() {
    machines().iter().for_each(verifying::the_first_token_is_distributed_as_the_target);
}

#[test]
fn wrong_trees_are_refused_and_nothing_allowed_is_no_token() {
    machines().iter().for_each(verifying::wrong_trees_are_refused_and_nothing_allowed_is_no_token);
}

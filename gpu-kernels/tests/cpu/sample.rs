//! Sampling and draft verification on the CPU, with all instructions that this machine has.

use crate::common::cpus;
use crate::sampling;
use crate::verifying;

#[test]
fn a_draw_falls_where_the_sorted_distribution_says() {
    for cpu in cpus() {
        sampling::draws(&cpu);
    }
}

#[test]
fn edges_of_the_vocabulary() {
    cpus().for_each(|cpu| sampling::edges_of_the_vocabulary(&cpu));
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    cpus().for_each(|cpu| sampling::numbers_that_mean_nothing_are_refused(&cpu));
}

#[test]
fn walks_of_chains_and_trees_are_those_of_the_host() {
    cpus().for_each(|cpu| verifying::walks_of_chains_and_trees_are_those_of_the_host(&cpu));
}

#[test]
fn without_distributions_the_tokens_are_those_of_sampling_one_at_a_time() {
    cpus().for_each(|cpu| {
        verifying::without_distributions_the_tokens_are_those_of_sampling_one_at_a_time(&cpu)
    });
}

#[test]
fn the_first_token_is_distributed_as_the_target() {
    cpus().for_each(|cpu| verifying::the_first_token_is_distributed_as_the_target(&cpu));
}

#[test]
fn wrong_trees_are_refused_and_nothing_allowed_is_no_token() {
    cpus().for_each(|cpu| verifying::wrong_trees_are_refused_and_nothing_allowed_is_no_token(&cpu));
}

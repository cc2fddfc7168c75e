//! Sampling on the emulator: against a sort, in f64, and against the CPU.

use quayline_gpu_kernels::{Cpu, Cuda, Dtype};

use crate::emulator;
use crate::sampling;

fn machines() -> Vec<Cuda> {
    [false, true].into_iter().filter_map(|d| emulator::cuda(Dtype::Bf16, d)).map(|(cuda, _)| cuda).collect()
}

#[test]
fn a_draw_falls_where_the_sorted_distribution_says() {
    let on_cpu = sampling::draws(&Cpu::detect().unwrap());
    for cuda in machines() {
        for (case, (found, on_cpu)) in sampling::draws(&cuda).iter().zip(&on_cpu).enumerate() {
            assert_eq!(found.token, on_cpu.token, "case {case}: the CPU draws another token");
        }
    }
}

#[test]
fn edges_of_the_vocabulary() {
    machines().iter().for_each(sampling::edges_of_the_vocabulary);
}

#[test]
fn numbers_that_mean_nothing_are_refused() {
    machines().iter().for_each(sampling::numbers_that_mean_nothing_are_refused);
}

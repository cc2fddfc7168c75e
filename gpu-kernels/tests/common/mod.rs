//! Random numbers, weights in memory, and every CPU that this machine can be.
#![allow(dead_code, reason = "each test file uses its part")]

use std::num::NonZeroUsize;
use std::sync::Arc;

use half::{bf16, f16};
use quayline_gpu_kernels::{Cpu, Dtype, Isa, Ops, WeightSource, cpu::Weight};

/// What an E4M3 byte is worth; its two that are no numbers are not asked for.
pub(crate) fn e4m3(bits: u8) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7) / 8.0);
    let size = if exponent == 0 { fraction / 64.0 } else { (1.0 + fraction) * 2.0_f64.powi(exponent - 7) };
    if bits >> 7 == 1 { -size } else { size }
}

/// A small generator (SplitMix64) with a seed to print.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.next() & 1 == 1
    }

    /// In -1..1, never tiny.
    pub(crate) fn float(&mut self) -> f32 {
        let x = (self.next() >> 40) as f32 / (1_u64 << 24) as f32;
        2.0 * x - 1.0
    }

    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// A weight whose bytes start at an odd address half of the time.
    pub(crate) fn stored(&mut self, dtype: Dtype, shape: &[usize]) -> Stored {
        let values = self.floats(shape.iter().product());
        let offset = self.below(4);
        store(dtype, shape, &values, offset)
    }
}

/// A weight in memory, and what its elements are worth.
pub(crate) struct Stored {
    pub(crate) source: WeightSource,
    pub(crate) values: Vec<f32>,
    pub(crate) shape: Vec<usize>,
}

pub(crate) fn store(dtype: Dtype, shape: &[usize], values: &[f32], offset: usize) -> Stored {
    let mut bytes = vec![0xff; offset];
    let mut rounded = Vec::new();
    for &x in values {
        match dtype {
            Dtype::F32 => {
                bytes.extend(x.to_le_bytes());
                rounded.push(x);
            }
            Dtype::Bf16 => {
                bytes.extend(bf16::from_f32(x).to_le_bytes());
                rounded.push(bf16::from_f32(x).to_f32());
            }
            Dtype::F16 => {
                bytes.extend(f16::from_f32(x).to_le_bytes());
                rounded.push(f16::from_f32(x).to_f32());
            }
        }
    }
    let range = offset..bytes.len();
    let source = WeightSource { bytes: Arc::new(bytes), range, dtype, shape: shape.to_vec() };
    Stored { source, values: rounded, shape: shape.to_vec() }
}

pub(crate) fn weight(cpu: &Cpu, stored: &Stored) -> Weight {
    cpu.weight(stored.source.clone()).unwrap()
}

pub(crate) fn vector(cpu: &Cpu, values: &[f32]) -> Weight {
    weight(cpu, &store(Dtype::F32, &[values.len()], values, 0))
}

pub(crate) fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.iter().copied().filter(|isa| isa.available())
}

pub(crate) fn cpu(threads: usize, isa: Isa) -> Cpu {
    Cpu::new(NonZeroUsize::new(threads), Some(isa)).unwrap()
}

/// Every instruction set that this machine has, on one and on three threads.
pub(crate) fn cpus() -> impl Iterator<Item = Cpu> {
    isas().flat_map(|isa| [1, 3].map(|threads| cpu(threads, isa)))
}

/// `x` as it is stored.
pub(crate) fn rounded(dtype: Dtype, x: f32) -> f32 {
    if dtype == Dtype::F16 { f16::from_f32(x).to_f32() } else { bf16::from_f32(x).to_f32() }
}

/// Half of the spacing of stored numbers around 1.
pub(crate) fn half_ulp(dtype: Dtype) -> f64 {
    if dtype == Dtype::F16 { 1.0 / 2048.0 } else { 1.0 / 256.0 }
}

pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// What a sum of products of this absolute size may be off by: f32 rounding, and with matrix tiles the rounding of
/// the activations to bf16.
pub(crate) fn linear_error(cpu: &Cpu, dtype: Dtype, size: f64) -> f64 {
    let coarse = cpu.isa().rounds_activations() && dtype == Dtype::Bf16;
    size * if coarse { 1.0 / 256.0 } else { 1e-6 } + 1e-7
}

/// What an average of values up to 1 may be off by: what it is in f32, or where weights are rounded to bf16, as they
/// are on GPUs, what that does.
pub(crate) fn attention_error(cpu: &Cpu, dtype: Dtype, in_f32: f64) -> f64 {
    if cpu.isa().rounds_activations() && dtype == Dtype::Bf16 { half_ulp(dtype) } else { in_f32 }
}

/// Activations as they meet weights of small integers: rounded where bf16 is multiplied.
pub(crate) fn before_integers(cpu: &Cpu, x: &[f32]) -> Vec<f32> {
    let coarse = cpu.isa().rounds_activations();
    x.iter().map(|&x| if coarse { rounded(Dtype::Bf16, x) } else { x }).collect()
}

/// Fails with a description when two numbers are further apart than allowed.
pub(crate) fn close(found: f32, exact: f64, error: f64, what: impl Fn() -> String) {
    let apart = (f64::from(found) - exact).abs();
    assert!(apart <= error, "{}: found {found}, exact {exact}, off by {apart:e}, allowed {error:e}", what());
}

#![doc = include_str!("../README.md")]

mod dtype;
mod error;
mod ops;
mod shape;

pub mod cpu;

pub use cpu::{Cpu, Isa};
pub use dtype::Dtype;
pub use error::Error;
pub use ops::{Attention, BatchInput, Ops, Projection, Span, WeightBytes, WeightSource};
pub use shape::{Heads, KvShape, RopeStyle};

#![doc = include_str!("../README.md")]
#![expect(
    unsafe_code,
    reason = "CPU instructions, and outputs shared by threads; every block says what makes it sound"
)]

#[cfg(target_endian = "big")]
compile_error!("weights are read where they lie, and they lie in little-endian order");

mod attention;
mod door;
mod dtype;
mod elements;
mod error;
mod fp8;
mod grouped;
mod latent;
mod ops;
mod quantised;
mod rounding;
mod sampling;
mod shape;
mod stored;
mod weights;

pub mod cpu;
pub mod cuda;

pub use attention::{Attention, Scores};
pub use cpu::{Cpu, Isa};
pub use cuda::Cuda;
pub use dtype::Dtype;
pub use elements::{Gate, HeadNorms, Norm};
pub use error::Error;
pub use grouped::{Grouped, Router};
pub use latent::{Latent, LatentAttention, LatentQuery, LatentShape};
pub use ops::{BatchInput, Ops, Projection, Span};
pub use quantised::{QuantSource, Quantised, RowStorage};
pub use sampling::{Draft, Drafts, Draw, Sampled, Sampling, Seen, Verified};
pub use shape::{Heads, KvOrder, KvShape, KvStorage, RopeStyle};
pub use weights::{Fp8Source, Int4Layout, Int4Source, Rounding, WeightBytes, WeightPart, WeightSource};

#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod buckets;
mod cache;
mod check;
mod claim;
mod config;
mod error;
mod hash;
mod id;
mod pool;
mod prefix;
pub mod scenario;
mod sequence;
mod stats;
mod table;

pub use cache::KvCache;
pub use check::Violation;
pub use claim::{Admission, Claim, Grant, Hit, Reservation, Reuse, SequenceKey};
pub use config::Config;
pub use error::Error;
pub use hash::BlockHash;
pub use id::{BlockCount, BlockId, BlockSize, SequenceId, Slot, TokenCount, TokenId, TokenIndex};
pub use stats::{HitStats, Stats};
pub use table::BlockTable;

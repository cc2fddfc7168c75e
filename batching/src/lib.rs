#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod batcher;
mod budget;
mod check;
mod config;
mod error;
mod flight;
mod id;
mod memory;
mod plan;
mod preempt;
mod queue;
mod reason;
mod request;
pub mod scenario;
mod sequence;
mod standing;
mod step;

pub use batcher::{Batcher, Flow};
pub use check::Violation;
pub use config::{Config, Order, Prefill};
pub use error::{ConfigError, Error, Refusal, RefusalReason};
pub use id::{RequestId, Tick, TokenId};
pub use memory::{Memory, Need, Room};
pub use plan::{Admitted, Note, Plan, Scheduled};
pub use reason::Reason;
pub use request::{FinishReason, Finished, Request, Sampled, StopRules};
pub use standing::{Counts, Standing, Stats};

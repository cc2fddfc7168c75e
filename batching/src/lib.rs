#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod error;
mod id;
mod memory;
mod plan;
mod reason;
mod request;

pub use config::{Config, Order, Prefill};
pub use error::{ConfigError, Error, Refusal, RefusalReason};
pub use id::{RequestId, Tick, TokenId};
pub use memory::{Memory, Need, Room};
pub use plan::{Admitted, Note, Plan, Scheduled};
pub use reason::Reason;
pub use request::{FinishReason, Finished, Request, Sampled, StopRules};

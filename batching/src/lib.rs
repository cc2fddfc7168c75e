#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod admit;
mod apply;
mod batcher;
mod budget;
mod check;
mod config;
mod dump;
mod encoder;
mod error;
mod expire;
mod flight;
mod fork;
mod gates;
mod id;
mod line;
mod memory;
mod order;
mod plan;
mod preempt;
mod queue;
mod reason;
mod remains;
mod remote;
mod request;
pub mod scenario;
mod sequence;
mod speculation;
mod standing;
mod step;
mod timers;

pub use batcher::{Batcher, Flow};
pub use check::Violation;
pub use config::{Config, Costs, EncoderLimits, FailedLoads, LongPrefills, Preemption, Prefill};
pub use dump::{Dump, DumpError};
pub use error::{ConfigError, Error, ForkError, Refusal, RefusalReason, WeightError};
pub use id::{AdapterId, RequestId, StepId, TenantId, Tick, TokenId};
pub use memory::{Memory, Need, Remote, Room};
pub use order::{Candidate, Fair, Lane, Order, Policy, Rank, Service};
pub use plan::{Admitted, Encode, Load, Note, Plan, Preempted, Scheduled, Source};
pub use reason::Reason;
pub use request::{EncoderItem, FinishReason, Finished, Grammar, Request, Sampled, StopRules, Targets};
pub use speculation::{DraftLimit, Drafts};
pub use standing::{Counts, Standing, Stats};

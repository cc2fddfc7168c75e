#![doc = include_str!("../README.md")]

mod active;
mod adapt;
mod agreement;
mod ahead;
mod beam;
mod block_file;
mod bundled;
mod chat;
mod config;
mod constraint;
mod copies;
mod detokenize;
mod disk;
mod drafts;
mod engine;
mod error;
mod failure;
mod files;
mod grammar;
mod graphs;
mod handover;
mod host_tier;
mod input;
mod json;
mod kv_events;
mod layers;
mod load;
mod machine;
mod model;
mod models;
mod options;
mod output;
mod reasons;
mod recent;
mod request;
mod rope;
mod rows;
mod sampling;
mod sizing;
mod snapshot;
mod step;
mod stop;
mod template;
mod text;
mod tokenizer;
mod warm_up;
mod watch;
mod weights;

pub use chat::Chat;
pub use config::{
    Architecture, ConfigError, Fp8Scales, GenerationConfig, ModelConfig, Quantization, QuantizationMethod,
    RopeConfig, RopeScaling,
};
pub use constraint::{Constraint, ConstraintError};
pub use copies::{Copied, Direction};
pub use detokenize::TextStream;
pub use drafts::Speculation;
pub use engine::Engine;
pub use error::{LoadError, Refusal, TextError};
pub use files::ModelFiles;
pub use grammar::{Grammar, Grammars, Guide, GuideState, look_ahead};
pub use handover::{DeliveryError, Load, Parcel};
pub use input::StepArrays;
pub use model::{Model, StepInput, StepLimits};
pub use options::{
    CublasLtPlace, Device, FailedLoads, KvDtype, KvSize, Offloading, OffloadingDisk, OffloadingWrite,
    Options, Preemption, Speeds,
};
pub use output::{Finish, FinishReason, Logprobs, Output, SampledToken, StopReason, TokenLogprob};
pub use quayline_batching::{Fair, Policy, Targets, TenantId, WeightError};
pub use quayline_gpu_kernels::{Dtype, Rounding};
pub use reasons::{Outcome, ReasonCount, TurnedAway};
pub use request::{Beams, Request, RequestId, Sampling, Tick};
pub use rope::{CosSin, Rope};
pub use snapshot::{
    BlockUse, Blocks, DiskBacklog, DiskUse, DraftTotals, HostUse, PrefixUse, RequestState, Snapshot,
    StepShape, Totals, WaitReason,
};
pub use text::{Text, TokenText};
pub use weights::{Weights, WeightsError};

pub use quayline_kv_cache::hash::Algorithm as HashAlgorithm;
pub use quayline_kv_cache::{BlockNames, EventBatch, Residency};

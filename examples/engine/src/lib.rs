#![doc = include_str!("../README.md")]

mod chat;
mod config;
mod detokenize;
mod engine;
mod error;
mod files;
mod json;
mod layers;
mod model;
mod models;
mod options;
mod output;
mod request;
mod rope;
mod sampling;
mod snapshot;
mod stop;
mod template;
mod text;
mod tokenizer;
mod weights;

pub use chat::Chat;
pub use config::{Architecture, ConfigError, GenerationConfig, ModelConfig, RopeConfig, RopeScaling};
pub use detokenize::TextStream;
pub use engine::Engine;
pub use error::{LoadError, Refusal, TextError};
pub use files::ModelFiles;
pub use model::{Model, StepInput, StepLimits};
pub use options::{KvDtype, KvSize, Options, Order};
pub use output::{Finish, FinishReason, Logprobs, Output, SampledToken, StopReason, TokenLogprob};
pub use request::{Request, RequestId, Sampling, Tick};
pub use rope::{CosSin, Rope};
pub use snapshot::{BlockUse, Blocks, PrefixUse, RequestState, Snapshot, StepShape, Totals};
pub use text::{Text, TokenText};
pub use weights::{Weights, WeightsError};

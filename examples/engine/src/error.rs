//! What can go wrong, in words that name the file, the field or the number at fault.

use std::io;
use std::path::PathBuf;

use crate::config::ConfigError;
use crate::files::ModelFiles;
use crate::weights::WeightsError;

/// Why a checkpoint could not be loaded. One line, fit to be shown to whoever typed the command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file was read, but what it says is malformed or contradicts another file.
    #[error("{file}: {problem}")]
    Invalid {
        /// Name of the file inside the checkpoint.
        file: String,
        /// What is wrong with it, naming the field.
        problem: String,
    },
    /// `config.json` lacks a size, holds an impossible one, or describes what is not computed here.
    #[error("config.json: {0}")]
    Config(#[from] ConfigError),
    /// The weights are damaged, or are not those that `config.json` describes.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The kernels refused a size, or the memory for it could not be had.
    #[error(transparent)]
    Kernels(#[from] quayline_gpu_kernels::Error),
    /// What one of the others says is wrong with a file of this directory.
    #[error("{}: {error}", directory.display())]
    In {
        /// The checkpoint.
        directory: PathBuf,
        /// What is wrong.
        error: Box<LoadError>,
    },
    /// A file asks for something that this engine does not do.
    #[error("{file}: {feature} is not supported")]
    Unsupported {
        /// Name of the file inside the checkpoint.
        file: String,
        /// What was asked for.
        feature: String,
    },
    /// The tokenizer can produce an id that the embedding table has no row for.
    #[error("tokenizer.json names token {token} but config.json has vocab_size {vocab_size}")]
    Vocabulary {
        /// The largest id of the tokenizer.
        token: u32,
        /// Rows of the embedding table.
        vocab_size: u32,
    },
    /// An engine option is out of range for this model or this machine.
    #[error("option {option}: {problem}")]
    Options {
        /// The field of [`Options`](crate::Options).
        option: &'static str,
        /// Why it cannot be.
        problem: String,
    },
    /// The tokenizer or the chat template of the checkpoint is unusable.
    #[error(transparent)]
    Text(#[from] TextError),
}

impl LoadError {
    /// Says in which directory the file at fault is, if there is one and the message does not say it yet.
    pub(crate) fn of(self, files: &ModelFiles) -> Self {
        match (self, files.directory()) {
            (error @ (Self::Read { .. } | Self::Kernels(_) | Self::Options { .. }), _) | (error, None) => {
                error
            }
            (error, Some(directory)) => Self::In { directory: directory.into(), error: Box::new(error) },
        }
    }

    /// A malformed file, by name.
    pub(crate) fn invalid(file: impl Into<String>, problem: impl ToString) -> Self {
        Self::Invalid { file: file.into(), problem: problem.to_string() }
    }
}

/// Why text could not be turned into tokens, or a conversation into text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The tokenizer file is malformed, or the tokenizer refused a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The model came without a chat template and the request brought none.
    #[error("this model has no chat template")]
    NoTemplate,
    /// The template file has several templates and none has this name.
    #[error("this model has no chat template called {0:?}")]
    UnknownTemplate(String),
    /// The template is not valid, or it failed on this conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// The template itself refused the conversation (`raise_exception`), in its own words.
    #[error("{0}")]
    Raised(String),
    /// A message is not of a form the template can render.
    #[error("{0}")]
    Message(String),
    /// `add_generation_prompt` and `continue_final_message` exclude each other.
    #[error("add_generation_prompt and continue_final_message cannot both be set")]
    ContradictoryPrompt,
    /// `continue_final_message` was asked for, but the template did not render the last message's text.
    #[error("continue_final_message: the final message does not appear in the rendered conversation")]
    FinalMessageNotRendered,
}

/// Why a request was not accepted. The engine is as it was before.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A request with this id is already queued or running.
    #[error("request {0} already exists")]
    Duplicate(u64),
    /// Ids from 2^63 on are the engine's own.
    #[error("the id {0} is one of the engine's own, which begin at 2^63")]
    ReservedId(u64),
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for a single new token.
    #[error(
        "the prompt has {prompt} tokens; the model's context is {context}, of which one must be left to answer"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: u32,
        /// Longest sequence of this engine.
        context: u32,
    },
    /// The prompt names a token that the model does not have.
    #[error("token {token} of the prompt is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// The request would need more cache than the whole pool has.
    #[error("the request may need {need} cache blocks, the pool has {pool}")]
    TooLarge {
        /// Blocks for the prompt and one more token.
        need: u32,
        /// Blocks in the pool.
        pool: u32,
    },
    /// A sampling parameter is out of range.
    #[error("{parameter} {problem}")]
    Sampling {
        /// The field's name as on the OpenAI wire.
        parameter: &'static str,
        /// What it must be, and what it was.
        problem: String,
    },
    /// The waiting line is full: try again later.
    #[error("the queue is full: {waiting} {unit} wait, the limit is {limit}")]
    QueueFull {
        /// How many wait.
        waiting: u64,
        /// How many may.
        limit: u64,
        /// What is counted: `requests` or `tokens`.
        unit: &'static str,
    },
}

impl Refusal {
    /// True when the same request may be accepted later (HTTP 429), false when it never will be (400).
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::QueueFull { .. })
    }

    /// Its code, for metrics and logs: one word in `snake_case` without numbers.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Duplicate(_) => "duplicate",
            Self::ReservedId(_) => "reserved_id",
            Self::EmptyPrompt => "empty_prompt",
            Self::PromptTooLong { .. } => "prompt_too_long",
            Self::UnknownToken { .. } => "unknown_token",
            Self::TooLarge { .. } => "too_large",
            Self::Sampling { .. } => "sampling",
            Self::QueueFull { .. } => "queue_full",
        }
    }

    /// The request field at fault, as named on the OpenAI wire.
    #[must_use]
    pub fn parameter(&self) -> Option<&'static str> {
        match self {
            Self::EmptyPrompt | Self::PromptTooLong { .. } | Self::UnknownToken { .. } => Some("prompt"),
            Self::Sampling { parameter, .. } => Some(parameter),
            _ => None,
        }
    }
}

//! Wrong input, with the numbers in it.

use crate::id::RequestId;
use crate::request::Request;

/// A [`Config`](crate::Config) that cannot work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nobody may run.
    #[error("running_max is 0: nobody could ever run")]
    NothingRuns,
    /// No room for a prompt and an answer.
    #[error("model_tokens_max is {model_tokens_max}: a prompt token and a generated one make 2")]
    ModelTooShort {
        /// As configured.
        model_tokens_max: u32,
    },
    /// Running requests would starve.
    #[error("step_tokens_max {step_tokens_max} is below running_max {running_max}: some would starve")]
    StepBelowRunning {
        /// As configured.
        step_tokens_max: u32,
        /// As configured.
        running_max: u32,
    },
    /// Without chunks a long prompt would wait forever.
    #[error(
        "with whole prompts step_tokens_max {step_tokens_max} must reach model_tokens_max {model_tokens_max}"
    )]
    StepBelowModel {
        /// As configured.
        step_tokens_max: u32,
        /// As configured.
        model_tokens_max: u32,
    },
}

/// `add` said no: why, and the request back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("request {} refused: {reason}", request.id)]
pub struct Refusal {
    /// What was offered.
    pub request: Request,
    /// Why it was not taken.
    pub reason: RefusalReason,
}

/// Why `add` refused a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalReason {
    /// The id is in use.
    #[error("a request of this id is still here")]
    Duplicate,
    /// A request of this id was cancelled, but its last output is still to come and would be taken for the
    /// new one's.
    #[error("the last output of a cancelled request of this id is still to come")]
    OutputPending,
    /// There is nothing to start from.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer.
    #[error("a prompt of {prompt_tokens} tokens leaves no room for an answer in {model_tokens_max}")]
    PromptTooLong {
        /// As asked.
        prompt_tokens: u32,
        /// What prompt and answer may have together.
        model_tokens_max: u32,
    },
    /// Zero tokens are asked for.
    #[error("zero tokens are asked for")]
    NothingAsked,
    /// The minimum is above the maximum.
    #[error("at least {new_tokens_min} but at most {new_tokens_max} tokens are asked for")]
    MinimumAboveMaximum {
        /// As asked.
        new_tokens_min: u32,
        /// As asked.
        new_tokens_max: u32,
    },
    /// As many wait as may wait.
    #[error("{queued} requests wait, and no more than {queued_requests_max} may")]
    QueueFull {
        /// How many wait.
        queued: u32,
        /// How many may.
        queued_requests_max: u32,
    },
    /// Too many tokens wait.
    #[error("{queued_tokens} tokens wait, {prompt_tokens} more would pass {queued_tokens_max}")]
    QueueTokensFull {
        /// How many wait.
        queued_tokens: u64,
        /// How many this one has.
        prompt_tokens: u32,
        /// How many may wait.
        queued_tokens_max: u64,
    },
    /// The batcher takes no new requests any more.
    #[error("draining: no new requests are taken")]
    Draining,
}

/// Results that do not belong to anything that was planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No plan asked for an output of this request, or it was given twice.
    #[error("request {id} has an output that no plan asked for")]
    NotExpected {
        /// Whose output.
        id: RequestId,
    },
}

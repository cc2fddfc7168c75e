//! Wrong input, with the numbers in it.

use crate::id::{RequestId, StepId};
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
    #[error(
        "step_tokens_max {step_tokens_max} is below running_max {running_max} with {slots} draft slots each: \
         some would starve"
    )]
    StepBelowRunning {
        /// As configured.
        step_tokens_max: u32,
        /// As configured.
        running_max: u32,
        /// As configured.
        slots: u32,
    },
    /// A chunk would be cut down to nothing.
    #[error("a chunk of {chunk_tokens} tokens has no multiple of {chunk_multiple} in it")]
    StepBelowChunk {
        /// The most that one request may have in a step.
        chunk_tokens: u32,
        /// As configured.
        chunk_multiple: u32,
    },
    /// Requests with an adapter would wait for ever.
    #[error("adapters_max is 0: no request with an adapter could ever run")]
    NoAdapters,
    /// The limits on drafts are not in order.
    #[error("the limits on drafts are not in the order of above_running")]
    DraftLimitsUnsorted,
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
    pub request: Box<Request>,
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
    /// Encoder items are not in order, overlap, or go beyond the prompt.
    #[error("encoder items overlap, are out of order or empty, or go beyond the prompt: see token {start}")]
    EncoderItems {
        /// Where the first wrong one begins.
        start: u32,
    },
    /// An encoder item could never be encoded.
    #[error("an encoder item of {item_tokens} tokens does not fit: {tokens_max} at most")]
    EncoderItemTooLarge {
        /// What it has.
        item_tokens: u32,
        /// What the encoder can do in a step, or keep.
        tokens_max: u32,
    },
    /// It is to fork from a request that is not here, or from one with another prompt.
    #[error("no request {leader} with such a prompt is here to fork from")]
    NoLeader {
        /// From whom.
        leader: RequestId,
    },
    /// Room of a former request of this id is not free yet: it is being handed over or loaded, or steps in
    /// flight may touch it.
    #[error("the room of a former request of this id is still in use")]
    RoomInUse,
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

/// Something that does not belong to what was planned. Nothing changes then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such plan is in flight: it was never made, had nothing scheduled, or has been applied.
    #[error("step {step} is not in flight")]
    NotInFlight {
        /// Which step.
        step: StepId,
    },
    /// An output of an earlier plan of the same request must be applied first.
    #[error("request {id} has an output in step {step}, which must be applied before")]
    OutOfOrder {
        /// Whose.
        id: RequestId,
        /// The earlier step.
        step: StepId,
    },
    /// The plan asked for no output of this request, or it is not with the others of its burst.
    #[error("request {id} has an output that the plan did not ask for")]
    NotExpected {
        /// Whose output.
        id: RequestId,
    },
    /// The plan asked for an output of this request, and it is not there.
    #[error("request {id} has no output, and the plan asked for one")]
    Missing {
        /// Whose output.
        id: RequestId,
    },
    /// More tokens than the plan had drafts for.
    #[error("request {id} has {tokens} tokens in one step, and {tokens_max} at most were planned")]
    TooMany {
        /// Whose output.
        id: RequestId,
        /// How many there are.
        tokens: u32,
        /// One, and one for each draft.
        tokens_max: u32,
    },
}

/// A request that cannot be forked, or not as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// There is no such request, or it does not run.
    #[error("request {parent} does not run")]
    NotRunning {
        /// From whom.
        parent: RequestId,
    },
    /// It has not read all that it knows.
    #[error("request {parent} has computed {computed_tokens} of {known_tokens} tokens")]
    StillReading {
        /// From whom.
        parent: RequestId,
        /// How far it is.
        computed_tokens: u32,
        /// How far it must be.
        known_tokens: u32,
    },
    /// The id is in use, or room of a former request of this id is.
    #[error("a request {child} is still here")]
    Duplicate {
        /// The id of the fork.
        child: RequestId,
    },
    /// As many run as may run.
    #[error("{running_max} run, and no more may")]
    RunningFull {
        /// How many may.
        running_max: u32,
    },
    /// The memory does not share.
    #[error("the memory cannot share the tokens of request {parent}")]
    NotShared {
        /// Whose.
        parent: RequestId,
    },
}

/// A weight that was not taken.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// Zero, negative, not a number, or out of all proportion.
    #[error("a weight is between 2^-16 and 2^16, not {weight}")]
    OutOfRange {
        /// As given.
        weight: f64,
    },
    /// The order has no weights.
    #[error("only the fair order has weights")]
    NotFair,
}

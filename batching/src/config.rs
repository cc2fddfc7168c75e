//! The limits a batcher works within.

use std::num::NonZeroU32;

use crate::error::ConfigError;

/// What a [`Batcher`](crate::Batcher) is told once. [`Config::new`] gives the defaults that users of vLLM
/// know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Tokens that one step may compute, over all requests (`max_num_batched_tokens`).
    pub step_tokens_max: u32,
    /// Requests that may run at the same time (`max_num_seqs`).
    pub running_max: u32,
    /// Prompt and generated tokens that one request may have (`max_model_len`). The memory must be able to
    /// hold one such request when nothing else runs.
    pub model_tokens_max: u32,
    /// How a prompt that does not fit into a step is cut.
    pub prefill: Prefill,
    /// Who is admitted first, and who is preempted first.
    pub order: Order,
    /// Admit a request only if all its known tokens fit into free memory, not just its first chunk
    /// (`scheduler_reserve_full_isl`). Keeps half-read prompts from pushing each other out.
    pub whole_sequence_check: bool,
    /// Tokens of room that an admission must leave free while something runs, so that the running can grow
    /// (`watermark`). The memory rounds this up to its own unit.
    pub watermark_tokens: u32,
    /// Requests that may wait; more are refused by `add`. `None`: no cap.
    pub queued_requests_max: Option<u32>,
    /// Known tokens of all waiting requests together; more are refused by `add`. `None`: no cap.
    pub queued_tokens_max: Option<u64>,
}

/// How prompts are cut into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// A prompt is computed in one step, or waits until one has room for all of it (chunked prefill off).
    Whole,
    /// A prompt takes what is left of the step.
    Chunked,
    /// As `Chunked`, but nobody takes more than `tokens_max` in a step, so that a long prompt does not eat
    /// the step of others. Does not apply to a request that is alone (`long_prefill_token_threshold`).
    Capped {
        /// The most that one request may take.
        tokens_max: NonZeroU32,
        /// Raise the cap to an equal share of the step, `step_tokens_max / (running + waiting)`, when that
        /// is more: smaller pieces would help nobody.
        adaptive: bool,
    },
}

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// In the order of `add`. The one admitted last yields first; a preempted request goes to the front.
    FirstCome,
    /// Lowest [`priority`](crate::Request::priority) first, ties by arrival, then by id. The last in this
    /// order yields first. A preempted request waits at its place in this order.
    Priority,
}

impl Config {
    /// The defaults: steps of 2048 tokens, 128 running, chunked prefill without a cap, first come first
    /// served, whole-sequence check on, no watermark, no caps on the queue.
    pub fn new(model_tokens_max: u32) -> Config {
        Config {
            step_tokens_max: 2048,
            running_max: 128,
            model_tokens_max,
            prefill: Prefill::Chunked,
            order: Order::FirstCome,
            whole_sequence_check: true,
            watermark_tokens: 0,
            queued_requests_max: None,
            queued_tokens_max: None,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let Config { step_tokens_max, running_max, model_tokens_max, .. } = *self;
        if running_max == 0 {
            return Err(ConfigError::NothingRuns);
        }
        if model_tokens_max < 2 {
            return Err(ConfigError::ModelTooShort { model_tokens_max });
        }
        if step_tokens_max < running_max {
            return Err(ConfigError::StepBelowRunning { step_tokens_max, running_max });
        }
        if self.prefill == Prefill::Whole && step_tokens_max < model_tokens_max {
            return Err(ConfigError::StepBelowModel { step_tokens_max, model_tokens_max });
        }
        Ok(())
    }
}

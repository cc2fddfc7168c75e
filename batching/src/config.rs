//! The limits a batcher works within.

use std::num::{NonZeroU32, NonZeroU64};

use crate::error::ConfigError;
use crate::speculation::Drafts;

/// What a [`Batcher`](crate::Batcher) is told once. [`Config::new`] gives the defaults that users of vLLM
/// know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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
    /// Prompt tokens in a step in which somebody generates, over all requests: what it waits between two of its
    /// tokens. A step in which nobody generates has `step_tokens_max`. `None`, and with whole prompts: no such
    /// limit.
    pub mixed_prefill_tokens_max: Option<NonZeroU32>,
    /// A chunk that does not reach the end of what is known ends at a multiple of this (a block, where the
    /// state of a recurrent layer is saved).
    pub chunk_multiple: NonZeroU32,
    /// How many long prompts may be read at the same time, so that short ones pass. `None`: any number.
    pub long_prefills: Option<LongPrefills>,
    /// Admit only in every nth step, unless nobody runs (`prefill_schedule_interval`).
    pub admission_interval: NonZeroU32,
    /// Admit a request only if all its known tokens fit into free memory, not just its first chunk
    /// (`scheduler_reserve_full_isl`). Keeps half-read prompts from pushing each other out.
    pub whole_sequence_check: bool,
    /// Tokens of room that an admission must leave free while something runs, so that the running can grow
    /// (`watermark`). The memory rounds this up to its own unit.
    pub watermark_tokens: u32,
    /// What becomes of the tokens of a request that is preempted.
    pub preemption: Preemption,
    /// How many drafts are verified beside each token.
    pub drafts: Drafts,
    /// How many outputs of a request may still be in flight when it is scheduled again: 0 waits for each,
    /// 1 plans one step ahead of the outputs (asynchronous scheduling). Where drafts are in flight, the step is
    /// planned as if they were accepted: see [`Scheduled::start`](crate::Scheduled::start).
    pub outputs_ahead: u32,
    /// Into how many plans the running are spread, for as many plans in flight (pipeline stages).
    pub micro_batches: NonZeroU32,
    /// Give room back only when every plan that may touch it has been applied. Needed when something else
    /// than the next step (a copy on a stream of its own) could write there meanwhile.
    pub fenced_frees: bool,
    /// Adapters that may be loaded at the same time. `None`: any number.
    pub adapters_max: Option<u32>,
    /// What the encoder may do in a step. `None`: requests with encoder items are refused.
    pub encoder: Option<EncoderLimits>,
    /// What becomes of a request whose tokens did not come from another machine.
    pub failed_loads: FailedLoads,
    /// Requests that may wait; more are refused by `add`. `None`: no cap.
    pub queued_requests_max: Option<u32>,
    /// Known tokens of all waiting requests together; more are refused by `add`. `None`: no cap.
    pub queued_tokens_max: Option<u64>,
    /// How long a request may wait, since it came or was preempted. `None`: for ever.
    pub waiting_ticks_max: Option<u64>,
    /// How long a request may take, since it was first admitted. `None`: for ever.
    pub running_ticks_max: Option<u64>,
    /// How long the room of a request that hands over is kept for the other machine. `None`: for ever.
    pub handover_ticks_max: Option<u64>,
    /// Who has waited for longer goes before all others, whatever the order says: the longest first. It also
    /// yields its room after all others, and if it has to, it stays as old as it was. `None`: the order decides
    /// alone, and may let somebody starve.
    pub patience_ticks: Option<u64>,
}

/// How prompts are cut into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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

/// A limit on long prompts that are read at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LongPrefills {
    /// Long is who has more tokens than this to compute when it is admitted, cached ones not counted.
    pub above_tokens: u32,
    /// How many of them may be at it.
    pub running_max: NonZeroU32,
}

/// What becomes of the tokens of a request that is preempted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Preemption {
    /// They are forgotten and computed again, as far as the memory does not find them.
    Recompute,
    /// They are moved to a slower tier and back, if the memory can.
    Swap,
    /// Whichever takes less time.
    Cheaper(Costs),
}

/// What moving and what computing tokens takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Costs {
    /// Bytes of keys and values of one token.
    pub bytes_per_token: u64,
    /// Bandwidth between the tiers, one way.
    pub bytes_per_second: NonZeroU64,
    /// What each transfer takes besides.
    pub transfer_nanoseconds: u64,
    /// How fast prompts are computed.
    pub prefill_tokens_per_second: NonZeroU64,
}

impl Costs {
    /// Nanoseconds to move `tokens` tokens away and back.
    pub fn swap_nanoseconds(&self, tokens: u32) -> u128 {
        let bytes = u128::from(self.bytes_per_token) * u128::from(tokens);
        2 * (u128::from(self.transfer_nanoseconds)
            + bytes * NANOSECONDS / u128::from(self.bytes_per_second.get()))
    }

    /// Nanoseconds to compute `tokens` tokens again.
    pub fn recompute_nanoseconds(&self, tokens: u32) -> u128 {
        u128::from(tokens) * NANOSECONDS / u128::from(self.prefill_tokens_per_second.get())
    }
}

const NANOSECONDS: u128 = 1_000_000_000;

/// What becomes of a request whose tokens did not come from another machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum FailedLoads {
    /// It keeps what did come, up to the first gap, and computes the rest itself.
    Recompute,
    /// It ends.
    End,
}

/// What the encoder may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EncoderLimits {
    /// Tokens of items that one step may encode.
    pub step_tokens_max: u32,
    /// Tokens of encoded items that can be kept until they are read.
    pub cache_tokens_max: u32,
}

impl Config {
    /// The defaults: steps of 2048 tokens, 128 running, chunked prefill without a cap, whole-sequence check
    /// on, no watermark, preemption by recompute, no drafts, one step at a time, no caps and no timeouts.
    pub fn new(model_tokens_max: u32) -> Config {
        Config {
            step_tokens_max: 2048,
            running_max: 128,
            model_tokens_max,
            prefill: Prefill::Chunked,
            mixed_prefill_tokens_max: None,
            chunk_multiple: NonZeroU32::MIN,
            long_prefills: None,
            admission_interval: NonZeroU32::MIN,
            whole_sequence_check: true,
            watermark_tokens: 0,
            preemption: Preemption::Recompute,
            drafts: Drafts::NONE,
            outputs_ahead: 0,
            micro_batches: NonZeroU32::MIN,
            fenced_frees: false,
            adapters_max: None,
            encoder: None,
            failed_loads: FailedLoads::Recompute,
            queued_requests_max: None,
            queued_tokens_max: None,
            waiting_ticks_max: None,
            running_ticks_max: None,
            handover_ticks_max: None,
            patience_ticks: None,
        }
    }

    /// The limit on prompt tokens beside those who generate, where there is one.
    pub(crate) fn mixed_prefill(&self) -> Option<u32> {
        self.mixed_prefill_tokens_max.filter(|_| self.prefill != Prefill::Whole).map(NonZeroU32::get)
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let Config { step_tokens_max, running_max, model_tokens_max, .. } = *self;
        if running_max == 0 {
            return Err(ConfigError::NothingRuns);
        }
        if model_tokens_max < 2 {
            return Err(ConfigError::ModelTooShort { model_tokens_max });
        }
        let slots = self.drafts.slots;
        if u64::from(step_tokens_max) < u64::from(running_max) * (1 + u64::from(slots)) {
            return Err(ConfigError::StepBelowRunning { step_tokens_max, running_max, slots });
        }
        if self.prefill == Prefill::Whole && step_tokens_max < model_tokens_max {
            return Err(ConfigError::StepBelowModel { step_tokens_max, model_tokens_max });
        }
        self.validate_chunks()?;
        if self.adapters_max == Some(0) {
            return Err(ConfigError::NoAdapters);
        }
        self.drafts.validate()
    }

    /// A chunk that is cut down to a multiple must have something left.
    fn validate_chunks(&self) -> Result<(), ConfigError> {
        let chunk_multiple = self.chunk_multiple.get();
        let chunk_tokens = match self.prefill {
            Prefill::Capped { tokens_max, .. } => tokens_max.get().min(self.step_tokens_max),
            Prefill::Whole | Prefill::Chunked => self.step_tokens_max,
        };
        let chunk_tokens = self.mixed_prefill().map_or(chunk_tokens, |mixed| mixed.min(chunk_tokens));
        if chunk_multiple > 1 && chunk_tokens < chunk_multiple {
            return Err(ConfigError::StepBelowChunk { chunk_tokens, chunk_multiple });
        }
        Ok(())
    }
}

//! Why somebody got less than it wanted: a code and the numbers behind it.

use std::fmt;

use crate::id::RequestId;

/// Why a request was skipped, cut, preempted or ended in a step. `Display` says it in a sentence,
/// [`code`](Reason::code) in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Reason {
    /// The tokens of the step are used up.
    StepSpent {
        /// What a step may have.
        step_tokens_max: u32,
    },
    /// Cut to what was left of the step.
    StepLeft {
        /// What it wanted.
        wanted_tokens: u32,
        /// What was left, and given.
        left_tokens: u32,
    },
    /// Cut to the cap on long prompts.
    LongPrefill {
        /// What it wanted.
        wanted_tokens: u32,
        /// What one request may take now, and was given.
        cap_tokens: u32,
    },
    /// Prompts are not cut here, and this one is longer than what is left of the step.
    NotCut {
        /// What it wanted.
        wanted_tokens: u32,
        /// What was left.
        left_tokens: u32,
    },
    /// As many run as may run.
    RunningFull {
        /// How many may.
        running_max: u32,
    },
    /// The memory has no room for it now. The unit is the memory's (blocks, usually).
    NoRoom {
        /// What would have to be free.
        need: u32,
        /// What is free.
        free: u32,
    },
    /// The memory has no room for it now, but has some back when the steps in flight have been applied.
    RoomInFlight {
        /// What would have to be free.
        need: u32,
        /// What is free.
        free: u32,
    },
    /// Its chunk would end before the next place where a chunk may end.
    ChunkTooShort {
        /// What it could have had.
        left_tokens: u32,
        /// What chunks are multiples of.
        chunk_multiple: u32,
    },
    /// Cut to a place where chunks end.
    ChunkEnd {
        /// What it wanted.
        wanted_tokens: u32,
        /// What it was given.
        tokens: u32,
    },
    /// Cut to what is before an item that the encoder cannot take now.
    EncoderSpent {
        /// What it costs to encode.
        item_tokens: u32,
        /// What the encoder has left in this step.
        left_tokens: u32,
    },
    /// Cut to what is before an item whose encoded form has no room now.
    EncoderFull {
        /// What it takes.
        item_tokens: u32,
        /// What is free, when all that nobody needs is forgotten.
        free_tokens: u32,
    },
    /// As many long prompts are being read as may be.
    LongPrefills {
        /// How many may.
        running_max: u32,
    },
    /// As many adapters are in use as may be, and its own is not among them.
    AdaptersFull {
        /// How many may.
        adapters_max: u32,
    },
    /// Its adapter gives its place to the one of a request that has waited for too long.
    AdapterYields {
        /// That request.
        to: RequestId,
    },
    /// In this step nobody is admitted, only in every nth.
    NotThisStep {
        /// That n.
        admission_interval: u32,
    },
    /// The running are spread over several plans, and this one has its share.
    OtherMicroBatch {
        /// How many are in one.
        requests_max: u32,
    },
    /// It yielded its room to a request that goes before it.
    Yielded {
        /// Who got the room.
        to: RequestId,
        /// What would have had to be free for that one.
        need: u32,
        /// What was free.
        free: u32,
    },
    /// The memory could never hold it: it ended.
    NeverFits {
        /// What it needs.
        need: u32,
        /// What there is.
        total: u32,
    },
    /// Somebody was preempted in this step, so nobody is admitted in it.
    PreemptedThisStep {
        /// How many were.
        preempted: u32,
    },
    /// Its last output has not been applied yet.
    OutputPending,
    /// The room that it had may still be touched by steps in flight.
    FreePending,
    /// Its grammar is not there yet.
    GrammarPending,
    /// It is another sample of this request, which has not read their prompt yet.
    LeaderReads {
        /// That request.
        leader: RequestId,
    },
    /// Its tokens are on their way from another machine.
    Loading {
        /// How many.
        tokens: u32,
    },
    /// The memory does not know yet what another machine, or a disk, has of it.
    RemoteUnknown,
    /// Its tokens did not all come from another machine.
    LoadFailed {
        /// How many were to come.
        tokens: u32,
        /// How many of them are there, up to the first gap.
        loaded_tokens: u32,
    },
    /// It waited for too long.
    WaitedTooLong {
        /// How long.
        waited_ticks: u64,
        /// How long it might have.
        waiting_ticks_max: u64,
    },
    /// It took too long.
    RanTooLong {
        /// How long, since it was first admitted.
        ran_ticks: u64,
        /// How long it might have.
        running_ticks_max: u64,
    },
    /// The caller admits nobody, or schedules nobody, at the moment.
    Paused,
    /// The caller put everything to sleep.
    Asleep,
    /// It waits behind others, and nobody passes.
    Behind {
        /// Who is at the head.
        head: RequestId,
        /// How many are before it.
        ahead: u32,
    },
}

impl Reason {
    /// Its code, for metrics and logs: one word in `snake_case` without numbers.
    pub fn code(&self) -> &'static str {
        match self {
            Reason::StepSpent { .. } => "step_spent",
            Reason::StepLeft { .. } => "step_left",
            Reason::LongPrefill { .. } => "long_prefill",
            Reason::NotCut { .. } => "not_cut",
            Reason::RunningFull { .. } => "running_full",
            Reason::NoRoom { .. } => "no_room",
            Reason::RoomInFlight { .. } => "room_in_flight",
            Reason::ChunkTooShort { .. } => "chunk_too_short",
            Reason::ChunkEnd { .. } => "chunk_end",
            Reason::EncoderSpent { .. } => "encoder_spent",
            Reason::EncoderFull { .. } => "encoder_full",
            Reason::LongPrefills { .. } => "long_prefills",
            Reason::AdaptersFull { .. } => "adapters_full",
            Reason::AdapterYields { .. } => "adapter_yields",
            Reason::NotThisStep { .. } => "not_this_step",
            Reason::OtherMicroBatch { .. } => "other_micro_batch",
            Reason::Yielded { .. } => "yielded",
            Reason::NeverFits { .. } => "never_fits",
            Reason::PreemptedThisStep { .. } => "preempted_this_step",
            Reason::OutputPending => "output_pending",
            Reason::FreePending => "free_pending",
            Reason::GrammarPending => "grammar_pending",
            Reason::LeaderReads { .. } => "leader_reads",
            Reason::Loading { .. } => "loading",
            Reason::RemoteUnknown => "remote_unknown",
            Reason::LoadFailed { .. } => "load_failed",
            Reason::WaitedTooLong { .. } => "waited_too_long",
            Reason::RanTooLong { .. } => "ran_too_long",
            Reason::Paused => "paused",
            Reason::Asleep => "asleep",
            Reason::Behind { .. } => "behind",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Reason::StepSpent { step_tokens_max } => {
                write!(f, "the {step_tokens_max} tokens of the step are spent")
            }
            Reason::StepLeft { wanted_tokens, left_tokens } => {
                write!(f, "{left_tokens} of {wanted_tokens} tokens: no more are left in the step")
            }
            Reason::LongPrefill { wanted_tokens, cap_tokens } => {
                write!(f, "{cap_tokens} of {wanted_tokens} tokens: the cap on long prompts")
            }
            Reason::NotCut { wanted_tokens, left_tokens } => {
                write!(f, "whole prompts only: {wanted_tokens} tokens wanted, {left_tokens} left in the step")
            }
            Reason::RunningFull { running_max } => write!(f, "{running_max} run, and no more may"),
            Reason::NoRoom { need, free } => write!(f, "no room: {need} needed, {free} free"),
            Reason::Yielded { to, need, free } => write!(f, "yielded to {to}: {need} needed, {free} free"),
            Reason::NeverFits { need, total } => write!(f, "can never fit: {need} needed, {total} in all"),
            Reason::PreemptedThisStep { preempted } => {
                write!(f, "{preempted} preempted in this step, so nobody is admitted")
            }
            Reason::RoomInFlight { need, free } => {
                write!(f, "no room before the steps in flight are done: {need} needed, {free} free")
            }
            Reason::ChunkTooShort { left_tokens, chunk_multiple } => {
                write!(f, "chunks are multiples of {chunk_multiple} tokens, and {left_tokens} are left")
            }
            Reason::ChunkEnd { wanted_tokens, tokens } => {
                write!(f, "{tokens} of {wanted_tokens} tokens: the chunk ends there")
            }
            Reason::EncoderSpent { item_tokens, left_tokens } => write!(
                f,
                "an item of {item_tokens} tokens is to be encoded, {left_tokens} are left for that in the step"
            ),
            Reason::EncoderFull { item_tokens, free_tokens } => {
                write!(
                    f,
                    "an item of {item_tokens} tokens is to be kept encoded, {free_tokens} are free for that"
                )
            }
            Reason::LongPrefills { running_max } => {
                write!(f, "{running_max} long prompts are being read, and no more may be")
            }
            Reason::AdaptersFull { adapters_max } => {
                write!(f, "{adapters_max} other adapters are in use, and no more may be")
            }
            Reason::AdapterYields { to } => {
                write!(f, "its adapter makes room for the one of {to}, which has waited for too long")
            }
            Reason::NotThisStep { admission_interval } => {
                write!(f, "admission is in one of {admission_interval} steps only")
            }
            Reason::OtherMicroBatch { requests_max } => {
                write!(f, "{requests_max} are in this micro-batch, and no more may be")
            }
            Reason::OutputPending => write!(f, "its last output is still to come"),
            Reason::FreePending => write!(f, "its former room is still in use by steps in flight"),
            Reason::GrammarPending => write!(f, "its grammar is still being compiled"),
            Reason::LeaderReads { leader } => write!(f, "{leader} is still to read their prompt"),
            Reason::Loading { tokens } => write!(f, "{tokens} tokens are on their way from another machine"),
            Reason::RemoteUnknown => write!(f, "what a slower tier has of it is not known yet"),
            Reason::LoadFailed { tokens, loaded_tokens } => {
                write!(f, "{loaded_tokens} of {tokens} tokens came from another machine")
            }
            Reason::WaitedTooLong { waited_ticks, waiting_ticks_max } => {
                write!(f, "waited for {waited_ticks} ticks, {waiting_ticks_max} at most")
            }
            Reason::RanTooLong { ran_ticks, running_ticks_max } => {
                write!(f, "ran for {ran_ticks} ticks, {running_ticks_max} at most")
            }
            Reason::Paused => write!(f, "paused"),
            Reason::Asleep => write!(f, "put to sleep"),
            Reason::Behind { head, ahead } => write!(f, "{ahead} before it, {head} at the head"),
        }
    }
}

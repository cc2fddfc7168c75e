//! Why somebody got less than it wanted: a code and the numbers behind it.

use std::fmt;

use crate::id::RequestId;

/// Why a request was skipped, cut, preempted or ended in a step. `Display` says it in a sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// The caller admits nobody, or schedules nobody, at the moment.
    Paused,
    /// It waits behind others, and nobody passes.
    Behind {
        /// Who is at the head.
        head: RequestId,
        /// How many are before it.
        ahead: u32,
    },
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
            Reason::OutputPending => write!(f, "its last output is still to come"),
            Reason::Paused => write!(f, "paused"),
            Reason::Behind { head, ahead } => write!(f, "{ahead} before it, {head} at the head"),
        }
    }
}

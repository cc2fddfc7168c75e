//! What the caller must do now.

use crate::id::{RequestId, StepId};
use crate::reason::Reason;
use crate::request::EncoderItem;
use crate::sequences::Slot;

/// One step, as plain data: the difference to the last one. Give the same `Plan` to every
/// [`Batcher::step`](crate::Batcher::step): its buffers are reused.
///
/// The caller, in this order: forgets what its runner holds for the `gone` and the `preempted` (their
/// memory is released already); copies what is swapped out, then what is swapped in; begins the `loads`;
/// runs the encoder on what is to `encode`; sends all known tokens of the `admitted` to the runner; computes
/// the `scheduled` in one forward pass; samples a token for each one that `samples`; and hands these to
/// [`Batcher::apply`](crate::Batcher::apply). A plan is carried out as it is, also for a request that is
/// cancelled meanwhile. A plan with nothing `scheduled` has no outputs and is not applied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Its number, to be given back with its outputs.
    pub step: StepId,
    /// Who computes what. The running in their order, then the admitted in theirs.
    pub scheduled: Vec<Scheduled>,
    /// Who starts or resumes in this step. The last entries of `scheduled` are theirs, in the same order.
    pub admitted: Vec<Admitted>,
    /// Who lost its room and waits again.
    pub preempted: Vec<Preempted>,
    /// Who ended in this step without an output, and why: the memory could never hold it, its time is up,
    /// its tokens did not come.
    pub ended: Vec<Note>,
    /// Who left since the last plan, in whatever way. The runner forgets it.
    pub gone: Vec<RequestId>,
    /// Who gets room now for tokens that another machine has. Nothing of it is computed in this step.
    pub loads: Vec<Load>,
    /// What the encoder must see before the step is computed.
    pub encode: Vec<Encode>,
    /// Contents of encoder items whose encoded form can be forgotten before anything is encoded.
    pub encoded_gone: Vec<u64>,
    /// Who is scheduled with less than it wanted.
    pub cut: Vec<Note>,
    /// Who gets nothing in this step: the running in their order; those who wait for something else than
    /// room (the first 256 of them); of the waiting, who was passed, down to the first that nobody may pass.
    pub skipped: Vec<Note>,
    /// How many wait behind the last of the `skipped`, for no other reason than that somebody is before
    /// them ([`Batcher::standing`](crate::Batcher::standing) tells it of each).
    pub behind: u32,
    /// Sum of all [`Scheduled::tokens`].
    pub tokens: u32,
    /// The most drafts that are worth proposing for one request after this step.
    pub drafts_max: u32,
    /// True if somebody who needs a grammar's mask is computed ahead of an output: its mask cannot be made
    /// before that output is there.
    pub masks_wait: bool,
}

/// A request's part of a step: compute its tokens `start..start + tokens`.
///
/// ```text
///   start         known                       end
///   | known tokens | drafts | padding         |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Scheduled {
    /// Who.
    pub id: RequestId,
    /// Its first token in this step; the ones before have their keys and values.
    ///
    /// While drafts of an earlier step are in flight, this is as if all of them were accepted. The part moves back by
    /// as many as are rejected (a generating request computes its last known token, wherever that is), and there is
    /// room for it at either place.
    pub start: u32,
    /// How many; at least one.
    pub tokens: u32,
    /// How many of them, at the end but for the padding, are drafts that were
    /// [proposed](crate::Batcher::propose).
    pub drafts: u32,
    /// How many of them, at the very end, are there for the shape alone.
    pub padding: u32,
    /// The batcher's own place for the request.
    pub(crate) slot: Slot,
    /// Its preemptions at the time, to know if it has been preempted since.
    pub(crate) life: u32,
    /// The last step before that it was scheduled in.
    pub(crate) step_before: StepId,
    /// True if this step had to ask the memory for room.
    pub(crate) granted: bool,
    /// True if its last known token is among them, so that the step yields its next token, and one more for
    /// each accepted draft. False for all but the last chunk of a prompt.
    pub samples: bool,
    /// True while it has generated fewer than [`new_tokens_min`](crate::StopRules::new_tokens_min): the
    /// sampler must not give it `eos` or a stop id. Where drafts are verified, here or in a step in flight, the sampler
    /// counts itself.
    pub masks_stops: bool,
    /// True if a grammar says which tokens it may generate.
    pub needs_mask: bool,
}

impl Scheduled {
    /// One past its last token in this step.
    #[inline]
    pub fn end(&self) -> u32 {
        self.start + self.tokens
    }

    /// Tokens that this part may bring, if it samples.
    #[inline]
    pub(crate) fn outputs_max(&self) -> u32 {
        if self.samples { 1 + self.drafts } else { 0 }
    }
}

/// A request that starts to run. A worker that holds state needs all of it: every known token and the block
/// table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Who.
    pub id: RequestId,
    /// How many of its tokens the memory already had, or another machine sent.
    pub cached_tokens: u32,
    /// What the memory did to have them.
    pub source: Source,
    /// How many tokens it knows: prompt, and generated before it was preempted.
    pub known_tokens: u32,
    /// How long it waited, in the caller's ticks.
    pub waited_ticks: u64,
    /// True if it ran before and was preempted.
    pub resumed: bool,
}

/// Where the tokens of an admitted request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// They were found where they were computed, if there are any.
    Cache,
    /// They are copied back from the slower tier, before the step computes.
    Swap,
    /// They are another request's, shared from now on.
    Fork(RequestId),
    /// Another machine sent them, or sends them within this step: so many of them.
    Remote {
        /// How many.
        tokens: u32,
    },
}

/// A request that lost its room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preempted {
    /// Who.
    pub id: RequestId,
    /// Why.
    pub reason: Reason,
    /// So many of its tokens are copied to the slower tier, before the step computes. 0: they are given up.
    pub swapped_tokens: u32,
}

/// A request whose tokens come from another machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Who.
    pub id: RequestId,
    /// The first token that is loaded; the ones before are here.
    pub start: u32,
    /// How many.
    pub tokens: u32,
}

/// An item for the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encode {
    /// Whose.
    pub id: RequestId,
    /// Which.
    pub item: EncoderItem,
}

/// Who, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Note {
    /// Who.
    pub id: RequestId,
    /// Why.
    pub reason: Reason,
}

impl Plan {
    /// An empty plan.
    pub fn new() -> Plan {
        Plan::default()
    }

    /// True if there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.scheduled.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        let Plan {
            step: _,
            scheduled,
            admitted,
            preempted,
            ended,
            gone,
            loads,
            encode,
            encoded_gone,
            cut,
            skipped,
            behind,
            tokens,
            drafts_max,
            masks_wait,
        } = self;
        scheduled.clear();
        admitted.clear();
        preempted.clear();
        ended.clear();
        gone.clear();
        loads.clear();
        encode.clear();
        encoded_gone.clear();
        cut.clear();
        skipped.clear();
        (*behind, *tokens, *drafts_max, *masks_wait) = (0, 0, 0, false);
    }
}

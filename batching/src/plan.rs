//! What the caller must do now.

use crate::id::RequestId;
use crate::reason::Reason;
use crate::sequence::Slot;

/// One step, as plain data. Give the same `Plan` to every [`Batcher::step`](crate::Batcher::step): its
/// buffers are reused.
///
/// The caller, in this order: forgets what its runner holds for the `preempted` and the `ended` (their
/// memory is released already), sends all known tokens of the `admitted` to the runner, computes the
/// `scheduled` in one forward pass, samples a token for each one that `samples`, and hands these to
/// [`Batcher::apply`](crate::Batcher::apply). A plan is carried out as it is, also for a request that is
/// cancelled meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Who computes what. The running in their order, then the admitted in theirs.
    pub scheduled: Vec<Scheduled>,
    /// Who starts or resumes in this step. The last entries of `scheduled` are theirs, in the same order.
    pub admitted: Vec<Admitted>,
    /// Who lost its room and waits again.
    pub preempted: Vec<Note>,
    /// Who ended because the memory could never hold it.
    pub ended: Vec<Note>,
    /// Who is scheduled with less than it wanted.
    pub cut: Vec<Note>,
    /// Who gets nothing in this step: the running in their order, then the waiting down to the first that
    /// nobody may pass.
    pub skipped: Vec<Note>,
    /// How many wait behind the last of the `skipped`, for no other reason than that nobody passes
    /// ([`Batcher::standing`](crate::Batcher::standing) tells it of each).
    pub behind: u32,
    /// Sum of all [`Scheduled::tokens`].
    pub tokens: u32,
}

/// A request's part of a step: compute its tokens `start..start + tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduled {
    /// Who.
    pub id: RequestId,
    /// Its first token in this step; the ones before have their keys and values.
    pub start: u32,
    /// How many; at least one.
    pub tokens: u32,
    /// The batcher's own place for the request.
    pub(crate) slot: Slot,
    /// True if this step had to ask the memory for room.
    pub(crate) granted: bool,
    /// True if its last known token is among them, so that the step yields its next token. False for all
    /// but the last chunk of a prompt.
    pub samples: bool,
    /// True while it has generated fewer than [`new_tokens_min`](crate::StopRules::new_tokens_min): the
    /// sampler must not give it `eos` or a stop id.
    pub masks_stops: bool,
}

impl Scheduled {
    /// One past its last token in this step.
    pub fn end(&self) -> u32 {
        self.start + self.tokens
    }
}

/// A request that starts to run. A worker that holds state needs all of it: every known token and the block
/// table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// Who.
    pub id: RequestId,
    /// How many of its tokens the memory already had.
    pub cached_tokens: u32,
    /// How many tokens it knows: prompt, and generated before it was preempted.
    pub known_tokens: u32,
    /// How long it waited, in the caller's ticks.
    pub waited_ticks: u64,
    /// True if it ran before and was preempted.
    pub resumed: bool,
}

/// Who, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        let Plan { scheduled, admitted, preempted, ended, cut, skipped, behind, tokens } = self;
        scheduled.clear();
        admitted.clear();
        preempted.clear();
        ended.clear();
        cut.clear();
        skipped.clear();
        *behind = 0;
        *tokens = 0;
    }
}

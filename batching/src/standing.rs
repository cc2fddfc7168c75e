//! How things stand: for one request, and in all.

use crate::admit::aside_reason;
use crate::batcher::{Batcher, count};
use crate::id::{RequestId, StepId, Tick};
use crate::order::Order;
use crate::reason::Reason;
use crate::sequence::{At, State, Waiting};

/// How a request stands after the last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It waits.
    Waiting {
        /// Since it came, or was preempted.
        since: Tick,
        /// Prompt, and generated before it was preempted.
        known_tokens: u32,
        /// How often it was preempted.
        preemptions: u32,
        /// Why. `None` if no step has come to it yet.
        reason: Option<Reason>,
    },
    /// It runs.
    Running {
        /// How many of its tokens are computed, or planned to be.
        computed_tokens: u32,
        /// Prompt and generated.
        known_tokens: u32,
        /// How often it was preempted.
        preemptions: u32,
        /// Why it got less than it wanted in the last step, if it did.
        reason: Option<Reason>,
    },
}

/// Numbers of now, and sums since the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// How many run.
    pub running: u32,
    /// How many wait.
    pub waiting: u32,
    /// Known tokens of those who wait.
    pub waiting_tokens: u64,
    /// Requests that are gone and whose room is still in use.
    pub remaining: u32,
    /// Plans whose outputs have not been applied.
    pub steps_in_flight: u32,
    /// The sums.
    pub counts: Counts,
}

/// Sums since the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Counts {
    /// Steps planned.
    pub steps: u64,
    /// Tokens scheduled in them.
    pub scheduled_tokens: u64,
    /// Tokens that admissions found cached.
    pub cached_tokens: u64,
    /// Admissions, of new and of preempted requests.
    pub admitted: u64,
    /// Requests made by [`Batcher::fork`].
    pub forked: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Tokens that preemptions moved to the slower tier.
    pub swapped_tokens: u64,
    /// Drafts that were verified.
    pub drafts: u64,
    /// Drafts that the model agreed with.
    pub drafts_accepted: u64,
    /// Requests that ended by their own rules or by `finish`.
    pub finished: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that `add` refused.
    pub refused: u64,
    /// Requests that ended without an output: [`Plan::ended`](crate::Plan::ended).
    pub ended: u64,
}

impl<O: Order> Batcher<O> {
    /// How a request stands, and why it waits; `None` if there is no such request. Cost: O(n) in the
    /// waiting.
    pub fn standing(&self, id: RequestId) -> Option<Standing> {
        let sequence = self.sequences.at(self.sequences.find(id)?);
        let (known_tokens, preemptions) = (sequence.known_tokens, sequence.preemptions);
        let last = StepId(self.counts.steps);
        let noted = sequence.note.filter(|&(step, _)| step == last).map(|(_, reason)| reason);
        Some(match &sequence.state {
            State::Running(running) => {
                let computed_tokens = running.computed_tokens;
                Standing::Running { computed_tokens, known_tokens, preemptions, reason: noted }
            }
            State::Waiting(waiting) => {
                let since = waiting.place.since;
                let reason = self.waits_for(id, waiting, noted);
                Standing::Waiting { since, known_tokens, preemptions, reason }
            }
        })
    }

    fn waits_for(&self, id: RequestId, waiting: &Waiting, noted: Option<Reason>) -> Option<Reason> {
        if let Some(reason) = aside_reason(&waiting.at) {
            return Some(reason);
        }
        if let Some(reason) = self.gates.closed(waiting.place.class) {
            return Some(reason);
        }
        match self.held {
            Some(held) if held.id == id => Some(held.reason),
            _ if noted.is_some() => noted,
            Some(held) => {
                let ahead = self.arrived.len()
                    + match waiting.at {
                        At::Queue => self.queue.ahead_of(&self.order, waiting.place),
                        _ => 0,
                    };
                Some(Reason::Behind { head: held.id, ahead: count(ahead) })
            }
            None => None,
        }
    }

    /// Who runs, in the order in which steps go through them.
    pub fn running(&self) -> impl Iterator<Item = RequestId> {
        self.running.iter().map(|&slot| self.sequences.at(slot).id)
    }

    /// Who waits: those who hold room, then those in the queue, first to last as the order stands now, then
    /// those who wait for something else. Cost: O(n log n).
    pub fn waiting(&self) -> impl Iterator<Item = RequestId> {
        let queued = self.queue.in_order(&self.order);
        let slots = self.arrived.iter().copied().chain(queued).chain(self.aside.values().copied());
        slots.map(|slot| self.sequences.at(slot).id)
    }

    /// The numbers of now, and the sums since the beginning.
    pub fn stats(&self) -> Stats {
        let gone = self.remains.keys().filter(|&&id| self.sequences.find(id).is_none()).count();
        Stats {
            running: count(self.running.len()),
            waiting: self.waiting_count(),
            waiting_tokens: self.waiting_tokens,
            remaining: count(gone),
            steps_in_flight: count(self.flight.plans().len()),
            counts: self.counts,
        }
    }
}

//! How things stand: for one request, and in all.

use crate::batcher::{Batcher, count};
use crate::id::{RequestId, Tick};
use crate::reason::Reason;
use crate::sequence::State;

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
    /// The sums.
    pub counts: Counts,
}

/// Sums since the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Steps planned.
    pub steps: u64,
    /// Tokens scheduled in them.
    pub scheduled_tokens: u64,
    /// Tokens that admissions found cached.
    pub cached_tokens: u64,
    /// Admissions, of new and of preempted requests.
    pub admitted: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Requests that ended by their own rules or by `finish`.
    pub finished: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that `add` refused.
    pub refused: u64,
    /// Requests that ended because the memory could never hold them.
    pub ended: u64,
}

impl Batcher {
    /// How a request stands, and why it waits; `None` if there is no such request. Cost: O(n) in the
    /// waiting.
    pub fn standing(&self, id: RequestId) -> Option<Standing> {
        let sequence = self.sequences.at(self.sequences.find(id)?);
        let (known_tokens, preemptions) = (sequence.known_tokens, sequence.preemptions);
        Some(match sequence.state {
            State::Running { computed_tokens, .. } => {
                Standing::Running { computed_tokens, known_tokens, preemptions }
            }
            State::Waiting { since, rank } => {
                let reason = match self.held {
                    _ if sequence.output_pending => Some(Reason::OutputPending),
                    Some(held) if held.id == id => Some(held.reason),
                    Some(held) => {
                        Some(Reason::Behind { head: held.id, ahead: count(self.queue.ahead_of(rank)) })
                    }
                    None => None,
                };
                Standing::Waiting { since, known_tokens, preemptions, reason }
            }
        })
    }

    /// Who runs, in the order in which steps go through them.
    pub fn running(&self) -> impl Iterator<Item = RequestId> {
        self.running.iter().map(|&slot| self.sequences.at(slot).id())
    }

    /// Who waits, first to last.
    pub fn waiting(&self) -> impl Iterator<Item = RequestId> {
        self.queue.iter().map(|(_, slot)| self.sequences.at(slot).id())
    }

    /// The numbers of now, and the sums since the beginning.
    pub fn stats(&self) -> Stats {
        Stats {
            running: count(self.running.len()),
            waiting: count(self.queue.len()),
            waiting_tokens: self.queue.tokens(),
            counts: self.counts,
        }
    }
}

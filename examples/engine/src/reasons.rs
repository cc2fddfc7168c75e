//! Why requests got less than they wanted: counted by outcome and reason, the last ones kept.

use std::collections::{BTreeMap, VecDeque};

use quayline_batching::{Note, Plan};

use crate::error::Refusal;
use crate::request::{RequestId, Tick};

/// What became of a request that did not get what it wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// It got nothing in a step.
    Skipped,
    /// It got less than it wanted in a step.
    Cut,
    /// It lost its room.
    Preempted,
    /// It ended without a further token.
    Ended,
    /// It was not accepted.
    Refused,
}

impl Outcome {
    /// The word in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Skipped => "skipped",
            Self::Cut => "cut",
            Self::Preempted => "preempted",
            Self::Ended => "ended",
            Self::Refused => "refused",
        }
    }
}

/// How often something happened for one reason. A request that is skipped in ten steps counts ten times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasonCount {
    /// What happened.
    pub outcome: Outcome,
    /// Why, in a word: [`WaitReason::code`](crate::WaitReason::code) or [`Refusal::code`].
    pub code: &'static str,
    /// How often since the start.
    pub count: u64,
}

/// A request that is here no more and got no answer, or none to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct TurnedAway {
    /// Its id.
    pub id: RequestId,
    /// When.
    pub at: Tick,
    /// [`Ended`](Outcome::Ended) or [`Refused`](Outcome::Refused).
    pub outcome: Outcome,
    /// Why, in a word.
    pub code: &'static str,
    /// Why, in a sentence with numbers.
    pub text: String,
}

/// The counts, and the last of those who were turned away.
#[derive(Debug, Default)]
pub(crate) struct Reasons {
    counts: BTreeMap<(Outcome, &'static str), u64>,
    turned_away: VecDeque<TurnedAway>,
}

/// How many of those who were turned away are remembered.
const TURNED_AWAY_MAX: usize = 32;

impl Reasons {
    /// Counts what a plan says. Allocates only when a reason comes up for the first time.
    pub(crate) fn note(&mut self, plan: &Plan, now: Tick) {
        let Plan { skipped, cut, preempted, ended, behind, .. } = plan;
        skipped.iter().for_each(|note| self.count(Outcome::Skipped, note.reason.code(), 1));
        cut.iter().for_each(|note| self.count(Outcome::Cut, note.reason.code(), 1));
        preempted.iter().for_each(|lost| self.count(Outcome::Preempted, lost.reason.code(), 1));
        self.count(Outcome::Skipped, BEHIND, u64::from(*behind));
        for &Note { id, reason } in ended {
            self.count(Outcome::Ended, reason.code(), 1);
            let (outcome, code, text) = (Outcome::Ended, reason.code(), reason.to_string());
            self.remember(TurnedAway { id: RequestId(id.0), at: now, outcome, code, text });
        }
    }

    pub(crate) fn note_refusal(&mut self, id: RequestId, now: Tick, refusal: &Refusal) {
        let (outcome, code, text) = (Outcome::Refused, refusal.code(), refusal.to_string());
        self.count(outcome, code, 1);
        self.remember(TurnedAway { id, at: now, outcome, code, text });
    }

    pub(crate) fn counts(&self) -> Vec<ReasonCount> {
        self.counts.iter().map(|(&(outcome, code), &count)| ReasonCount { outcome, code, count }).collect()
    }

    pub(crate) fn turned_away(&self) -> Vec<TurnedAway> {
        self.turned_away.iter().cloned().collect()
    }

    fn count(&mut self, outcome: Outcome, code: &'static str, times: u64) {
        if times > 0 {
            *self.counts.entry((outcome, code)).or_default() += times;
        }
    }

    fn remember(&mut self, one: TurnedAway) {
        if self.turned_away.len() == TURNED_AWAY_MAX {
            self.turned_away.pop_front();
        }
        self.turned_away.push_back(one);
    }
}

/// The code of those whom a plan counts and does not name (`Reason::Behind`).
const BEHIND: &str = "behind";

#[cfg(test)]
mod tests {
    use quayline_batching::Reason;

    use super::*;

    #[test]
    fn those_who_are_only_counted_bear_the_code_of_those_who_are_named() {
        let behind = Reason::Behind { head: quayline_batching::RequestId(1), ahead: 2 };
        assert_eq!(behind.code(), BEHIND);
    }

    #[test]
    fn the_last_refusals_are_remembered() {
        let mut reasons = Reasons::default();
        for id in 0..40 {
            reasons.note_refusal(RequestId(id), Tick(id), &Refusal::EmptyPrompt);
        }
        let kept: Vec<u64> = reasons.turned_away().iter().map(|one| one.id.0).collect();
        assert_eq!(kept, (8..40).collect::<Vec<u64>>());
        let count = ReasonCount { outcome: Outcome::Refused, code: "empty_prompt", count: 40 };
        assert_eq!(reasons.counts(), [count]);
    }
}

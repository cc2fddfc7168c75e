//! Moments at which somebody's time is up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::id::{RequestId, Tick};

/// When to look at whom. A request that has left, or whose time was put off, is looked at for nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timers {
    due: BinaryHeap<Reverse<(Tick, RequestId)>>,
}

impl Timers {
    pub(crate) fn set(&mut self, due: Tick, id: RequestId) {
        self.due.push(Reverse((due, id)));
    }

    /// All of them, in the order of their moments.
    pub(crate) fn sorted(&self) -> Vec<(Tick, RequestId)> {
        let mut due: Vec<(Tick, RequestId)> = self.due.iter().map(|&Reverse(due)| due).collect();
        due.sort_unstable();
        due
    }

    /// The next one whose moment is before `now`.
    pub(crate) fn next_before(&mut self, now: Tick) -> Option<RequestId> {
        let &Reverse((due, _)) = self.due.peek()?;
        if due >= now {
            return None;
        }
        self.due.pop().map(|Reverse((_, id))| id)
    }
}

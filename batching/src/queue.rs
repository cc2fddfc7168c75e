//! Who waits, in the order of admission.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use crate::config::Order;
use crate::id::{RequestId, Tick};
use crate::request::Request;
use crate::sequence::Slot;

/// A place in the queue; the lowest is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// Turns are dealt out upwards at the back, downwards at the front.
    FirstCome { turn: i64 },
    /// A place of its own, whenever it comes.
    Priority { priority: i32, arrival: Tick, id: RequestId },
}

impl Rank {
    pub(crate) fn by_priority(request: &Request) -> Rank {
        Rank::Priority { priority: request.priority, arrival: request.arrival, id: request.id }
    }
}

/// The waiting requests. Joining, leaving and finding the next one cost O(log n).
#[derive(Debug, Clone)]
pub(crate) struct Queue {
    order: Order,
    waiting: BTreeMap<Rank, Slot>,
    tokens: u64,
    front_turn: i64,
    back_turn: i64,
}

impl Queue {
    pub(crate) fn new(order: Order) -> Queue {
        Queue { order, waiting: BTreeMap::new(), tokens: 0, front_turn: 0, back_turn: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Known tokens of all who wait.
    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The place of one who comes new.
    pub(crate) fn back(&mut self, request: &Request) -> Rank {
        match self.order {
            Order::Priority => Rank::by_priority(request),
            Order::FirstCome => {
                self.back_turn += 1;
                Rank::FirstCome { turn: self.back_turn - 1 }
            }
        }
    }

    /// The place of one who was preempted: before all others, or where its priority puts it.
    pub(crate) fn front(&mut self, request: &Request) -> Rank {
        match self.order {
            Order::Priority => Rank::by_priority(request),
            Order::FirstCome => {
                self.front_turn -= 1;
                Rank::FirstCome { turn: self.front_turn }
            }
        }
    }

    pub(crate) fn join(&mut self, rank: Rank, slot: Slot, known_tokens: u32) {
        self.tokens += u64::from(known_tokens);
        let former = self.waiting.insert(rank, slot);
        assert!(former.is_none(), "two requests have the place {rank:?}");
    }

    pub(crate) fn leave(&mut self, rank: Rank, known_tokens: u32) {
        self.tokens -= u64::from(known_tokens);
        self.waiting.remove(&rank).expect("one who waits has its place in the queue");
    }

    /// One who waits has learned a token: the last output before it was preempted came in.
    pub(crate) fn grow(&mut self) {
        self.tokens += 1;
    }

    /// The first one behind `place`, or the first of all.
    pub(crate) fn next(&self, place: Option<Rank>) -> Option<(Rank, Slot)> {
        let from = place.map_or(Unbounded, Excluded);
        self.waiting.range((from, Unbounded)).next().map(|(&rank, &slot)| (rank, slot))
    }

    /// How many wait before `rank`. Cost: O(n).
    pub(crate) fn ahead_of(&self, rank: Rank) -> usize {
        self.waiting.range(..rank).count()
    }

    /// Who waits, first to last.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Rank, Slot)> {
        self.waiting.iter().map(|(&rank, &slot)| (rank, slot))
    }
}

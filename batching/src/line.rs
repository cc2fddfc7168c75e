//! A line of waiting requests in lanes, whose order may change while they wait.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BTreeMap, BinaryHeap};

use crate::id::RequestId;
use crate::order::{Lane, Order, Rank};
use crate::sequences::Slot;

/// A place in a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Key {
    pub(crate) rank: Rank,
    pub(crate) id: RequestId,
}

/// The first of a lane: the lowest of these is the first of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Head {
    pub(crate) level: u128,
    pub(crate) key: Key,
    pub(crate) lane: Lane,
}

/// Lanes, and a heap of their heads. Joining and leaving cost O(log n), finding the first O(1) while
/// nothing changes.
///
/// Levels rise while nobody looks, so an entry of the heap may be lower than its lane's head is now; never
/// higher. It is put right when it comes to the top.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    lanes: BTreeMap<Lane, LaneQueue>,
    heads: BinaryHeap<Reverse<(Head, u64)>>,
    /// Numbers the entries of the heap. Of each lane only the newest counts.
    entries: u64,
    len: usize,
}

/// So many lanes stay when nobody waits in them any more: whoever comes next in one of them allocates nothing for it.
const LANES_KEPT: usize = 16;

#[derive(Debug, Clone, Default)]
struct LaneQueue {
    waiting: BTreeMap<Key, Slot>,
    entry: u64,
}

impl Line {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn join(&mut self, level: u128, lane: Lane, key: Key, slot: Slot) {
        let queue = self.lanes.entry(lane).or_default();
        let first = queue.waiting.first_key_value().is_none_or(|(&first, _)| key < first);
        let former = queue.waiting.insert(key, slot);
        assert!(former.is_none(), "two requests have the place {key:?}");
        self.len += 1;
        if first {
            self.entries += 1;
            queue.entry = self.entries;
            self.heads.push(Reverse((Head { level, key, lane }, self.entries)));
            self.forget_old_heads();
        }
    }

    pub(crate) fn leave(&mut self, lane: Lane, key: Key) {
        let queue = self.lanes.get_mut(&lane).expect("who waits has a lane");
        queue.waiting.remove(&key).expect("who waits has its place in the lane");
        if queue.waiting.is_empty() && self.lanes.len() > LANES_KEPT {
            self.lanes.remove(&lane);
        }
        self.len -= 1;
    }

    /// The first of all.
    pub(crate) fn first(&mut self, order: &impl Order) -> Option<(Head, Slot)> {
        loop {
            let mut top = self.heads.peek_mut()?;
            let Reverse((head, entry)) = *top;
            let current = self.lanes.get(&head.lane).filter(|queue| queue.entry == entry);
            let Some((&key, &slot)) = current.and_then(|queue| queue.waiting.first_key_value()) else {
                PeekMut::pop(top);
                continue;
            };
            let now = Head { level: order.level(head.lane), key, lane: head.lane };
            if now == head {
                return Some((head, slot));
            }
            *top = Reverse((now, entry));
        }
    }

    /// Everybody, lane by lane.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Lane, Key, Slot)> {
        self.lanes
            .iter()
            .flat_map(|(&lane, queue)| queue.waiting.iter().map(move |(&key, &slot)| (lane, key, slot)))
    }

    /// Keeps the heap in proportion to the lanes, where better and better heads came.
    fn forget_old_heads(&mut self) {
        if self.heads.len() > 2 * self.lanes.len() + 64 {
            let lanes = &self.lanes;
            self.heads.retain(|Reverse((head, entry))| {
                lanes.get(&head.lane).is_some_and(|queue| queue.entry == *entry)
            });
        }
    }
}

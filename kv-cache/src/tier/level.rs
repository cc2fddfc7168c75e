//! One tier: its slots, what is in them, and who is at work on them.
//!
//! ```text
//!             reserve            written            forget, no job left
//!    free  ------------> writing --------> ready ----------------------> free
//!                           |                |
//!                           | forget         | forget, a job is still at work
//!                           +-------> gone <-+
//!                                      |  its last job ends
//!                                      +------------------------------> free
//! ```
//!
//! A slot that a job reads or writes is never handed out, whatever happens to its content meanwhile.

use std::collections::BTreeSet;

use super::order::Order;
use super::recent::Recent;
use super::{Contents, JobId, Key, TierConfig, TierStats, Write};
use crate::BlockCount;
use crate::id::count;

/// Slots and index of one tier.
#[derive(Clone, Debug)]
pub(super) struct Level<K> {
    pub(super) config: TierConfig,
    pub(super) slots: Vec<Slot<K>>,
    /// Slots that hold nothing; the last is the next to be used.
    pub(super) free: Vec<u32>,
    pub(super) order: Order<K>,
    /// How often a key has been offered, where that counts.
    offers: Recent<K, u32>,
    /// What an asked tier was asked and has not answered, and what it denied having.
    asked: Recent<K, ()>,
    denied: Recent<K, ()>,
    /// Content of the tier above that has been offered often enough, in this order.
    pub(super) due: Recent<K, ()>,
}

/// A place for one block, and how many jobs read, write or pin it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot<K> {
    pub(super) state: State<K>,
    pub(super) jobs: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State<K> {
    Free,
    /// The job is writing this content here.
    Writing(K, JobId),
    Ready(K),
    /// Content that was forgotten while a job was at work on it.
    Gone,
}

/// What a tier says of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    Ready(u32),
    Writing(JobId),
    Awaited,
    Absent,
}

impl<K: Key> Level<K> {
    pub(super) fn new(config: TierConfig) -> Self {
        let slots = config.slots.0;
        Level {
            config,
            slots: vec![Slot { state: State::Free, jobs: 0 }; slots as usize],
            free: (0..slots).rev().collect(),
            order: Order::new(config.eviction, slots as usize),
            offers: Recent::new(),
            asked: Recent::new(),
            denied: Recent::new(),
            due: Recent::new(),
        }
    }

    pub(super) fn held(&self) -> BlockCount {
        BlockCount(self.config.slots.0 - count(self.free.len()))
    }

    /// The counters of this tier, with the slots as they are now.
    pub(super) fn stats(&self, counted: TierStats) -> TierStats {
        let mut stats = TierStats { free: BlockCount(count(self.free.len())), ..counted };
        for slot in &self.slots {
            stats.ready.0 += u32::from(matches!(slot.state, State::Ready(_)));
            stats.writing.0 += u32::from(matches!(slot.state, State::Writing(..)));
            stats.gone.0 += u32::from(slot.state == State::Gone);
            stats.held.0 += u32::from(slot.jobs > 0 && matches!(slot.state, State::Ready(_)));
        }
        stats
    }

    pub(super) fn presence(&self, key: &K) -> Presence {
        let Some(slot) = self.slot(key) else {
            return if self.asked.contains(key) { Presence::Awaited } else { Presence::Absent };
        };
        match self.slots[slot as usize].state {
            State::Writing(_, job) => Presence::Writing(job),
            _ => Presence::Ready(slot),
        }
    }

    /// The slot that holds the key or will hold it.
    pub(super) fn slot(&self, key: &K) -> Option<u32> {
        self.order.slot(key)
    }

    pub(super) fn ready(&self, key: &K) -> Option<u32> {
        match self.presence(key) {
            Presence::Ready(slot) => Some(slot),
            _ => None,
        }
    }

    pub(super) fn asks(&self) -> bool {
        matches!(self.config.contents, Contents::Asked { .. })
    }

    /// Whether to ask about a key that is not here: this tier asks, and has not asked or been denied it.
    pub(super) fn ask(&mut self, key: K) -> bool {
        let new = self.asks() && self.presence(&key) == Presence::Absent && !self.denied.contains(&key);
        if new {
            self.asked.insert(key, ());
        }
        new
    }

    /// Takes down that a key is not here.
    pub(super) fn deny(&mut self, key: K) {
        self.asked.remove(&key);
        if let Contents::Asked { remembered } = self.config.contents {
            self.denied.insert_bounded(key, (), remembered as usize);
        }
    }

    /// All questions are open again, those under way and those answered with no.
    pub(super) fn forget_answers(&mut self) {
        self.asked.clear();
        self.denied.clear();
    }

    /// Counts an offer, and says whether the content is to be stored now.
    pub(super) fn wants(&mut self, key: K) -> bool {
        let Write::After { offers, tracked } = self.config.write else { return false };
        if offers == 1 {
            return true;
        }
        let offered = self.offers.get(&key).unwrap_or(0).saturating_add(1);
        self.offers.insert_bounded(key, offered, tracked as usize);
        offered >= offers
    }

    /// The keys to give up so that `need` slots are free; an offered key, one at which a job is at work, and one
    /// that may not go never are. Fewer than needed if it cannot be done.
    pub(super) fn victims(&self, need: usize, offered: &BTreeSet<K>, may_go: impl Fn(&K) -> bool) -> Vec<K> {
        self.order.victims(need.saturating_sub(self.free.len()), |key, slot| {
            self.is_idle(slot) && !offered.contains(key) && may_go(key)
        })
    }

    /// Whether the content is here and no job is at work on it.
    fn is_idle(&self, slot: u32) -> bool {
        let slot = &self.slots[slot as usize];
        slot.jobs == 0 && matches!(slot.state, State::Ready(_))
    }

    pub(super) fn evict(&mut self, key: &K) {
        let slot = self.order.evict(key).expect("a victim is in the order");
        self.vacate(slot);
    }

    /// Takes a free slot for content that `job` will write; or for content that is there already.
    pub(super) fn reserve(&mut self, key: K, job: Option<JobId>) -> u32 {
        let slot = self.free.pop().expect("room has been made");
        self.take(key, slot, job);
        slot
    }

    /// Fills an empty tier with content that lies in it already. Slots exist, and neither they nor keys repeat.
    pub(super) fn restore(&mut self, content: &[(K, u32)]) {
        for &(key, slot) in content {
            self.take(key, slot, None);
        }
        let slots = &self.slots;
        self.free.retain(|&slot| slots[slot as usize].state == State::Free);
    }

    fn take(&mut self, key: K, slot: u32, job: Option<JobId>) {
        let state = job.map_or(State::Ready(key), |job| State::Writing(key, job));
        self.slots[slot as usize] = Slot { state, jobs: u32::from(job.is_some()) };
        self.order.insert(key, slot);
        self.asked.remove(&key);
        self.denied.remove(&key);
        self.due.remove(&key);
    }

    /// A job begins to read the slot, or to keep it.
    pub(super) fn hold(&mut self, slot: u32) {
        self.slots[slot as usize].jobs += 1;
    }

    /// The write ends; returns the content if it is here from now on.
    pub(super) fn end_write(&mut self, slot: u32, good: bool) -> Option<K> {
        let place = &mut self.slots[slot as usize];
        match place.state {
            State::Writing(key, _) if good => {
                place.state = State::Ready(key);
                self.end_hold(slot);
                Some(key)
            }
            State::Writing(..) => {
                self.forget(slot);
                self.end_hold(slot);
                None
            }
            _ => {
                self.end_hold(slot);
                None
            }
        }
    }

    /// A reader or keeper ends.
    pub(super) fn end_hold(&mut self, slot: u32) {
        let place = &mut self.slots[slot as usize];
        place.jobs = place.jobs.checked_sub(1).expect("every job ends once");
        if place.jobs == 0 && place.state == State::Gone {
            self.vacate(slot);
        }
    }

    /// Forgets what a slot holds, and returns it if others could read it.
    pub(super) fn forget(&mut self, slot: u32) -> Option<K> {
        let (key, ready) = match self.slots[slot as usize].state {
            State::Ready(key) => (key, true),
            State::Writing(key, _) => (key, false),
            State::Free | State::Gone => return None,
        };
        self.order.remove(&key);
        self.vacate(slot);
        ready.then_some(key)
    }

    /// Forgets everything. Slots at which jobs are at work are free when those end.
    pub(super) fn reset(&mut self) {
        for slot in (0..self.config.slots.0).rev() {
            if self.slots[slot as usize].state != State::Free {
                self.forget(slot);
            }
        }
        self.order.clear();
        self.offers.clear();
        self.forget_answers();
        self.due.clear();
    }

    fn vacate(&mut self, slot: u32) {
        let place = &mut self.slots[slot as usize];
        if place.jobs > 0 {
            place.state = State::Gone;
        } else {
            place.state = State::Free;
            self.free.push(slot);
        }
    }
}

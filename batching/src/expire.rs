//! What happens at the beginning of a step because time has passed: those whose time is up leave, and some
//! of the waiting are looked up in the memory.

use crate::batcher::{Batcher, count};
use crate::memory::Memory;
use crate::order::Order;
use crate::plan::Plan;
use crate::reason::Reason;
use crate::remains::Remains;
use crate::sequence::{At, Sequence, State};
use crate::sequences::Slot;

impl<O: Order> Batcher<O> {
    /// Ends everybody whose time is up.
    pub(crate) fn expire(&mut self, memory: &mut impl Memory, plan: &mut Plan) {
        while let Some(id) = self.timers.next_before(self.now) {
            if let Some(Remains::HandedOver { since }) = self.remains.get(&id) {
                let kept_ticks = self.now.since(*since);
                if self.config.handover_ticks_max.is_some_and(|max| kept_ticks > max) {
                    self.handed_over(id, memory);
                }
            }
            let Some(slot) = self.sequences.find(id) else { continue };
            let Some(reason) = self.overdue(self.sequences.at(slot)) else { continue };
            self.running.retain(|&running| running != slot);
            self.end(slot, reason, memory, plan);
        }
    }

    fn overdue(&self, sequence: &Sequence) -> Option<Reason> {
        if let (State::Waiting(waiting), Some(waiting_ticks_max)) =
            (&sequence.state, self.config.waiting_ticks_max)
        {
            let waited_ticks = self.now.since(waiting.place.since);
            if waited_ticks > waiting_ticks_max {
                return Some(Reason::WaitedTooLong { waited_ticks, waiting_ticks_max });
            }
        }
        let (started, running_ticks_max) = (sequence.started?, self.config.running_ticks_max?);
        let ran_ticks = self.now.since(started);
        (ran_ticks > running_ticks_max).then_some(Reason::RanTooLong { ran_ticks, running_ticks_max })
    }

    /// Looks up a few of the waiting in the memory, as many as the order wants: first those who are new,
    /// then the others in turn, nobody twice.
    pub(crate) fn look_up(&mut self, memory: &mut impl Memory) {
        let mut left = self.order.lookups_max();
        while left > 0
            && let Some(slot) = self.next_unseen()
        {
            self.look_up_one(slot, memory);
            left -= 1;
        }
        for _ in 0..left.min(count(self.sequences.len())) {
            if let Some(slot) = self.next_seen() {
                self.look_up_one(slot, memory);
            }
        }
    }

    /// The first of the new ones who has not left meanwhile.
    fn next_unseen(&mut self) -> Option<Slot> {
        while let Some(id) = self.unseen.pop_front() {
            if let Some(slot) = self.sequences.find(id) {
                return Some(slot);
            }
        }
        None
    }

    fn next_seen(&mut self) -> Option<Slot> {
        let next = self.sequences.behind(self.seen).next().or_else(|| self.sequences.behind(None).next());
        let (slot, sequence) = next?;
        self.seen = Some(sequence.id);
        Some(slot)
    }

    fn look_up_one(&mut self, slot: Slot, memory: &mut impl Memory) {
        let State::Waiting(waiting) = &self.sequences.at(slot).state else { return };
        if waiting.at != At::Queue || waiting.swapped_tokens.is_some() {
            return;
        }
        let (place, before) = (waiting.place, waiting.cached_tokens);
        let cached_tokens = memory.cached_tokens(place.key.id);
        if cached_tokens != before {
            self.queue.leave(place);
            self.sequences.at_mut(slot).waiting_mut().cached_tokens = cached_tokens;
            self.enqueue(slot);
        }
    }
}

//! Requests leave: complete, unwanted, or out of time.

use crate::batcher::Batcher;
use crate::id::{RequestId, StepId};
use crate::memory::Memory;
use crate::order::Order;
use crate::queue::Class;
use crate::remains::Remains;
use crate::sequence::{At, State, Waiting};
use crate::sequences::Slot;

impl<O: Order> Batcher<O> {
    /// Ends a request that the caller found to be complete, by a stop string for example, and releases its
    /// memory, unless it [hands over](crate::Request::hands_over). False if there is no such request (any more).
    pub fn finish(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        let found = self.remove(id, true, memory);
        self.counts.finished += u64::from(found);
        found
    }

    /// Ends a request that nobody wants any more, at any moment, and releases its memory. False if there is
    /// no such request (any more). An output that a plan has asked for is dropped when it comes.
    pub fn cancel(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        let found = self.remove(id, false, memory);
        self.counts.cancelled += u64::from(found);
        found
    }

    fn remove(&mut self, id: RequestId, complete: bool, memory: &mut impl Memory) -> bool {
        let Some(slot) = self.sequences.find(id) else { return false };
        if self.sequences.at(slot).is_running() {
            self.running.retain(|&running| running != slot);
        }
        self.retire(slot, complete, memory);
        true
    }

    /// Forgets a sequence and gives back what it holds; one that is `complete` may hand it over. The caller
    /// takes it off the list of the running.
    pub(crate) fn retire(&mut self, slot: Slot, complete: bool, memory: &mut impl Memory) {
        let mut sequence = self.sequences.remove(slot);
        let id = sequence.id;
        if sequence.pending > 0 {
            self.flight.depart(id, sequence.last_step);
        }
        self.encoder.leave(id);
        match &mut sequence.state {
            State::Waiting(waiting) => {
                self.waiting_tokens -= u64::from(sequence.known_tokens);
                self.leave_waiting(slot, waiting, memory);
            }
            State::Running(running) => {
                let class = Class { adapter: sequence.request.adapter, long: running.long };
                self.gates.leave(class);
                self.promises -= u32::from(running.promised);
                if complete && sequence.request.hands_over {
                    self.hand_over(id);
                } else {
                    self.give_back(id, sequence.last_step, memory);
                }
            }
        }
        if let Some(leader) = sequence.request.sample_of {
            self.lose_follower(leader);
        }
        if sequence.followers > 0 {
            self.wake_followers(id);
        }
        self.order.leaves(sequence.lane);
        self.gone.push(id);
    }

    fn leave_waiting(&mut self, slot: Slot, waiting: &Waiting, memory: &mut impl Memory) {
        let id = waiting.place.key.id;
        match waiting.at {
            At::Queue => self.queue.leave(waiting.place),
            At::Aside(_) => {
                self.aside.remove(&id);
            }
            At::Loading { .. } => {
                self.aside.remove(&id);
                self.promises -= 1;
                self.remains.insert(id, Remains::Arriving);
            }
            At::Loaded { .. } => {
                self.arrived.retain(|&arrived| arrived != slot);
                self.promises -= 1;
                memory.release(id);
            }
        }
        if waiting.swapped_tokens.is_some() {
            memory.release(id);
        }
    }

    /// Gives room back, at once or when the steps that may touch it are done.
    pub(crate) fn give_back(&mut self, id: RequestId, last_step: StepId, memory: &mut impl Memory) {
        if self.config.fenced_frees && self.flight.reaches(last_step) {
            self.remains.insert(id, Remains::Fenced(last_step));
        } else {
            memory.release(id);
        }
    }
}

//! Prefill on one machine, decode on another: tokens that are on their way, and room that is kept until
//! they have left.

use crate::batcher::Batcher;
use crate::config::FailedLoads;
use crate::id::RequestId;
use crate::memory::Memory;
use crate::order::Order;
use crate::plan::Note;
use crate::reason::Reason;
use crate::remains::Remains;
use crate::sequence::{At, State};
use crate::sequences::Slot;

impl<O: Order> Batcher<O> {
    /// The tokens of a [`Load`](crate::Load) have come, all of them: the request runs as soon as there are
    /// tokens for it in a step. False if nothing is on its way for this id. One that was cancelled
    /// meanwhile loses its room now.
    pub fn loaded(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        self.arrive(id, u32::MAX, memory)
    }

    /// The tokens of a [`Load`](crate::Load) have come up to a gap only: the first `tokens` tokens of the
    /// request are here, those that were here before included; fewer, if the load wrote over some of them. What
    /// becomes of it says [`Config::failed_loads`](crate::Config::failed_loads). False if nothing is on its way for
    /// this id.
    ///
    /// Also for a request that runs with tokens that were to come within its step
    /// ([`Remote::Now`](crate::Remote::Now)): its outputs in flight are worth nothing and dropped.
    pub fn load_failed(&mut self, id: RequestId, tokens: u32, memory: &mut impl Memory) -> bool {
        let running = self.sequences.find(id).filter(|&slot| self.sequences.at(slot).is_running());
        match running {
            Some(slot) => self.restart(slot, tokens, memory),
            None => return self.arrive(id, tokens, memory),
        }
        true
    }

    /// The other machine has fetched what a request [handed over](crate::Request::hands_over): its room is
    /// released. False if nothing of this id is being handed over.
    pub fn handed_over(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        let found = matches!(self.remains.get(&id), Some(Remains::HandedOver { .. }));
        if found {
            self.remains.remove(&id);
            memory.release(id);
        }
        found
    }

    /// Keeps the room of one that ended.
    pub(crate) fn hand_over(&mut self, id: RequestId) {
        self.remains.insert(id, Remains::HandedOver { since: self.now });
        if let Some(ticks) = self.config.handover_ticks_max {
            self.timers.set(self.now.after(ticks), id);
        }
    }

    fn arrive(&mut self, id: RequestId, tokens: u32, memory: &mut impl Memory) -> bool {
        if matches!(self.remains.get(&id), Some(Remains::Arriving)) {
            self.remains.remove(&id);
            memory.truncate(id, 0);
            memory.release(id);
            return true;
        }
        let Some(slot) = self.sequences.find(id) else { return false };
        let State::Waiting(waiting) = &mut self.sequences.at_mut(slot).state else { return false };
        let At::Loading { cached_tokens, loaded_tokens, covered_tokens } = waiting.at else { return false };
        let here = tokens.min(loaded_tokens);
        self.aside.remove(&id);
        if here < loaded_tokens {
            memory.truncate(id, here);
        }
        memory.publish(id, here);
        let still_cached = cached_tokens.min(here);
        waiting.at = At::Loaded { cached_tokens: still_cached, loaded_tokens: here, covered_tokens };
        self.arrived.push(slot);
        if here < loaded_tokens && self.config.failed_loads == FailedLoads::End {
            let (tokens, loaded_tokens) = (loaded_tokens - cached_tokens, here.saturating_sub(cached_tokens));
            self.end_between(slot, Reason::LoadFailed { tokens, loaded_tokens }, memory);
        }
        true
    }

    /// One that runs has built on tokens that did not come.
    fn restart(&mut self, slot: Slot, tokens: u32, memory: &mut impl Memory) {
        let sequence = self.sequences.at_mut(slot);
        let id = sequence.id;
        memory.truncate(id, tokens);
        self.running.retain(|&running| running != slot);
        let computed_tokens = sequence.running().computed_tokens;
        (sequence.pending, sequence.pending_drafts) = (0, 0);
        sequence.running_mut().computed_tokens = tokens.min(computed_tokens);
        sequence.lives_from = sequence.preemptions + 1;
        self.displace(slot, self.now, memory);
        if self.config.failed_loads == FailedLoads::End {
            let reason = Reason::LoadFailed { tokens: computed_tokens, loaded_tokens: tokens };
            self.end_between(slot, reason, memory);
        }
    }

    /// Ends a request between two steps. The next plan tells of it.
    fn end_between(&mut self, slot: Slot, reason: Reason, memory: &mut impl Memory) {
        self.ended.push(Note { id: self.sequences.at(slot).id, reason });
        self.retire(slot, false, memory);
        self.counts.ended += 1;
    }
}

//! The outputs of a step: tokens become known, drafts are accepted or not, and whoever is done leaves.

use crate::batcher::Batcher;
use crate::error::Error;
use crate::flight::burst;
use crate::id::{RequestId, StepId};
use crate::memory::Memory;
use crate::order::{Order, Service};
use crate::plan::Scheduled;
use crate::remains::Remains;
use crate::request::{FinishReason, Finished, Sampled};
use crate::sequence::State;
use crate::sequences::Slot;

impl<O: Order> Batcher<O> {
    /// Takes the outputs of a step: each sampled token becomes known, and whoever is done leaves.
    /// `finished` is cleared first. The outputs may come in any order, cheapest is the order of the plan, in
    /// which they are taken and room is given back; only those of one request must be together, and in
    /// theirs. Those of requests that left meanwhile are dropped, and may be left out. Plans may be applied in
    /// any order, as long as those that hold the same request are applied in theirs.
    ///
    /// # Errors
    /// [`Error`] for a step that is not in flight, or outputs that are not those it asked for. Nothing
    /// changes then.
    pub fn apply(
        &mut self,
        step: StepId,
        sampled: &[Sampled],
        memory: &mut impl Memory,
        finished: &mut Vec<Finished>,
    ) -> Result<(), Error> {
        let flown = self.flight.land(step, sampled, &self.sequences)?;
        finished.clear();
        let sorted = self.flight.take_sorted();
        let mut outputs = if sorted.is_empty() { sampled } else { &sorted };
        for part in &flown.parts {
            let tokens = if part.samples { burst(outputs, part.id) } else { 0 };
            let (own, others) = outputs.split_at(tokens);
            outputs = others;
            self.settle(part, own, memory, finished);
        }
        self.flight.recycle(flown, sorted);
        if !finished.is_empty() {
            self.running.retain(|&slot| self.sequences.get(slot).is_some());
            self.counts.finished += finished.len() as u64;
        }
        self.free_fenced(memory);
        Ok(())
    }

    /// Offers so many drafts of a request's next tokens, to be verified in the next step. Returns how many
    /// will be, if the step has room for them: fewer than offered when they could be of no use, and none
    /// for a request that does not generate at the moment.
    ///
    /// With [`outputs_ahead`](crate::Config::outputs_ahead) the drafts need not exist yet: they are asked for when the
    /// step is carried out, and may be fewer then; those that are missing count as rejected.
    pub fn propose(&mut self, id: RequestId, drafts: u32) -> u32 {
        let worth = self.drafts_wanted(id).min(drafts);
        if let Some(slot) = self.sequences.find(id) {
            self.sequences.at_mut(slot).drafts = worth;
        }
        worth
    }

    /// How many drafts of a request's next tokens are worth proposing now.
    pub fn drafts_wanted(&self, id: RequestId) -> u32 {
        let Some(slot) = self.sequences.find(id) else { return 0 };
        let sequence = self.sequences.at(slot);
        if !sequence.is_running()
            || sequence.pending > self.config.outputs_ahead
            || sequence.new_tokens() == 0
        {
            return 0;
        }
        let drafts_max = self.config.drafts.tokens_max(self.running.len());
        drafts_max.min(sequence.draft_reach).min(sequence.drafts_useful())
    }

    /// A part of a step is done, and has brought these outputs.
    fn settle(
        &mut self,
        part: &Scheduled,
        outputs: &[Sampled],
        memory: &mut impl Memory,
        finished: &mut Vec<Finished>,
    ) {
        let Some(sequence) = self.sequences.get_mut(part.slot) else { return };
        if part.life < sequence.lives_from {
            return;
        }
        let same_life = part.life == sequence.preemptions;
        if let State::Running(running) = &mut sequence.state
            && same_life
        {
            running.in_flight_tokens -= part.tokens;
            let settled = running.computed_tokens - running.in_flight_tokens;
            if sequence.has_items() {
                self.encoder.settle(part.id, settled);
            }
        }
        if !part.samples {
            return;
        }
        sequence.pending -= 1;
        sequence.pending_drafts -= part.drafts + part.padding;
        let model_tokens_max = self.config.model_tokens_max;
        let mut taken = 0;
        let verdict = outputs.iter().find_map(|output| {
            taken += 1;
            sequence.append(output.token, model_tokens_max)
        });
        let accepted = u32::try_from(outputs.len()).unwrap_or(u32::MAX).saturating_sub(1);
        let rejected = part.drafts + part.padding - accepted;
        if rejected > 0
            && same_life
            && let State::Running(running) = &mut sequence.state
        {
            running.computed_tokens -= rejected;
            // What fills a block is another token now: the memory is asked again, though there is room.
            running.covered_tokens = running.computed_tokens;
            memory.truncate(part.id, running.computed_tokens);
        }
        if part.drafts > 0 {
            sequence.draft_reach = self.config.drafts.reach(sequence.draft_reach, part.drafts, accepted);
            self.counts.drafts += u64::from(part.drafts);
            self.counts.drafts_accepted += u64::from(accepted);
        }
        self.order.charge(sequence.lane, Service::Output { tokens: taken });
        let waits = !sequence.is_running();
        self.waiting_tokens += if waits { u64::from(taken) } else { 0 };
        match verdict {
            Some(reason) => {
                let tokens = u32::try_from(outputs.len()).unwrap_or(u32::MAX);
                self.conclude(part, reason, tokens - taken, memory, finished);
            }
            None if waits => self.regate(part.slot),
            None => {}
        }
    }

    fn conclude(
        &mut self,
        part: &Scheduled,
        reason: FinishReason,
        dropped_tokens: u32,
        memory: &mut impl Memory,
        finished: &mut Vec<Finished>,
    ) {
        finished.push(Finished { id: part.id, reason, dropped_tokens });
        self.retire(part.slot, true, memory);
    }

    /// Gives back the room that no step in flight can touch any more.
    fn free_fenced(&mut self, memory: &mut impl Memory) {
        if self.remains.is_empty() {
            return;
        }
        let mut freed: Vec<RequestId> = Vec::new();
        self.remains.retain(|&id, remains| {
            let keep = !matches!(*remains, Remains::Fenced(step) if !self.flight.reaches(step));
            if !keep {
                freed.push(id);
            }
            keep
        });
        for id in freed {
            memory.release(id);
            let waiting: Option<Slot> = self.sequences.find(id);
            if let Some(slot) = waiting {
                self.regate(slot);
            }
        }
    }
}

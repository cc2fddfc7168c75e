//! Who yields when memory runs out, and what becomes of what it computed: it is given up, and computed again
//! as far as the memory does not find it, or it is moved to a slower tier and back.

use crate::batcher::Batcher;
use crate::config::Preemption;
use crate::id::Tick;
use crate::memory::Memory;
use crate::order::{Order, Rank};
use crate::plan::{Plan, Preempted, Scheduled};
use crate::queue::{Class, Place};
use crate::reason::Reason;
use crate::remains::Remains;
use crate::sequence::{At, Running, State, Waiting};
use crate::sequences::Slot;
use crate::step::Step;

impl<O: Order> Batcher<O> {
    /// The place, among the running, of the next one to yield: the last by the order, and of equals the one
    /// admitted last. Those who had lost patience yield after all others, the one that came last of them first:
    /// so the one that came first of them comes to its end, whatever the order says.
    pub(crate) fn victim_place(&self) -> usize {
        let rank = |&place: &usize| {
            let sequence = self.sequences.at(self.running[place]);
            let Running { turn, impatient_since, .. } = *sequence.running();
            let turn = i64::try_from(turn).unwrap_or(i64::MAX);
            match impatient_since {
                None => (true, self.order.yields(&sequence.candidate(turn, 0), sequence.lane)),
                Some(since) => (false, Rank(i128::from(since.0), sequence.id.0)),
            }
        };
        (0..self.running.len()).max_by_key(rank).expect("whoever asks for room runs")
    }

    /// True if room will come back when the steps in flight have been applied. Until then nobody is
    /// preempted for it: that would be in vain.
    pub(crate) fn frees_pending(&self) -> bool {
        self.remains.values().any(|remains| matches!(remains, Remains::Fenced(_)))
    }

    /// Takes the room of the running request at `place` and sends it back to the queue. If this step had
    /// scheduled it already, the step gets its tokens back; if it had skipped it, there is a new reason now.
    pub(crate) fn preempt<M: Memory>(&mut self, place: usize, reason: Reason, step: &mut Step<'_, M>) {
        let slot = self.running.remove(place);
        let id = self.sequences.at(slot).id;
        step.plan.skipped.retain(|note| note.id != id);
        if let Some(part) = withdraw(step.plan, slot) {
            let sequence = self.sequences.at_mut(slot);
            sequence.last_step = part.step_before;
            sequence.pending -= u32::from(part.samples);
            sequence.pending_drafts -= part.drafts + part.padding;
            let running = sequence.running_mut();
            running.computed_tokens = part.start;
            running.in_flight_tokens -= part.tokens;
            let generates = part.samples && part.tokens - part.drafts - part.padding == 1;
            step.budget.give_back(part.tokens, generates);
            step.plan.tokens -= part.tokens;
            self.encoder.withdraw(id, step.plan);
            if part.granted {
                step.memory.withdraw(id);
            }
        }
        let swapped_tokens = self.displace(slot, step.now, step.memory);
        step.plan.preempted.push(Preempted { id, reason, swapped_tokens });
    }

    /// Takes the room of one that has just left the list of the running, and lets it wait. Returns how many
    /// of its tokens are in the slower tier now.
    pub(crate) fn displace(&mut self, slot: Slot, now: Tick, memory: &mut impl Memory) -> u32 {
        let sequence = self.sequences.at(slot);
        let (id, last_step, known_tokens) = (sequence.id, sequence.last_step, sequence.known_tokens);
        let running = *sequence.running();
        let class = Class { adapter: sequence.request.adapter, long: running.long };
        self.gates.leave(class);
        self.promises -= u32::from(running.promised);
        self.encoder.leave(id);

        let computed_tokens = running.computed_tokens.min(known_tokens);
        let swaps = computed_tokens > 0 && self.prefers_swap(computed_tokens);
        let swapped_tokens = if swaps { memory.swap_out(id, computed_tokens) } else { 0 };
        if swapped_tokens == 0 {
            self.give_back(id, last_step, memory);
        }

        self.turns.front -= 1;
        let turn = self.turns.front;
        let sequence = self.sequences.at_mut(slot);
        let key = crate::line::Key { rank: Rank::default(), id };
        let class = Class { long: false, ..class };
        let age = running.impatient_since.unwrap_or(now);
        let place = Place { class, lane: sequence.lane, key, since: now, age };
        let swapped = (swapped_tokens > 0).then_some(swapped_tokens);
        let waiting = Waiting { place, turn, at: At::Queue, swapped_tokens: swapped, cached_tokens: 0 };
        sequence.state = State::Waiting(Box::new(waiting));
        sequence.preemptions += 1;
        sequence.note = None;
        sequence.drafts = 0;
        self.waiting_tokens += u64::from(known_tokens);
        self.counts.preemptions += 1;
        self.counts.swapped_tokens += u64::from(swapped_tokens);
        if let Some(ticks) = self.config.waiting_ticks_max {
            self.timers.set(now.after(ticks), id);
        }
        if sequence.followers > 0 {
            self.wake_followers(id);
        }
        self.enqueue(slot);
        swapped_tokens
    }

    fn prefers_swap(&self, tokens: u32) -> bool {
        match self.config.preemption {
            Preemption::Recompute => false,
            Preemption::Swap => true,
            Preemption::Cheaper(costs) => {
                costs.swap_nanoseconds(tokens) < costs.recompute_nanoseconds(tokens)
            }
        }
    }
}

/// Takes a request out of a plan in the making. Returns what it had there.
fn withdraw(plan: &mut Plan, slot: Slot) -> Option<Scheduled> {
    let place = plan.scheduled.iter().position(|scheduled| scheduled.slot == slot)?;
    let scheduled = plan.scheduled.remove(place);
    plan.cut.retain(|note| note.id != scheduled.id);
    Some(scheduled)
}

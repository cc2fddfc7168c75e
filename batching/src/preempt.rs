//! Who yields when memory runs out, and what it loses: its room. It starts over later, from whatever the
//! memory still has of it.

use crate::batcher::Batcher;
use crate::config::Order;
use crate::memory::Memory;
use crate::plan::{Note, Plan, Scheduled};
use crate::queue::Rank;
use crate::reason::Reason;
use crate::sequence::{Slot, State};
use crate::step::Step;

impl Batcher {
    /// The place, among the running, of the next one to yield: the one admitted last, or the last by
    /// priority.
    pub(crate) fn victim_place(&self) -> usize {
        let last = self.running.len() - 1;
        match self.config.order {
            Order::FirstCome => last,
            Order::Priority => (0..=last)
                .max_by_key(|&place| Rank::by_priority(&self.sequences.at(self.running[place]).request))
                .unwrap_or(last),
        }
    }

    /// Takes the room of the running request at `place` and sends it back to the queue. If this step had
    /// scheduled it already, the step gets its tokens back.
    pub(crate) fn preempt<M: Memory>(&mut self, place: usize, reason: Reason, step: &mut Step<'_, M>) {
        let slot = self.running.remove(place);
        let sequence = self.sequences.at_mut(slot);
        let id = sequence.id();
        if let Some(scheduled) = withdraw(step.plan, slot) {
            step.budget.give_back(scheduled.tokens);
            if scheduled.granted {
                step.memory.withdraw(id);
            }
        }
        step.memory.release(id);

        let rank = self.queue.front(&sequence.request);
        sequence.state = State::Waiting { since: step.now, rank };
        sequence.preemptions += 1;
        self.queue.join(rank, slot, sequence.known_tokens);
        self.counts.preemptions += 1;
        step.plan.preempted.push(Note { id, reason });
    }
}

/// Takes a request out of a plan in the making. Returns what it had there.
fn withdraw(plan: &mut Plan, slot: Slot) -> Option<Scheduled> {
    let place = plan.scheduled.iter().position(|scheduled| scheduled.slot == slot)?;
    let scheduled = plan.scheduled.remove(place);
    plan.cut.retain(|note| note.id != scheduled.id);
    Some(scheduled)
}

//! The audit of everything that must always be true.

use std::collections::BTreeMap;

use crate::batcher::Batcher;
use crate::gates::Gates;
use crate::order::Order;
use crate::queue::Class;
use crate::sequence::{At, Running, Sequence, State};
use crate::sequences::Slot;

/// An invariant that does not hold: a bug in this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(String);

impl<O: Order> Batcher<O> {
    /// Audits every invariant. Cost: O(n log n). Meant for tests, and for a server that is idle.
    ///
    /// # Errors
    /// [`Violation`], in words, for the first one that does not hold.
    pub fn check(&self) -> Result<(), Violation> {
        ensure(self.sequences.is_consistent(), || "slots, vacancies and ids disagree".into())?;
        ensure(self.encoder.is_consistent(), || "the encoder's sums are wrong".into())?;
        self.check_lists()?;
        self.check_waiting()?;
        self.check_gates()?;
        let in_flight = self.in_flight();
        for (slot, sequence) in self.sequences.iter() {
            self.check_sequence(sequence)?;
            let (outputs, drafts, tokens) = in_flight.get(&slot).copied().unwrap_or_default();
            let (id, pending) = (sequence.id, sequence.pending);
            ensure(outputs == pending, || {
                format!("{pending} outputs of {id} are pending, and {outputs} in flight")
            })?;
            let pending = sequence.pending_drafts;
            ensure(drafts == pending, || {
                format!("{pending} drafts of {id} are pending, and {drafts} in flight")
            })?;
            if let State::Running(running) = &sequence.state {
                self.check_running(sequence, running)?;
                let counted = running.in_flight_tokens;
                ensure(tokens == counted, || {
                    format!("{tokens} tokens of {id} are in flight, and {counted} are counted")
                })?;
            }
        }
        Ok(())
    }

    fn check_lists(&self) -> Result<(), Violation> {
        let lists = [self.running.len(), self.queue.len(), self.aside.len(), self.arrived.len()];
        let (listed, all) = (lists.iter().sum::<usize>(), self.sequences.len());
        ensure(listed == all, || {
            format!("running, queued, aside and arrived are {lists:?}, but {all} are here")
        })?;
        let (running, running_max) = (self.running.len(), self.config.running_max);
        ensure(running <= running_max as usize, || format!("{running} run, and {running_max} may"))?;
        let mut slots = self.running.clone();
        slots.sort_unstable();
        slots.dedup();
        ensure(slots.len() == running, || "a request runs twice".into())?;
        ensure(self.running.iter().all(|&slot| self.sequences.at(slot).is_running()), || {
            "one that waits is listed as running".into()
        })?;
        let turns = self.running.iter().map(|&slot| self.sequences.at(slot).running().turn);
        ensure(turns.is_sorted(), || "the running are not in the order of admission".into())
    }

    fn check_waiting(&self) -> Result<(), Violation> {
        let queued = self.queue.iter().map(|(_, _, slot)| (slot, 0));
        let aside = self.aside.values().map(|&slot| (slot, 1));
        let arrived = self.arrived.iter().map(|&slot| (slot, 2));
        let mut tokens = 0;
        for (slot, list) in queued.chain(aside).chain(arrived) {
            let sequence = self.sequences.at(slot);
            let id = sequence.id;
            let State::Waiting(waiting) = &sequence.state else {
                return Err(Violation(format!("request {id} runs, and is listed as waiting")));
            };
            let place = match waiting.at {
                At::Queue => 0,
                At::Aside(_) | At::Loading { .. } => 1,
                At::Loaded { .. } => 2,
            };
            ensure(place == list, || format!("request {id} is not where it should be: {:?}", waiting.at))?;
            tokens += u64::from(sequence.known_tokens);
        }
        let listed = self.queue.iter().all(|(lane, key, slot)| {
            let place = self.sequences.at(slot).waiting().place;
            place.lane == lane && place.key == key
        });
        ensure(listed, || "somebody is at another place in the queue than it knows".into())?;
        let counted = self.waiting_tokens;
        ensure(tokens == counted, || format!("{tokens} tokens wait, but {counted} are counted"))
    }

    fn check_gates(&self) -> Result<(), Violation> {
        let mut gates = Gates::new(&self.config);
        let mut promises = 0;
        for (_, sequence) in self.sequences.iter() {
            match &sequence.state {
                State::Running(running) => {
                    gates.enter(Class { adapter: sequence.request.adapter, long: running.long });
                    promises += u32::from(running.promised);
                }
                State::Waiting(waiting) => {
                    promises += u32::from(matches!(waiting.at, At::Loading { .. } | At::Loaded { .. }));
                }
            }
        }
        ensure(gates.longs() == self.gates.longs(), || "the long prompts are miscounted".into())?;
        ensure(gates.adapters() == self.gates.adapters(), || "the adapters are miscounted".into())?;
        let adapters = gates.adapters().len();
        ensure(self.config.adapters_max.is_none_or(|max| adapters <= max as usize), || {
            format!("{adapters} adapters are in use")
        })?;
        let counted = self.promises;
        ensure(promises == counted, || format!("{promises} were promised room, and {counted} are counted"))
    }

    /// Outputs, drafts and tokens in flight of each sequence that is still the one they were planned for.
    fn in_flight(&self) -> BTreeMap<Slot, (u32, u32, u32)> {
        let mut in_flight: BTreeMap<Slot, (u32, u32, u32)> = BTreeMap::new();
        for part in self.flight.plans().iter().flat_map(|flown| &flown.parts) {
            let Some(sequence) = self.sequences.get(part.slot) else { continue };
            if part.life >= sequence.lives_from {
                let (outputs, drafts, tokens) = in_flight.entry(part.slot).or_default();
                *outputs += u32::from(part.samples);
                *drafts += part.drafts + part.padding;
                *tokens += if part.life == sequence.preemptions { part.tokens } else { 0 };
            }
        }
        in_flight
    }

    fn check_sequence(&self, sequence: &Sequence) -> Result<(), Violation> {
        let (id, known, model) = (sequence.id, sequence.known_tokens, self.config.model_tokens_max);
        ensure(known >= sequence.request.prompt_tokens, || {
            format!("request {id} lost tokens of its prompt")
        })?;
        ensure(known < model, || {
            format!("request {id} has {known} tokens and goes on, in a model of {model}")
        })?;
        let limit = sequence.request.stop.new_tokens_max;
        ensure(sequence.new_tokens() < limit, || format!("request {id} has its {limit} tokens and goes on"))
    }

    fn check_running(&self, sequence: &Sequence, running: &Running) -> Result<(), Violation> {
        let (id, known) = (sequence.id, sequence.known_tokens);
        let Running { computed_tokens, covered_tokens, .. } = *running;
        ensure(computed_tokens > 0, || format!("request {id} runs, but nothing of it was scheduled"))?;
        ensure(computed_tokens <= covered_tokens, || {
            format!("{computed_tokens} tokens of request {id} are computed, with room for {covered_tokens}")
        })?;
        let pending = sequence.pending;
        ensure(pending > 0 || computed_tokens < known, || {
            format!("{computed_tokens} of {known} tokens of {id} are computed, and no output is pending")
        })?;
        ensure(pending == 0 || computed_tokens + 1 >= known + pending, || {
            format!(
                "{pending} outputs of {id} are pending, with {computed_tokens} of {known} tokens computed"
            )
        })?;
        ensure(pending <= self.config.outputs_ahead + 1, || format!("{pending} outputs of {id} are pending"))
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation(otherwise())) }
}

//! The audit of everything that must always be true.

use crate::batcher::Batcher;
use crate::flight::Awaited;
use crate::sequence::State;

/// An invariant that does not hold: a bug in this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Violation(String);

impl Batcher {
    /// Audits every invariant. Cost: O(n log n). Meant for tests, and for a server that is idle.
    ///
    /// # Errors
    /// [`Violation`], in words, for the first one that does not hold.
    pub fn check(&self) -> Result<(), Violation> {
        ensure(self.sequences.is_consistent(), || "slots, vacancies and ids disagree".into())?;
        self.check_lists()?;
        self.check_running()?;
        self.check_queue()?;
        self.check_flight()
    }

    fn check_lists(&self) -> Result<(), Violation> {
        let (running, waiting, all) = (self.running.len(), self.queue.len(), self.sequences.len());
        ensure(running + waiting == all, || format!("{running} run and {waiting} wait, but {all} are here"))?;
        let running_max = self.config.running_max;
        ensure(running <= running_max as usize, || format!("{running} run, and {running_max} may"))?;
        let mut slots = self.running.clone();
        slots.sort_unstable();
        slots.dedup();
        ensure(slots.len() == running, || "a request runs twice".into())
    }

    fn check_running(&self) -> Result<(), Violation> {
        for &slot in &self.running {
            let sequence = self.sequences.at(slot);
            let (id, known) = (sequence.id(), sequence.known_tokens);
            let State::Running { computed_tokens, covered_tokens } = sequence.state else {
                return Err(Violation(format!("request {id} is listed as running, but waits")));
            };
            ensure(computed_tokens > 0, || format!("request {id} runs, but nothing of it was scheduled"))?;
            ensure(computed_tokens <= known, || {
                format!("{computed_tokens} of {known} tokens of {id} are computed")
            })?;
            ensure(computed_tokens <= covered_tokens, || {
                format!(
                    "{computed_tokens} tokens of request {id} are computed, with room for {covered_tokens}"
                )
            })?;
            ensure(sequence.output_pending == (computed_tokens == known), || {
                format!(
                    "request {id} has computed {computed_tokens} of {known}: its output is pending, or is not"
                )
            })?;
        }
        Ok(())
    }

    fn check_queue(&self) -> Result<(), Violation> {
        let mut tokens = 0;
        for (place, slot) in self.queue.iter() {
            let sequence = self.sequences.at(slot);
            let id = sequence.id();
            let in_place = matches!(sequence.state, State::Waiting { rank, .. } if rank == place);
            ensure(in_place, || format!("request {id} is not where the queue has it"))?;
            tokens += u64::from(sequence.known_tokens);
        }
        let counted = self.queue.tokens();
        ensure(tokens == counted, || format!("{tokens} tokens wait, but {counted} are counted"))
    }

    fn check_flight(&self) -> Result<(), Violation> {
        let pending = self.sequences.iter().filter(|(_, sequence)| sequence.output_pending).count();
        let awaited = self.flight.awaited();
        ensure(pending == awaited.len(), || {
            format!("{pending} outputs are pending, {} awaited", awaited.len())
        })?;
        for &Awaited { id, slot, .. } in awaited {
            let known = self
                .sequences
                .get(slot)
                .is_some_and(|sequence| sequence.id() == id && sequence.output_pending);
            ensure(known, || format!("an output of {id} is awaited, but not pending"))?;
        }
        for (_, sequence) in self.sequences.iter() {
            let (id, known, model) = (sequence.id(), sequence.known_tokens, self.config.model_tokens_max);
            ensure(known >= sequence.request.prompt_tokens, || {
                format!("request {id} lost tokens of its prompt")
            })?;
            ensure(known < model, || {
                format!("request {id} has {known} tokens and goes on, in a model of {model}")
            })?;
            let limit = sequence.request.stop.new_tokens_max;
            ensure(sequence.new_tokens() < limit, || {
                format!("request {id} has its {limit} tokens and goes on")
            })?;
        }
        Ok(())
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation(otherwise())) }
}

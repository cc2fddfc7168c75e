//! One step: the running get their tokens, then the waiting are admitted to what is left. The heart of the
//! crate.

use std::cmp::Ordering;

use crate::batcher::{Batcher, Flow, count};
use crate::budget::{Budget, Share};
use crate::error::Error;
use crate::id::Tick;
use crate::memory::{Memory, Need, Room};
use crate::plan::{Admitted, Note, Plan, Scheduled};
use crate::reason::Reason;
use crate::request::{Finished, Sampled};
use crate::sequence::{Slot, State};

/// A step in the making.
pub(crate) struct Step<'a, M> {
    pub(crate) now: Tick,
    pub(crate) memory: &'a mut M,
    pub(crate) budget: Budget,
    pub(crate) plan: &'a mut Plan,
}

/// What became of one who waited.
enum Entry {
    /// It left the queue: it runs, or it can never run.
    Left,
    /// It cannot run yet, through no lack of room. Others may pass.
    Passed(Reason),
    /// There is no room for it. Nobody passes: whoever is smaller would keep it waiting for ever.
    Held(Reason),
}

impl Batcher {
    /// Decides the next step and writes it into `plan`. From here on the planned tokens count as computed.
    ///
    /// A request whose output of an earlier plan has not been applied is not scheduled again, so a caller
    /// may have several plans in flight.
    ///
    /// Cost: tens of nanoseconds for each running request. Nothing is allocated while the same requests go
    /// on generating.
    ///
    /// # Panics
    /// If the memory says that all known tokens of a request are cached: the last one must be computed.
    pub fn step<M: Memory>(&mut self, now: Tick, memory: &mut M, plan: &mut Plan) {
        plan.clear();
        let budget = Budget::new(&self.config, self.running.len() + self.queue.len());
        let mut step = Step { now, memory, budget, plan };
        self.schedule_running(&mut step);
        self.admit_waiting(&mut step);
        self.close(step.budget.spent(), plan);
    }

    /// Takes the outputs of a step: each sampled token becomes known, and whoever is done leaves.
    /// `finished` is cleared first. Outputs may come late, in parts and in any order; cheapest is the order
    /// of the plan. Those of requests that ended meanwhile are dropped. They may be left out; once an
    /// output of a later plan has been applied, they are not expected any more.
    ///
    /// # Errors
    /// [`Error::NotExpected`] for an output that no plan asked for. Nothing changes then.
    pub fn apply(
        &mut self,
        sampled: &[Sampled],
        memory: &mut impl Memory,
        finished: &mut Vec<Finished>,
    ) -> Result<(), Error> {
        self.flight.land(sampled, &mut self.sequences)?;
        finished.clear();
        for (place, output) in sampled.iter().enumerate() {
            let Some(slot) = self.flight.landed(place) else { continue };
            let sequence = self.sequences.at_mut(slot);
            let verdict = sequence.append(output.token, self.config.model_tokens_max);
            if matches!(sequence.state, State::Waiting { .. }) {
                self.queue.grow();
            }
            if let Some(reason) = verdict {
                finished.push(Finished { id: output.id, reason });
                self.retire(slot, memory);
            }
        }
        if !finished.is_empty() {
            self.running.retain(|&slot| self.sequences.get(slot).is_some());
            self.counts.finished += finished.len() as u64;
        }
        Ok(())
    }

    /// Every running request, in order, gets the tokens that it knows and has not computed, as far as the
    /// step reaches. For one that generates, that is one token.
    fn schedule_running<M: Memory>(&mut self, step: &mut Step<'_, M>) {
        let mut place = 0;
        while let Some(&slot) = self.running.get(place) {
            place = match self.share_of(slot, &step.budget) {
                Ok(share) => self.extend(place, share, step),
                Err(reason) => {
                    step.plan.skipped.push(Note { id: self.sequences.at(slot).id(), reason });
                    place + 1
                }
            };
        }
    }

    fn share_of(&self, slot: Slot, budget: &Budget) -> Result<Share, Reason> {
        let sequence = self.sequences.at(slot);
        if self.flow == Flow::Stopped {
            return Err(Reason::Paused);
        }
        if sequence.output_pending {
            return Err(Reason::OutputPending);
        }
        budget.share(sequence.known_tokens - sequence.progress().0)
    }

    /// Finds room for the share of the running request at `place`, preempting others, or itself, until
    /// there is room. Returns the place to go on with.
    fn extend<M: Memory>(&mut self, mut place: usize, share: Share, step: &mut Step<'_, M>) -> usize {
        let slot = self.running[place];
        let sequence = self.sequences.at(slot);
        let (computed_tokens, covered_tokens) = sequence.progress();
        let id = sequence.id();
        let need =
            Need { computed_tokens, new_tokens: share.tokens, whole_tokens: None, watermark_tokens: 0 };
        if need.held_tokens() <= covered_tokens {
            self.schedule(slot, computed_tokens, covered_tokens, share, step);
            return place + 1;
        }
        loop {
            match step.memory.allocate(id, need) {
                Room::Granted { covered_tokens } => {
                    self.schedule(slot, computed_tokens, covered_tokens, share, step);
                    return place + 1;
                }
                Room::Never { need, total } => {
                    self.running.remove(place);
                    self.end(slot, Reason::NeverFits { need, total }, step);
                    return place;
                }
                Room::Short { need, free } => {
                    let victim = self.victim_place();
                    let itself = victim == place;
                    let reason = if itself {
                        Reason::NoRoom { need, free }
                    } else {
                        Reason::Yielded { to: id, need, free }
                    };
                    self.preempt(victim, reason, step);
                    match victim.cmp(&place) {
                        Ordering::Less => place -= 1,
                        Ordering::Equal => return place,
                        Ordering::Greater => {}
                    }
                }
            }
        }
    }

    /// The waiting, in order, until one has to wait on.
    fn admit_waiting<M: Memory>(&mut self, step: &mut Step<'_, M>) {
        self.held = None;
        let (mut passed, mut passed_count) = (None, 0);
        while let Some((rank, slot)) = self.queue.next(passed) {
            let id = self.sequences.at(slot).id();
            match self.admit(slot, step) {
                Entry::Left => {}
                Entry::Passed(reason) => {
                    step.plan.skipped.push(Note { id, reason });
                    (passed, passed_count) = (Some(rank), passed_count + 1);
                }
                Entry::Held(reason) => {
                    let note = Note { id, reason };
                    step.plan.skipped.push(note);
                    step.plan.behind = count(self.queue.len() - passed_count - 1);
                    self.held = Some(note);
                    break;
                }
            }
        }
    }

    fn admit<M: Memory>(&mut self, slot: Slot, step: &mut Step<'_, M>) -> Entry {
        if let Some(reason) = self.door_closed(step) {
            return Entry::Held(reason);
        }
        let sequence = self.sequences.at(slot);
        let (id, known_tokens) = (sequence.id(), sequence.known_tokens);
        if sequence.output_pending {
            return Entry::Passed(Reason::OutputPending);
        }
        let cached_tokens = step.memory.cached_tokens(id);
        assert!(
            cached_tokens < known_tokens,
            "{cached_tokens} of the {known_tokens} tokens of request {id} are cached, but the last must be computed"
        );
        let share = match step.budget.share(known_tokens - cached_tokens) {
            Ok(share) => share,
            Err(reason) => return Entry::Held(reason),
        };
        match step.memory.allocate(id, self.admission_need(cached_tokens, known_tokens, share)) {
            Room::Short { need, free } => return Entry::Held(Reason::NoRoom { need, free }),
            Room::Never { need, total } => self.end(slot, Reason::NeverFits { need, total }, step),
            Room::Granted { covered_tokens } => {
                self.enter(slot, cached_tokens, step);
                self.schedule(slot, cached_tokens, covered_tokens, share, step);
            }
        }
        Entry::Left
    }

    /// Why nobody is admitted at this point of the step, whoever it is.
    fn door_closed<M>(&self, step: &Step<'_, M>) -> Option<Reason> {
        if matches!(self.flow, Flow::Holding | Flow::Stopped) {
            Some(Reason::Paused)
        } else if !step.plan.preempted.is_empty() {
            Some(Reason::PreemptedThisStep { preempted: count(step.plan.preempted.len()) })
        } else if self.running.len() >= self.config.running_max as usize {
            Some(Reason::RunningFull { running_max: self.config.running_max })
        } else {
            step.budget.is_spent()
        }
    }

    fn admission_need(&self, cached_tokens: u32, known_tokens: u32, share: Share) -> Need {
        Need {
            computed_tokens: cached_tokens,
            new_tokens: share.tokens,
            whole_tokens: self.config.whole_sequence_check.then_some(known_tokens),
            watermark_tokens: if self.running.is_empty() { 0 } else { self.config.watermark_tokens },
        }
    }

    /// From the queue to the running.
    fn enter<M>(&mut self, slot: Slot, cached_tokens: u32, step: &mut Step<'_, M>) {
        let sequence = self.sequences.at_mut(slot);
        let State::Waiting { since, rank } = sequence.state else {
            unreachable!("request {} is in the queue, but runs", sequence.id())
        };
        step.plan.admitted.push(Admitted {
            id: sequence.id(),
            cached_tokens,
            known_tokens: sequence.known_tokens,
            waited_ticks: step.now.since(since),
            resumed: sequence.preemptions > 0,
        });
        self.queue.leave(rank, sequence.known_tokens);
        self.running.push(slot);
        self.counts.admitted += 1;
        self.counts.cached_tokens += u64::from(cached_tokens);
    }

    /// Writes a share into the plan. The tokens count as computed from here on.
    fn schedule<M>(
        &mut self,
        slot: Slot,
        start: u32,
        covered_tokens: u32,
        share: Share,
        step: &mut Step<'_, M>,
    ) {
        let sequence = self.sequences.at_mut(slot);
        let computed_tokens = start + share.tokens;
        debug_assert!(covered_tokens >= computed_tokens, "room was granted for less than was asked for");
        let granted = match sequence.state {
            State::Running { covered_tokens: before, .. } => covered_tokens != before,
            State::Waiting { .. } => true,
        };
        sequence.state = State::Running { computed_tokens, covered_tokens };
        let id = sequence.id();
        let samples = computed_tokens == sequence.known_tokens;
        let masks_stops = samples && sequence.new_tokens() < sequence.request.stop.new_tokens_min;
        step.budget.take(share.tokens);
        step.plan.scheduled.push(Scheduled {
            id,
            start,
            tokens: share.tokens,
            slot,
            granted,
            samples,
            masks_stops,
        });
        if let Some(reason) = share.cut {
            step.plan.cut.push(Note { id, reason });
        }
    }

    /// Ends a request that the memory could never hold.
    fn end<M: Memory>(&mut self, slot: Slot, reason: Reason, step: &mut Step<'_, M>) {
        step.plan.ended.push(Note { id: self.sequences.at(slot).id(), reason });
        self.retire(slot, step.memory);
        self.counts.ended += 1;
    }

    /// The plan is made: outputs are awaited from those who reached their last known token.
    fn close(&mut self, tokens: u32, plan: &mut Plan) {
        plan.tokens = tokens;
        self.counts.steps += 1;
        self.counts.scheduled_tokens += u64::from(tokens);
        for scheduled in plan.scheduled.iter().filter(|scheduled| scheduled.samples) {
            self.sequences.at_mut(scheduled.slot).output_pending = true;
            self.flight.await_output(scheduled.id, scheduled.slot, self.counts.steps);
        }
    }
}

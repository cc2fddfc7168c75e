//! One step: the running get their tokens, then the waiting are admitted to what is left. The heart of the
//! crate.

use std::cmp::Ordering;

use crate::batcher::{Batcher, Flow, count};
use crate::budget::Budget;
use crate::id::{StepId, Tick};
use crate::memory::{Memory, Need, Room};
use crate::order::Order;
use crate::plan::{Note, Plan, Scheduled};
use crate::reason::Reason;
use crate::sequence::{Sequence, State};
use crate::sequences::Slot;

/// A step in the making.
pub(crate) struct Step<'a, M> {
    pub(crate) now: Tick,
    pub(crate) memory: &'a mut M,
    pub(crate) budget: Budget,
    pub(crate) plan: &'a mut Plan,
}

/// A request's part of a step in the making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) start: u32,
    /// Of what it knows, or will know when the steps in flight are done.
    pub(crate) tokens: u32,
    pub(crate) drafts: u32,
    pub(crate) padding: u32,
    /// Why it is smaller than was wanted.
    pub(crate) cut: Option<Reason>,
}

/// The share of the running that one plan gets, when several are in flight: those who were in none of the
/// other plans first.
#[derive(Debug)]
struct MicroBatch {
    requests_max: usize,
    /// Who was in a plan after this one is in flight elsewhere.
    before: StepId,
    /// How many of those may be in this plan too.
    again: usize,
}

impl MicroBatch {
    /// `None` if there is one plan at a time, which all the running share.
    fn new<O: Order>(batcher: &Batcher<O>, step: StepId) -> Option<MicroBatch> {
        let batches = batcher.config.micro_batches.get();
        if batches == 1 {
            return None;
        }
        let before = StepId(step.0.saturating_sub(u64::from(batches) - 1));
        let requests_max = batcher.running.len().div_ceil(batches as usize);
        let turn = |&&slot: &&Slot| batcher.sequences.at(slot).last_step < before;
        let fresh = batcher.running.iter().filter(turn).count();
        Some(MicroBatch { requests_max, before, again: requests_max.saturating_sub(fresh) })
    }

    fn admits(&mut self, sequence: &Sequence, scheduled: usize) -> Result<(), Reason> {
        let again = sequence.last_step >= self.before;
        if scheduled >= self.requests_max || (again && self.again == 0) {
            return Err(Reason::OtherMicroBatch { requests_max: count(self.requests_max) });
        }
        self.again -= usize::from(again);
        Ok(())
    }
}

impl Part {
    pub(crate) fn end(&self) -> u32 {
        self.start + self.tokens + self.drafts + self.padding
    }
}

impl<O: Order> Batcher<O> {
    /// Decides the next step and writes it into `plan`. From here on the planned tokens count as computed.
    ///
    /// A request whose output of an earlier plan has not been applied is scheduled again only as far as
    /// [`outputs_ahead`](crate::Config::outputs_ahead) allows; others are, so a caller may have several
    /// plans in flight.
    ///
    /// Cost: tens of nanoseconds for each running request. Nothing is allocated while the same requests go
    /// on generating.
    ///
    /// # Panics
    /// If the memory says that all known tokens of a request are cached: the last one must be computed.
    pub fn step<M: Memory>(&mut self, now: Tick, memory: &mut M, plan: &mut Plan) {
        plan.clear();
        self.now = now;
        self.counts.steps += 1;
        plan.step = StepId(self.counts.steps);
        plan.ended.append(&mut self.ended);
        self.expire(memory, plan);
        self.look_up(memory);
        self.encoder.begin_step();
        let eligible = self.running.len() + self.queue.len() + self.arrived.len();
        let drafts_max = self.config.drafts.tokens_max(self.running.len());
        let budget = Budget::new(&self.config, eligible, self.generating(), drafts_max);
        let mut step = Step { now, memory, budget, plan };
        self.schedule_running(&mut step);
        self.yield_adapters(now);
        self.admit_waiting(&mut step);
        self.close(plan);
    }

    /// How many want one token of this step, and their drafts. Not counted, and 0, where nothing depends on it.
    fn generating(&self) -> u32 {
        if self.config.mixed_prefill().is_none() {
            return 0;
        }
        let wants_one = |&&slot: &&Slot| {
            let sequence = self.sequences.at(slot);
            sequence.pending <= self.config.outputs_ahead
                && sequence.expected_tokens() == sequence.running().computed_tokens + 1
        };
        count(self.running.iter().filter(wants_one).count())
    }

    /// Every running request, in order, gets the tokens that it knows and has not computed, as far as the
    /// step reaches. For one that generates, that is one token, and its drafts.
    fn schedule_running<M: Memory>(&mut self, step: &mut Step<'_, M>) {
        let drafts_max = self.config.drafts.tokens_max(self.running.len());
        let mut batch = MicroBatch::new(self, step.plan.step);
        let mut place = 0;
        while let Some(&slot) = self.running.get(place) {
            let others = self.running.len() - place - 1;
            let part = match &mut batch {
                None => self.part_of(slot, drafts_max, others, step),
                Some(batch) => batch
                    .admits(self.sequences.at(slot), step.plan.scheduled.len())
                    .and_then(|()| self.part_of(slot, drafts_max, others, step)),
            };
            place = match part {
                Ok(part) => self.extend(place, part, step),
                Err(reason) => {
                    self.skip(slot, reason, step.plan);
                    place + 1
                }
            };
        }
    }

    /// What a running request may have: all it wants, cut by the caps in their order.
    fn part_of<M: Memory>(
        &mut self,
        slot: Slot,
        drafts_max: u32,
        others: usize,
        step: &mut Step<'_, M>,
    ) -> Result<Part, Reason> {
        let sequence = self.sequences.at(slot);
        if self.flow == Flow::Stopped {
            return Err(Reason::Paused);
        }
        if sequence.pending > self.config.outputs_ahead || sequence.ends_in_flight() {
            return Err(Reason::OutputPending);
        }
        let start = sequence.running().computed_tokens;
        let wanted = sequence.expected_tokens().saturating_sub(start);
        if wanted == 0 {
            return Err(Reason::OutputPending);
        }
        let share = step.budget.share(wanted)?;
        let part = Part { start, tokens: share.tokens, drafts: 0, padding: 0, cut: share.cut };
        // The last token of a prompt may be part of an item that must be encoded first.
        if share.tokens == 1 && wanted == 1 && sequence.new_tokens() > 0 {
            return Ok(self.with_drafts(sequence, part, drafts_max, others, &step.budget));
        }
        self.trim(slot, part, wanted, step.memory)
    }

    /// The drafts of a request that generates, behind its one token. They never take the token of another.
    fn with_drafts(
        &self,
        sequence: &Sequence,
        part: Part,
        drafts_max: u32,
        others: usize,
        budget: &Budget,
    ) -> Part {
        if drafts_max == 0 {
            return part;
        }
        let model_room = self.config.model_tokens_max - part.end();
        let beyond = budget.beyond(1, others).min(model_room);
        let offered = sequence.drafts.min(sequence.drafts_useful());
        let drafts = offered.min(drafts_max).min(beyond);
        let padding = if self.config.drafts.padding { drafts_max.min(beyond) - drafts } else { 0 };
        let cut = (drafts < offered.min(drafts_max)).then_some(Reason::StepLeft {
            wanted_tokens: 1 + offered.min(drafts_max),
            left_tokens: 1 + drafts,
        });
        Part { drafts, padding, cut, ..part }
    }

    /// Cuts a chunk of a prompt to where chunks end, and to what the encoder can take.
    pub(crate) fn trim(
        &self,
        slot: Slot,
        mut part: Part,
        wanted: u32,
        memory: &mut impl Memory,
    ) -> Result<Part, Reason> {
        let sequence = self.sequences.at(slot);
        let (start, left_tokens, chunk_multiple) =
            (part.start, part.tokens, self.config.chunk_multiple.get());
        if part.tokens < wanted {
            let end = part.end() / chunk_multiple * chunk_multiple;
            if end <= start {
                return Err(Reason::ChunkTooShort { left_tokens, chunk_multiple });
            }
            if end < part.end() {
                part.tokens = end - start;
                part.cut = Some(Reason::ChunkEnd { wanted_tokens: wanted, tokens: part.tokens });
            }
        }
        let end = memory.chunk_end(sequence.id, start, part.end()).clamp(start + 1, part.end());
        if end < part.end() {
            part.tokens = end - start;
            part.cut = Some(Reason::ChunkEnd { wanted_tokens: wanted, tokens: part.tokens });
        }
        if !sequence.has_items() {
            return Ok(part);
        }
        match self.encoder.end_of_chunk(&sequence.request, start, part.end()) {
            (end, Some(reason)) if end == start => Err(reason),
            (end, reason) => Ok(Part { tokens: end - start, cut: reason.or(part.cut), ..part }),
        }
    }

    /// Finds room for the part of the running request at `place`, preempting others, or itself, until there
    /// is room. Returns the place to go on with.
    fn extend<M: Memory>(&mut self, mut place: usize, part: Part, step: &mut Step<'_, M>) -> usize {
        let slot = self.running[place];
        let sequence = self.sequences.at(slot);
        let (id, covered_tokens) = (sequence.id, sequence.running().covered_tokens);
        if part.end() + self.config.drafts.slots <= covered_tokens {
            self.schedule(slot, part, covered_tokens, step);
            return place + 1;
        }
        let need = self.need(sequence, part);
        loop {
            match step.memory.allocate(id, need) {
                Room::Granted { covered_tokens } => {
                    self.schedule(slot, part, covered_tokens, step);
                    return place + 1;
                }
                Room::Never { need, total } => {
                    self.running.remove(place);
                    self.end(slot, Reason::NeverFits { need, total }, step.memory, step.plan);
                    return place;
                }
                Room::Short { need, free } if self.frees_pending() => {
                    self.skip(slot, Reason::RoomInFlight { need, free }, step.plan);
                    return place + 1;
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

    /// The room for a part: what is known can be found by others, the rest is for tokens that may turn out
    /// to be others. So are drafts in flight: the part is planned behind them, as if they were accepted.
    pub(crate) fn need(&self, sequence: &Sequence, part: Part) -> Need {
        let start = part.start.min(sequence.known_tokens);
        let findable = (part.start + part.tokens).min(sequence.known_tokens);
        let in_flight_tokens = match &sequence.state {
            State::Running(running) => running.in_flight_tokens,
            State::Waiting(_) => 0,
        };
        Need {
            computed_tokens: start,
            new_tokens: findable - start,
            lookahead_tokens: part.end() - findable + self.config.drafts.slots,
            settled_tokens: part.start - in_flight_tokens,
            ..Need::default()
        }
    }

    /// Writes a part into the plan. Its tokens count as computed from here on.
    pub(crate) fn schedule<M>(
        &mut self,
        slot: Slot,
        part: Part,
        covered_tokens: u32,
        step: &mut Step<'_, M>,
    ) {
        let sequence = self.sequences.at_mut(slot);
        let tokens = part.end() - part.start;
        debug_assert!(covered_tokens >= part.end(), "room was granted for less than was asked for");
        let samples = part.start + part.tokens == sequence.expected_tokens();
        let masks_stops = samples && sequence.masks_stops();
        let needs_mask = samples && sequence.needs_mask();
        step.plan.masks_wait |= needs_mask && sequence.pending > 0;
        let (id, life, step_before) = (sequence.id, sequence.preemptions, sequence.last_step);
        let running = sequence.running_mut();
        let granted = covered_tokens != running.covered_tokens;
        running.computed_tokens = part.end();
        running.in_flight_tokens += tokens;
        running.covered_tokens = covered_tokens;
        let read = samples && (running.long || running.promised);
        sequence.last_step = step.plan.step;
        sequence.pending += u32::from(samples);
        sequence.pending_drafts += part.drafts + part.padding;
        sequence.drafts = 0;
        if let Some(reason) = part.cut {
            sequence.note = Some((step.plan.step, reason));
            step.plan.cut.push(Note { id, reason });
        }
        step.budget.take(tokens, samples && part.tokens == 1);
        step.plan.tokens += tokens;
        let Part { start, drafts, padding, .. } = part;
        step.plan.scheduled.push(Scheduled {
            id,
            start,
            tokens,
            drafts,
            padding,
            slot,
            life,
            step_before,
            granted,
            samples,
            masks_stops,
            needs_mask,
        });
        if sequence.has_items() {
            self.encoder.schedule(&sequence.request, start, part.end(), step.plan);
        }
        if samples && sequence.followers > 0 {
            self.wake_followers(id);
        }
        if read {
            self.has_read(slot);
        }
    }

    /// One of the long prompts, or of those that were promised room, is read to its end.
    fn has_read(&mut self, slot: Slot) {
        let sequence = self.sequences.at_mut(slot);
        let adapter = sequence.request.adapter;
        let running = sequence.running_mut();
        if std::mem::take(&mut running.long) {
            self.gates.leave(crate::queue::Class { adapter, long: true });
            self.gates.enter(crate::queue::Class { adapter, long: false });
        }
        self.promises -= u32::from(std::mem::take(&mut running.promised));
    }

    pub(crate) fn skip(&mut self, slot: Slot, reason: Reason, plan: &mut Plan) {
        let sequence = self.sequences.at_mut(slot);
        sequence.note = Some((plan.step, reason));
        plan.skipped.push(Note { id: sequence.id, reason });
    }

    /// Ends a request without an output.
    pub(crate) fn end(&mut self, slot: Slot, reason: Reason, memory: &mut impl Memory, plan: &mut Plan) {
        plan.ended.push(Note { id: self.sequences.at(slot).id, reason });
        self.retire(slot, false, memory);
        self.counts.ended += 1;
    }

    /// The plan is made, and takes off.
    fn close(&mut self, plan: &mut Plan) {
        plan.gone.append(&mut self.gone);
        plan.drafts_max = self.config.drafts.tokens_max(self.running.len());
        self.counts.scheduled_tokens += u64::from(plan.tokens);
        if !plan.scheduled.is_empty() {
            self.flight.take_off(plan.step, &plan.scheduled);
        }
    }
}

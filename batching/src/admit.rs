//! The second half of a step: who waits is admitted to what the running have left.

use std::ops::Range;

use crate::batcher::{Batcher, Flow, count};
use crate::config::LongPrefills;
use crate::id::{RequestId, Tick};
use crate::memory::{Memory, Need, Remote, Room};
use crate::order::{Order, Service};
use crate::plan::{Admitted, Load, Note, Plan, Source};
use crate::queue::Class;
use crate::reason::Reason;
use crate::sequence::{At, Gate, Running, State};
use crate::sequences::Slot;
use crate::step::{Part, Step};

/// What became of one who waited.
enum Entry {
    /// It left its place: it runs, it loads, it can never run, or it waits with the long prompts now.
    Left,
    /// It cannot run yet, through no lack of room. Others may pass, and it keeps its place.
    Passed(Reason),
    /// There is no room for it. Nobody passes: whoever is smaller would keep it waiting for ever.
    Held(Reason),
}

/// What is there already of one who waits.
#[derive(Debug, Clone, Copy)]
struct AtHand {
    /// Its first so many tokens, those that come within this step included.
    tokens: u32,
    /// Of them, those that come from another machine.
    external_tokens: u32,
    source: Source,
}

/// How many of those who wait beside the queue a plan names.
const NAMED_MAX: usize = 256;

impl<O: Order> Batcher<O> {
    /// The waiting, in order, until one has to wait on.
    pub(crate) fn admit_waiting<M: Memory>(&mut self, step: &mut Step<'_, M>) {
        self.held = None;
        let skipped_before = step.plan.skipped.len();
        self.name_aside(step.plan);
        let aside = step.plan.skipped.len();
        while let Some(slot) = self.next_waiting(step.now) {
            match self.admit(slot, step) {
                Entry::Left => {}
                Entry::Passed(reason) => {
                    self.queue.leave(self.sequences.at(slot).waiting().place);
                    self.passed.push(slot);
                    self.skip(slot, reason, step.plan);
                }
                Entry::Held(reason) => {
                    self.skip(slot, reason, step.plan);
                    self.held = Some(Note { id: self.sequences.at(slot).id, reason });
                    break;
                }
            }
        }
        while let Some(slot) = self.passed.pop() {
            self.queue.put(&self.order, self.sequences.at(slot).waiting().place, slot);
        }
        let woken = self.forget_woken(skipped_before..aside, step.plan);
        self.name_closed(step.plan);
        let named = step.plan.skipped.len() - (aside - woken);
        step.plan.behind = count((self.queue.len() + self.arrived.len()).saturating_sub(named));
    }

    /// Who is next: those who hold room already, then whoever has lost patience, then the order decides.
    fn next_waiting(&mut self, now: Tick) -> Option<Slot> {
        let open = |class: Class| self.gates.closed(class).is_none();
        let class = |slot: Slot| self.sequences.at(slot).waiting().place.class;
        if let Some(&slot) = self.arrived.iter().find(|&&slot| open(class(slot))) {
            return Some(slot);
        }
        let patience_ends = self.patience_ends(now);
        let impatient = patience_ends.and_then(|moment| self.queue.oldest_before(moment, open));
        impatient.or_else(|| self.queue.first(&self.order, open))
    }

    /// Who waits since before this moment has lost patience.
    pub(crate) fn patience_ends(&self, now: Tick) -> Option<Tick> {
        self.config.patience_ticks.map(|ticks| Tick(now.0.saturating_sub(ticks)))
    }

    fn admit<M: Memory>(&mut self, slot: Slot, step: &mut Step<'_, M>) -> Entry {
        let holds_room = matches!(self.sequences.at(slot).waiting().at, At::Loaded { .. });
        if let Some(reason) = self.door_closed(holds_room, step) {
            return Entry::Held(reason);
        }
        let (at_hand, later) = match self.at_hand(slot, step) {
            Ok(at_hand) => at_hand,
            Err(reason) => return Entry::Passed(reason),
        };
        let sequence = self.sequences.at(slot);
        let (id, known_tokens) = (sequence.id, sequence.known_tokens);
        let here = at_hand.tokens;
        assert!(
            here < known_tokens,
            "{here} of the {known_tokens} tokens of request {id} are cached, but the last must be computed"
        );
        if later > 0 {
            return self.begin_load(slot, here, later, step);
        }
        let wanted = known_tokens - here;
        if !holds_room && self.too_many_longs(wanted) {
            self.wait_with_the_long(slot);
            return Entry::Left;
        }
        let part = step.budget.share(wanted).and_then(|share| {
            let part = Part { start: here, tokens: share.tokens, drafts: 0, padding: 0, cut: share.cut };
            self.trim(slot, part, wanted, step.memory)
        });
        match part {
            Ok(part) => self.find_room(slot, at_hand, part, step),
            Err(reason) => Entry::Held(reason),
        }
    }

    /// Why nobody is admitted at this point of the step, whoever it is.
    fn door_closed<M>(&self, holds_room: bool, step: &Step<'_, M>) -> Option<Reason> {
        let interval = self.config.admission_interval;
        if self.flow == Flow::Stopped || (self.flow == Flow::Holding && !holds_room) {
            Some(Reason::Paused)
        } else if !step.plan.preempted.is_empty() {
            Some(Reason::PreemptedThisStep { preempted: count(step.plan.preempted.len()) })
        } else if self.running.len() >= self.config.running_max as usize {
            Some(Reason::RunningFull { running_max: self.config.running_max })
        } else if !self.running.is_empty() && !step.plan.step.0.is_multiple_of(u64::from(interval.get())) {
            Some(Reason::NotThisStep { admission_interval: interval.get() })
        } else {
            step.budget.is_spent()
        }
    }

    /// Finds out what is there of one who waits, and how many tokens more another machine would send later.
    fn at_hand<M: Memory>(&self, slot: Slot, step: &mut Step<'_, M>) -> Result<(AtHand, u32), Reason> {
        let sequence = self.sequences.at(slot);
        let (id, known_tokens, waiting) = (sequence.id, sequence.known_tokens, sequence.waiting());
        let here = |tokens, source| Ok((AtHand { tokens, external_tokens: 0, source }, 0));
        if let At::Loaded { cached_tokens, loaded_tokens, .. } = waiting.at {
            let source = Source::Remote { tokens: loaded_tokens - cached_tokens };
            return here(loaded_tokens.min(known_tokens - 1), source);
        }
        if let Some(tokens) = waiting.swapped_tokens {
            return here(tokens, Source::Swap);
        }
        if let Some(leader) = self.leader_of(slot, step.plan)? {
            return here(known_tokens - 1, Source::Fork(leader));
        }
        let tokens = step.memory.cached_tokens(id);
        match step.memory.remote_tokens(id, tokens) {
            Remote::Unknown => Err(Reason::RemoteUnknown),
            Remote::Later { tokens: later } if later > 0 && tokens < known_tokens => {
                let later = later.min(known_tokens - tokens);
                Ok((AtHand { tokens, external_tokens: 0, source: Source::Cache }, later))
            }
            Remote::Now { tokens: external } if external > 0 && tokens < known_tokens => {
                let external_tokens = external.min(known_tokens - 1 - tokens);
                let source = Source::Remote { tokens: external_tokens };
                Ok((AtHand { tokens: tokens + external_tokens, external_tokens, source }, 0))
            }
            Remote::Nothing | Remote::Later { .. } | Remote::Now { .. } => here(tokens, Source::Cache),
        }
    }

    fn find_room<M: Memory>(
        &mut self,
        slot: Slot,
        at_hand: AtHand,
        part: Part,
        step: &mut Step<'_, M>,
    ) -> Entry {
        let id = self.sequences.at(slot).id;
        let need = self.admission_need(slot, at_hand, part, step.memory);
        let room = match at_hand.source {
            Source::Swap => step.memory.swap_in(id, need),
            Source::Fork(leader) => {
                if !step.memory.fork(leader, id, part.start) {
                    self.sequences.at_mut(slot).request.sample_of = None;
                    self.lose_follower(leader);
                    return self.admit(slot, step);
                }
                self.sequences.find(leader).into_iter().for_each(|leader| self.share_room(leader));
                step.memory.allocate(id, need)
            }
            Source::Cache | Source::Remote { .. } => step.memory.allocate(id, need),
        };
        match room {
            Room::Short { need, free } => {
                if matches!(at_hand.source, Source::Fork(_)) {
                    step.memory.release(id);
                }
                self.unwedge(slot, step);
                return Entry::Held(Reason::NoRoom { need, free });
            }
            Room::Never { need, total } => {
                if matches!(at_hand.source, Source::Fork(_)) {
                    step.memory.release(id);
                }
                self.end(slot, Reason::NeverFits { need, total }, step.memory, step.plan);
            }
            Room::Granted { covered_tokens } => {
                self.enter(slot, at_hand, part, step);
                self.schedule(slot, part, covered_tokens, step);
            }
        }
        Entry::Left
    }

    fn admission_need(&self, slot: Slot, at_hand: AtHand, part: Part, memory: &impl Memory) -> Need {
        let sequence = self.sequences.at(slot);
        let need = self.need(sequence, part);
        let computed_tokens = need.computed_tokens - at_hand.external_tokens;
        let need = Need { computed_tokens, external_tokens: at_hand.external_tokens, ..need };
        if matches!(sequence.waiting().at, At::Loaded { .. }) {
            return need;
        }
        Need {
            whole_tokens: self.config.whole_sequence_check.then_some(sequence.known_tokens),
            watermark_tokens: if self.running.is_empty() { 0 } else { self.config.watermark_tokens },
            reserved_tokens: self.promised_tokens(memory),
            ..need
        }
    }

    /// Room for tokens that another machine will send. Until then nothing of the request is computed.
    fn begin_load<M: Memory>(&mut self, slot: Slot, here: u32, later: u32, step: &mut Step<'_, M>) -> Entry {
        let sequence = self.sequences.at(slot);
        let (id, known_tokens) = (sequence.id, sequence.known_tokens);
        let need = Need {
            computed_tokens: here,
            external_tokens: later,
            settled_tokens: here,
            whole_tokens: Some(known_tokens),
            watermark_tokens: if self.running.is_empty() { 0 } else { self.config.watermark_tokens },
            reserved_tokens: self.promised_tokens(step.memory) + self.unread_tokens(step.memory),
            ..Need::default()
        };
        match step.memory.allocate(id, need) {
            Room::Short { need, free } => return Entry::Held(Reason::NoRoom { need, free }),
            Room::Never { need, total } => {
                self.end(slot, Reason::NeverFits { need, total }, step.memory, step.plan);
            }
            Room::Granted { covered_tokens } => {
                let waiting = self.sequences.at_mut(slot).waiting_mut();
                waiting.at = At::Loading { cached_tokens: here, loaded_tokens: here + later, covered_tokens };
                self.queue.leave(waiting.place);
                self.aside.insert(id, slot);
                self.promises += 1;
                step.plan.loads.push(Load { id, start: here, tokens: later });
            }
        }
        Entry::Left
    }

    /// Room that those will need who hold room of another machine's tokens, beyond what they hold.
    fn promised_tokens(&self, memory: &impl Memory) -> u32 {
        if self.promises == 0 {
            return 0;
        }
        let waiting = self.aside.values().chain(&self.arrived).filter_map(|&slot| {
            let sequence = self.sequences.at(slot);
            match sequence.waiting().at {
                At::Loading { covered_tokens, .. } | At::Loaded { covered_tokens, .. } => {
                    Some((sequence.known_tokens, covered_tokens))
                }
                At::Queue | At::Aside(_) => None,
            }
        });
        let running = self.running.iter().filter_map(|&slot| {
            let sequence = self.sequences.at(slot);
            let running = sequence.running();
            running.promised.then_some((sequence.known_tokens, running.covered_tokens))
        });
        let missing = |(known, covered): (u32, u32)| memory.rounded_tokens(known.saturating_sub(covered));
        waiting.chain(running).map(missing).sum()
    }

    /// Room that the running will need for what they know already, but for those who were promised it.
    fn unread_tokens(&self, memory: &impl Memory) -> u32 {
        let running = self.running.iter().map(|&slot| self.sequences.at(slot));
        let running = running.filter(|sequence| !sequence.running().promised);
        running
            .map(|sequence| sequence.known_tokens.saturating_sub(sequence.running().covered_tokens))
            .map(|missing| memory.rounded_tokens(missing))
            .sum()
    }

    /// If nobody runs and those with tokens of another machine hold all the room, the first of them gives
    /// its own up and starts over.
    fn unwedge<M: Memory>(&mut self, slot: Slot, step: &mut Step<'_, M>) {
        let At::Loaded { .. } = self.sequences.at(slot).waiting().at else { return };
        if !self.running.is_empty() {
            return;
        }
        self.arrived.retain(|&arrived| arrived != slot);
        self.promises -= 1;
        step.memory.release(self.sequences.at(slot).id);
        self.enqueue(slot);
    }

    fn too_many_longs(&self, wanted: u32) -> bool {
        let Some(LongPrefills { above_tokens, .. }) = self.config.long_prefills else { return false };
        wanted > above_tokens && self.gates.closed(Class { adapter: None, long: true }).is_some()
    }

    fn wait_with_the_long(&mut self, slot: Slot) {
        let waiting = self.sequences.at_mut(slot).waiting_mut();
        self.queue.leave(waiting.place);
        waiting.place.class.long = true;
        self.queue.put(&self.order, waiting.place, slot);
    }

    /// From the queue to the running.
    fn enter<M>(&mut self, slot: Slot, at_hand: AtHand, part: Part, step: &mut Step<'_, M>) {
        let waiting = self.sequences.at(slot).waiting();
        let (place, at) = (waiting.place, waiting.at);
        let impatient = self.patience_ends(step.now).is_some_and(|moment| place.age < moment);
        let sequence = self.sequences.at_mut(slot);
        let (id, known_tokens, adapter) = (sequence.id, sequence.known_tokens, sequence.request.adapter);
        let wanted = known_tokens - at_hand.tokens;
        let long = self.config.long_prefills.is_some_and(|long| wanted > long.above_tokens);
        let promised = matches!(at, At::Loaded { .. });
        step.plan.admitted.push(Admitted {
            id,
            cached_tokens: at_hand.tokens,
            source: at_hand.source,
            known_tokens,
            waited_ticks: step.now.since(place.since),
            resumed: sequence.preemptions > 0,
        });
        sequence.state = State::Running(Running {
            computed_tokens: part.start,
            in_flight_tokens: 0,
            covered_tokens: 0,
            turn: self.turns.admission,
            long,
            promised,
            impatient_since: impatient.then_some(place.age),
        });
        self.turns.admission += 1;
        let first = sequence.started.is_none();
        let lane = sequence.lane;
        if first {
            sequence.started = Some(step.now);
            self.start_clock(id, step.now);
            self.order.charge(lane, Service::Prompt { tokens: wanted });
        }
        if promised {
            self.arrived.retain(|&arrived| arrived != slot);
        } else {
            self.queue.leave(place);
        }
        self.gates.enter(Class { adapter, long });
        self.running.push(slot);
        self.waiting_tokens -= u64::from(known_tokens);
        self.counts.admitted += 1;
        self.counts.cached_tokens += u64::from(at_hand.tokens);
    }

    fn start_clock(&mut self, id: RequestId, now: Tick) {
        if let Some(ticks) = self.config.running_ticks_max {
            self.timers.set(now.after(ticks), id);
        }
    }

    /// Names those who wait for something else than room and turn.
    fn name_aside(&mut self, plan: &mut Plan) {
        for &slot in self.aside.values().take(NAMED_MAX) {
            let sequence = self.sequences.at(slot);
            if let Some(reason) = aside_reason(&sequence.waiting().at) {
                plan.skipped.push(Note { id: sequence.id, reason });
            }
        }
    }

    /// Those who waited for their leader when they were named, and went on within the step, have another reason
    /// now, or none. Returns how many.
    fn forget_woken(&self, named: Range<usize>, plan: &mut Plan) -> usize {
        let before = plan.skipped.len();
        for place in named.rev() {
            let Note { id, reason } = plan.skipped[place];
            if matches!(reason, Reason::LeaderReads { .. }) && !self.aside.contains_key(&id) {
                plan.skipped.remove(place);
            }
        }
        before - plan.skipped.len()
    }

    /// Names the first of those who wait for a limit on their kind, unless it was passed for another reason before.
    fn name_closed(&mut self, plan: &mut Plan) {
        let Batcher { queue, order, gates, sequences, arrived, .. } = self;
        let open = |class: Class| gates.closed(class).is_none();
        let arrived = arrived.iter().map(|&slot| (sequences.at(slot).waiting().place.class, slot));
        let arrived = arrived.filter(|&(class, _)| !open(class));
        for (class, slot) in arrived.chain(queue.heads_of_closed(order, open)) {
            let sequence = sequences.at(slot);
            let passed = sequence.note.is_some_and(|(step, _)| step == plan.step);
            if let Some(reason) = gates.closed(class).filter(|_| !passed) {
                plan.skipped.push(Note { id: sequence.id, reason });
            }
        }
    }
}

/// Why one waits who is not in the queue.
pub(crate) fn aside_reason(at: &At) -> Option<Reason> {
    Some(match *at {
        At::Aside(Gate::Output) => Reason::OutputPending,
        At::Aside(Gate::Fence) => Reason::FreePending,
        At::Aside(Gate::Grammar) => Reason::GrammarPending,
        At::Aside(Gate::Leader(leader)) => Reason::LeaderReads { leader },
        At::Loading { cached_tokens, loaded_tokens, .. } => {
            Reason::Loading { tokens: loaded_tokens - cached_tokens }
        }
        At::Queue | At::Loaded { .. } => return None,
    })
}

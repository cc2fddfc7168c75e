//! Requests that share what another has computed: parallel samples of one prompt, and the beams of a
//! search.

use crate::batcher::Batcher;
use crate::error::{ForkError, RefusalReason};
use crate::id::RequestId;
use crate::memory::Memory;
use crate::order::Order;
use crate::plan::Plan;
use crate::queue::Class;
use crate::reason::Reason;
use crate::request::Request;
use crate::sequence::{At, Gate, Running, Sequence, State};
use crate::sequences::Slot;

impl<O: Order> Batcher<O> {
    /// Makes a copy of a running request, under the id `child`: both know the same tokens, share the same
    /// room, and go their own ways from here on. A step of beam search cancels the beams that end and forks
    /// those that go on twice. If an output of the parent is in flight, the child awaits one too.
    ///
    /// # Errors
    /// [`ForkError`] if the parent does not run or has not read its prompt, the id is in use, as many run
    /// as may run, or the memory does not share. Nothing changes then.
    pub fn fork(
        &mut self,
        parent: RequestId,
        child: RequestId,
        memory: &mut impl Memory,
    ) -> Result<(), ForkError> {
        let slot = self.sequences.find(parent).filter(|&slot| self.sequences.at(slot).is_running());
        let slot = slot.ok_or(ForkError::NotRunning { parent })?;
        if self.sequences.find(child).is_some()
            || self.flight.has_departed(child)
            || self.remains.contains_key(&child)
        {
            return Err(ForkError::Duplicate { child });
        }
        let running_max = self.config.running_max;
        if self.running.len() >= running_max as usize {
            return Err(ForkError::RunningFull { running_max });
        }
        let sequence = self.sequences.at(slot);
        let (running, known_tokens) = (*sequence.running(), sequence.known_tokens);
        let computed_tokens = running.computed_tokens;
        if computed_tokens + 1 < known_tokens {
            return Err(ForkError::StillReading { parent, computed_tokens, known_tokens });
        }
        if !memory.fork(parent, child, computed_tokens) {
            return Err(ForkError::NotShared { parent });
        }
        self.share_room(slot);
        let covered_tokens = computed_tokens;
        self.insert_fork(slot, child, Running { covered_tokens, long: false, promised: false, ..running });
        Ok(())
    }

    /// Somebody forked from it: it must ask before it writes again.
    pub(crate) fn share_room(&mut self, slot: Slot) {
        let running = self.sequences.at_mut(slot).running_mut();
        running.covered_tokens = running.computed_tokens;
    }

    fn insert_fork(&mut self, from: Slot, child: RequestId, running: Running) {
        let parent = self.sequences.at(from);
        let request =
            Request { id: child, sample_of: None, encoder_items: Vec::new(), ..(*parent.request).clone() };
        let turn = self.turns.admission;
        self.turns.admission += 1;
        let sequence = Sequence {
            id: child,
            state: State::Running(Running { turn, ..running }),
            lane: self.order.lane(&request),
            note: None,
            followers: 0,
            request: Box::new(request),
            ..parent.clone()
        };
        let class = Class { adapter: sequence.request.adapter, long: false };
        if let (Some(ticks), Some(started)) = (self.config.running_ticks_max, sequence.started) {
            self.timers.set(started.after(ticks), child);
        }
        self.gates.enter(class);
        let slot = self.sequences.insert(sequence);
        self.running.push(slot);
        self.flight.double(from, slot, child);
        self.counts.forked += 1;
    }

    /// True while a request that others want to fork from has not read its prompt.
    pub(crate) fn still_reads(&self, leader: RequestId) -> bool {
        let Some(slot) = self.sequences.find(leader) else { return false };
        let sequence = self.sequences.at(slot);
        match &sequence.state {
            State::Waiting(_) => sequence.started.is_none(),
            State::Running(running) => running.computed_tokens < sequence.request.prompt_tokens,
        }
    }

    /// The request that one who waits can fork its whole prompt from, if there is one. What it shares in part is copied
    /// before the step computes, so the leader must have read the prompt in an earlier step than this one.
    pub(crate) fn leader_of(&self, slot: Slot, plan: &Plan) -> Result<Option<RequestId>, Reason> {
        let sequence = self.sequences.at(slot);
        let Some(leader) = sequence.request.sample_of.filter(|_| sequence.started.is_none()) else {
            return Ok(None);
        };
        let prompt_tokens = sequence.request.prompt_tokens;
        let Some(place) = self.sequences.find(leader) else { return Ok(None) };
        let State::Running(running) = &self.sequences.at(place).state else { return Ok(None) };
        let here = plan.scheduled.iter().find(|part| part.slot == place);
        let computed_before = here.map_or(running.computed_tokens, |part| part.start);
        if computed_before >= prompt_tokens {
            Ok(Some(leader))
        } else if running.computed_tokens >= prompt_tokens {
            Err(Reason::LeaderReads { leader })
        } else {
            Ok(None)
        }
    }

    pub(crate) fn examine_leader(&self, request: &Request) -> Result<(), RefusalReason> {
        let Some(leader) = request.sample_of else { return Ok(()) };
        let other = self.sequences.find(leader).map(|slot| self.sequences.at(slot));
        let fits = other.is_some_and(|other| {
            other.request.prompt_tokens == request.prompt_tokens && other.request.adapter == request.adapter
        });
        if fits { Ok(()) } else { Err(RefusalReason::NoLeader { leader }) }
    }

    pub(crate) fn add_follower(&mut self, leader: Option<RequestId>) {
        if let Some(slot) = leader.and_then(|leader| self.sequences.find(leader)) {
            self.sequences.at_mut(slot).followers += 1;
        }
    }

    pub(crate) fn lose_follower(&mut self, leader: RequestId) {
        if let Some(slot) = self.sequences.find(leader) {
            let sequence = self.sequences.at_mut(slot);
            sequence.followers = sequence.followers.saturating_sub(1);
        }
    }

    /// Lets those go on who waited for this one to read their prompt.
    pub(crate) fn wake_followers(&mut self, leader: RequestId) {
        let waits = |&slot: &Slot| match &self.sequences.at(slot).state {
            State::Waiting(waiting) => waiting.at == At::Aside(Gate::Leader(leader)),
            State::Running(_) => false,
        };
        let followers: Vec<Slot> = self.aside.values().copied().filter(waits).collect();
        for follower in followers {
            self.regate(follower);
        }
    }
}

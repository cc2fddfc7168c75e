//! The façade: requests come in and go out. What happens between is in `step.rs` and `apply.rs`.

use std::collections::{BTreeMap, VecDeque};

use crate::config::{Config, Preemption};
use crate::encoder::Encoder;
use crate::error::{ConfigError, Refusal, RefusalReason, WeightError};
use crate::flight::Flight;
use crate::gates::Gates;
use crate::id::{RequestId, TenantId, Tick};
use crate::line::Key;
use crate::memory::Memory;
use crate::order::{Order, Policy};
use crate::plan::{Note, Plan};
use crate::queue::{Class, Place, Queue};
use crate::reason::Reason;
use crate::remains::{AllRemains, Remains};
use crate::request::{Grammar, Request};
use crate::sequence::{At, Gate, Sequence, State, Waiting};
use crate::sequences::{Sequences, Slot};
use crate::standing::Counts;
use crate::timers::Timers;

/// Decides, step by step, which requests run and with how many tokens. See the [crate
/// documentation](crate).
#[derive(Debug, Clone)]
pub struct Batcher<O = Policy> {
    pub(crate) config: Config,
    pub(crate) order: O,
    pub(crate) flow: Flow,
    /// When the last step was.
    pub(crate) now: Tick,
    pub(crate) sequences: Sequences,
    /// In the order of admission.
    pub(crate) running: Vec<Slot>,
    pub(crate) queue: Queue,
    /// Who waits for something else than room and turn.
    pub(crate) aside: BTreeMap<RequestId, Slot>,
    /// Whose tokens have come from another machine, in the order in which they came.
    pub(crate) arrived: Vec<Slot>,
    /// Who holds room without running, or runs after that, and is promised room for all it knows.
    pub(crate) promises: u32,
    /// Known tokens of all who wait.
    pub(crate) waiting_tokens: u64,
    pub(crate) gates: Gates,
    pub(crate) encoder: Encoder,
    pub(crate) flight: Flight,
    pub(crate) remains: AllRemains,
    pub(crate) timers: Timers,
    /// The next places at the back and at the front of the queue, and among the running.
    pub(crate) turns: Turns,
    /// Whose cached tokens are looked up next: the new, then all others by id.
    pub(crate) unseen: VecDeque<RequestId>,
    pub(crate) seen: Option<RequestId>,
    /// Who was at the head of the queue at the end of the last step, and why.
    pub(crate) held: Option<Note>,
    /// What the next plan has to tell: who left since the last one, and who ended without an output.
    pub(crate) gone: Vec<RequestId>,
    pub(crate) ended: Vec<Note>,
    pub(crate) counts: Counts,
    /// Who was passed in this step. Kept for its buffer.
    pub(crate) passed: Vec<Slot>,
}

/// What the caller lets through at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Flow {
    /// Everything.
    #[default]
    Open,
    /// New requests are refused; all that are here run to their end.
    Draining,
    /// New requests queue up; nobody is admitted but who already holds room; the running run on.
    Holding,
    /// New requests queue up; nobody is scheduled. The running keep their room.
    Stopped,
}

/// Numbers that were dealt out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Turns {
    pub(crate) front: i64,
    pub(crate) back: i64,
    pub(crate) admission: u64,
}

impl Batcher {
    /// A batcher without requests, in the order of arrival.
    ///
    /// # Errors
    /// [`ConfigError`] when the limits contradict each other.
    pub fn new(config: Config) -> Result<Batcher, ConfigError> {
        Batcher::with_order(config, Policy::FirstCome)
    }

    /// Gives a tenant a share in proportion to `weight`, in the order [`Policy::Fair`].
    ///
    /// # Errors
    /// [`WeightError`] if the weight is senseless (zero, negative, not a number, beyond 2^16) or the order
    /// has none. Nothing changes then.
    pub fn set_weight(&mut self, tenant: TenantId, weight: f64) -> Result<(), WeightError> {
        self.order.set_weight(tenant, weight)
    }
}

impl<O: Order> Batcher<O> {
    /// A batcher without requests, in any order.
    ///
    /// # Errors
    /// [`ConfigError`] when the limits contradict each other.
    pub fn with_order(config: Config, order: O) -> Result<Batcher<O>, ConfigError> {
        config.validate()?;
        Ok(Batcher {
            order,
            flow: Flow::default(),
            now: Tick(0),
            sequences: Sequences::default(),
            running: Vec::new(),
            queue: Queue::new(config.patience_ticks.is_some()),
            aside: BTreeMap::new(),
            arrived: Vec::new(),
            promises: 0,
            waiting_tokens: 0,
            gates: Gates::new(&config),
            encoder: Encoder::new(config.encoder),
            flight: Flight::default(),
            remains: AllRemains::new(),
            timers: Timers::default(),
            turns: Turns::default(),
            unseen: VecDeque::new(),
            seen: None,
            held: None,
            gone: Vec::new(),
            ended: Vec::new(),
            counts: Counts::default(),
            passed: Vec::new(),
            config,
        })
    }

    /// The limits it works within.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The order it works in.
    pub fn order(&self) -> &O {
        &self.order
    }

    /// Queues a request. Cost: O(log n).
    ///
    /// # Errors
    /// [`Refusal`], with the request in it, when it makes no sense, can never run, or the queue is full.
    /// Nothing changes then, but for the count of refusals.
    pub fn add(&mut self, request: Request) -> Result<(), Refusal> {
        if let Err(reason) = self.examine(&request) {
            self.counts.refused += 1;
            return Err(Refusal { request: Box::new(request), reason });
        }
        let lane = self.order.lane(&request);
        let turn = self.turns.back;
        self.turns.back += 1;
        self.add_follower(request.sample_of);
        let (id, arrival) = (request.id, request.arrival);
        let key = Key { rank: crate::Rank::default(), id };
        let class = Class { adapter: request.adapter, long: false };
        let place = Place { class, lane, key, since: arrival, age: arrival };
        let waiting = Waiting { place, turn, at: At::Queue, swapped_tokens: None, cached_tokens: 0 };
        let Config { model_tokens_max, waiting_ticks_max, .. } = self.config;
        let reach = self.config.drafts.tokens_max;
        self.waiting_tokens += u64::from(request.prompt_tokens);
        let slot = self.sequences.insert(Sequence::new(request, lane, waiting, model_tokens_max, reach));
        self.enqueue(slot);
        if let Some(ticks) = waiting_ticks_max {
            self.timers.set(arrival.after(ticks), id);
        }
        if self.order.lookups_max() > 0 {
            self.unseen.push_back(id);
        }
        Ok(())
    }

    /// The grammar of a request is compiled: it may be admitted. False if no such request waits for one. If
    /// it could not be compiled, [`cancel`](Batcher::cancel) the request.
    pub fn grammar_ready(&mut self, id: RequestId) -> bool {
        let Some(slot) = self.sequences.find(id) else { return false };
        let request = &mut self.sequences.at_mut(slot).request;
        if request.grammar != Grammar::Compiling {
            return false;
        }
        request.grammar = Grammar::Ready;
        self.regate(slot);
        true
    }

    /// What becomes of the tokens of those who are preempted from here on: what moving and computing them takes may be
    /// measured as it goes.
    pub fn set_preemption(&mut self, preemption: Preemption) {
        self.config.preemption = preemption;
    }

    /// Opens, drains, holds or stops the flow.
    pub fn set_flow(&mut self, flow: Flow) {
        self.flow = flow;
    }

    /// What is let through at the moment.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Stops the flow and takes the room of all who run, the last first, so that they resume in their
    /// order: the memory can be given away. `plan` is cleared, and says who lost what. Room of requests
    /// whose tokens are on their way, or are handed over, is still in use.
    ///
    /// [`set_flow`](Batcher::set_flow) wakes it up.
    pub fn sleep<M: Memory>(&mut self, now: Tick, memory: &mut M, plan: &mut Plan) {
        plan.clear();
        self.now = now;
        self.flow = Flow::Stopped;
        while let Some(slot) = self.running.pop() {
            let id = self.sequences.at(slot).id;
            let swapped_tokens = self.displace(slot, now, memory);
            plan.preempted.push(crate::Preempted { id, reason: Reason::Asleep, swapped_tokens });
        }
        plan.gone.append(&mut self.gone);
        plan.ended.append(&mut self.ended);
    }

    /// True if somebody runs or waits.
    pub fn has_work(&self) -> bool {
        self.sequences.len() > 0
    }

    /// Puts one who waits, and is on no list, where it belongs: into the queue, or beside it.
    pub(crate) fn enqueue(&mut self, slot: Slot) {
        let gate = self.gate_of(slot);
        let sequence = self.sequences.at_mut(slot);
        let waiting = sequence.waiting();
        let rank = self.order.rank(&sequence.candidate(waiting.turn, waiting.cached_tokens));
        let waiting = sequence.waiting_mut();
        waiting.place.key.rank = rank;
        match gate {
            Some(gate) => {
                waiting.at = At::Aside(gate);
                self.aside.insert(waiting.place.key.id, slot);
            }
            None => {
                waiting.at = At::Queue;
                self.queue.join(&mut self.order, waiting.place, slot);
            }
        }
    }

    /// Something happened that one aside may have waited for.
    pub(crate) fn regate(&mut self, slot: Slot) {
        let sequence = self.sequences.at(slot);
        if let State::Waiting(waiting) = &sequence.state
            && let At::Aside(_) = waiting.at
        {
            let id = sequence.id;
            self.aside.remove(&id);
            self.enqueue(slot);
        }
    }

    fn gate_of(&self, slot: Slot) -> Option<Gate> {
        let sequence = self.sequences.at(slot);
        if matches!(self.remains.get(&sequence.id), Some(Remains::Fenced(_))) {
            Some(Gate::Fence)
        } else if sequence.pending > 0 {
            Some(Gate::Output)
        } else if sequence.request.grammar == Grammar::Compiling {
            Some(Gate::Grammar)
        } else {
            sequence.request.sample_of.filter(|&leader| self.still_reads(leader)).map(Gate::Leader)
        }
    }

    fn examine(&self, request: &Request) -> Result<(), RefusalReason> {
        let Request { id, prompt_tokens, stop, .. } = request;
        let (id, prompt_tokens, model_tokens_max) = (*id, *prompt_tokens, self.config.model_tokens_max);
        if self.flow == Flow::Draining {
            return Err(RefusalReason::Draining);
        }
        if self.sequences.find(id).is_some() {
            return Err(RefusalReason::Duplicate);
        }
        if self.flight.has_departed(id) {
            return Err(RefusalReason::OutputPending);
        }
        if self.remains.contains_key(&id) {
            return Err(RefusalReason::RoomInUse);
        }
        if prompt_tokens == 0 {
            return Err(RefusalReason::EmptyPrompt);
        }
        if prompt_tokens >= model_tokens_max {
            return Err(RefusalReason::PromptTooLong { prompt_tokens, model_tokens_max });
        }
        let (new_tokens_min, new_tokens_max) = (stop.new_tokens_min, stop.new_tokens_max);
        if new_tokens_max == 0 {
            return Err(RefusalReason::NothingAsked);
        }
        if new_tokens_min > new_tokens_max {
            return Err(RefusalReason::MinimumAboveMaximum { new_tokens_min, new_tokens_max });
        }
        self.encoder.examine(request)?;
        self.examine_leader(request)?;
        self.examine_queue(prompt_tokens)
    }

    fn examine_queue(&self, prompt_tokens: u32) -> Result<(), RefusalReason> {
        let queued = self.waiting_count();
        if let Some(queued_requests_max) = self.config.queued_requests_max.filter(|&max| queued >= max) {
            return Err(RefusalReason::QueueFull { queued, queued_requests_max });
        }
        let queued_tokens = self.waiting_tokens;
        let wanted = queued_tokens + u64::from(prompt_tokens);
        if let Some(queued_tokens_max) = self.config.queued_tokens_max.filter(|&max| wanted > max) {
            return Err(RefusalReason::QueueTokensFull { queued_tokens, prompt_tokens, queued_tokens_max });
        }
        Ok(())
    }

    pub(crate) fn waiting_count(&self) -> u32 {
        count(self.sequences.len() - self.running.len())
    }
}

/// A length as the `u32` of our messages.
pub(crate) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

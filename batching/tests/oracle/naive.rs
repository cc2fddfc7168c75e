//! A scheduler that is obviously right: plain lists, every figure and every place worked out anew whenever it
//! is wanted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use quayline_batching::scenario::BlockMemory;
use quayline_batching::{
    Config, FinishReason, Finished, Flow, Memory, Need, Prefill, Request, RequestId, Room, Sampled, TenantId,
};

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    FirstCome,
    Priority,
    Deadline,
    ShortestJob,
    LongestPrefix { lookups: u32 },
    Fair { input_cost: u32, output_cost: u32 },
}

/// A tenant's weight is a power of two, so that what it was served is counted in whole numbers: a quarter of a
/// token's cost is 1.
pub(crate) const WEIGHTS: [f64; 3] = [1.0, 4.0, 0.25];
const PRICES: [u64; 3] = [4, 1, 16];

/// A request as the naive scheduler sees it.
#[derive(Debug, Clone)]
pub(crate) struct Naive {
    request: Request,
    pub(crate) known: u32,
    computed: u32,
    pending: bool,
    /// Since when it waits, or as if it did: one that had lost patience when it was preempted stays as old.
    pub(crate) age: u64,
    /// It was admitted because it had waited for too long.
    impatient: bool,
    charged: bool,
    /// How many of its tokens were found cached when they were last looked for.
    found: u32,
}

/// The naive scheduler. `running` is in the order of admission, `waiting` in the order of coming, whoever was
/// preempted before all others.
#[derive(Debug)]
pub(crate) struct Oracle {
    pub(crate) config: Config,
    pub(crate) order: Order,
    pub(crate) memory: BlockMemory,
    pub(crate) requests: BTreeMap<RequestId, Naive>,
    pub(crate) running: Vec<RequestId>,
    pub(crate) waiting: Vec<RequestId>,
    pub(crate) flow: Flow,
    pub(crate) now: u64,
    /// What each tenant was served, by its weight, and lifted to.
    served: BTreeMap<TenantId, u64>,
    served_last: u64,
    /// Whose cached tokens are looked for next: the new ones, then whoever is behind this one.
    new: VecDeque<RequestId>,
    looked_for: Option<RequestId>,
}

/// What a step decided: who computes `(from, tokens)`, and who yielded, ended or got nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) scheduled: Vec<(RequestId, u32, u32)>,
    pub(crate) preempted: Vec<RequestId>,
    pub(crate) ended: Vec<RequestId>,
    pub(crate) skipped: Vec<RequestId>,
}

impl Decision {
    fn tokens(&self) -> u32 {
        self.scheduled.iter().map(|&(_, _, tokens)| tokens).sum()
    }

    /// Those of prompts.
    fn prompt_tokens(&self, requests: &BTreeMap<RequestId, Naive>) -> u32 {
        let scheduled = self.scheduled.iter();
        let prompts = scheduled.filter(|&&(id, from, _)| from + 1 < requests[&id].known);
        prompts.map(|&(_, _, tokens)| tokens).sum()
    }
}

impl Oracle {
    pub(crate) fn new(config: Config, order: Order, memory: BlockMemory) -> Oracle {
        Oracle {
            config,
            order,
            memory,
            requests: BTreeMap::new(),
            running: Vec::new(),
            waiting: Vec::new(),
            flow: Flow::Open,
            now: 0,
            served: BTreeMap::new(),
            served_last: 0,
            new: VecDeque::new(),
            looked_for: None,
        }
    }

    pub(crate) fn add(&mut self, request: Request, tokens: Vec<u64>) {
        let (id, tenant, arrival) = (request.id, request.tenant, request.arrival.0);
        self.memory.open(id, tokens);
        let naive = Naive {
            known: request.prompt_tokens,
            computed: 0,
            pending: false,
            age: arrival,
            impatient: false,
            charged: false,
            found: 0,
            request,
        };
        self.lift(tenant);
        self.requests.insert(id, naive);
        self.waiting.push(id);
        self.new.push_back(id);
    }

    /// Where a request stands in the order; lowest first, and of equals the one before the other on the list.
    fn rank(&self, id: RequestId) -> (i128, u64, Option<RequestId>) {
        let Naive { request, known, found, .. } = &self.requests[&id];
        let new_tokens = i128::from(known - request.prompt_tokens);
        let first = match self.order {
            Order::FirstCome => return (0, 0, None),
            Order::Fair { .. } => return (self.level(request.tenant).into(), 0, None),
            Order::Priority => i128::from(request.priority),
            Order::Deadline => request.targets.map_or(i128::MAX, |targets| {
                let first = request.arrival.0 + targets.first_token_ticks;
                i128::from(first) + i128::from(targets.token_ticks) * new_tokens
            }),
            Order::ShortestJob => {
                let hint = request.expected_new_tokens.unwrap_or(u32::MAX).min(request.stop.new_tokens_max);
                (i128::from(hint) - new_tokens).max(0)
            }
            Order::LongestPrefix { .. } => -i128::from(*found),
        };
        (first, request.arrival.0, Some(id))
    }

    /// Who waits for room and turn, in order.
    pub(crate) fn queue(&self) -> Vec<RequestId> {
        let waiting = self.waiting.iter().copied();
        let mut queue: Vec<RequestId> = waiting.filter(|id| !self.requests[id].pending).collect();
        queue.sort_by_key(|&id| self.rank(id));
        queue
    }

    /// Who waits for an output.
    pub(crate) fn aside(&self) -> BTreeSet<RequestId> {
        self.waiting.iter().copied().filter(|id| self.requests[id].pending).collect()
    }

    /// Who has waited for longer than anybody has patience for.
    pub(crate) fn is_impatient(&self, id: RequestId) -> bool {
        let waited = self.now.saturating_sub(self.requests[&id].age);
        self.config.patience_ticks.is_some_and(|ticks| waited > ticks)
    }

    fn next(&self) -> Option<RequestId> {
        let queue = self.queue();
        let impatient = queue.iter().copied().filter(|&id| self.is_impatient(id));
        impatient.min_by_key(|&id| (self.requests[&id].age, id)).or(queue.first().copied())
    }

    /// The last by the order, of equals the one admitted last; of those who had lost patience the youngest, if
    /// there is nobody else.
    fn victim(&self) -> RequestId {
        let last = |&&id: &&RequestId| {
            let (rank, arrival, _) = self.rank(id);
            match self.order {
                Order::FirstCome | Order::LongestPrefix { .. } => (0, 0),
                Order::ShortestJob => (rank, 0),
                _ => (rank, arrival),
            }
        };
        let patient = self.running.iter().filter(|id| !self.requests[*id].impatient);
        let impatient = self.running.iter().max_by_key(|&&id| (self.requests[&id].age, id));
        *patient.max_by_key(last).or(impatient).unwrap()
    }

    fn level(&self, tenant: TenantId) -> u64 {
        self.served.get(&tenant).copied().unwrap_or(0)
    }

    /// A tenant of whom nobody waits gets no credit for that when somebody does again.
    fn lift(&mut self, tenant: TenantId) {
        let tenants = self.queue().into_iter().map(|id| self.requests[&id].request.tenant);
        let waiting: BTreeSet<TenantId> = tenants.collect();
        if !waiting.contains(&tenant) {
            let others = waiting.iter().map(|&tenant| self.level(tenant));
            let lifted = self.level(tenant).max(others.min().unwrap_or(self.served_last));
            self.served.insert(tenant, lifted);
        }
    }

    fn charge(&mut self, id: RequestId, costs: u32) {
        let tenant = self.requests[&id].request.tenant;
        let served = self.level(tenant) + u64::from(costs) * PRICES[tenant.0 as usize];
        self.served.insert(tenant, served);
    }

    pub(crate) fn remove(&mut self, id: RequestId) {
        if self.running.contains(&id) {
            self.memory.release(id);
        }
        self.memory.close(id);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        self.new.retain(|&other| other != id);
        self.requests.remove(&id);
    }

    /// A few of the waiting are looked for in the memory: the new ones, then all others in turn.
    fn look(&mut self) {
        let Order::LongestPrefix { lookups } = self.order else { return };
        let new = self.new.len().min(lookups as usize);
        let in_turn = (lookups as usize - new).min(self.requests.len());
        for id in self.new.drain(..new).collect::<Vec<_>>() {
            self.look_for(id);
        }
        for _ in 0..in_turn {
            let behind = self.requests.keys().find(|&&id| Some(id) > self.looked_for);
            let id = *behind.or(self.requests.keys().next()).unwrap();
            self.looked_for = Some(id);
            self.look_for(id);
        }
    }

    fn look_for(&mut self, id: RequestId) {
        if self.queue().contains(&id) {
            self.requests.get_mut(&id).unwrap().found = self.memory.cached_tokens(id);
        }
    }

    /// The largest piece one request may have in a step with this many requests.
    fn cap(&self) -> u32 {
        let requests = (self.running.len() + self.queue().len()) as u32;
        match self.config.prefill {
            Prefill::Capped { tokens_max, adaptive: false } if requests > 1 => tokens_max.get(),
            Prefill::Capped { tokens_max, adaptive: true } if requests > 1 => {
                tokens_max.get().max(self.config.step_tokens_max / requests)
            }
            _ => u32::MAX,
        }
    }

    /// The tokens of a step, and of prompts in it: fewer while somebody generates, who gets his own whoever is first.
    fn step_tokens(&self) -> (u32, u32) {
        let naive = self.running.iter().map(|id| &self.requests[id]);
        let generating =
            naive.filter(|naive| !naive.pending && naive.computed + 1 == naive.known).count() as u32;
        match self.config.mixed_prefill_tokens_max {
            Some(prefill) if generating > 0 && self.config.prefill != Prefill::Whole => {
                let max = self.config.step_tokens_max;
                (max.min(generating + prefill.get()), prefill.get().min(max - generating))
            }
            _ => (self.config.step_tokens_max, self.config.step_tokens_max),
        }
    }

    pub(crate) fn step(&mut self) -> Decision {
        self.look();
        let mut decision = Decision::default();
        let (cap, step_tokens) = (self.cap(), self.step_tokens());
        let mut done = Vec::new();
        while let Some(&id) = self.running.iter().find(|id| !done.contains(*id)) {
            done.push(id);
            let naive = &self.requests[&id];
            let wanted = naive.known - naive.computed;
            let tokens = wanted.min(cap).min(self.left(wanted, step_tokens, &decision));
            if self.flow == Flow::Stopped || naive.pending || tokens == 0 {
                decision.skipped.push(id);
                continue;
            }
            let need = Need {
                computed_tokens: naive.computed,
                new_tokens: tokens,
                settled_tokens: naive.computed,
                ..Need::default()
            };
            self.grow(id, need, &mut decision);
        }
        decision.skipped.extend(self.aside());
        while let Some(id) = self.next() {
            if !self.admit(id, cap, step_tokens, &mut decision) {
                decision.skipped.push(id);
                break;
            }
        }
        for &(id, from, tokens) in &decision.scheduled {
            let naive = self.requests.get_mut(&id).unwrap();
            naive.pending = from + tokens == naive.known;
        }
        decision
    }

    /// What is left of a step for one who wants so much.
    fn left(&self, wanted: u32, (step, prompts): (u32, u32), decision: &Decision) -> u32 {
        let left = step - decision.tokens();
        let left_for_prompts = prompts - decision.prompt_tokens(&self.requests);
        if wanted == 1 { left } else { left.min(left_for_prompts) }
    }

    fn grow(&mut self, id: RequestId, need: Need, decision: &mut Decision) {
        loop {
            match self.memory.allocate(id, need) {
                Room::Granted { .. } => {
                    self.requests.get_mut(&id).unwrap().computed += need.new_tokens;
                    decision.scheduled.push((id, need.computed_tokens, need.new_tokens));
                    return;
                }
                Room::Never { .. } => {
                    decision.ended.push(id);
                    return self.remove(id);
                }
                Room::Short { .. } => {
                    let victim = self.victim();
                    self.preempt(victim, decision);
                    if victim == id {
                        return;
                    }
                }
            }
        }
    }

    fn preempt(&mut self, victim: RequestId, decision: &mut Decision) {
        decision.skipped.retain(|&id| id != victim);
        if decision.scheduled.iter().any(|&(id, _, _)| id == victim) {
            decision.scheduled.retain(|&(id, _, _)| id != victim);
            self.memory.withdraw(victim);
        }
        self.memory.release(victim);
        self.running.retain(|&id| id != victim);
        let naive = self.requests.get_mut(&victim).unwrap();
        (naive.computed, naive.found) = (0, 0);
        naive.age = if naive.impatient { naive.age } else { self.now };
        let (tenant, pending) = (naive.request.tenant, naive.pending);
        if !pending {
            self.lift(tenant);
        }
        self.waiting.insert(0, victim);
        decision.preempted.push(victim);
    }

    /// False if this one has to wait on.
    fn admit(&mut self, id: RequestId, cap: u32, step_tokens: (u32, u32), decision: &mut Decision) -> bool {
        let closed = matches!(self.flow, Flow::Holding | Flow::Stopped)
            || !decision.preempted.is_empty()
            || self.running.len() == self.config.running_max as usize
            || self.left(u32::MAX, step_tokens, decision) == 0;
        if closed {
            return false;
        }
        let known = self.requests[&id].known;
        let cached = self.memory.cached_tokens(id);
        let wanted = known - cached;
        let left = self.left(wanted, step_tokens, decision);
        if self.config.prefill == Prefill::Whole && wanted > left {
            return false;
        }
        let need = Need {
            computed_tokens: cached,
            new_tokens: wanted.min(cap).min(left),
            whole_tokens: self.config.whole_sequence_check.then_some(known),
            watermark_tokens: if self.running.is_empty() { 0 } else { self.config.watermark_tokens },
            settled_tokens: cached,
            ..Need::default()
        };
        match self.memory.allocate(id, need) {
            Room::Short { .. } => return false,
            Room::Never { .. } => {
                decision.ended.push(id);
                self.remove(id);
            }
            Room::Granted { .. } => {
                let impatient = self.is_impatient(id);
                self.waiting.retain(|&other| other != id);
                self.running.push(id);
                let naive = self.requests.get_mut(&id).unwrap();
                (naive.computed, naive.impatient) = (need.held_tokens(), impatient);
                decision.scheduled.push((id, cached, need.new_tokens));
                self.charge_prompt(id, wanted);
            }
        }
        true
    }

    /// Once in its life, for what was not cached.
    fn charge_prompt(&mut self, id: RequestId, tokens: u32) {
        let naive = self.requests.get_mut(&id).unwrap();
        if let Order::Fair { input_cost, .. } = self.order
            && !std::mem::replace(&mut naive.charged, true)
        {
            let tenant = naive.request.tenant;
            self.served_last = self.served_last.max(self.level(tenant));
            self.charge(id, input_cost * tokens);
        }
    }

    pub(crate) fn apply(&mut self, sampled: &[Sampled]) -> Vec<Finished> {
        let mut finished = Vec::new();
        for &Sampled { id, token } in sampled {
            let Some(naive) = self.requests.get(&id) else { continue };
            let new_tokens = naive.known + 1 - naive.request.prompt_tokens;
            let stop = &naive.request.stop;
            let reason = if stop.eos == Some(token) {
                Some(FinishReason::Eos)
            } else if stop.stop_ids.contains(&token) {
                Some(FinishReason::StopId(token))
            } else if new_tokens == stop.new_tokens_max {
                Some(FinishReason::NewTokensMax(stop.new_tokens_max))
            } else if naive.known + 1 == self.config.model_tokens_max {
                Some(FinishReason::ModelTokensMax(naive.known + 1))
            } else {
                None
            };
            if let Order::Fair { output_cost, .. } = self.order {
                self.charge(id, output_cost);
            }
            match reason {
                Some(reason) => {
                    finished.push(Finished { id, reason, dropped_tokens: 0 });
                    self.remove(id);
                }
                None => self.learn(id, token.0.into()),
            }
        }
        finished
    }

    fn learn(&mut self, id: RequestId, token: u64) {
        self.memory.push(id, token);
        if self.waiting.contains(&id) {
            // It waited for this output alone, and for its turn from now on.
            self.lift(self.requests[&id].request.tenant);
        }
        let naive = self.requests.get_mut(&id).unwrap();
        (naive.pending, naive.known) = (false, naive.known + 1);
    }
}

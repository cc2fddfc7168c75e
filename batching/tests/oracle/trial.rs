//! The batcher and the naive scheduler side by side: they get the same calls, and must give the same answers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use quayline_batching::scenario::BlockMemory;
use quayline_batching::{
    Batcher, Config, Error, Fair, Flow, Plan, Policy, Reason, Request, RequestId, Sampled, StepId, StopRules,
    Targets, TenantId, Tick, TokenId,
};

use crate::naive::{Decision, Oracle, Order, WEIGHTS};

/// What a random caller does.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Add(Asked),
    Step,
    /// Applies the outputs of the oldest step in flight, or of the newest, in their order or backwards.
    Apply {
        token: u32,
        newest: bool,
        backwards: bool,
    },
    Cancel {
        which: usize,
    },
    Finish {
        which: usize,
    },
    Flow(Flow),
    Later {
        ticks: u64,
    },
}

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Tokens of the prompt that all have in common, and others.
    pub(crate) shared: u32,
    pub(crate) own: u32,
    pub(crate) new_tokens: u32,
    pub(crate) eos: bool,
    /// It came so many ticks ago.
    pub(crate) since: u64,
    pub(crate) priority: i32,
    pub(crate) tenant: u64,
    pub(crate) targets: Option<(u64, u64)>,
    pub(crate) expected: Option<u32>,
}

/// The batcher, the oracle, and what is checked of the batcher alone.
pub(crate) struct Trial {
    batcher: Batcher,
    memory: BlockMemory,
    oracle: Oracle,
    plan: Plan,
    due: VecDeque<(StepId, Vec<RequestId>)>,
    next_id: u64,
    /// The next token to be computed of each that runs.
    progress: BTreeMap<RequestId, u32>,
    texts: BTreeMap<RequestId, Vec<u64>>,
    /// Digests of texts up to and with a token that some plan has computed.
    computed: BTreeSet<u64>,
}

impl Trial {
    pub(crate) fn new(config: Config, order: Order, memory: BlockMemory) -> Trial {
        let mut batcher = Batcher::with_order(config.clone(), policy(order)).unwrap();
        if let Order::Fair { .. } = order {
            for (tenant, weight) in (0..).zip(WEIGHTS) {
                batcher.set_weight(TenantId(tenant), weight).unwrap();
            }
        }
        Trial {
            batcher,
            memory: memory.clone(),
            oracle: Oracle::new(config, order, memory),
            plan: Plan::new(),
            due: VecDeque::new(),
            next_id: 0,
            progress: BTreeMap::new(),
            texts: BTreeMap::new(),
            computed: BTreeSet::new(),
        }
    }

    pub(crate) fn act(&mut self, act: &Act) {
        match *act {
            Act::Add(ref asked) => self.add(asked),
            Act::Step => self.step(),
            Act::Apply { token, newest, backwards } => self.apply(token, newest, backwards),
            Act::Cancel { which } | Act::Finish { which } => {
                self.remove(which, matches!(act, Act::Cancel { .. }))
            }
            Act::Flow(flow) => {
                self.batcher.set_flow(flow);
                self.oracle.flow = flow;
            }
            Act::Later { ticks } => self.oracle.now += ticks,
        }
        self.batcher.check().unwrap();
        assert_eq!(self.batcher.running().collect::<Vec<_>>(), self.oracle.running);
        let waiting: Vec<RequestId> = self.oracle.queue().into_iter().chain(self.oracle.aside()).collect();
        assert_eq!(self.batcher.waiting().collect::<Vec<_>>(), waiting);
        assert_eq!(self.memory.free(), self.oracle.memory.free());
    }

    fn add(&mut self, asked: &Asked) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let stop = StopRules {
            eos: asked.eos.then_some(TokenId(2)),
            stop_ids: vec![TokenId(3)],
            ..StopRules::after(asked.new_tokens)
        };
        let targets =
            asked.targets.map(|(first_token_ticks, token_ticks)| Targets { first_token_ticks, token_ticks });
        let request = Request {
            arrival: Tick(self.oracle.now.saturating_sub(asked.since)),
            priority: asked.priority,
            tenant: TenantId(asked.tenant),
            targets,
            expected_new_tokens: asked.expected,
            ..Request::new(id, asked.shared + asked.own, stop)
        };
        let own = (0..u64::from(asked.own)).map(|place| (id.0 + 1) << 32 | place);
        let tokens: Vec<u64> = (0..u64::from(asked.shared)).map(|place| 1 << 20 | place).chain(own).collect();
        self.batcher.add(request.clone()).unwrap();
        self.memory.open(id, tokens.clone());
        self.texts.insert(id, tokens.clone());
        self.oracle.add(request, tokens);
    }

    fn step(&mut self) {
        let impatient = self.impatient();
        self.batcher.step(Tick(self.oracle.now), &mut self.memory, &mut self.plan);
        let plan = &self.plan;
        let decision = Decision {
            scheduled: plan.scheduled.iter().map(|part| (part.id, part.start, part.tokens)).collect(),
            preempted: plan.preempted.iter().map(|note| note.id).collect(),
            ended: plan.ended.iter().map(|note| note.id).collect(),
            skipped: plan.skipped.iter().map(|note| note.id).collect(),
        };
        assert_eq!(decision, self.oracle.step());
        self.audit_plan();
        self.audit_patience(&impatient);
        for note in &self.plan.ended {
            self.memory.close(note.id);
        }
        if !self.plan.is_empty() {
            let due = self.plan.scheduled.iter().filter(|part| part.samples).map(|part| part.id);
            self.due.push_back((self.plan.step, due.collect()));
        }
    }

    /// Who wait for their turn and have lost patience, the oldest first.
    fn impatient(&self) -> Vec<RequestId> {
        let mut impatient = self.oracle.queue();
        impatient.retain(|&id| self.oracle.is_impatient(id));
        impatient.sort_by_key(|&id| (self.oracle.requests[&id].age, id));
        impatient
    }

    /// Nobody passes one who has lost patience.
    fn audit_patience(&self, impatient: &[RequestId]) {
        let admitted = self.plan.admitted.iter().map(|admitted| admitted.id);
        let ended = |id: &&RequestId| self.plan.ended.iter().any(|note| note.id == **id);
        let waiting = impatient.iter().filter(|id| !ended(id)).copied();
        let first: Vec<(RequestId, RequestId)> = admitted.zip(waiting).collect();
        assert!(first.iter().all(|(admitted, oldest)| admitted == oldest), "{first:?}");
    }

    /// What must be true of any plan, whoever made it.
    fn audit_plan(&mut self) {
        let plan = &self.plan;
        let config = self.batcher.config();
        assert_eq!(plan.tokens, plan.scheduled.iter().map(|part| part.tokens).sum::<u32>());
        assert!(plan.tokens <= config.step_tokens_max);
        assert!(plan.preempted.is_empty() || plan.admitted.is_empty());
        let preempted = plan.preempted.iter().map(|preempted| preempted.id);
        for id in preempted.chain(plan.ended.iter().map(|note| note.id)) {
            self.progress.remove(&id);
        }
        for admitted in &plan.admitted {
            assert!(admitted.cached_tokens < admitted.known_tokens);
            let former = self.progress.insert(admitted.id, admitted.cached_tokens);
            assert_eq!(former, None, "{} is admitted though it runs", admitted.id);
        }
        for part in &plan.scheduled {
            let digests = digests(&self.texts[&part.id]);
            let (found, now) = digests[..part.end() as usize].split_at(part.start as usize);
            let found = found.iter().all(|digest| self.computed.contains(digest));
            assert!(found, "{} builds on tokens that nobody has computed", part.id);
            self.computed.extend(now);
            let next = self.progress.get_mut(&part.id).unwrap();
            assert_eq!(part.start, *next, "a token of {} is computed twice or left out", part.id);
            assert!(part.tokens > 0);
            *next = part.end();
            assert_eq!(part.samples, *next == self.oracle.requests[&part.id].known);
        }
        for note in &plan.cut {
            let part = plan.scheduled.iter().find(|part| part.id == note.id).unwrap();
            let (Reason::StepLeft { wanted_tokens, left_tokens: given }
            | Reason::LongPrefill { wanted_tokens, cap_tokens: given }) = note.reason
            else {
                panic!("{} is no reason for a cut", note.reason)
            };
            assert!(part.tokens == given && given < wanted_tokens);
        }
    }

    /// Applies the oldest step in flight, or the newest that can go before it.
    fn apply(&mut self, token: u32, newest: bool, backwards: bool) {
        let next = if newest { self.due.pop_back() } else { self.due.pop_front() };
        let Some((step, due)) = next else { return };
        let due_ids = due.clone();
        let mut sampled: Vec<Sampled> = (due.into_iter().enumerate())
            .map(|(place, id)| Sampled { id, token: TokenId((token + place as u32) % 8) })
            .collect();
        // However the outputs are listed, they are taken in the order of the plan.
        let in_plan_order = sampled.clone();
        if backwards {
            sampled.reverse();
        }
        let mut finished = Vec::new();
        self.attack(step, &sampled);
        match self.batcher.apply(step, &sampled, &mut self.memory, &mut finished) {
            Ok(()) => {}
            Err(Error::OutOfOrder { .. }) if newest => return self.due.push_back((step, due_ids)),
            Err(error) => panic!("{error}"),
        }
        for output in &sampled {
            if self.batcher.standing(output.id).is_some() {
                self.memory.push(output.id, u64::from(output.token.0));
                self.texts.get_mut(&output.id).unwrap().push(u64::from(output.token.0));
            }
        }
        let expected = self.oracle.apply(&in_plan_order);
        assert_eq!(finished, expected);
        for done in &finished {
            self.memory.close(done.id);
            self.progress.remove(&done.id);
        }
        self.batcher.apply(step, &sampled, &mut self.memory, &mut finished).unwrap_err();
    }

    /// Outputs that are not those of the step are refused, and change nothing.
    fn attack(&mut self, step: StepId, sampled: &[Sampled]) {
        let before = self.batcher.dump();
        let stranger = Sampled { id: RequestId(u64::MAX), token: TokenId(1) };
        let mut wrong = vec![[sampled, &[stranger]].concat()];
        if let Some(&first) = sampled.first()
            && self.oracle.requests.contains_key(&first.id)
        {
            wrong.push([&[first], sampled].concat());
            wrong.push(sampled[1..].to_vec());
        }
        let mut finished = Vec::new();
        for wrong in wrong {
            self.batcher.apply(step, &wrong, &mut self.memory, &mut finished).unwrap_err();
        }
        let later = StepId(step.0 + 1000);
        let error = self.batcher.apply(later, sampled, &mut self.memory, &mut finished).unwrap_err();
        assert_eq!(error, Error::NotInFlight { step: later });
        assert!(self.batcher.dump() == before, "a refused call changed something");
    }

    fn remove(&mut self, which: usize, cancel: bool) {
        let ids: Vec<RequestId> = self.oracle.requests.keys().copied().collect();
        let Some(&id) = ids.get(which % ids.len().max(1)) else { return };
        let how = if cancel { Batcher::cancel } else { Batcher::finish };
        assert!(how(&mut self.batcher, id, &mut self.memory));
        assert!(!how(&mut self.batcher, id, &mut self.memory));
        self.memory.close(id);
        self.oracle.remove(id);
        self.progress.remove(&id);
    }

    /// Steps until everybody is done.
    pub(crate) fn drain(&mut self) {
        self.act(&Act::Flow(Flow::Draining));
        for _ in 0..20_000 {
            self.act(&Act::Apply { token: 4, newest: false, backwards: false });
            if !self.batcher.has_work() {
                break;
            }
            self.act(&Act::Later { ticks: 1 });
            self.act(&Act::Step);
        }
        assert!(!self.batcher.has_work(), "somebody waits for ever: {:?}", self.plan);
        assert_eq!(self.memory.free(), self.memory.total(), "the last one out leaves the memory empty");
        let counts = self.batcher.stats().counts;
        assert_eq!(counts.finished + counts.cancelled + counts.ended, self.next_id);
    }
}

fn policy(order: Order) -> Policy {
    match order {
        Order::FirstCome => Policy::FirstCome,
        Order::Priority => Policy::Priority,
        Order::Deadline => Policy::Deadline,
        Order::ShortestJob => Policy::ShortestJob,
        Order::LongestPrefix { lookups } => Policy::LongestPrefix { lookups_max: lookups },
        Order::Fair { input_cost, output_cost } => Policy::Fair(Fair::with_costs(input_cost, output_cost)),
    }
}

/// A digest for every beginning of a text (FNV-1a, a token at a time).
fn digests(text: &[u64]) -> Vec<u64> {
    let digest = |digest: &mut u64, token: &u64| {
        *digest = (*digest ^ token).wrapping_mul(0x0100_0000_01b3);
        Some(*digest)
    };
    text.iter().scan(0xcbf2_9ce4_8422_2325, digest).collect()
}

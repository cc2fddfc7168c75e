//! Random callers against a scheduler that is obviously right: plain lists, every figure worked out anew in
//! each step.
//!
//! Requests come, are cancelled and finished at any moment, outputs are applied late and in part, memories
//! are small. After every call both must agree and the audit must be clean; at the end everybody must be
//! done, with no token computed twice or left out.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
#![expect(clippy::cast_possible_truncation, reason = "a trial has a hundred acts")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU32;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use quayline_batching::scenario::BlockMemory;
use quayline_batching::{
    Batcher, Config, Error, FinishReason, Finished, Flow, Memory, Need, Plan, Policy, Prefill, Reason,
    Request, RequestId, Room, Sampled, StepId, StopRules, Targets, Tick, TokenId,
};

/// A request as the naive scheduler sees it.
#[derive(Debug, Clone)]
struct Naive {
    request: Request,
    known: u32,
    computed: u32,
    pending: bool,
}

/// The naive scheduler. `running` and `waiting` are in order; nothing else is remembered.
#[derive(Debug)]
struct Oracle {
    config: Config,
    order: Policy,
    memory: BlockMemory,
    requests: BTreeMap<RequestId, Naive>,
    running: Vec<RequestId>,
    waiting: Vec<RequestId>,
    flow: Flow,
}

/// What a step decided: who computes `(from, tokens)`, and who yielded, ended or got nothing.
#[derive(Debug, Default, PartialEq, Eq)]
struct Decision {
    scheduled: Vec<(RequestId, u32, u32)>,
    preempted: Vec<RequestId>,
    ended: Vec<RequestId>,
    skipped: Vec<RequestId>,
}

impl Oracle {
    fn add(&mut self, request: Request, tokens: Vec<u64>) {
        let id = request.id;
        self.memory.open(id, tokens);
        self.requests
            .insert(id, Naive { known: request.prompt_tokens, computed: 0, pending: false, request });
        self.waiting.push(id);
        self.sort_waiting();
    }

    /// The place of a request in the order, but for who came first. Lowest first.
    fn rank(&self, id: RequestId) -> (i128, u64) {
        let Naive { request, known, .. } = &self.requests[&id];
        let new_tokens = i128::from(known - request.prompt_tokens);
        let first = match self.order {
            Policy::Priority => i128::from(request.priority),
            Policy::Deadline => request.targets.map_or(i128::MAX, |targets| {
                let first = request.arrival.0 + targets.first_token_ticks;
                i128::from(first) + i128::from(targets.token_ticks) * new_tokens
            }),
            Policy::ShortestJob => {
                i128::from(request.expected_new_tokens.unwrap_or(request.stop.new_tokens_max)) - new_tokens
            }
            _ => return (0, 0),
        };
        (first.max(if self.order == Policy::ShortestJob { 0 } else { i128::MIN }), request.arrival.0)
    }

    fn sort_waiting(&mut self) {
        if self.order != Policy::FirstCome {
            let mut waiting = std::mem::take(&mut self.waiting);
            waiting.sort_by_key(|&id| (self.rank(id), id));
            self.waiting = waiting;
        }
    }

    /// The last by the order, of equals the one admitted last.
    fn victim(&self) -> RequestId {
        let rank = |&&id: &&RequestId| match self.order {
            Policy::ShortestJob => (self.rank(id).0, 0),
            _ => self.rank(id),
        };
        *self.running.iter().max_by_key(rank).unwrap()
    }

    fn remove(&mut self, id: RequestId) {
        if self.running.contains(&id) {
            self.memory.release(id);
        }
        self.memory.close(id);
        self.running.retain(|&other| other != id);
        self.waiting.retain(|&other| other != id);
        self.requests.remove(&id);
    }

    /// Who waits for room and turn, in order, and who waits for an output.
    fn queue(&self) -> Vec<RequestId> {
        self.waiting.iter().copied().filter(|id| !self.requests[id].pending).collect()
    }

    fn aside(&self) -> BTreeSet<RequestId> {
        self.waiting.iter().copied().filter(|id| self.requests[id].pending).collect()
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

    /// The tokens of a step: fewer prompt tokens while somebody generates.
    fn step_tokens(&self) -> u32 {
        let naive = self.running.iter().map(|id| &self.requests[id]);
        let generating =
            naive.filter(|naive| !naive.pending && naive.computed + 1 == naive.known).count() as u32;
        match self.config.mixed_prefill_tokens_max {
            Some(prefill) if generating > 0 && self.config.prefill != Prefill::Whole => {
                self.config.step_tokens_max.min(generating + prefill.get())
            }
            _ => self.config.step_tokens_max,
        }
    }

    fn step(&mut self) -> Decision {
        let mut decision = Decision::default();
        let (cap, step_tokens) = (self.cap(), self.step_tokens());
        let mut done = Vec::new();
        while let Some(&id) = self.running.iter().find(|id| !done.contains(*id)) {
            done.push(id);
            let spent: u32 = decision.scheduled.iter().map(|&(_, _, tokens)| tokens).sum();
            let left = step_tokens - spent;
            let naive = &self.requests[&id];
            let tokens = (naive.known - naive.computed).min(cap).min(left);
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
        self.admit((cap, step_tokens), &mut decision);
        for &(id, from, tokens) in &decision.scheduled {
            let naive = self.requests.get_mut(&id).unwrap();
            naive.pending = from + tokens == naive.known;
        }
        decision
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
        if decision.scheduled.iter().any(|&(id, _, _)| id == victim) {
            decision.scheduled.retain(|&(id, _, _)| id != victim);
            self.memory.withdraw(victim);
        }
        self.memory.release(victim);
        self.running.retain(|&id| id != victim);
        self.requests.get_mut(&victim).unwrap().computed = 0;
        self.waiting.insert(0, victim);
        self.sort_waiting();
        decision.preempted.push(victim);
    }

    fn admit(&mut self, (cap, step_tokens): (u32, u32), decision: &mut Decision) {
        decision.skipped.extend(self.aside());
        for id in self.queue() {
            let spent: u32 = decision.scheduled.iter().map(|&(_, _, tokens)| tokens).sum();
            let left = step_tokens - spent;
            let closed = matches!(self.flow, Flow::Holding | Flow::Stopped)
                || !decision.preempted.is_empty()
                || self.running.len() == self.config.running_max as usize
                || left == 0;
            let naive = self.requests[&id].clone();
            if closed {
                return decision.skipped.push(id);
            }
            let cached = self.memory.cached_tokens(id);
            let wanted = naive.known - cached;
            if self.config.prefill == Prefill::Whole && wanted > left {
                return decision.skipped.push(id);
            }
            let need = Need {
                computed_tokens: cached,
                new_tokens: wanted.min(cap).min(left),
                whole_tokens: self.config.whole_sequence_check.then_some(naive.known),
                watermark_tokens: if self.running.is_empty() { 0 } else { self.config.watermark_tokens },
                settled_tokens: cached,
                ..Need::default()
            };
            match self.memory.allocate(id, need) {
                Room::Short { .. } => return decision.skipped.push(id),
                Room::Never { .. } => {
                    decision.ended.push(id);
                    self.remove(id);
                }
                Room::Granted { .. } => {
                    self.waiting.retain(|&other| other != id);
                    self.running.push(id);
                    self.requests.get_mut(&id).unwrap().computed = need.held_tokens();
                    decision.scheduled.push((id, cached, need.new_tokens));
                }
            }
        }
    }

    fn apply(&mut self, sampled: &[Sampled]) -> Vec<Finished> {
        let finished = self.learn(sampled);
        self.sort_waiting();
        finished
    }

    fn learn(&mut self, sampled: &[Sampled]) -> Vec<Finished> {
        let mut finished = Vec::new();
        for &Sampled { id, token } in sampled {
            let Some(naive) = self.requests.get_mut(&id) else { continue };
            naive.pending = false;
            naive.known += 1;
            let stop = &naive.request.stop;
            let reason = if stop.eos == Some(token) {
                FinishReason::Eos
            } else if stop.stop_ids.contains(&token) {
                FinishReason::StopId(token)
            } else if naive.known - naive.request.prompt_tokens == stop.new_tokens_max {
                FinishReason::NewTokensMax(stop.new_tokens_max)
            } else if naive.known == self.config.model_tokens_max {
                FinishReason::ModelTokensMax(naive.known)
            } else {
                self.memory.push(id, u64::from(token.0));
                continue;
            };
            finished.push(Finished { id, reason, dropped_tokens: 0 });
            self.remove(id);
        }
        finished
    }
}

/// What a random caller does.
#[derive(Debug, Clone)]
enum Act {
    Add {
        shared: u32,
        own: u32,
        priority: i32,
        arrival: u64,
        new_tokens: u32,
        eos: bool,
    },
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
}

/// The batcher, the oracle, and what is checked of the batcher alone.
struct Trial {
    batcher: Batcher,
    memory: BlockMemory,
    oracle: Oracle,
    plan: Plan,
    due: VecDeque<(StepId, Vec<RequestId>)>,
    next_id: u64,
    /// The next token to be computed of each that runs.
    progress: BTreeMap<RequestId, u32>,
    /// Who was admitted for the first time, in that order.
    admitted: Vec<RequestId>,
    texts: BTreeMap<RequestId, Vec<u64>>,
    /// Digests of texts up to and with a token that some plan has computed.
    computed: BTreeSet<u64>,
}

impl Trial {
    fn new(config: Config, order: Policy, memory: BlockMemory) -> Trial {
        let oracle = Oracle {
            config: config.clone(),
            order: order.clone(),
            memory: memory.clone(),
            requests: BTreeMap::new(),
            running: Vec::new(),
            waiting: Vec::new(),
            flow: Flow::Open,
        };
        Trial {
            batcher: Batcher::with_order(config, order).unwrap(),
            memory,
            oracle,
            plan: Plan::new(),
            due: VecDeque::new(),
            next_id: 0,
            progress: BTreeMap::new(),
            admitted: Vec::new(),
            texts: BTreeMap::new(),
            computed: BTreeSet::new(),
        }
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Add { shared, own, priority, arrival, new_tokens, eos } => {
                let id = RequestId(self.next_id);
                self.next_id += 1;
                let eos = eos.then_some(TokenId(2));
                let stop = StopRules { eos, stop_ids: vec![TokenId(3)], ..StopRules::after(new_tokens) };
                let targets =
                    Targets { first_token_ticks: 5 * arrival, token_ticks: priority.unsigned_abs().into() };
                let request = Request {
                    priority,
                    arrival: Tick(arrival),
                    targets: (priority != 0).then_some(targets),
                    expected_new_tokens: (priority != 0).then_some(new_tokens / 2),
                    ..Request::new(id, shared + own, stop)
                };
                let own = (0..u64::from(own)).map(|place| (id.0 + 1) << 32 | place);
                let tokens: Vec<u64> =
                    (0..u64::from(shared)).map(|place| 1 << 20 | place).chain(own).collect();
                self.batcher.add(request.clone()).unwrap();
                self.memory.open(id, tokens.clone());
                self.texts.insert(id, tokens.clone());
                self.oracle.add(request, tokens);
            }
            Act::Step => self.step(),
            Act::Apply { token, newest, backwards } => self.apply(token, newest, backwards),
            Act::Cancel { which } | Act::Finish { which } => {
                self.remove(which, matches!(act, Act::Cancel { .. }))
            }
            Act::Flow(flow) => {
                self.batcher.set_flow(flow);
                self.oracle.flow = flow;
            }
        }
        self.batcher.check().unwrap();
        assert_eq!(self.batcher.running().collect::<Vec<_>>(), self.oracle.running);
        let waiting: Vec<RequestId> = self.oracle.queue().into_iter().chain(self.oracle.aside()).collect();
        assert_eq!(self.batcher.waiting().collect::<Vec<_>>(), waiting);
        assert_eq!(self.memory.free(), self.oracle.memory.free());
    }

    fn step(&mut self) {
        self.batcher.step(Tick(0), &mut self.memory, &mut self.plan);
        let plan = &self.plan;
        let decision = Decision {
            scheduled: plan.scheduled.iter().map(|part| (part.id, part.start, part.tokens)).collect(),
            preempted: plan.preempted.iter().map(|note| note.id).collect(),
            ended: plan.ended.iter().map(|note| note.id).collect(),
            skipped: plan.skipped.iter().map(|note| note.id).collect(),
        };
        assert_eq!(decision, self.oracle.step());
        self.audit_plan();
        for note in &self.plan.ended {
            self.memory.close(note.id);
        }
        if !self.plan.is_empty() {
            let due = self.plan.scheduled.iter().filter(|part| part.samples).map(|part| part.id);
            self.due.push_back((self.plan.step, due.collect()));
        }
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
            if !admitted.resumed {
                self.admitted.push(admitted.id);
            }
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
    fn drain(&mut self) {
        self.act(&Act::Flow(Flow::Draining));
        for _ in 0..20_000 {
            self.act(&Act::Apply { token: 4, newest: false, backwards: false });
            if !self.batcher.has_work() {
                break;
            }
            self.act(&Act::Step);
        }
        assert!(!self.batcher.has_work(), "somebody waits for ever: {:?}", self.plan);
        assert_eq!(self.memory.free(), self.memory.total(), "the last one out leaves the memory empty");
        if self.oracle.order == Policy::FirstCome {
            assert!(self.admitted.is_sorted(), "first come, first served: {:?}", self.admitted);
        }
        let counts = self.batcher.stats().counts;
        assert_eq!(counts.finished + counts.cancelled + counts.ended, self.next_id);
    }
}

fn capped(tokens: u32, adaptive: bool) -> Prefill {
    Prefill::Capped { tokens_max: NonZeroU32::new(tokens).unwrap(), adaptive }
}

prop_compose! {
    fn configs()(
        running_max in 1u32..6,
        step_more in 0u32..40,
        model_tokens_max in 48u32..80,
        prefill in prop_oneof![
            Just(Prefill::Whole),
            Just(Prefill::Chunked),
            (1u32..12, any::<bool>()).prop_map(|(tokens, adaptive)| capped(tokens, adaptive)),
        ],
        whole_sequence_check in any::<bool>(),
        watermark_tokens in prop_oneof![Just(0u32), 0u32..20],
    ) -> Config {
        let least = if prefill == Prefill::Whole { model_tokens_max } else { running_max };
        Config {
            step_tokens_max: least + step_more,
            running_max,
            prefill,
            whole_sequence_check,
            watermark_tokens,
            ..Config::new(model_tokens_max)
        }
    }
}

prop_compose! {
    /// From too small for some requests to large enough for several.
    fn memories()(blocks in 6u32..30, block_tokens in 1u32..6, caching in any::<bool>()) -> BlockMemory {
        BlockMemory::new(blocks, block_tokens, caching)
    }
}

fn acts() -> impl Strategy<Value = Act> {
    let add = (0u32..24, 1u32..24, -2i32..3, 0u64..4, 1u32..24, any::<bool>());
    let add = add.prop_map(|(shared, own, priority, arrival, new_tokens, eos)| Act::Add {
        shared,
        own,
        priority,
        arrival,
        new_tokens,
        eos,
    });
    let flow = prop_oneof![3 => Just(Flow::Open), 1 => Just(Flow::Holding), 1 => Just(Flow::Stopped)];
    prop_oneof![
        6 => add,
        12 => Just(Act::Step),
        8 => (0u32..8, prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(token, newest, backwards)| Act::Apply { token, newest, backwards }),
        1 => any::<usize>().prop_map(|which| Act::Cancel { which }),
        1 => any::<usize>().prop_map(|which| Act::Finish { which }),
        1 => flow.prop_map(Act::Flow),
    ]
}

/// A digest for every beginning of a text (FNV-1a, a token at a time).
fn digests(text: &[u64]) -> Vec<u64> {
    let digest = |digest: &mut u64, token: &u64| {
        *digest = (*digest ^ token).wrapping_mul(0x0100_0000_01b3);
        Some(*digest)
    };
    text.iter().scan(0xcbf2_9ce4_8422_2325, digest).collect()
}

/// Little memory in small shared blocks, prompts in pieces, and the urgent come last: the running yield in
/// the very step that had scheduled them.
fn crowded() -> impl Strategy<Value = (Config, BlockMemory)> {
    (2u32..6, 1u32..6, 6u32..20, 1u32..4, any::<bool>()).prop_map(
        |(running_max, tokens, blocks, block_tokens, whole)| {
            let config = Config {
                step_tokens_max: 24,
                running_max,
                prefill: capped(tokens, false),
                whole_sequence_check: whole,
                ..Config::new(64)
            };
            (config, BlockMemory::new(blocks, block_tokens, true))
        },
    )
}

fn trial(config: Config, order: Policy, memory: BlockMemory, acts: &[Act]) {
    let mut trial = Trial::new(config, order, memory);
    for act in acts {
        trial.act(act);
    }
    trial.drain();
}

/// The same cases on every machine; what fails is printed in full, cut down to the fewest acts.
fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(250))]

    #[test]
    fn any_caller_gets_what_the_naive_scheduler_says(
        config in configs(),
        order in prop_oneof![
            Just(Policy::FirstCome),
            Just(Policy::Priority),
            Just(Policy::Deadline),
            Just(Policy::ShortestJob),
        ],
        memory in memories(),
        acts in prop::collection::vec(acts(), 1..120),
    ) {
        trial(config, order, memory, &acts);
    }

    #[test]
    fn prompts_are_read_slowly_beside_those_who_generate(
        config in configs(),
        mixed_prefill in 1u32..16,
        memory in memories(),
        acts in prop::collection::vec(acts(), 1..120),
    ) {
        let mixed_prefill_tokens_max = NonZeroU32::new(mixed_prefill);
        trial(Config { mixed_prefill_tokens_max, ..config }, Policy::FirstCome, memory, &acts);
    }

    #[test]
    fn nobody_finds_what_was_not_computed(
        (config, memory) in crowded(),
        acts in prop::collection::vec(acts(), 1..120),
    ) {
        trial(config, Policy::Priority, memory, &acts);
    }
}

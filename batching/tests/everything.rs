//! Random callers who use everything at once: drafts, several plans in flight, fences, swaps, loads, forks,
//! grammars, adapters, encoder items, timeouts, sleep, restarts from a dump. No second scheduler says what
//! must happen; these rules must hold whatever happens: no step is larger than it may be, no token is
//! computed twice or left out, drafts are never built on, whoever waits has a reason, a restarted batcher
//! goes on like the other, and in the end everybody is gone and the memory empty.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(clippy::cast_possible_truncation, reason = "a trial has a few hundred acts")]

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use quayline_batching::scenario::BlockMemory;
use quayline_batching::{
    AdapterId, Batcher, Config, Costs, DraftLimit, Drafts, EncoderItem, EncoderLimits, FailedLoads, Fair,
    Finished, Flow, Grammar, LongPrefills, Plan, Policy, Preemption, Prefill, Remote, Request, RequestId,
    Sampled, Scheduled, Standing, StepId, StopRules, Targets, TenantId, Tick, TokenId,
};

/// What a random caller does. Numbers choose among what is there.
#[derive(Debug, Clone)]
enum Act {
    Add(Box<Asked>),
    Step,
    Apply { newest: bool, accepted: u32, token: u32, backwards: bool },
    Propose { which: usize, drafts: u32 },
    Cancel { which: usize },
    Finish { which: usize },
    Grammars,
    Loads { gap: Option<u32> },
    HandOver,
    Fork { which: usize },
    Flow(Flow),
    Sleep,
    Later { ticks: u64 },
    Restart,
}

#[derive(Debug, Clone)]
struct Asked {
    shared: u32,
    own: u32,
    new_tokens: u32,
    eos: bool,
    priority: i32,
    tenant: u64,
    adapter: Option<u64>,
    compiling: bool,
    hands_over: bool,
    sibling: bool,
    remote: Remote,
    item: Option<(u64, u32)>,
}

/// A request as its caller sees it.
#[derive(Debug, Clone)]
struct Seen {
    known: u32,
    pending: u32,
    /// Drafts and padding in flight.
    drafts: u32,
    /// How far it is computed, if it runs.
    computed: Option<u32>,
    loading: bool,
}

impl Seen {
    /// What it will know when the steps in flight have been applied, if all drafts are accepted.
    fn expected(&self) -> u32 {
        self.known + self.pending + self.drafts
    }
}

#[derive(Debug, Clone)]
struct Trial {
    batcher: Batcher,
    memory: BlockMemory,
    plan: Plan,
    seen: BTreeMap<RequestId, Seen>,
    /// Plans in flight, and who has lost its part in them since.
    flown: VecDeque<(StepId, Vec<(Scheduled, bool)>)>,
    handed: Vec<RequestId>,
    arriving: Vec<RequestId>,
    next_id: u64,
    now: u64,
    drained: bool,
}

impl Trial {
    fn new(config: Config, order: Policy, memory: BlockMemory) -> Trial {
        Trial {
            batcher: Batcher::with_order(config, order).unwrap(),
            memory,
            plan: Plan::new(),
            seen: BTreeMap::new(),
            flown: VecDeque::new(),
            handed: Vec::new(),
            arriving: Vec::new(),
            next_id: 0,
            now: 0,
            drained: false,
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Add(asked) => self.add(asked),
            Act::Step => self.step(),
            &Act::Apply { newest, accepted, token, backwards } => {
                self.apply(newest, accepted, token, backwards);
            }
            &Act::Propose { which, drafts } => {
                if let Some(id) = self.pick(which) {
                    let wanted = self.batcher.drafts_wanted(id);
                    assert_eq!(self.batcher.propose(id, drafts), wanted.min(drafts));
                }
            }
            &Act::Cancel { which } => self.remove(which, true),
            &Act::Finish { which } => self.remove(which, false),
            Act::Grammars => {
                let ids: Vec<RequestId> = self.seen.keys().copied().collect();
                for id in ids {
                    self.batcher.grammar_ready(id);
                }
            }
            &Act::Loads { gap } => self.load(gap),
            Act::HandOver => self.hand_over(),
            &Act::Fork { which } => self.fork(which),
            &Act::Flow(flow) => self.batcher.set_flow(flow),
            Act::Sleep => {
                self.batcher.sleep(Tick(self.now), &mut self.memory, &mut self.plan);
                self.note_losses();
                self.batcher.set_flow(Flow::Open);
            }
            Act::Later { ticks } => self.now += ticks,
            Act::Restart => self.restart(),
        }
        self.batcher.check().unwrap();
        assert_eq!(self.batcher.stats().running + self.batcher.stats().waiting, self.seen.len() as u32);
    }

    fn pick(&self, which: usize) -> Option<RequestId> {
        self.seen.keys().nth(which % self.seen.len().max(1)).copied()
    }

    fn add(&mut self, asked: &Asked) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let sibling = self.seen.keys().next_back().copied().filter(|_| asked.sibling);
        let prompt_tokens = asked.shared + asked.own;
        let stop = StopRules { eos: asked.eos.then_some(TokenId(2)), ..StopRules::after(asked.new_tokens) };
        let item = asked.item.filter(|&(_, tokens)| tokens <= prompt_tokens);
        let mut request = Request {
            arrival: Tick(self.now),
            priority: asked.priority,
            tenant: TenantId(asked.tenant),
            targets: (asked.priority > 0)
                .then_some(Targets { first_token_ticks: 10, token_ticks: asked.tenant }),
            adapter: asked.adapter.map(AdapterId),
            grammar: if asked.compiling { Grammar::Compiling } else { Grammar::None },
            hands_over: asked.hands_over,
            sample_of: sibling,
            encoder_items: item
                .map(|(content, tokens)| EncoderItem { content, start: prompt_tokens - tokens, tokens })
                .into_iter()
                .collect(),
            ..Request::new(id, prompt_tokens, stop)
        };
        if self.batcher.config().encoder.is_none() {
            request.encoder_items.clear();
        }
        let own = (0..u64::from(asked.own)).map(|place| (id.0 + 1) << 32 | place);
        let tokens = (0..u64::from(asked.shared)).map(|place| 1 << 20 | place).chain(own).collect();
        let before = self.batcher.stats();
        if self.batcher.add(request).is_err() {
            let counts = quayline_batching::Counts { refused: before.counts.refused + 1, ..before.counts };
            assert_eq!(self.batcher.stats(), quayline_batching::Stats { counts, ..before });
            return;
        }
        self.memory.open(id, tokens);
        self.memory.set_remote(id, asked.remote);
        self.seen
            .insert(id, Seen { known: prompt_tokens, pending: 0, drafts: 0, computed: None, loading: false });
    }

    fn step(&mut self) {
        self.batcher.step(Tick(self.now), &mut self.memory, &mut self.plan);
        self.note_losses();
        let plan = self.plan.clone();
        let config = self.batcher.config().clone();
        assert_eq!(plan.tokens, plan.scheduled.iter().map(|part| part.tokens).sum::<u32>());
        let slots = config.drafts.slots * plan.scheduled.len() as u32;
        assert!(plan.tokens + slots <= config.step_tokens_max, "the step is larger than it may be");
        assert!(plan.preempted.is_empty() || plan.admitted.is_empty() && plan.loads.is_empty());
        let mut named: Vec<RequestId> = plan.skipped.iter().map(|note| note.id).collect();
        named.extend(plan.scheduled.iter().map(|part| part.id));
        named.sort_unstable();
        assert!(
            named.is_sorted_by(|one, other| one < other),
            "somebody is told of twice: {:?}",
            plan.skipped
        );
        self.audit_mixed(&plan, &config);
        let encoded: u32 = plan.encode.iter().map(|encode| encode.item.tokens).sum();
        assert!(config.encoder.is_none_or(|limits| encoded <= limits.step_tokens_max));
        for load in &plan.loads {
            self.seen.get_mut(&load.id).unwrap().loading = true;
        }
        for admitted in &plan.admitted {
            let seen = self.seen.get_mut(&admitted.id).unwrap();
            assert_eq!(
                (seen.computed, seen.pending),
                (None, 0),
                "{} is admitted though it runs",
                admitted.id
            );
            assert!(admitted.cached_tokens < admitted.known_tokens);
            assert_eq!(admitted.known_tokens, seen.known);
            seen.computed = Some(admitted.cached_tokens);
        }
        for part in &plan.scheduled {
            self.audit(part, &config);
        }
        let drafted: u32 = plan.scheduled.iter().map(|part| part.drafts + part.padding).sum();
        assert!(drafted == 0 || config.drafts.tokens_max > 0);
        if !plan.is_empty() {
            let parts = plan.scheduled.iter().map(|&part| (part, true)).collect();
            self.flown.push_back((plan.step, parts));
        }
        for (&id, _) in self.seen.iter().filter(|(id, _)| !plan.scheduled.iter().any(|part| part.id == **id))
        {
            let reason = match self.batcher.standing(id).unwrap() {
                Standing::Waiting { reason, .. } | Standing::Running { reason, .. } => reason,
            };
            assert!(reason.is_some(), "{id} gets nothing, and has no reason");
        }
    }

    /// Prompts leave their tokens to those who generate, and have no more than they may beside them.
    fn audit_mixed(&self, plan: &Plan, config: &Config) {
        let Some(prefill) = config.mixed_prefill_tokens_max else { return };
        let generates = |part: &&Scheduled| part.samples && part.tokens - part.drafts - part.padding == 1;
        let running = plan.scheduled.len() - plan.admitted.len();
        if plan.scheduled[..running].iter().any(|part| generates(&part)) {
            let prompts = plan.scheduled.iter().filter(|part| !generates(part));
            assert!(prompts.map(|part| part.tokens).sum::<u32>() <= prefill.get(), "{:?}", plan.scheduled);
        }
        for note in &plan.skipped {
            let seen = &self.seen[&note.id];
            let generates = seen.computed.is_some_and(|computed| computed + 1 == seen.expected());
            let spent = matches!(note.reason, quayline_batching::Reason::StepSpent { .. });
            assert!(!(generates && spent), "{} generates, and prompts have spent its step", note.id);
        }
    }

    fn audit(&mut self, part: &Scheduled, config: &Config) {
        let seen = self.seen.get_mut(&part.id).unwrap();
        let sure = part.tokens - part.drafts - part.padding;
        assert_eq!(Some(part.start), seen.computed, "a token of {} is computed twice or left out", part.id);
        assert!(sure > 0 && part.end() <= config.model_tokens_max);
        assert!(part.start + sure <= seen.expected(), "{} runs ahead of what will be known", part.id);
        assert_eq!(part.samples, part.start + sure == seen.expected());
        assert!(part.samples || part.drafts + part.padding == 0);
        assert!(seen.pending <= config.outputs_ahead);
        seen.computed = Some(part.end());
        seen.pending += u32::from(part.samples);
        seen.drafts += part.drafts + part.padding;
    }

    /// Who lost its room or its life in the plan.
    fn note_losses(&mut self) {
        for preempted in &self.plan.preempted {
            self.seen.get_mut(&preempted.id).unwrap().computed = None;
            for (_, parts) in &mut self.flown {
                parts
                    .iter_mut()
                    .filter(|(part, _)| part.id == preempted.id)
                    .for_each(|(_, runs)| *runs = false);
            }
        }
        let ended: Vec<RequestId> = self.plan.ended.iter().map(|note| note.id).collect();
        ended.into_iter().for_each(|id| self.forget(id));
    }

    fn forget(&mut self, id: RequestId) {
        let Some(seen) = self.seen.remove(&id) else { return };
        if seen.loading {
            self.arriving.push(id);
        }
        self.memory.close(id);
    }

    fn apply(&mut self, newest: bool, accepted: u32, token: u32, backwards: bool) {
        let place = if newest { self.flown.len().saturating_sub(1) } else { 0 };
        let Some((step, parts)) = self.flown.get(place).cloned() else { return };
        let mut sampled = Vec::new();
        let samples = parts.iter().filter(|(part, _)| part.samples);
        for (part, _) in
            samples.filter(|(part, _)| self.seen.contains_key(&part.id) || token.is_multiple_of(2))
        {
            let tokens = 1 + accepted.min(part.drafts);
            let burst = (0..tokens).map(|place| (token + place + part.id.0 as u32) % 8);
            let burst = burst.map(|token| Sampled { id: part.id, token: TokenId(token) });
            let at = if backwards { 0 } else { sampled.len() };
            sampled.splice(at..at, burst);
        }
        let mut finished = Vec::new();
        if self.batcher.apply(step, &sampled, &mut self.memory, &mut finished).is_err() {
            assert!(newest, "the oldest step can always be applied");
            return;
        }
        self.flown.remove(place);
        for (part, runs) in parts {
            self.settle(&part, runs, &sampled, &finished);
        }
        for done in &finished {
            if self.batcher.stats().remaining > 0 {
                self.handed.push(done.id);
            }
            self.forget(done.id);
        }
    }

    fn settle(&mut self, part: &Scheduled, runs: bool, sampled: &[Sampled], finished: &[Finished]) {
        let Some(seen) = self.seen.get_mut(&part.id) else { return };
        if !part.samples {
            return;
        }
        let tokens: Vec<u32> =
            sampled.iter().filter(|output| output.id == part.id).map(|output| output.token.0).collect();
        seen.pending -= 1;
        seen.drafts -= part.drafts + part.padding;
        seen.known += tokens.len() as u32;
        if runs {
            let rejected = part.drafts + part.padding + 1 - tokens.len() as u32;
            seen.computed = seen.computed.map(|computed| computed - rejected);
        }
        if !finished.iter().any(|done| done.id == part.id) {
            tokens.iter().for_each(|&token| self.memory.push(part.id, u64::from(token)));
        }
    }

    fn remove(&mut self, which: usize, cancel: bool) {
        let Some(id) = self.pick(which) else { return };
        let remaining = self.batcher.stats().remaining;
        let how = if cancel { Batcher::cancel } else { Batcher::finish };
        assert!(how(&mut self.batcher, id, &mut self.memory));
        assert!(!how(&mut self.batcher, id, &mut self.memory));
        if self.batcher.stats().remaining > remaining && !self.seen[&id].loading {
            self.handed.push(id);
        }
        self.forget(id);
    }

    /// Tokens of other machines come, all or with a gap.
    fn load(&mut self, gap: Option<u32>) {
        for id in std::mem::take(&mut self.arriving) {
            assert!(self.batcher.loaded(id, &mut self.memory));
        }
        let loading: Vec<RequestId> =
            self.seen.iter().filter(|(_, seen)| seen.loading).map(|(&id, _)| id).collect();
        for id in loading {
            self.seen.get_mut(&id).unwrap().loading = false;
            assert!(match gap {
                Some(tokens) => self.batcher.load_failed(id, tokens, &mut self.memory),
                None => self.batcher.loaded(id, &mut self.memory),
            });
            if self.batcher.standing(id).is_none() {
                self.forget(id);
            }
        }
    }

    fn hand_over(&mut self) {
        for id in std::mem::take(&mut self.handed) {
            self.batcher.handed_over(id, &mut self.memory);
        }
    }

    fn fork(&mut self, which: usize) {
        let Some(parent) = self.pick(which) else { return };
        let child = RequestId(self.next_id);
        self.next_id += 1;
        if self.batcher.fork(parent, child, &mut self.memory).is_err() {
            return;
        }
        self.memory.copy_text(parent, child);
        self.seen.insert(child, self.seen[&parent].clone());
        for (_, parts) in &mut self.flown {
            if let Some(place) = parts.iter().position(|(part, _)| part.id == parent) {
                let (mut part, runs) = parts[place];
                part.id = child;
                parts.insert(place + 1, (part, runs));
            }
        }
    }

    /// The batcher that is restored from a dump decides as the other would have.
    fn restart(&mut self) {
        if self.drained {
            return;
        }
        let restored = Batcher::restore(self.batcher.dump()).unwrap();
        assert!(restored.dump() == self.batcher.dump());
        let mut other = self.clone();
        other.batcher = restored;
        other.drained = true;
        let mut this = Trial { drained: true, ..self.clone() };
        for round in 0..4 {
            for trial in [&mut this, &mut other] {
                trial.step();
                trial.apply(false, round, round, false);
                trial.load(None);
            }
            assert_eq!(this.plan, other.plan);
            assert_eq!(this.batcher.stats(), other.batcher.stats());
        }
        self.batcher = Batcher::restore(self.batcher.dump()).unwrap();
    }

    /// Lets everybody come to its end.
    fn drain(&mut self) {
        self.batcher.set_flow(Flow::Draining);
        for _ in 0..5000 {
            self.act(&Act::Grammars);
            self.act(&Act::Loads { gap: None });
            self.act(&Act::HandOver);
            while !self.flown.is_empty() {
                self.act(&Act::Apply { newest: false, accepted: 1, token: 4, backwards: false });
            }
            let ids: Vec<RequestId> = self.seen.keys().copied().collect();
            ids.iter().for_each(|&id| self.memory.set_remote(id, Remote::Nothing));
            if !self.batcher.has_work() && self.batcher.stats().remaining == 0 {
                break;
            }
            self.act(&Act::Step);
        }
        assert!(!self.batcher.has_work(), "somebody waits for ever: {:?}", self.plan.skipped);
        assert_eq!(self.batcher.stats().remaining, 0);
        assert_eq!(self.memory.free(), self.memory.total(), "the last one out leaves the memory empty");
    }
}

fn at_least_one(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count.max(1)).unwrap()
}

fn orders() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::FirstCome),
        Just(Policy::Priority),
        Just(Policy::Deadline),
        Just(Policy::ShortestJob),
        (0u32..4).prop_map(|lookups_max| Policy::LongestPrefix { lookups_max }),
        (0u32..3, 0u32..3).prop_map(|(input, output)| Policy::Fair(Fair::with_costs(input, output))),
    ]
}

prop_compose! {
    fn drafts()(
        tokens_max in 0u32..5,
        limited in any::<bool>(),
        adaptive in any::<bool>(),
        padding in prop::bool::weighted(0.2),
        slots in prop_oneof![3 => Just(0u32), 1 => 1u32..3],
    ) -> Drafts {
        let limits = if limited { vec![DraftLimit { above_running: 2, tokens_max: 1 }] } else { Vec::new() };
        Drafts { tokens_max, limits, adaptive, padding: padding && tokens_max > 0, slots }
    }
}

fn preemptions() -> impl Strategy<Value = Preemption> {
    let costs = Costs {
        bytes_per_token: 1000,
        bytes_per_second: 2_000_000_000.try_into().unwrap(),
        transfer_nanoseconds: 2000,
        prefill_tokens_per_second: 800_000.try_into().unwrap(),
    };
    prop_oneof![Just(Preemption::Recompute), Just(Preemption::Swap), Just(Preemption::Cheaper(costs))]
}

prop_compose! {
    fn configs()(
        running_max in 1u32..6,
        step_more in 0u32..40,
        prefill in prop_oneof![
            Just(Prefill::Chunked),
            (4u32..12, any::<bool>()).prop_map(|(tokens, adaptive)| {
                Prefill::Capped { tokens_max: at_least_one(tokens), adaptive }
            }),
        ],
        limits in (1u32..5, prop::option::of((4u32..20, 1u32..3)), 1u32..4, prop::option::of(1u32..3)),
        checks in (any::<bool>(), 0u32..12, prop::bool::weighted(0.3)),
        preemption in preemptions(),
        drafts in drafts(),
        ahead in (0u32..3, 1u32..3),
        ends in any::<bool>(),
        encoder in prop::option::of(12u32..30),
        mixed_prefill in prop::option::of(4u32..12),
        times in (prop::option::of(20u64..80), prop::option::of(20u64..80), prop::option::of(5u64..30)),
    ) -> Config {
        let (chunk_multiple, longs, admission_interval, adapters_max) = limits;
        let (whole_sequence_check, watermark_tokens, fenced_frees) = checks;
        Config {
            step_tokens_max: running_max * (1 + drafts.slots) + 4 + step_more,
            running_max,
            prefill,
            mixed_prefill_tokens_max: mixed_prefill.map(at_least_one),
            chunk_multiple: at_least_one(chunk_multiple),
            long_prefills: longs.map(|(above_tokens, running_max)| LongPrefills {
                above_tokens,
                running_max: at_least_one(running_max),
            }),
            admission_interval: at_least_one(admission_interval),
            whole_sequence_check,
            watermark_tokens,
            preemption,
            drafts,
            outputs_ahead: ahead.0,
            micro_batches: at_least_one(ahead.1),
            fenced_frees,
            adapters_max,
            encoder: encoder.map(|tokens| EncoderLimits { step_tokens_max: 12, cache_tokens_max: tokens }),
            failed_loads: if ends { FailedLoads::End } else { FailedLoads::Recompute },
            waiting_ticks_max: times.0,
            running_ticks_max: times.1,
            patience_ticks: times.2,
            handover_ticks_max: times.0,
            ..Config::new(64)
        }
    }
}

prop_compose! {
    fn memories()(
        blocks in 10u32..40,
        block_tokens in 1u32..6,
        caching in any::<bool>(),
        host in 0u32..20,
    ) -> BlockMemory {
        BlockMemory::new(blocks, block_tokens, caching).with_host_blocks(host)
    }
}

prop_compose! {
    fn asked()(
        tokens in (0u32..24, 1u32..24, 1u32..24),
        eos in any::<bool>(),
        priority in -2i32..3,
        tenant in 0u64..3,
        adapter in prop::option::weighted(0.3, 0u64..4),
        flags in (prop::bool::weighted(0.1), prop::bool::weighted(0.1), prop::bool::weighted(0.2)),
        remote in prop_oneof![
            6 => Just(Remote::Nothing),
            1 => (1u32..40).prop_map(|tokens| Remote::Now { tokens }),
            1 => (1u32..40).prop_map(|tokens| Remote::Later { tokens }),
            1 => Just(Remote::Unknown),
        ],
        item in prop::option::weighted(0.3, (0u64..5, 1u32..12)),
    ) -> Act {
        Act::Add(Box::new(Asked {
            shared: tokens.0,
            own: tokens.1,
            new_tokens: tokens.2,
            eos,
            priority,
            tenant,
            adapter,
            compiling: flags.0,
            hands_over: flags.1,
            sibling: flags.2,
            remote,
            item,
        }))
    }
}

fn acts() -> impl Strategy<Value = Act> {
    let flow = prop_oneof![3 => Just(Flow::Open), 1 => Just(Flow::Holding), 1 => Just(Flow::Stopped)];
    prop_oneof![
        8 => asked(),
        16 => Just(Act::Step),
        12 => (prop::bool::weighted(0.2), 0u32..5, 0u32..8, prop::bool::weighted(0.2)).prop_map(
            |(newest, accepted, token, backwards)| Act::Apply { newest, accepted, token, backwards }),
        5 => (any::<usize>(), 0u32..6).prop_map(|(which, drafts)| Act::Propose { which, drafts }),
        1 => any::<usize>().prop_map(|which| Act::Cancel { which }),
        1 => any::<usize>().prop_map(|which| Act::Finish { which }),
        1 => Just(Act::Grammars),
        2 => prop::option::weighted(0.3, 0u32..40).prop_map(|gap| Act::Loads { gap }),
        1 => Just(Act::HandOver),
        2 => any::<usize>().prop_map(|which| Act::Fork { which }),
        1 => flow.prop_map(Act::Flow),
        1 => prop::bool::weighted(0.3).prop_map(|sleep| if sleep { Act::Sleep } else { Act::Step }),
        2 => (1u64..8).prop_map(|ticks| Act::Later { ticks }),
        1 => Just(Act::Restart),
    ]
}

/// The same cases on every machine; what fails is cut down before it is printed. `QUAYLINE_ORACLE_CASES` makes more of
/// them, `QUAYLINE_ORACLE_SEED` others.
fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: u32::try_from(asked_for("QUAYLINE_ORACLE_CASES", 120)).unwrap(),
        rng_seed: RngSeed::Fixed(asked_for("QUAYLINE_ORACLE_SEED", 0x5eed)),
        failure_persistence: None,
        max_shrink_iters: 100_000,
        ..ProptestConfig::default()
    }
}

#[expect(clippy::disallowed_methods, reason = "a test may be asked by its environment to run longer")]
fn asked_for(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |number| number.parse().unwrap())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn the_rules_hold_whatever_happens(
        config in configs(),
        order in orders(),
        memory in memories(),
        acts in prop::collection::vec(acts(), 1..150),
    ) {
        let mut trial = Trial::new(config, order, memory);
        for act in &acts {
            trial.act(act);
        }
        trial.drain();
    }
}

//! A trace through the real batcher and the real cache, in simulated time.
//!
//! The loop is an engine's: take in who has arrived, plan a step, start it when the one before ends, and hand
//! its tokens back when it ends itself. With `outputs_ahead` it plans one step while another runs, so that the
//! host's work is hidden and the news of a step come one step later. The time that a step takes is the cost
//! model's; nothing else is modelled.

use std::collections::VecDeque;

use quayline_batching::{
    self as batching, Batcher, Finished, Plan, Policy, Request, RequestId, Sampled, StepId, StopRules,
    Targets, TenantId, Tick, TokenId,
};
use quayline_kv_cache::{self as kv_cache, BlockCount, BlockSize, KvCache, Reuse, SequenceKey};

use crate::adapt::{OPEN, PagedMemory, sequence};
use crate::cost::{Cost, StepShape};
use crate::fairness::{Fairness, OUTPUT_COST, Verdict};
use crate::prompts::Prompts;
use crate::trace::{Arrival, BLOCK_TOKENS};

/// The engine that is simulated.
#[derive(Clone, Debug)]
pub struct Engine {
    /// The limits of a step.
    pub batching: batching::Config,
    /// Tokens of a block of the cache.
    pub block_tokens: u32,
    /// Blocks of the cache.
    pub blocks: u32,
    /// Whether equal prefixes are shared.
    pub prefix_caching: bool,
    /// When answers are due, for the order that looks at it.
    pub targets: Targets,
    /// How long steps take.
    pub cost: Cost,
}

/// What became of a request. Times are seconds since the trace began.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Served {
    /// Whose it is.
    pub tenant: u32,
    /// When it came.
    pub arrived: f64,
    /// When the engine took it in: an engine looks at its door between steps.
    pub queued: f64,
    /// When its first token was there.
    pub first: f64,
    /// When its last token was there.
    pub last: f64,
    /// How many tokens it got; none when it was refused.
    pub tokens: u32,
    /// How often it was preempted.
    pub preemptions: u32,
}

impl Served {
    /// Seconds from a token to the next. `None` for an answer of one token.
    pub fn per_token(&self) -> Option<f64> {
        (self.tokens > 1).then(|| (self.last - self.first) / f64::from(self.tokens - 1))
    }
}

/// What became of a trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// One for each request, as they came.
    pub requests: Vec<Served>,
    /// Seconds between neighbouring tokens, over all requests.
    pub gaps: Vec<f32>,
    /// Seconds from the first arrival to the last token.
    pub seconds: f64,
    /// Steps that computed something.
    pub steps: u64,
    /// Tokens that these computed, some of them more than once.
    pub computed_tokens: u64,
    /// How often a request lost its room.
    pub preemptions: u64,
    /// Tokens of the prompts when they were admitted, and those of them that the cache had.
    pub prompt_tokens: u64,
    /// See [`prompt_tokens`](Report::prompt_tokens).
    pub hit_tokens: u64,
    /// How tenants fared against one another.
    pub fairness: Verdict,
}

/// Plays a trace; `tenants` says whose each request is.
///
/// # Errors
/// When the engine's settings contradict each other.
///
/// # Panics
/// When batcher and cache disagree, or requests are left that nobody serves: a bug of ours.
pub fn serve(
    engine: &Engine,
    order: Policy,
    arrivals: &[Arrival],
    tenants: &[u32],
) -> Result<Report, String> {
    assert_eq!(arrivals.len(), tenants.len(), "each request is somebody's");
    let mut run = Run::new(engine, order, arrivals, tenants)?;
    let ahead = engine.batching.outputs_ahead as usize;
    loop {
        run.take_in();
        let planned = run.plan();
        if run.flights.len() > ahead || (!planned && !run.flights.is_empty()) {
            run.land();
        } else if !planned {
            let Some(next) = run.arrivals.get(run.next) else { break };
            run.now = run.now.max(ticks(next));
        }
    }
    assert!(!run.batcher.has_work(), "requests are left, and no step serves them");
    Ok(run.report())
}

/// A step that runs, or waits for the one before.
#[derive(Debug, Default)]
struct Flight {
    step: StepId,
    ends: u64,
    sampled: Vec<Sampled>,
}

struct Run<'a> {
    engine: &'a Engine,
    arrivals: &'a [Arrival],
    prompts: Option<Prompts>,
    batcher: Batcher,
    memory: PagedMemory,
    now: u64,
    /// When the last step that was planned ends.
    busy_until: u64,
    /// The first that has not arrived.
    next: usize,
    plan: Plan,
    flights: VecDeque<Flight>,
    /// Flights that have landed, for their buffers.
    landed: Vec<Flight>,
    finished: Vec<Finished>,
    prompt: Vec<kv_cache::TokenId>,
    /// By request: its first so many tokens have been computed once, and its tenant was charged for them.
    charged: Vec<u32>,
    waiting: Vec<u32>,
    fairness: Fairness,
    report: Report,
}

impl<'a> Run<'a> {
    fn new(
        engine: &'a Engine,
        order: Policy,
        arrivals: &'a [Arrival],
        tenants: &[u32],
    ) -> Result<Run<'a>, String> {
        let tokens = |arrival: &Arrival| arrival.prompt_tokens.max(1) + arrival.output_tokens.max(1);
        let longest = arrivals.iter().map(tokens).max().unwrap_or(2);
        let limits = &engine.batching;
        let limits =
            batching::Config { model_tokens_max: limits.model_tokens_max.max(longest + 1), ..limits.clone() };
        let size = BlockSize::new(engine.block_tokens).map_err(|error| error.to_string())?;
        let config = kv_cache::Config {
            prefix_caching: engine.prefix_caching,
            // One more: the null block.
            ..kv_cache::Config::new(size, BlockCount(engine.blocks.saturating_add(1)))
        };
        let cache = KvCache::new(config).map_err(|error| error.to_string())?;
        let of = |(arrival, &tenant): (&Arrival, &u32)| Served {
            tenant,
            arrived: arrival.at.as_secs_f64(),
            ..Served::default()
        };
        let tenant_count = tenants.iter().max().map_or(0, |&last| last as usize + 1);
        Ok(Run {
            engine,
            arrivals,
            prompts: Prompts::of(arrivals).ok(),
            batcher: Batcher::with_order(limits, order).map_err(|error| error.to_string())?,
            memory: PagedMemory { cache },
            now: 0,
            busy_until: 0,
            next: 0,
            plan: Plan::new(),
            flights: VecDeque::new(),
            landed: Vec::new(),
            finished: Vec::new(),
            prompt: Vec::new(),
            charged: vec![0; arrivals.len()],
            waiting: vec![0; tenant_count],
            fairness: Fairness::new(tenant_count),
            report: Report { requests: arrivals.iter().zip(tenants).map(of).collect(), ..Report::default() },
        })
    }

    /// Takes in who has arrived by now.
    fn take_in(&mut self) {
        while let Some(arrival) = self.arrivals.get(self.next).filter(|arrival| ticks(arrival) <= self.now) {
            let (index, id) = (self.next, request_id(self.next));
            self.next += 1;
            self.write_prompt(index);
            let output_tokens = arrival.output_tokens.max(1);
            let tenant = self.report.requests[index].tenant;
            let request = Request {
                arrival: Tick(ticks(arrival)),
                priority: i32::try_from(tenant).unwrap_or(i32::MAX),
                tenant: TenantId(tenant.into()),
                targets: Some(self.engine.targets),
                expected_new_tokens: Some(output_tokens),
                ..Request::new(id, arrival.prompt_tokens.max(1), StopRules::after(output_tokens))
            };
            self.report.requests[index].queued = seconds(self.now);
            self.batcher.add(request).expect("the longest request is within the model's maximum");
            let opened =
                self.memory.cache.open(sequence(id), SequenceKey::default(), &self.prompt, Reuse::ReadWrite);
            opened.expect("the id is new");
            self.waiting[tenant as usize] += 1;
        }
    }

    /// Tokens that are equal where the trace's blocks are, and nobody else's where it names none.
    fn write_prompt(&mut self, index: usize) {
        let blocks = self.prompts.as_ref().and_then(|prompts| prompts.iter().nth(index));
        let blocks = blocks.map_or(&[][..], |prompt| &prompt.blocks);
        let length = self.arrivals[index].prompt_tokens.max(1) as usize;
        self.prompt.clear();
        for &block in blocks {
            self.prompt.extend([block; BLOCK_TOKENS as usize]);
        }
        self.prompt.resize(length, own_token(index));
    }

    /// Plans a step and lets it run. False when there is nothing to compute.
    fn plan(&mut self) -> bool {
        self.batcher.step(Tick(self.now), &mut self.memory, &mut self.plan);
        self.note();
        if self.plan.is_empty() {
            return false;
        }
        let mut flight = self.landed.pop().unwrap_or_default();
        flight.sampled.clear();
        flight.step = self.plan.step;
        let mut shape = StepShape::default();
        for part in &self.plan.scheduled {
            shape.add(part.start, part.tokens, part.samples);
            let index = index(part.id);
            let charged = &mut self.charged[index];
            let prompt_tokens = self.arrivals[index].prompt_tokens;
            let new_tokens = part.end().min(prompt_tokens).saturating_sub(part.start.max(*charged));
            *charged = (*charged).max(part.end());
            let output_cost = if part.samples { OUTPUT_COST } else { 0.0 };
            let tenant = self.report.requests[index].tenant;
            self.fairness.serve(tenant, f64::from(new_tokens) + output_cost);
            if part.samples {
                let token = own_token(index);
                // What will be sampled is known, so that the cache need not wait for it.
                self.memory.cache.push(sequence(part.id), &[token]).expect(OPEN);
                flight.sampled.push(Sampled { id: part.id, token: TokenId(token) });
            }
        }
        self.busy_until = self.busy_until.max(self.now) + ticks_of(self.engine.cost.seconds(&shape));
        flight.ends = self.busy_until;
        self.flights.push_back(flight);
        self.fairness.step(self.now, &self.waiting);
        self.report.steps += 1;
        self.report.computed_tokens += u64::from(self.plan.tokens);
        true
    }

    /// Books who started, who was preempted and who ended without computing.
    fn note(&mut self) {
        for admitted in &self.plan.admitted {
            let served = &self.report.requests[index(admitted.id)];
            self.waiting[served.tenant as usize] -= 1;
        }
        for preempted in &self.plan.preempted {
            let served = &mut self.report.requests[index(preempted.id)];
            served.preemptions += 1;
            self.waiting[served.tenant as usize] += 1;
            self.report.preemptions += 1;
        }
        for ended in &self.plan.ended {
            let tenant = self.report.requests[index(ended.id)].tenant;
            self.waiting[tenant as usize] -= 1;
            self.memory.cache.close(sequence(ended.id)).expect(OPEN);
        }
    }

    /// Waits for the oldest step, and hands its tokens back.
    fn land(&mut self) {
        let flight = self.flights.pop_front().expect("a step is on its way");
        self.now = self.now.max(flight.ends);
        let now = seconds(self.now);
        for sampled in &flight.sampled {
            let served = &mut self.report.requests[index(sampled.id)];
            if served.tokens == 0 {
                served.first = now;
            } else {
                #[expect(clippy::cast_possible_truncation, reason = "seven digits are enough for a gap")]
                self.report.gaps.push((now - served.last) as f32);
            }
            served.last = now;
            served.tokens += 1;
        }
        let applied = self.batcher.apply(flight.step, &flight.sampled, &mut self.memory, &mut self.finished);
        applied.expect("each sampled token was planned");
        for finished in &self.finished {
            self.memory.cache.close(sequence(finished.id)).expect(OPEN);
        }
        self.landed.push(flight);
    }

    fn report(mut self) -> Report {
        let hits = self.memory.cache.stats().first;
        self.report.prompt_tokens = hits.tokens;
        self.report.hit_tokens = hits.hit_tokens;
        self.report.seconds = seconds(self.now);
        self.report.fairness = self.fairness.verdict();
        self.report
    }
}

/// A token of a request that no other request has: block numbers are below.
fn own_token(index: usize) -> u32 {
    (1 << 31) | u32::try_from(index).expect("fewer than 2^31 requests")
}

fn request_id(index: usize) -> RequestId {
    RequestId(index as u64)
}

fn index(id: RequestId) -> usize {
    usize::try_from(id.0).expect("an index")
}

/// Ticks are nanoseconds since the trace began.
fn ticks(arrival: &Arrival) -> u64 {
    u64::try_from(arrival.at.as_nanos()).unwrap_or(u64::MAX)
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / 1e9
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time, at most centuries")]
fn ticks_of(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

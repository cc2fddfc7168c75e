//! The batch former: steady decode of N requests with prompts of 128 tokens, the case of vLLM's and
//! nano-vllm's schedulers. Once over memory without end (the batch former alone), once over the paged cache
//! (what the peers' schedulers include). Then a request that comes, and a long queue in fair order.
#![expect(clippy::unwrap_used, reason = "a bench whose setup fails has no figure")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quayline_batching::{
    Batcher, Config, Memory, Need, Plan, Policy, Request, RequestId, Room, Sampled, StopRules, TenantId,
    Tick, TokenId,
};
use quayline_benches::beside::beside;
use quayline_benches::random::Random;
use quayline_kv_cache::{
    Admission, BlockCount, BlockSize, Claim, KvCache, Reuse, SequenceId, SequenceKey, TokenCount,
};

const PROMPT: u32 = 128;
/// Blocks of 16 tokens: four times as many as vLLM had, for four times its requests.
const BLOCKS: u32 = 160_000;

/// Steps before the requests start over: until the pool, or the longest request, is nearly full.
fn steps_max(requests: u32) -> u32 {
    (BLOCKS / requests * 16).min(2000) - PROMPT - 64
}

/// Room without end, where nothing is cached.
struct Endless;

impl Memory for Endless {
    fn cached_tokens(&mut self, _: RequestId) -> u32 {
        0
    }
    fn allocate(&mut self, _: RequestId, need: Need) -> Room {
        Room::Granted { covered_tokens: need.held_tokens() }
    }
    fn withdraw(&mut self, _: RequestId) {}
    fn release(&mut self, _: RequestId) {}
}

/// The paged cache as the batch former's memory.
struct Paged(KvCache);

impl Memory for Paged {
    fn cached_tokens(&mut self, id: RequestId) -> u32 {
        self.0.lookup(SequenceId(id.0)).unwrap().tokens.get()
    }
    fn allocate(&mut self, id: RequestId, need: Need) -> Room {
        let claim = Claim {
            computed: TokenCount(need.computed_tokens),
            new_tokens: TokenCount(need.new_tokens),
            whole_sequence: need.whole_tokens.is_some(),
            ..Claim::default()
        };
        match self.0.reserve(SequenceId(id.0), claim).unwrap() {
            Admission::Admit(reservation) => {
                Room::Granted { covered_tokens: reservation.commit().covered.get() }
            }
            Admission::Wait { need, free, .. } => Room::Short { need: need.get(), free: free.get() },
            Admission::Never { need, blocks } => Room::Never { need: need.get(), total: blocks.get() },
            Admission::OverLimit(_) => unreachable!("there are no quotas"),
            Admission::NextStep => unreachable!("there is no group with a state"),
        }
    }
    fn withdraw(&mut self, id: RequestId) {
        self.0.withdraw(SequenceId(id.0)).unwrap();
    }
    fn release(&mut self, id: RequestId) {
        self.0.release(SequenceId(id.0)).unwrap();
    }
}

impl Paged {
    fn of(blocks: u32) -> Self {
        let config = quayline_kv_cache::Config::new(BlockSize::new(16).unwrap(), BlockCount(blocks + 1));
        Self(KvCache::new(config).unwrap())
    }
}

/// What a memory must hear besides: prompts, and tokens that became known.
trait Known: Memory {
    fn new() -> Self;
    fn open(&mut self, id: RequestId, prompt: &[u32]);
    fn push(&mut self, sampled: &[Sampled]);
}

impl Known for Endless {
    fn new() -> Self {
        Self
    }
    fn open(&mut self, _: RequestId, _: &[u32]) {}
    fn push(&mut self, _: &[Sampled]) {}
}

impl Known for Paged {
    fn new() -> Self {
        Self::of(BLOCKS)
    }
    fn open(&mut self, id: RequestId, prompt: &[u32]) {
        self.0.open(SequenceId(id.0), SequenceKey::default(), prompt, Reuse::ReadWrite).unwrap();
    }
    fn push(&mut self, sampled: &[Sampled]) {
        for one in sampled {
            self.0.push(SequenceId(one.id.0), &[one.token.0]).unwrap();
        }
    }
}

/// A batch former with N requests that all generate.
struct Decoding<M> {
    batcher: Batcher,
    memory: M,
    plan: Plan,
    sampled: Vec<Sampled>,
    finished: Vec<quayline_batching::Finished>,
    now: u64,
}

impl<M: Known> Decoding<M> {
    fn new(requests: u32) -> Self {
        let config = Config { step_tokens_max: 8192, running_max: requests, ..Config::new(2048) };
        let mut batcher = Batcher::new(config).unwrap();
        let mut memory = M::new();
        let mut random = Random::new(5, u64::from(requests));
        for id in 0..u64::from(requests) {
            let prompt: Vec<u32> =
                (0..PROMPT).map(|_| u32::try_from(random.below(32_000)).unwrap()).collect();
            memory.open(RequestId(id), &prompt);
            let stop = StopRules::after(2000 - PROMPT);
            batcher.add(Request::new(RequestId(id), PROMPT, stop)).unwrap();
        }
        let mut decoding =
            Self { batcher, memory, plan: Plan::new(), sampled: Vec::new(), finished: Vec::new(), now: 0 };
        while decoding.plan.scheduled.len() < requests as usize || decoding.plan.tokens > requests {
            decoding.step();
        }
        for _ in 0..16 {
            decoding.step();
        }
        decoding
    }

    fn step(&mut self) {
        self.now += 1;
        self.batcher.step(Tick(self.now), &mut self.memory, &mut self.plan);
        self.sampled.clear();
        let who = self.plan.scheduled.iter().filter(|scheduled| scheduled.samples);
        self.sampled.extend(who.map(|scheduled| Sampled { id: scheduled.id, token: TokenId(11) }));
        self.memory.push(&self.sampled);
        let sampled = black_box(&self.sampled);
        self.batcher.apply(self.plan.step, sampled, &mut self.memory, &mut self.finished).unwrap();
    }
}

/// Time of so many steps.
fn steps<M: Known>(requests: u32, iterations: u64) -> Duration {
    let mut spent = Duration::ZERO;
    let steps_max = steps_max(requests);
    for first in (0..iterations).step_by(steps_max as usize) {
        let mut decoding = Decoding::<M>::new(requests);
        let start = Instant::now();
        for _ in 0..(iterations - first).min(u64::from(steps_max)) {
            decoding.step();
        }
        spent += start.elapsed();
        assert_eq!((decoding.plan.scheduled.len(), decoding.plan.tokens), (requests as usize, requests));
        assert!(decoding.finished.is_empty());
    }
    spent
}

fn decode(criterion: &mut Criterion) {
    beside(
        "batching/step/*",
        "two cache lines per request and step, about 10 ns",
        "per request and step, with its cache manager: vLLM 13.4 us at 256 and 43 us at 1, nano-vllm 0.64 us at 256",
    );
    for (memory, run) in
        [("step", steps::<Endless> as fn(u32, u64) -> Duration), ("step-paged", steps::<Paged>)]
    {
        let mut group = criterion.benchmark_group(format!("batching/{memory}"));
        for requests in [1, 64, 256, 1024, 4096] {
            group.throughput(Throughput::Elements(u64::from(requests)));
            group.bench_function(format!("decode-{requests}"), |bencher| {
                bencher.iter_custom(|iterations| run(requests, iterations));
            });
        }
        group.finish();
    }
}

/// Whole steps, one by one: what the slowest of a hundred takes.
#[expect(clippy::print_stdout, reason = "a bench prints")]
fn slowest(_: &mut Criterion) {
    for (memory, step) in [("step", whole_steps::<Endless>()), ("step-paged", whole_steps::<Paged>())] {
        let at = |part: usize| step[(step.len() - 1) * part / 1000];
        println!(
            "batching/{memory}/decode-1024: median {:?}, p99 {:?}, p99.9 {:?} a step (goal: 50 us, p99 100 us; vLLM 20 ms)",
            at(500),
            at(990),
            at(999)
        );
    }
}

/// Times of steps in which 1024 requests generate, in order.
fn whole_steps<M: Known>() -> Vec<Duration> {
    let mut decoding = Decoding::<M>::new(1024);
    let mut times: Vec<Duration> = (0..1800)
        .map(|_| {
            let start = Instant::now();
            decoding.step();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times
}

/// A request of 512 tokens comes, is hashed, looked up and admitted, and goes again; over the paged cache. Once while
/// the pool has blocks that nothing was ever in, and once when each of its 32 blocks must be taken from another prompt.
/// In a pool as a GPU of 80 GB has it beside a model of 8 B, and in one that no processor's cache holds.
fn admit(criterion: &mut Criterion) {
    beside(
        "batching/admit/* (goal 2 us)",
        "32 hashes of 16 tokens, 10 ns each with xxh3; 32 lines of the index written, 64 if something is evicted",
        "vLLM 200-260 us for add and first schedule",
    );
    let mut group = criterion.benchmark_group("batching/admit");
    for blocks in [20_000, BLOCKS] {
        let fills_the_pool = u64::from(blocks / 32);
        for (name, before) in [("fresh", 0), ("evicting", fills_the_pool)] {
            group.bench_function(format!("512-tokens/{blocks}-blocks-{name}"), |bencher| {
                bencher.iter_custom(|iterations| {
                    let (mut spent, mut left) = (Duration::ZERO, iterations);
                    while left > 0 {
                        let mut prompts = Prompts::new(blocks);
                        (0..before).for_each(|_| _ = prompts.admit());
                        let fresh = left.min(fills_the_pool);
                        spent += (0..fresh).map(|_| prompts.admit()).sum::<Duration>();
                        assert_eq!(
                            prompts.memory.0.stats().evictions,
                            if before > 0 { 32 * fresh } else { 0 }
                        );
                        left -= fresh;
                    }
                    spent
                });
            });
        }
    }
    group.finish();
}

/// Prompts that come one after the other, each another one.
struct Prompts {
    batcher: Batcher,
    memory: Paged,
    plan: Plan,
    prompt: Vec<u32>,
    id: u64,
}

impl Prompts {
    fn new(blocks: u32) -> Self {
        let mut random = Random::new(5, 512);
        Prompts {
            batcher: Batcher::new(Config::new(2048)).unwrap(),
            memory: Paged::of(blocks),
            plan: Plan::new(),
            prompt: (0..512).map(|_| u32::try_from(random.below(32_000)).unwrap()).collect(),
            id: 0,
        }
    }

    /// The time from a request's arrival to the plan that it is in.
    fn admit(&mut self) -> Duration {
        let Prompts { batcher, memory, plan, prompt, id } = self;
        *id += 1;
        prompt[0] = u32::try_from(*id).unwrap();
        let request = Request::new(RequestId(*id), 512, StopRules::after(16));
        let start = Instant::now();
        memory.open(request.id, prompt);
        batcher.add(request).unwrap();
        batcher.step(Tick(*id), memory, plan);
        let spent = start.elapsed();
        assert_eq!(plan.tokens, 512);
        assert!(batcher.cancel(RequestId(*id), memory));
        memory.0.close(SequenceId(*id)).unwrap();
        batcher.apply(plan.step, &[], memory, &mut Vec::new()).unwrap();
        spent
    }
}

/// 100,000 requests of so many tenants wait, and in every step one ends and one is admitted.
fn fair(criterion: &mut Criterion) {
    beside("batching/fair/*", "two heap operations, a few cache misses", "none has a fair order");
    let mut group = criterion.benchmark_group("batching/fair");
    for tenants in [10, 1000, 100_000] {
        group.bench_function(format!("waiting-100k-tenants-{tenants}"), |bencher| {
            let config = Config { running_max: 8, ..Config::new(2048) };
            let mut batcher = Batcher::with_order(config, Policy::fair()).unwrap();
            let (mut plan, mut finished) = (Plan::new(), Vec::new());
            let mut next = 0;
            let mut add = |batcher: &mut Batcher| {
                next += 1;
                let stop = StopRules::after(1 + u32::try_from(next % 8).unwrap());
                let request = Request::new(RequestId(next), 16, stop);
                batcher.add(Request { tenant: TenantId(next * 7919 % tenants), ..request }).unwrap();
            };
            (0..100_000).for_each(|_| add(&mut batcher));
            bencher.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for now in 0..iterations {
                    let start = Instant::now();
                    batcher.step(Tick(now), &mut Endless, &mut plan);
                    spent += start.elapsed();
                    let who = plan.scheduled.iter().filter(|scheduled| scheduled.samples);
                    let sampled: Vec<Sampled> =
                        who.map(|scheduled| Sampled { id: scheduled.id, token: TokenId(11) }).collect();
                    batcher.apply(plan.step, &sampled, &mut Endless, &mut finished).unwrap();
                    finished.iter().for_each(|_| add(&mut batcher));
                }
                assert!(batcher.stats().waiting > 99_000);
                spent
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decode, slowest, admit, fair);
criterion_main!(benches);

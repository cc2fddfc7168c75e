//! The batch former: steady decode of N requests with prompts of 128 tokens, the case of vLLM's and
//! nano-vllm's schedulers. Once over memory without end (the batch former alone), once over the paged cache
//! (what the peers' schedulers include).
#![expect(clippy::unwrap_used, reason = "a bench whose setup fails has no figure")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quayline_batching::{
    Batcher, Config, Memory, Need, Plan, Request, RequestId, Room, Sampled, StopRules, Tick, TokenId,
};
use quayline_benches::beside::beside;
use quayline_benches::random::Random;
use quayline_kv_cache::{
    Admission, BlockCount, BlockSize, Claim, KvCache, Reuse, SequenceId, SequenceKey, TokenCount,
};

const PROMPT: u32 = 128;
/// Blocks of 16 tokens, as many as vLLM had.
const BLOCKS: u32 = 40_000;

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
        let config = quayline_kv_cache::Config::new(BlockSize::new(16).unwrap(), BlockCount(BLOCKS + 1));
        Self(KvCache::new(config).unwrap())
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
        for requests in [1, 64, 256, 1024] {
            group.throughput(Throughput::Elements(u64::from(requests)));
            group.bench_function(format!("decode-{requests}"), |bencher| {
                bencher.iter_custom(|iterations| run(requests, iterations));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);

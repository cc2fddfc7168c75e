//! Who may wait for ever. More requests come than can be served, each of them one that the order likes better
//! than one that came before them. First come, deadline and fair let that one come to its end all the same;
//! the other orders do not, unless `Config::patience_ticks` is set, and then every order does.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use quayline_batching::scenario::BlockMemory;
use quayline_batching::{
    AdapterId, Batcher, Config, Finished, Plan, Policy, Request, RequestId, Sampled, StopRules, Targets,
    TenantId, Tick, TokenId,
};

const UNLOVED: RequestId = RequestId(u64::MAX);
const COMES_AT: u64 = 50;

/// Random numbers below a bound, the same for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(bound)) as u32
    }
}

struct Stream {
    batcher: Batcher,
    memory: BlockMemory,
    dice: Dice,
    plan: Plan,
    next: u64,
}

impl Stream {
    /// Places for three, and room for two of them when they are long. What is computed is lost with the room,
    /// unless the order is about just that.
    fn new(order: Policy, patience_ticks: Option<u64>, seed: u64) -> Stream {
        let caching = matches!(order, Policy::LongestPrefix { .. });
        let config = Config { step_tokens_max: 8, running_max: 3, patience_ticks, ..Config::new(64) };
        Stream {
            batcher: Batcher::with_order(config, order).unwrap(),
            memory: BlockMemory::new(12, 4, caching),
            dice: Dice(seed),
            plan: Plan::new(),
            next: 0,
        }
    }

    /// Short and urgent, due soon, of one of three tenants, with the prompt of all others.
    fn add_favourite(&mut self, now: u64) {
        let (prompt_tokens, new_tokens) = (8 + self.dice.below(8), 1 + self.dice.below(6));
        let targets = Targets { first_token_ticks: 1 + u64::from(self.dice.below(5)), token_ticks: 1 };
        let request = Request {
            arrival: Tick(now),
            tenant: TenantId(self.dice.below(3).into()),
            expected_new_tokens: Some(new_tokens),
            targets: Some(targets),
            ..Request::new(RequestId(self.next), prompt_tokens, StopRules::after(new_tokens))
        };
        self.next += 1;
        self.memory.open(request.id, (0..u64::from(prompt_tokens)).collect());
        self.batcher.add(request).unwrap();
    }

    /// Long, of low priority, due late, with a prompt that nobody else has.
    fn add_unloved(&mut self, now: u64) {
        let request = Request {
            arrival: Tick(now),
            priority: i32::MAX,
            tenant: TenantId(9),
            expected_new_tokens: Some(u32::MAX),
            targets: Some(Targets { first_token_ticks: 60, token_ticks: 2 }),
            ..Request::new(UNLOVED, 24, StopRules::after(16))
        };
        self.memory.open(UNLOVED, (1000..1024).collect());
        self.batcher.add(request).unwrap();
    }

    fn step(&mut self, now: u64) -> Vec<Finished> {
        self.batcher.step(Tick(now), &mut self.memory, &mut self.plan);
        let samples = self.plan.scheduled.iter().filter(|part| part.samples);
        let sampled: Vec<Sampled> = samples.map(|part| Sampled { id: part.id, token: TokenId(0) }).collect();
        let mut finished = Vec::new();
        self.batcher.apply(self.plan.step, &sampled, &mut self.memory, &mut finished).unwrap();
        for output in sampled.iter().filter(|output| self.batcher.standing(output.id).is_some()) {
            self.memory.push(output.id, now << 32 | output.id.0);
        }
        finished.iter().for_each(|done| self.memory.close(done.id));
        finished
    }

    /// When the unloved one ends, and how often somebody was preempted until then; `None` if it does not end.
    fn unloved_ends(mut self, ticks: u64) -> Option<(u64, u64)> {
        for now in 0..ticks {
            if now == COMES_AT {
                self.add_unloved(now);
            }
            self.add_favourite(now);
            if self.dice.below(2) == 0 {
                self.add_favourite(now);
            }
            if self.step(now).iter().any(|done| done.id == UNLOVED) {
                return Some((now, self.batcher.stats().counts.preemptions));
            }
        }
        None
    }
}

fn check(order: &Policy, patience_ticks: Option<u64>, ends: bool) {
    let mut preemptions = 0;
    for seed in 0..8 {
        let ended = Stream::new(order.clone(), patience_ticks, seed).unloved_ends(1000);
        assert_eq!(ended.is_some(), ends, "{order:?}, patience {patience_ticks:?}, seed {seed}: {ended:?}");
        preemptions += ended.map_or(0, |(_, preemptions)| preemptions);
    }
    assert!(!ends || preemptions > 0, "{order:?}: nobody was preempted, so this shows little");
}

#[test]
fn first_come_deadline_and_fair_starve_nobody() {
    for order in [Policy::FirstCome, Policy::Deadline, Policy::fair()] {
        check(&order, None, true);
    }
}

#[test]
fn the_other_orders_do() {
    for order in [Policy::Priority, Policy::ShortestJob, Policy::LongestPrefix { lookups_max: 4 }] {
        check(&order, None, false);
    }
}

/// The unloved one is not only admitted, it also keeps its room: otherwise it would be pushed out again and
/// again by those whom the order likes better.
#[test]
fn with_patience_no_order_does() {
    let orders = [
        Policy::FirstCome,
        Policy::Priority,
        Policy::Deadline,
        Policy::ShortestJob,
        Policy::LongestPrefix { lookups_max: 4 },
        Policy::fair(),
    ];
    for order in orders {
        check(&order, Some(40), true);
    }
}

/// Requests with the two adapters that are loaded keep coming, and one needs a third. When it ends, if it does.
fn third_adapter_ends(patience_ticks: Option<u64>, seed: u64) -> Option<u64> {
    let mut stream = Stream::new(Policy::FirstCome, None, seed);
    let config = Config {
        step_tokens_max: 96,
        running_max: 24,
        adapters_max: Some(2),
        patience_ticks,
        ..Config::new(64)
    };
    stream.batcher = Batcher::new(config).unwrap();
    stream.memory = BlockMemory::new(200, 4, false);
    for now in 0..400 {
        for adapter in [0, 1, 0, 1, 0, 1, 0, 1] {
            let new_tokens = 1 + stream.dice.below(6);
            let request = Request {
                arrival: Tick(now),
                adapter: Some(AdapterId(adapter)),
                ..Request::new(RequestId(stream.next), 4, StopRules::after(new_tokens))
            };
            stream.next += 1;
            stream.memory.open(request.id, vec![0; 4]);
            stream.batcher.add(request).unwrap();
        }
        if now == COMES_AT {
            let request = Request {
                arrival: Tick(now),
                adapter: Some(AdapterId(9)),
                ..Request::new(UNLOVED, 4, StopRules::after(4))
            };
            stream.memory.open(UNLOVED, (1000..1004).collect());
            stream.batcher.add(request).unwrap();
        }
        if stream.step(now).iter().any(|done| done.id == UNLOVED) {
            return Some(now);
        }
        stream.batcher.check().unwrap();
    }
    None
}

/// It has its place when the last request with one of the others has ended: 6 tokens, and its own 4.
#[test]
fn patience_ends_the_wait_for_an_adapter() {
    for seed in 0..8 {
        assert_eq!(third_adapter_ends(None, seed), None, "seed {seed}");
        let ended = third_adapter_ends(Some(40), seed);
        let latest = COMES_AT + 40 + 1 + 6 + 4;
        assert!(ended.is_some_and(|ended| ended <= latest), "seed {seed}: {ended:?}, {latest} at the latest");
    }
}

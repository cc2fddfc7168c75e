//! The bound of *Fairness in Serving Large Language Models* (Sheng et al., OSDI 2024): whoever has requests
//! waiting all the time is served the same as any other such tenant, up to a constant that does not grow
//! with time.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(clippy::cast_possible_truncation, reason = "a trial has a few thousand requests")]

use quayline_batching::{
    Batcher, Config, Fair, Memory, Need, Order, Plan, Policy, Request, RequestId, Room, Sampled, StopRules,
    TenantId, Tick, TokenId,
};

const INPUT_COST: u64 = 1;
const OUTPUT_COST: u64 = 2;
const PROMPT_MAX: u64 = 60;
/// Room for so many tokens.
const ROOM: u64 = 400;

/// Room that is counted in tokens: a request takes what it may ever need, as in the paper.
struct Slab {
    free: u64,
    taken: std::collections::BTreeMap<RequestId, u64>,
}

impl Memory for Slab {
    fn cached_tokens(&mut self, _: RequestId) -> u32 {
        0
    }
    fn allocate(&mut self, id: RequestId, need: Need) -> Room {
        let wanted = u64::from(need.held_tokens() + 40);
        if !self.taken.contains_key(&id) {
            if wanted > self.free {
                return Room::Short { need: 0, free: 0 };
            }
            self.free -= wanted;
            self.taken.insert(id, wanted);
        }
        Room::Granted { covered_tokens: need.held_tokens() }
    }
    fn withdraw(&mut self, _: RequestId) {}
    fn release(&mut self, id: RequestId) {
        self.free += self.taken.remove(&id).unwrap_or(0);
    }
}

/// Tenants who always have more requests waiting than could run at once, each with its own lengths of prompt
/// and answer.
struct Crowd {
    batcher: Batcher,
    memory: Slab,
    shapes: Vec<(u32, u32)>,
    waiting: Vec<u32>,
    /// What each was served, in costs.
    served: Vec<u64>,
    tenants: Vec<usize>,
    plan: Plan,
    now: u64,
}

impl Crowd {
    fn new(order: Policy, shapes: &[(u32, u32)]) -> Crowd {
        let config = Config { step_tokens_max: 128, running_max: 16, ..Config::new(512) };
        Crowd {
            batcher: Batcher::with_order(config, order).unwrap(),
            memory: Slab { free: ROOM, taken: std::collections::BTreeMap::new() },
            shapes: shapes.to_vec(),
            waiting: vec![0; shapes.len()],
            served: vec![0; shapes.len()],
            tenants: Vec::new(),
            plan: Plan::new(),
            now: 0,
        }
    }

    fn fill(&mut self, tenant: usize) {
        while self.waiting[tenant] < 20 {
            let (prompt, answer) = self.shapes[tenant];
            let id = RequestId(self.tenants.len() as u64);
            self.tenants.push(tenant);
            self.waiting[tenant] += 1;
            let request = Request {
                tenant: TenantId(tenant as u64),
                arrival: Tick(self.now),
                ..Request::new(id, prompt, StopRules::after(answer))
            };
            self.batcher.add(request).unwrap();
        }
    }

    fn step(&mut self) {
        self.now += 1;
        self.batcher.step(Tick(self.now), &mut self.memory, &mut self.plan);
        for admitted in &self.plan.admitted {
            let tenant = self.tenants[admitted.id.0 as usize];
            self.waiting[tenant] -= 1;
            self.served[tenant] += INPUT_COST * u64::from(admitted.known_tokens);
        }
        let samples = self.plan.scheduled.iter().filter(|part| part.samples);
        let sampled: Vec<Sampled> = samples.map(|part| Sampled { id: part.id, token: TokenId(0) }).collect();
        for output in &sampled {
            self.served[self.tenants[output.id.0 as usize]] += OUTPUT_COST;
        }
        let mut finished = Vec::new();
        self.batcher.apply(self.plan.step, &sampled, &mut self.memory, &mut finished).unwrap();
        if self.now.is_multiple_of(100) {
            self.batcher.check().unwrap();
        }
    }
}

const SHAPES: [(u32, u32); 4] = [(60, 5), (10, 40), (30, 20), (3, 1)];

/// Twice the larger of the longest prompt's cost and the cost of all tokens that can run at once.
const BOUND: u64 = 2 * max(INPUT_COST * PROMPT_MAX, OUTPUT_COST * ROOM);

const fn max(one: u64, other: u64) -> u64 {
    if one > other { one } else { other }
}

#[test]
fn tenants_who_always_wait_are_served_the_same() {
    let mut crowd = Crowd::new(Policy::Fair(Fair::with_costs(1, 2)), &SHAPES);
    for _ in 0..4000 {
        (0..4).for_each(|tenant| crowd.fill(tenant));
        crowd.step();
        let (most, least) = (crowd.served.iter().max().unwrap(), crowd.served.iter().min().unwrap());
        assert!(most - least <= BOUND, "{:?} at step {}", crowd.served, crowd.now);
    }
    assert!(crowd.served.iter().all(|&served| served > 10 * BOUND), "{:?}", crowd.served);
}

#[test]
fn first_come_first_served_breaks_the_bound() {
    let mut crowd = Crowd::new(Policy::FirstCome, &SHAPES);
    for _ in 0..4000 {
        (0..4).for_each(|tenant| crowd.fill(tenant));
        crowd.step();
    }
    let (most, least) = (crowd.served.iter().max().unwrap(), crowd.served.iter().min().unwrap());
    assert!(most - least > BOUND, "the bound is no test: {:?}", crowd.served);
}

#[test]
fn weights_divide_the_service() {
    let mut crowd = Crowd::new(Policy::fair(), &SHAPES[..2]);
    crowd.batcher.set_weight(TenantId(1), 3.0).unwrap();
    for _ in 0..4000 {
        (0..2).for_each(|tenant| crowd.fill(tenant));
        crowd.step();
        let (one, three) = (crowd.served[0], crowd.served[1]);
        assert!((3 * one).abs_diff(three) <= 3 * BOUND, "{one} and {three} at step {}", crowd.now);
    }
}

/// Theorem 4.9: who comes back after a pause gets its share at once, and no more than that.
#[test]
fn a_pause_earns_no_credit() {
    let mut crowd = Crowd::new(Policy::fair(), &SHAPES[..3]);
    for round in 0..4 {
        for _ in 0..300 {
            crowd.fill(0);
            crowd.fill(1);
            crowd.step();
        }
        let before = crowd.served.clone();
        for _ in 0..600 {
            (0..3).for_each(|tenant| crowd.fill(tenant));
            crowd.step();
            let since: Vec<u64> = crowd.served.iter().zip(&before).map(|(now, then)| now - then).collect();
            let (most, least) = (since.iter().max().unwrap(), since.iter().min().unwrap());
            assert!(most - least <= 2 * BOUND, "{since:?} in round {round}");
        }
        while crowd.waiting[2] > 0 {
            crowd.fill(0);
            crowd.fill(1);
            crowd.step();
        }
    }
}

/// An order of one's own: the shortest prompt first.
#[derive(Debug, Clone)]
struct ShortPromptsFirst;

impl Order for ShortPromptsFirst {
    fn rank(&self, waiting: &quayline_batching::Candidate<'_>) -> quayline_batching::Rank {
        quayline_batching::Rank(i128::from(waiting.request.prompt_tokens), waiting.request.arrival.0)
    }
}

#[test]
fn an_order_of_ones_own() {
    let mut batcher = Batcher::with_order(Config::new(512), ShortPromptsFirst).unwrap();
    for (id, prompt) in [(1, 30), (2, 10), (3, 20)] {
        batcher.add(Request::new(RequestId(id), prompt, StopRules::after(1))).unwrap();
    }
    let waiting: Vec<u64> = batcher.waiting().map(|id| id.0).collect();
    assert_eq!(waiting, [2, 3, 1]);
}

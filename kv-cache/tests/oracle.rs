//! Random calls against the model of `model/`, over caches of one to three groups of every kind. After every call the
//! cache is audited and every number in it compared.
//!
//! `QUAYLINE_ORACLE_CALLS=1000000 cargo test --release -p quayline-kv-cache --test oracle` makes a million of them, as
//! `.ci/run` does with another `QUAYLINE_ORACLE_SEED` for every commit.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

mod calls;
mod model;
mod pair;
mod plain;
mod seen;
mod shelves;

use std::cell::Cell;

use calls::{Call, call, shape, tiers};
use model::{Model, Shape};
use pair::{Pair, Tiered};
use plain::{PlainArc, PlainCost, PlainFair, PlainLeafFirst, PlainLru, PlainSlru};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngAlgorithm, RngSeed, TestRunner};
use quayline_kv_cache::evict::{CostAware, Fair, Policy, PolicyName, Slru};
use quayline_kv_cache::*;
use seen::must_have_seen;

/// Calls of a run that fits in some seconds without optimisation.
const CALLS: u64 = 10_000;

#[test]
fn the_cache_does_what_the_model_does() {
    let (wanted, made) = (asked("QUAYLINE_ORACLE_CALLS", CALLS), Cell::new(0));
    let seed = asked("QUAYLINE_ORACLE_SEED", 20);
    // Runs of up to 400 calls, the same ones every time. A failing run is shrunk before it is printed.
    let runs = Runs {
        cases: u32::MAX,
        rng_seed: RngSeed::Fixed(seed),
        rng_algorithm: RngAlgorithm::XorShift,
        failure_persistence: None,
        max_shrink_iters: 100_000,
        ..Runs::default()
    };
    let behind = prop::option::weighted(0.6, tiers());
    let strategy =
        (shape(), prop::option::weighted(0.8, policy()), behind, prop::collection::vec(call(), 1..400));
    let mut runner = TestRunner::new(runs);
    while made.get() < wanted {
        let once = Runs { cases: 25, ..runner.config().clone() };
        let mut some = TestRunner::new_with_rng(once, runner.new_rng());
        let result = some.run(&strategy, |(shape, chosen, behind, calls)| {
            made.set(made.get() + calls.len() as u64);
            play(&shape, chosen, behind, calls);
            Ok(())
        });
        assert!(result.is_ok(), "seed {seed}: {}", result.unwrap_err());
    }
    eprintln!("{} calls, seed {seed}", made.get());
    must_have_seen(OFTEN, SELDOM, wanted >= 100_000);
}

#[expect(clippy::disallowed_methods, reason = "a test may be asked by its environment to run longer")]
fn asked(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |number| number.parse().unwrap())
}

fn policy() -> impl Strategy<Value = PolicyName> {
    (0..PolicyName::ALL.len()).prop_map(|place| PolicyName::ALL[place])
}

/// What even a short run brings about.
const OFTEN: &[&str] = &[
    "a block is copied on write",
    "a claim can never be granted",
    "a claim is granted",
    "a claim is over its limit",
    "a claim waits",
    "a listener begins anew",
    "a load begins",
    "a load ends for nobody",
    "a pin is refused",
    "a prefix is pinned",
    "a prefix is shared",
    "a quota is set",
    "a sequence waits for content",
    "a store ends well",
    "a store is asked",
    "a tier has no room",
    "a whole sequence is claimed",
    "all is forgotten",
    "external tokens are claimed",
    "groups share a prefix",
    "lookahead is claimed",
    "what was computed is stored",
];

/// What a hundred thousand calls bring about, each of it.
const SELDOM: &[&str] = &[
    "a tier tells a name",
    "a tier tells of tokens",
    "a claim cannot go back",
    "a claim finds blocks set aside",
    "a claim meets a load",
    "a claim waits for the next step",
    "a job ends after a reset",
    "a load ends early",
    "a load ends well",
    "a load fails in the middle",
    "a load finds its block still read",
    "a load finds its content gone",
    "a load from a disk begins",
    "a pin expires",
    "a pin is over the cap",
    "a prefix with an item is shared",
    "a sequence cannot go back",
    "a sequence forks",
    "a sequence is cut",
    "a sequence is swapped out",
    "a sequence waits no longer",
    "a store fails",
    "a store is given up",
    "a store says no",
    "a store says yes",
    "a tier gives content up",
    "a tier is written back",
    "a tier is written through",
    "all is forgotten while jobs are at work",
    "content is promoted",
    "content outlives its process",
    "the caller's own load fails",
    "what is pushed out finds no room",
    "what is pushed out is saved",
    "what was offered before is stored",
];

/// Of what a late block costs more, so that it shows in small pools.
const DOUBLES_AFTER: u32 = 12;

/// Plays calls with a policy behind quotas, or with LRU alone.
fn play(shape: &Shape, chosen: Option<PolicyName>, behind: Option<Tiered>, calls: Vec<Call>) {
    let mut shape = shape.clone();
    shape.config.report_lost = behind.is_some();
    let (blocks, size) = (shape.config.block_count, shape.config.block_size);
    let Some(chosen) = chosen else {
        return Pair::new(&shape, Lru::new(blocks), PlainLru::new(blocks), |_, _, _, _| ())
            .play(behind, calls);
    };
    let shape = &shape;
    match chosen {
        PolicyName::Lru => fair(shape, Policy::Lru(Lru::new(blocks)), PlainLru::new(blocks), behind, calls),
        PolicyName::LeafFirst => {
            fair(shape, Policy::new(chosen, blocks, size), PlainLeafFirst::new(blocks), behind, calls);
        }
        PolicyName::Slru => {
            fair(shape, Policy::Slru(Slru::new(blocks, 40)), PlainSlru::new(blocks, 40), behind, calls)
        }
        PolicyName::Arc => {
            fair(shape, Policy::new(chosen, blocks, size), PlainArc::new(blocks), behind, calls)
        }
        PolicyName::Cost => {
            let doubles_after = DOUBLES_AFTER.div_ceil(size.get());
            let cost = CostAware::with_cost(blocks, size, TokenCount(doubles_after * size.get()));
            fair(shape, Policy::Cost(cost), PlainCost::new(blocks, doubles_after), behind, calls);
        }
    }
}

fn fair<P: Eviction + Clone>(
    shape: &Shape,
    policy: Policy,
    plain: P,
    behind: Option<Tiered>,
    calls: Vec<Call>,
) {
    let blocks = shape.config.block_count;
    let set_quota =
        |cache: &mut KvCache<Xxh3, Fair<Policy>>, model: &mut Model<PlainFair<P>>, tenant, quota| {
            cache.set_quota(tenant, quota);
            model.policy.set_quota(tenant, quota);
        };
    let plain = PlainFair::new(plain, &[]);
    Pair::new(shape, Fair::new(blocks, policy), plain, set_quota).play(behind, calls);
}

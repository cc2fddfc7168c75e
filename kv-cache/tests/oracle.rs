//! Random calls against the model of `model/`, over caches of one to three groups of every kind. After every call the
//! cache is audited and every number in it compared.
//!
//! `QUAYLINE_ORACLE_CALLS=1000000 cargo test --release -p quayline-kv-cache --test oracle` makes a million of them;
//! `QUAYLINE_ORACLE_SEED` makes others.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

mod calls;
mod model;
mod pair;
mod plain;
mod shelves;

use std::cell::Cell;

use calls::{Call, call, shape, tiers};
use model::{Model, Shape};
use pair::{Pair, Tiered};
use plain::{PlainArc, PlainCost, PlainFair, PlainLeafFirst, PlainLru, PlainSlru};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::evict::{CostAware, Fair, Policy, PolicyName, Slru};
use quayline_kv_cache::*;

/// Calls of a run that fits in a few seconds.
const CALLS: u64 = 12_000;

#[test]
fn the_cache_does_what_the_model_does() {
    let (wanted, made) = (asked("QUAYLINE_ORACLE_CALLS", CALLS), Cell::new(0));
    let seed = asked("QUAYLINE_ORACLE_SEED", 20);
    // Runs of up to 150 calls, the same ones every time. A failing run is shrunk before it is printed.
    let runs = Runs {
        cases: u32::MAX,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Runs::default()
    };
    let behind = prop::option::weighted(0.6, tiers());
    let strategy =
        (shape(), prop::option::weighted(0.8, policy()), behind, prop::collection::vec(call(), 1..150));
    let mut runner = TestRunner::new(runs);
    while made.get() < wanted {
        let once = Runs { cases: 100, ..runner.config().clone() };
        let mut some = TestRunner::new_with_rng(once, runner.new_rng());
        let result = some.run(&strategy, |(shape, chosen, behind, calls)| {
            made.set(made.get() + calls.len() as u64);
            play(&shape, chosen, behind, calls);
            Ok(())
        });
        assert!(result.is_ok(), "seed {seed}: {}", result.unwrap_err());
    }
    eprintln!("{} calls, seed {seed}", made.get());
}

#[expect(clippy::disallowed_methods, reason = "a test may be asked by its environment to run longer")]
fn asked(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |number| number.parse().unwrap())
}

fn policy() -> impl Strategy<Value = PolicyName> {
    (0..PolicyName::ALL.len()).prop_map(|place| PolicyName::ALL[place])
}

/// Of what a late block costs more, so that it shows in small pools.
const DOUBLES_AFTER: u32 = 12;

/// Plays calls with a policy behind quotas, or with LRU alone.
fn play(shape: &Shape, chosen: Option<PolicyName>, behind: Option<Tiered>, calls: Vec<Call>) {
    let (blocks, size) = (shape.config.block_count, shape.config.block_size);
    let Some(chosen) = chosen else {
        return Pair::new(shape, Lru::new, PlainLru::new(blocks), |_, _, _, _| ()).play(behind, calls);
    };
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

fn fair<P: Eviction>(shape: &Shape, policy: Policy, plain: P, behind: Option<Tiered>, calls: Vec<Call>) {
    let blocks = shape.config.block_count;
    let set_quota =
        |cache: &mut KvCache<Xxh3, Fair<Policy>>, model: &mut Model<PlainFair<P>>, tenant, quota| {
            cache.set_quota(tenant, quota);
            model.policy.set_quota(tenant, quota);
        };
    let plain = PlainFair::new(blocks, plain, &[]);
    Pair::new(shape, |blocks| Fair::new(blocks, policy), plain, set_quota).play(behind, calls);
}

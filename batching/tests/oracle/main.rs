//! Random callers against a scheduler that is obviously right: plain lists, every figure worked out anew in
//! each step.
//!
//! Requests come, are cancelled and finished at any moment, outputs are applied late and in part, memories
//! are small. After every call both must agree and the audit must be clean; at the end everybody must be
//! done, with no token computed twice or left out.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]
#![expect(clippy::cast_possible_truncation, reason = "a trial has a hundred acts")]

mod naive;
mod trial;

use std::num::NonZeroU32;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use quayline_batching::scenario::BlockMemory;
use quayline_batching::{Config, Flow, Prefill};

use naive::Order;
use trial::{Act, Asked, Trial};

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
        patience_ticks in prop::option::of(0u64..30),
    ) -> Config {
        let least = if prefill == Prefill::Whole { model_tokens_max } else { running_max };
        Config {
            step_tokens_max: least + step_more,
            running_max,
            prefill,
            whole_sequence_check,
            watermark_tokens,
            patience_ticks,
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

prop_compose! {
    fn asked()(
        (shared, own) in (0u32..24, 1u32..24),
        (new_tokens, eos) in (1u32..24, any::<bool>()),
        since in prop_oneof![3 => Just(0u64), 1 => 0u64..4],
        priority in -2i32..3,
        tenant in 0u64..3,
        targets in prop::option::of((0u64..40, 0u64..6)),
        expected in prop::option::of(0u32..40),
    ) -> Act {
        Act::Add(Asked { shared, own, new_tokens, eos, since, priority, tenant, targets, expected })
    }
}

fn orders() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::FirstCome),
        Just(Order::Priority),
        Just(Order::Deadline),
        Just(Order::ShortestJob),
        prop_oneof![0u32..4, Just(1000)].prop_map(|lookups| Order::LongestPrefix { lookups }),
        (0u32..3, 0u32..4).prop_map(|(input_cost, output_cost)| Order::Fair { input_cost, output_cost }),
    ]
}

fn acts() -> impl Strategy<Value = Act> {
    let flow = prop_oneof![3 => Just(Flow::Open), 1 => Just(Flow::Holding), 1 => Just(Flow::Stopped)];
    prop_oneof![
        6 => asked(),
        12 => Just(Act::Step),
        8 => (0u32..8, prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|(token, newest, backwards)| Act::Apply { token, newest, backwards }),
        1 => any::<usize>().prop_map(|which| Act::Cancel { which }),
        1 => any::<usize>().prop_map(|which| Act::Finish { which }),
        1 => flow.prop_map(Act::Flow),
        6 => (1u64..6).prop_map(|ticks| Act::Later { ticks }),
    ]
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

fn trial(config: Config, order: Order, memory: BlockMemory, acts: &[Act]) {
    let mut trial = Trial::new(config, order, memory);
    for act in acts {
        trial.act(act);
    }
    trial.drain();
}

/// The same cases on every machine; what fails is printed in full, cut down to the fewest acts.
/// `QUAYLINE_ORACLE_CASES` makes more of them, `QUAYLINE_ORACLE_SEED` others.
fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: u32::try_from(asked_for("QUAYLINE_ORACLE_CASES", 150)).unwrap(),
        rng_seed: RngSeed::Fixed(asked_for("QUAYLINE_ORACLE_SEED", 0x5eed)),
        failure_persistence: None,
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
    fn any_caller_gets_what_the_naive_scheduler_says(
        config in configs(),
        order in orders(),
        memory in memories(),
        acts in prop::collection::vec(acts(), 1..120),
    ) {
        trial(config, order, memory, &acts);
    }

    #[test]
    fn prompts_are_read_slowly_beside_those_who_generate(
        config in configs(),
        order in orders(),
        mixed_prefill in 1u32..16,
        memory in memories(),
        acts in prop::collection::vec(acts(), 1..120),
    ) {
        let mixed_prefill_tokens_max = NonZeroU32::new(mixed_prefill);
        trial(Config { mixed_prefill_tokens_max, ..config }, order, memory, &acts);
    }

    #[test]
    fn nobody_finds_what_was_not_computed(
        (config, memory) in crowded(),
        acts in prop::collection::vec(acts(), 1..120),
    ) {
        trial(config, Order::Priority, memory, &acts);
    }
}

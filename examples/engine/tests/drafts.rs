//! Drafts pay off where an answer repeats itself or its question, and cost next to nothing where it does not. That
//! they change no answer is for `equality.rs` to show, over all that a request may ask for.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use quayline_engine::{
    Dtype, Engine, ModelFiles, Options, Request, RequestId, Sampling, Speculation, Tick, Totals,
};

const PASSAGE: &str = "O, then, I see Queen Mab hath been with you.\nShe is the fairies' midwife, and she comes\n\
    In shape no bigger than an agate-stone\nOn the fore-finger of an alderman,\n\n";

const TOKENS: u32 = 300;

/// What is asked, and how much of the answer drafts should have foreseen.
struct Case {
    name: &'static str,
    prompt: String,
    sampling: Sampling,
    /// Least and most steps for each hundred tokens.
    steps: [u64; 2],
    /// Most drafts for each hundred tokens that turn out wrong.
    wrong_max: u64,
}

fn cases() -> [Case; 4] {
    let greedy = Sampling { max_tokens: Some(TOKENS), ignore_eos: true, ..Sampling::greedy() };
    let random = Sampling { temperature: 1.0, seed: Some(1), ..greedy.clone() };
    [
        Case {
            name: "says the same over and over",
            prompt: "ROMEO:\n".into(),
            sampling: Sampling { frequency_penalty: -1.0, ..greedy.clone() },
            steps: [10, 35],
            wrong_max: 25,
        },
        Case {
            name: "repeats itself",
            prompt: "ROMEO:\n".into(),
            sampling: greedy.clone(),
            steps: [30, 75],
            wrong_max: 40,
        },
        Case {
            name: "goes on from a text that repeats itself",
            prompt: PASSAGE.repeat(3),
            sampling: greedy,
            steps: [30, 75],
            wrong_max: 40,
        },
        Case {
            name: "repeats nothing",
            prompt: PASSAGE.into(),
            sampling: random,
            steps: [90, 100],
            wrong_max: 5,
        },
    ]
}

fn engine(speculation: Option<Speculation>, async_scheduling: bool) -> Engine {
    // The answers, and so what drafts foresee of them, are the same on all machines that compute in f32.
    let dtype = Some(Dtype::F32);
    let options = Options { dtype, speculation, async_scheduling, ..Options::default() };
    Engine::load(&ModelFiles::bundled(), &options).unwrap()
}

fn drafts() -> Option<Speculation> {
    let [drafts, min, max] = [8, 2, 4].map(|n| NonZeroU32::new(n).unwrap());
    Some(Speculation {
        num_speculative_tokens: drafts,
        prompt_lookup_max: max,
        prompt_lookup_min: min,
        disable_by_batch_size: None,
    })
}

/// The answer to `count` equal requests at once, and how long it took.
fn answer(engine: &mut Engine, case: &Case, count: u64) -> (Vec<u32>, Duration) {
    let prompt = engine.text().encode(&case.prompt, true).unwrap();
    for id in (0..count).map(RequestId) {
        engine.add(Request { sampling: case.sampling.clone(), ..Request::new(id, prompt.clone()) }).unwrap();
    }
    let (mut outputs, start) = (Vec::new(), Instant::now());
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
    }
    let time = start.elapsed();
    let first = outputs.iter().filter(|output| output.id == RequestId(0));
    (first.flat_map(|output| output.tokens.iter().map(|token| token.id)).collect(), time)
}

#[test]
fn drafts_save_steps_where_a_text_repeats_itself_and_cost_few_where_it_does_not() {
    drafts_save_steps(false);
}

/// How many drafts a step verifies is decided one step before they are made, which costs few of them.
#[test]
fn and_so_they_do_where_steps_are_planned_ahead_of_them() {
    drafts_save_steps(true);
}

fn drafts_save_steps(async_scheduling: bool) {
    let (mut plain, mut drafting) = (engine(None, false), engine(drafts(), async_scheduling));
    let mut before = Totals::default();
    for case in cases() {
        let name = case.name;
        let (expected, _) = answer(&mut plain, &case, 1);
        let (tokens, _) = answer(&mut drafting, &case, 1);
        assert_eq!(tokens, expected, "{name}");
        let totals = drafting.snapshot().totals;
        let steps = (totals.steps - before.steps) * 100 / tokens.len() as u64;
        let (drafted, accepted) = (totals.drafts.draft_tokens, totals.drafts.accepted_tokens);
        let wrong = drafted - before.drafts.draft_tokens - (accepted - before.drafts.accepted_tokens);
        let wrong = wrong * 100 / tokens.len() as u64;
        let figures = format!("{name}: of 100 tokens {steps} steps and {wrong} wrong drafts");
        assert!((case.steps[0]..=case.steps[1]).contains(&steps), "{figures}");
        assert!(wrong <= case.wrong_max, "{figures}");
        before = totals;
    }
    drafting.check().unwrap();
}

/// Prints what drafts bring: `cargo test --release -p quayline-engine --test drafts -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_drafts_bring() {
    let (mut plain, mut drafting) = (engine(None, false), engine(drafts(), false));
    for case in cases() {
        for count in [1, 4, 16] {
            let mut ratios: Vec<(f64, Duration, Duration)> = (0..7)
                .map(|_| {
                    let (expected, off) = answer(&mut plain, &case, count);
                    let (tokens, on) = answer(&mut drafting, &case, count);
                    assert_eq!(tokens, expected, "{}", case.name);
                    (off.as_secs_f64() / on.as_secs_f64(), off, on)
                })
                .collect();
            ratios.sort_by(|one, other| one.0.total_cmp(&other.0));
            let (ratio, off, on) = ratios[ratios.len() / 2];
            eprintln!("{}, {count} at once: {off:?} without, {on:?} with, {ratio:.2} times", case.name);
        }
    }
}

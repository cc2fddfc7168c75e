//! Steps planned while others compute: what they bring is measured. That they change no answer is for `equality.rs` to
//! show.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::time::{Duration, Instant};

use quayline_engine::{Engine, ModelFiles, Options, Request, RequestId, Sampling, Tick};

fn engine(async_scheduling: bool) -> Engine {
    Engine::load(&ModelFiles::bundled(), &Options { async_scheduling, ..Options::default() }).unwrap()
}

/// Time in which `count` requests at once generate 200 tokens each.
fn time(engine: &mut Engine, count: u64) -> Duration {
    for id in 0..count {
        let sampling =
            Sampling { max_tokens: Some(200), seed: Some(id), ignore_eos: true, ..Sampling::default() };
        engine.add(Request { sampling, ..Request::new(RequestId(id), vec![5; 16]) }).unwrap();
    }
    let (mut outputs, start) = (Vec::new(), Instant::now());
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
    }
    start.elapsed()
}

/// Prints what planning ahead brings: `cargo test --release -p quayline-engine --test ahead -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_planning_ahead_brings() {
    let (mut plain, mut ahead) = (engine(false), engine(true));
    for count in [1, 4, 16, 64] {
        let mut pairs: Vec<(f64, Duration, Duration)> = (0..7)
            .map(|_| {
                let (off, on) = (time(&mut plain, count), time(&mut ahead, count));
                (off.as_secs_f64() / on.as_secs_f64(), off, on)
            })
            .collect();
        pairs.sort_by(|one, other| one.0.total_cmp(&other.0));
        let (ratio, off, on) = pairs[pairs.len() / 2];
        eprintln!("{count} at once: {off:?} without, {on:?} with, {ratio:.2} times");
    }
}

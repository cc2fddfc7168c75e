//! Host memory behind the cache: what the device had to give up comes back from there.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};

use common::load;
use quayline_engine::{
    Engine, HostUse, KvSize, LoadError, ModelFiles, Offloading, OffloadingWrite, Options, Output, Preemption,
    Request, RequestId, Sampling, Speeds, Tick,
};

/// K and V of a token of the bundled model: 6 layers, 2 heads of 32 numbers of 2 bytes.
const BYTES_PER_TOKEN: u64 = 6 * 2 * 2 * 32 * 2;

/// Room for 16 blocks of 8 tokens, and for a hundred behind them.
fn options() -> Options {
    Options {
        block_size: NonZeroU32::new(8).unwrap(),
        kv: KvSize::Blocks(16),
        offloading: Some(Offloading::new(100 * 8 * BYTES_PER_TOKEN)),
        threads: NonZeroUsize::new(1),
        ..Options::default()
    }
}

/// A prompt of `tokens` tokens that begins like no other's.
fn request(id: u64, begin: u32, tokens: u32, answer: u32) -> Request {
    let prompt: Vec<u32> = (0..tokens).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect();
    let sampling =
        Sampling { max_tokens: Some(answer), ignore_eos: true, logprobs: Some(1), ..Sampling::greedy() };
    Request { sampling, ..Request::new(RequestId(id), prompt) }
}

fn answer(engine: &mut Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Output> {
    requests.into_iter().for_each(|request| engine.add(request).unwrap());
    common::run(engine)
}

fn host(engine: &Engine) -> HostUse {
    engine.snapshot().host.unwrap()
}

/// Reads four other prompts, which take all the room there is.
fn crowd(engine: &mut Engine) {
    for begin in 10..14 {
        answer(engine, [request(1000 + u64::from(begin), begin, 60, 2)]);
    }
}

#[test]
fn a_prompt_that_was_evicted_comes_back_from_host_memory() {
    let first = answer(&mut load(&options()), [request(1, 1, 50, 8)]);
    for (write, uses) in [
        (OffloadingWrite::Through, 1),
        (OffloadingWrite::AfterUses(NonZeroU32::new(2).unwrap()), 2),
        (OffloadingWrite::Back, 1),
    ] {
        let offloading = options().offloading.map(|offloading| Offloading { write, ..offloading });
        let mut engine = load(&Options { offloading, ..options() });
        for _ in 0..uses {
            answer(&mut engine, [request(1, 1, 50, 8)]);
        }
        crowd(&mut engine);
        let before = host(&engine);
        let again = answer(&mut engine, [request(2, 1, 50, 8)]);
        assert_eq!((again[0].cached_tokens, again[0].loaded_tokens), (48, 48), "{write:?}");
        let tokens =
            |outputs: &[Output]| outputs.iter().flat_map(|one| one.tokens.clone()).collect::<Vec<_>>();
        assert_eq!(tokens(&again), tokens(&first), "{write:?}");
        let after = host(&engine);
        assert_eq!((after.queries - before.queries, after.hits - before.hits), (50, 48));
        assert_eq!(after.loaded_bytes - before.loaded_bytes, 48 * BYTES_PER_TOKEN);
    }
}

#[test]
fn what_is_used_once_stays_out_of_host_memory_that_wants_two_uses() {
    let write = OffloadingWrite::AfterUses(NonZeroU32::new(2).unwrap());
    let offloading = options().offloading.map(|offloading| Offloading { write, ..offloading });
    let mut engine = load(&Options { offloading, ..options() });
    answer(&mut engine, [request(1, 1, 50, 8)]);
    assert_eq!(host(&engine).used, 0);
    answer(&mut engine, [request(2, 1, 50, 8)]);
    assert!(host(&engine).used >= 6);
}

#[test]
fn a_reset_forgets_host_memory_too() {
    let mut engine = load(&options());
    answer(&mut engine, [request(1, 1, 50, 8)]);
    crowd(&mut engine);
    assert!(engine.reset_prefix_cache());
    assert_eq!(host(&engine).used, 0);
    assert_eq!(answer(&mut engine, [request(2, 1, 50, 8)])[0].cached_tokens, 0);
}

#[test]
fn nothing_is_reset_while_one_who_yielded_needs_it() {
    let mut engine = load(&Options { preemption: Preemption::Swap, ..options() });
    [request(1, 1, 50, 40), request(2, 2, 50, 40)].into_iter().for_each(|one| engine.add(one).unwrap());
    let mut outputs = Vec::new();
    while host(&engine).swapped_tokens == 0 {
        engine.step(Tick(0), &mut outputs);
    }
    assert!(!engine.reset_prefix_cache());
    answer(&mut engine, []);
    assert!(engine.reset_prefix_cache());
}

#[test]
fn who_yields_is_moved_or_computes_again_whichever_is_quicker() {
    for (bytes_per_second, prefill, moves) in [(1_000_000_000, 10, true), (1_000, 1_000_000, false)] {
        let speed = |rate| NonZeroU64::new(rate).unwrap();
        let preemption = Preemption::Cheaper(Speeds::default());
        let mut engine = load(&Options { preemption, ..options() });
        engine.set_speeds(Speeds {
            bytes_per_second: speed(bytes_per_second),
            prefill_tokens_per_second: speed(prefill),
        });
        answer(&mut engine, [request(1, 1, 50, 40), request(2, 2, 50, 40)]);
        assert!(engine.snapshot().totals.preemptions > 0);
        assert_eq!(host(&engine).swapped_tokens > 0, moves);
        if moves {
            assert_eq!(host(&engine).swapped_tokens % 8, 0, "blocks that are full");
        }
    }
}

#[test]
fn copies_can_be_timed() {
    assert_eq!(load(&options()).exercise_copies(3), Some(2 * 3 * 8 * BYTES_PER_TOKEN));
    assert_eq!(load(&Options { offloading: None, ..options() }).exercise_copies(3), None);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |options: Options| match Engine::load(&ModelFiles::bundled(), &options) {
        Err(LoadError::Options { option, .. }) => option,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        refused(Options { offloading: Some(Offloading::new(1000)), ..options() }),
        "kv_offloading_size"
    );
    assert_eq!(refused(Options { prefix_caching: false, ..options() }), "kv_offloading_size");
    let nowhere = Options { offloading: None, preemption: Preemption::Swap, ..options() };
    assert_eq!(refused(nowhere), "preemption_mode");
}

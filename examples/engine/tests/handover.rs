//! Prefill in one engine, decode in another: the answers are those of one.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};

use common::{load, run};
use quayline_engine::{
    DeliveryError, Engine, FailedLoads, FinishReason, KvSize, Load, Offloading, Options, Output, Request,
    RequestId, Sampling, Tick,
};

fn options() -> Options {
    Options {
        block_size: NonZeroU32::new(8).unwrap(),
        kv: KvSize::Blocks(64),
        max_model_len: Some(128),
        threads: NonZeroUsize::new(1),
        ..Options::default()
    }
}

/// Prompts of 40 to 80 tokens; the first three of each six begin alike.
fn request(id: u64) -> Request {
    let begin = if id % 6 < 3 { 1 } else { id };
    let prompt: Vec<u32> = (0..40 + id * 7 % 41)
        .map(|at| 100 + u32::try_from((if at < 24 { begin } else { id } * 131 + at * 7) % 1000).unwrap())
        .collect();
    let sampling = Sampling {
        max_tokens: Some(12),
        ignore_eos: true,
        logprobs: Some(2),
        seed: Some(id),
        temperature: if id.is_multiple_of(2) { 0.0 } else { 0.8 },
        ..Sampling::default()
    };
    Request { sampling, ..Request::new(RequestId(id), prompt) }
}

/// The same request as the two engines get it.
fn halves(request: &Request) -> (Request, Request) {
    let first = Sampling { max_tokens: Some(1), ..request.sampling.clone() };
    let tokens = u32::try_from(request.prompt.len()).unwrap();
    (
        Request { sampling: first, hands_over: true, ..request.clone() },
        Request { remote_tokens: tokens, ..request.clone() },
    )
}

/// Tokens and log-probabilities as bits.
type Answers = BTreeMap<RequestId, Vec<(u32, Vec<u32>)>>;

fn note(answers: &mut Answers, outputs: &mut Vec<Output>) {
    for output in outputs.drain(..) {
        let own = answers.entry(output.id).or_default();
        for token in output.tokens {
            let logprobs = token.logprobs.unwrap();
            own.push((token.id, logprobs.top.iter().map(|one| one.logprob.to_bits()).collect()));
        }
    }
}

fn alone(ids: std::ops::Range<u64>) -> Answers {
    let mut engine = load(&options());
    let mut answers = Answers::new();
    for id in ids {
        engine.add(request(id)).unwrap();
        note(&mut answers, &mut run(&mut engine));
    }
    answers
}

/// Both engines at once. Every load waits for `delay` steps, and is delivered if `arrives`.
fn together(
    prefill: &mut Engine,
    decode: &mut Engine,
    ids: std::ops::Range<u64>,
    delay: u32,
    arrives: impl Fn(u64) -> bool,
) -> Vec<Output> {
    for (first, _) in ids.clone().map(|id| halves(&request(id))) {
        prefill.add(first).unwrap();
    }
    run(prefill);
    for (_, second) in ids.clone().map(|id| halves(&request(id))) {
        decode.add(second).unwrap();
    }
    let (mut outputs, mut coming) = (Vec::new(), Vec::<(u32, Load)>::new());
    for step in 0.. {
        assert!(step < 2000, "no end");
        if !decode.has_work() {
            break;
        }
        decode.step(Tick(0), &mut outputs);
        coming.extend(decode.loads().into_iter().map(|load| (step + delay, load)));
        let due: Vec<Load> = coming.iter().filter(|(at, _)| *at <= step).map(|(_, load)| *load).collect();
        coming.retain(|(at, _)| *at > step);
        for Load { id, start, tokens } in due {
            if arrives(id.0) {
                let parcel = prefill.fetch(id, start, tokens).unwrap();
                decode.deliver(id, &parcel).unwrap();
            } else {
                decode.not_delivered(id, &mut outputs).unwrap();
            }
        }
        decode.check().unwrap();
    }
    for id in ids {
        assert!(prefill.handed_over(RequestId(id)));
    }
    prefill.check().unwrap();
    assert_eq!((prefill.snapshot().blocks.used, decode.snapshot().blocks.used), (0, 0));
    outputs
}

#[test]
fn an_answer_is_the_same_wherever_its_prompt_was_read() {
    let expected = alone(0..12);
    let tight = Options { kv: KvSize::Blocks(24), max_num_batched_tokens: 64, ..options() };
    let offloading = Options { offloading: Some(Offloading::new(1 << 21)), ..tight.clone() };
    let uncached = Options { prefix_caching: false, ..options() };
    for (decode, delay) in [(options(), 0), (options(), 3), (tight, 1), (offloading, 2), (uncached, 1)] {
        let (mut first, mut second) =
            (load(&Options { kv: KvSize::Blocks(200), ..options() }), load(&decode));
        let mut outputs = together(&mut first, &mut second, 0..12, delay, |_| true);
        let loaded: u32 =
            outputs.iter().filter(|output| output.output_tokens == 1).map(|one| one.loaded_tokens).sum();
        let mut answers = Answers::new();
        note(&mut answers, &mut outputs);
        assert_eq!(answers, expected, "delay {delay}, {decode:?}");
        let delivered = second.snapshot().totals.delivered_tokens;
        assert!(delivered >= 400 && u64::from(loaded) == delivered, "{delivered} delivered, {loaded} loaded");
    }
}

#[test]
fn what_is_here_already_is_not_fetched() {
    let (mut first, mut second) = (load(&options()), load(&options()));
    second.add(request(0)).unwrap();
    run(&mut second);
    let (prefill, decode) = halves(&request(2));
    first.add(prefill).unwrap();
    run(&mut first);
    second.add(decode).unwrap();
    second.step(Tick(0), &mut Vec::new());
    assert_eq!(second.loads(), [Load { id: RequestId(2), start: 24, tokens: 24 }]);
    second.deliver(RequestId(2), &first.fetch(RequestId(2), 24, 24).unwrap()).unwrap();
    let mut answers = Answers::new();
    note(&mut answers, &mut run(&mut second));
    assert_eq!(answers[&RequestId(2)], alone(2..3)[&RequestId(2)]);
}

#[test]
fn what_does_not_come_is_computed_or_ends_the_request() {
    let expected = alone(0..6);
    let mut second = load(&options());
    let mut outputs = together(&mut load(&options()), &mut second, 0..6, 1, |id| id % 2 == 0);
    let mut answers = Answers::new();
    note(&mut answers, &mut outputs);
    assert_eq!(answers, expected);

    let mut second = load(&Options { failed_loads: FailedLoads::End, ..options() });
    let mut outputs = together(&mut load(&options()), &mut second, 0..6, 1, |id| id % 2 == 0);
    let failed =
        |output: &&Output| output.finish.as_ref().is_some_and(|one| one.reason == FinishReason::Error);
    let failed: Vec<u64> = outputs.iter().filter(failed).map(|output| output.id.0).collect();
    assert_eq!(failed, [1, 3, 5]);
    let turned_away = second.snapshot().turned_away;
    assert!(turned_away.iter().all(|one| one.code == "load_failed") && turned_away.len() == 3);
    let mut answers = Answers::new();
    note(&mut answers, &mut outputs);
    answers.retain(|id, _| id.0 % 2 == 0);
    assert!(answers.iter().all(|(id, answer)| expected[id] == *answer));
}

#[test]
fn who_is_cancelled_while_tokens_are_on_their_way_leaves_nothing() {
    let (mut first, mut second) = (load(&options()), load(&options()));
    let (prefill, decode) = halves(&request(7));
    first.add(prefill).unwrap();
    run(&mut first);
    second.add(decode).unwrap();
    second.step(Tick(0), &mut Vec::new());
    let Load { id, start, tokens } = second.loads()[0];
    assert!(second.cancel(id) && !second.has_work());
    second.check().unwrap();
    assert_eq!(second.snapshot().blocks.used, 0);
    let parcel = first.fetch(id, start, tokens).unwrap();
    assert_eq!(second.deliver(id, &parcel), Err(DeliveryError::NotAwaited(7)));
}

#[test]
fn a_parcel_that_does_not_fit_is_refused_and_the_request_waits_on() {
    let (mut first, mut second) = (load(&options()), load(&options()));
    let (prefill, decode) = halves(&request(8));
    first.add(prefill).unwrap();
    run(&mut first);
    second.add(decode).unwrap();
    second.step(Tick(0), &mut Vec::new());
    let Load { id, start, tokens } = second.loads()[0];
    assert!(first.fetch(id, start, tokens + 80).is_none() && first.fetch(id, 3, 8).is_none());
    assert!(first.fetch(RequestId(99), start, tokens).is_none());
    let parcel = first.fetch(id, start, tokens).unwrap();
    let mut short = parcel.clone();
    short.blocks.pop();
    assert!(matches!(second.deliver(id, &short), Err(DeliveryError::OtherTokens { .. })));
    let mut other = parcel.clone();
    other.blocks[1] = vec![0; 5].into();
    assert!(matches!(second.deliver(id, &other), Err(DeliveryError::OtherBlocks { found_bytes: 5, .. })));
    let mut large = parcel.clone();
    large.block_size = 16;
    assert!(matches!(second.deliver(id, &large), Err(DeliveryError::OtherBlocks { found_tokens: 16, .. })));
    second.deliver(id, &parcel).unwrap();
    assert_eq!(run(&mut second).len(), 12);
}

#[test]
fn what_nobody_fetches_is_kept_for_its_time_and_its_id_is_taken() {
    let mut engine = load(&Options { handover_ticks_max: Some(10), ..options() });
    let (prefill, _) = halves(&request(1));
    engine.add(prefill.clone()).unwrap();
    run(&mut engine);
    assert!(engine.snapshot().blocks.used > 0);
    engine.add(prefill.clone()).unwrap_err();
    engine.add(request(2)).unwrap();
    engine.step(Tick(11), &mut Vec::new());
    assert!(engine.fetch(RequestId(1), 0, 8).is_none() && !engine.handed_over(RequestId(1)));
    run(&mut engine);
    assert_eq!(engine.snapshot().blocks.used, 0);
    engine.add(prefill).unwrap();
}

//! Beam search, beside one that recomputes every beam from scratch.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::num::{NonZeroU32, NonZeroUsize};

use common::{load, run};
use quayline_engine::{
    Beams, Engine, FinishReason, KvSize, Offloading, Options, Output, Preemption, Refusal, Request,
    RequestId, Sampling, Tick, TokenLogprob,
};

fn options() -> Options {
    Options { threads: NonZeroUsize::new(1), max_model_len: Some(256), ..Options::default() }
}

fn encode(engine: &Engine, text: &str) -> Vec<u32> {
    engine.text().encode(text, true).unwrap()
}

fn search(id: u64, prompt: &[u32], width: u64, tokens: u32, length_penalty: f32) -> Request {
    let others = (id + 1..id + width).map(RequestId).collect();
    let sampling = Sampling { max_tokens: Some(tokens), logprobs: Some(1), ..Sampling::default() };
    let beams = Some(Beams { others, length_penalty });
    Request { sampling, beams, ..Request::new(RequestId(id), prompt) }
}

/// What a search found: tokens, their log-probabilities as bits, the score as bits, and whether it ended by itself.
type Found = (Vec<u32>, Vec<u32>, u64, bool);

fn found(outputs: &[Output]) -> Vec<Found> {
    let one = |output: &Output| {
        let bits =
            |token: &quayline_engine::SampledToken| token.logprobs.as_ref().unwrap().chosen.logprob.to_bits();
        let tokens = output.tokens.iter().map(|token| token.id).collect();
        let ended = output.finish.as_ref().unwrap().reason == FinishReason::Stop;
        (tokens, output.tokens.iter().map(bits).collect(), output.beam_score.unwrap().to_bits(), ended)
    };
    outputs.iter().map(one).collect()
}

/// The `top` likeliest tokens behind `tokens`, read from the first token on.
fn likeliest(engine: &mut Engine, tokens: &[u32], top: u32) -> Vec<TokenLogprob> {
    let sampling = Sampling { max_tokens: Some(1), logprobs: Some(top), ..Sampling::greedy() };
    engine.add(Request { sampling, ..Request::new(RequestId(9), tokens) }).unwrap();
    run(engine)[0].tokens[0].logprobs.clone().unwrap().top
}

/// The same search, plainly: no beam knows of another, nothing is kept.
fn naive(engine: &mut Engine, prompt: &[u32], width: usize, tokens: u32, length_penalty: f32) -> Vec<Found> {
    #[derive(Clone)]
    struct Beam(Vec<u32>, Vec<u32>, f64, f64, bool);
    let eos = engine.eos_tokens()[0];
    let score = |length: usize, sum: f64| sum / (length as f64).powf(f64::from(length_penalty));
    let (mut live, mut complete) = (vec![Beam(prompt.to_vec(), vec![], 0.0, 0.0, false)], Vec::<Beam>::new());
    for _ in 0..tokens {
        let mut next = Vec::new();
        for Beam(tokens, bits, sum, ..) in &live {
            for offer in likeliest(engine, tokens, 2 * u32::try_from(width).unwrap()) {
                let sum = sum + f64::from(offer.logprob);
                let (mut tokens, mut bits) = (tokens.clone(), bits.clone());
                tokens.push(offer.id);
                bits.push(offer.logprob.to_bits());
                let ends = offer.id == eos;
                let beam =
                    Beam(tokens.clone(), bits, sum, score(tokens.len() - usize::from(ends), sum), ends);
                if ends { complete.push(beam) } else { next.push(beam) }
            }
        }
        next.sort_by(|one, other| other.3.total_cmp(&one.3));
        next.truncate(width);
        live = next;
    }
    complete.extend(live);
    complete.sort_by(|one, other| other.3.total_cmp(&one.3));
    complete.truncate(width);
    let found = |Beam(tokens, bits, _, score, ends): Beam| {
        (tokens[prompt.len()..].to_vec(), bits, score.to_bits(), ends)
    };
    complete.into_iter().map(found).collect()
}

/// Prompts, widths, lengths and penalties.
const CASES: [(&str, usize, u32, f32); 5] = [
    ("ROMEO:\n", 1, 8, 1.0),
    ("ROMEO:\nAy me! sad hours seem", 2, 12, 1.0),
    ("JULIET:\nWhat's in a name? That which we call a rose", 4, 20, 1.0),
    ("JULIET:\nWhat's in a name?", 3, 10, 0.0),
    ("Nurse:\n", 8, 9, 2.5),
];

#[test]
fn a_search_finds_what_one_finds_that_recomputes_every_beam() {
    let mut ends = 0;
    let mut plain = load(&Options { prefix_caching: false, ..options() });
    let mut engine = load(&options());
    for (text, width, tokens, penalty) in CASES {
        let prompt = encode(&engine, text);
        engine.add(search(1, &prompt, width as u64, tokens, penalty)).unwrap();
        let outputs = run(&mut engine);
        let ids: Vec<u64> = outputs.iter().map(|output| output.id.0).collect();
        assert_eq!(ids, (1..=width as u64).collect::<Vec<_>>(), "{text:?}");
        let expected = naive(&mut plain, &prompt, width, tokens, penalty);
        assert_eq!(found(&outputs), expected, "{text:?}");
        for output in &outputs {
            let ended = output.finish.as_ref().unwrap().reason == FinishReason::Stop;
            ends += u32::from(ended);
            let shown: Vec<u32> = output.tokens.iter().map(|token| token.id).collect();
            let shown = &shown[..shown.len() - usize::from(ended)];
            assert_eq!(output.text, engine.text().decode(shown, true));
        }
    }
    assert!(ends > 0, "no sequence ended by itself: the test shows less than it says");
    let totals = engine.snapshot().totals;
    assert!(totals.forks > 10 && totals.copied_blocks > 10, "beams fork: {totals:?}");
    assert_eq!(engine.snapshot().blocks.used, 0);
}

#[test]
fn a_search_finds_the_same_in_a_crowd_and_where_beams_must_yield() {
    let mut alone = load(&options());
    let prompt = encode(&alone, "JULIET:\nWhat's in a name? That which we call a rose");
    alone.add(search(1, &prompt, 4, 40, 1.0)).unwrap();
    let expected = found(&run(&mut alone));
    let tight = |blocks, prefix_caching, swaps: bool| Options {
        block_size: NonZeroU32::new(8).unwrap(),
        kv: KvSize::Blocks(blocks),
        max_model_len: Some(120),
        max_num_batched_tokens: 32,
        max_num_seqs: 6,
        prefix_caching,
        offloading: swaps.then_some(Offloading::new(1 << 20)),
        preemption: if swaps { Preemption::Swap } else { Preemption::Recompute },
        ..options()
    };
    let mut preemptions = 0;
    for options in
        [tight(100, true, false), tight(18, true, false), tight(16, false, false), tight(18, true, true)]
    {
        let mut engine = load(&options);
        let mut outputs = Vec::new();
        for round in 0..3 {
            let other = |id| Request {
                sampling: Sampling { max_tokens: Some(20), ignore_eos: true, ..Sampling::greedy() },
                ..Request::new(RequestId(id), &prompt[round..])
            };
            engine.add(other(100 + round as u64)).unwrap();
            engine.add(other(200 + round as u64)).unwrap();
            engine.step(Tick(0), &mut outputs);
            engine.add(search(1 + 10 * round as u64, &prompt, 4, 40, 1.0)).unwrap();
            outputs.extend(run(&mut engine));
            let own = |output: &&Output| output.beam_score.is_some();
            let answers: Vec<Output> = outputs.iter().filter(own).cloned().collect();
            assert_eq!(found(&answers), expected, "{options:?}");
            outputs.clear();
        }
        preemptions += engine.snapshot().totals.preemptions;
        assert_eq!(engine.snapshot().blocks.used, 0);
    }
    assert!(preemptions > 0, "nobody yielded: the test shows less than it says");
}

#[test]
fn a_search_is_cancelled_by_any_of_its_ids_and_leaves_nothing() {
    for id in [1, 3] {
        let mut engine = load(&options());
        let prompt = encode(&engine, "ROMEO:\n");
        engine.add(search(1, &prompt, 3, 50, 1.0)).unwrap();
        let mut outputs = Vec::new();
        for _ in 0..5 {
            engine.step(Tick(0), &mut outputs);
        }
        assert_eq!(engine.request(RequestId(1)).unwrap().id, RequestId(1));
        assert!(engine.cancel(RequestId(id)));
        assert!(!engine.cancel(RequestId(1)) && !engine.has_work() && outputs.is_empty());
        engine.check().unwrap();
        let snapshot = engine.snapshot();
        assert_eq!((snapshot.blocks.used, snapshot.totals.cancelled), (0, 1));
    }
}

#[test]
fn what_a_search_cannot_do_is_refused_by_name() {
    let mut engine = load(&options());
    let prompt = encode(&engine, "ROMEO:\n");
    let base = || search(1, &prompt, 3, 5, 1.0);
    let with = |sampling| Request { sampling, ..base() };
    let sampling = || base().sampling;
    let cases: Vec<(&str, Request)> = vec![
        ("length_penalty", search(1, &prompt, 3, 5, f32::NAN)),
        ("n", search(1, &prompt, 1000, 5, 1.0)),
        ("n", Request { beams: Some(Beams { others: vec![RequestId(1)], length_penalty: 1.0 }), ..base() }),
        ("stop", with(Sampling { stop: vec!["a".into()], ..sampling() })),
        ("min_tokens", with(Sampling { min_tokens: 2, ..sampling() })),
        ("logit_bias", with(Sampling { logit_bias: vec![(3, 1.0)], ..sampling() })),
        ("presence_penalty", with(Sampling { presence_penalty: 1.0, ..sampling() })),
        ("prompt_logprobs", with(Sampling { prompt_logprobs: Some(0), ..sampling() })),
    ];
    for (parameter, request) in cases {
        assert_eq!(engine.add(request).unwrap_err().parameter(), Some(parameter));
    }
    let reserved = Request::new(RequestId(1 << 63), &*prompt);
    assert_eq!(engine.add(reserved), Err(Refusal::ReservedId(1 << 63)));
    engine.add(base()).unwrap();
    assert_eq!(engine.add(Request::new(RequestId(2), &*prompt)), Err(Refusal::Duplicate(2)));
    assert_eq!(engine.add(search(3, &prompt, 2, 5, 1.0)), Err(Refusal::Duplicate(3)));
    run(&mut engine);
}

//! The engine as its callers see it: what is refused, how answers end, what is counted, and that nothing leaks.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::{load, run};
use quayline_engine::{
    BlockUse, Engine, FinishReason, KvSize, LoadError, ModelFiles, Options, Output, Refusal, Request,
    RequestId, Sampling, StopReason, Tick,
};

fn engine() -> Engine {
    load(&Options { max_model_len: Some(256), ..Options::default() })
}

fn text(outputs: &[Output]) -> String {
    outputs.iter().map(|output| output.text.as_str()).collect()
}

fn tokens(outputs: &[Output]) -> Vec<u32> {
    outputs.iter().flat_map(|output| &output.tokens).map(|token| token.id).collect()
}

fn request(engine: &Engine, prompt: &str, sampling: Sampling) -> Request {
    let prompt = engine.text().encode(prompt, true).unwrap();
    Request { sampling, ..Request::new(RequestId(1), prompt) }
}

fn greedy(max_tokens: u32) -> Sampling {
    Sampling { max_tokens: Some(max_tokens), ignore_eos: true, ..Sampling::greedy() }
}

#[test]
fn an_answer_comes_token_by_token_and_its_text_is_theirs() {
    let mut engine = engine();
    let request = request(&engine, "ROMEO:\n", greedy(20));
    let prompt_tokens = u32::try_from(request.prompt.len()).unwrap();
    engine.add(request).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(outputs.len(), 20);
    for (n, output) in (1..).zip(&outputs) {
        assert_eq!((output.output_tokens, output.prompt_tokens), (n, prompt_tokens));
        assert_eq!(output.tokens.len(), 1);
        assert_eq!(output.finish.is_some(), n == 20);
    }
    let finish = outputs[19].finish.clone().unwrap();
    assert_eq!((finish.reason, finish.stop), (FinishReason::Length, None));
    assert_eq!(engine.text().decode(&tokens(&outputs), true), text(&outputs));
}

#[test]
fn warming_up_changes_nothing_that_can_be_seen() {
    let (mut cold, mut warm) = (engine(), engine());
    for _ in 0..2 {
        warm.warm_up().unwrap();
        let mut said = [String::new(), String::new()];
        for (engine, said) in [&mut cold, &mut warm].into_iter().zip(&mut said) {
            // The second time the cache has the prompt.
            engine.add(request(engine, "ROMEO:\nBut, soft! what light through yonder", greedy(5))).unwrap();
            let outputs = run(engine);
            engine.check().unwrap();
            *said = format!("{outputs:?} {:?}", engine.snapshot());
        }
        assert_eq!(said[0], said[1]);
    }
}

#[test]
fn a_stop_string_ends_the_text_before_it_or_behind_it() {
    let mut engine = engine();
    let whole = request(&engine, "ROMEO:\n", greedy(30));
    engine.add(whole.clone()).unwrap();
    let whole_text = text(&run(&mut engine));
    let stop: String = whole_text.chars().skip(9).take(4).collect();
    let at = whole_text.find(&stop).unwrap();
    for include in [false, true] {
        let sampling = Sampling {
            stop: vec!["\u{1F600}".into(), stop.clone()],
            include_stop_str_in_output: include,
            ..greedy(30)
        };
        engine.add(Request { sampling, ..whole.clone() }).unwrap();
        let outputs = run(&mut engine);
        let end = if include { at + stop.len() } else { at };
        assert_eq!(text(&outputs), whole_text[..end]);
        let finish = outputs.last().unwrap().finish.clone().unwrap();
        assert_eq!(finish.reason, FinishReason::Stop);
        assert_eq!(finish.stop, Some(StopReason::String(stop.clone())));
    }
}

#[test]
fn a_stop_id_ends_the_text_and_is_named_and_a_minimum_holds_it_back() {
    let mut engine = engine();
    let whole = request(&engine, "ROMEO:\n", greedy(10));
    engine.add(whole.clone()).unwrap();
    let free = run(&mut engine);
    let stop = tokens(&free)[3];
    let first = tokens(&free).iter().position(|&id| id == stop).unwrap();
    let sampling = Sampling { stop_token_ids: vec![stop], ..greedy(10) };
    engine.add(Request { sampling: sampling.clone(), ..whole.clone() }).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(tokens(&outputs), tokens(&free)[..=first]);
    assert_eq!(outputs.last().unwrap().finish.clone().unwrap().stop, Some(StopReason::Token(stop)));
    assert_eq!(text(&outputs), engine.text().decode(&tokens(&free)[..first], true), "its text is left out");
    engine.add(Request { sampling: Sampling { min_tokens: 8, ..sampling }, ..whole }).unwrap();
    let outputs = run(&mut engine);
    assert!(outputs.len() >= 8 && !tokens(&outputs)[..8].contains(&stop));
}

#[test]
fn end_of_sequence_is_no_stop_reason_and_is_not_shown() {
    let mut engine = engine();
    let eos = engine.eos_tokens()[0];
    let bias =
        Sampling { logit_bias: vec![(eos, 100.0)], min_tokens: 2, skip_special_tokens: false, ..greedy(9) };
    let request = request(&engine, "ROMEO:\n", Sampling { ignore_eos: false, ..bias });
    engine.add(request.clone()).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(outputs.len(), 3, "two tokens at least, then the end");
    let finish = outputs[2].finish.clone().unwrap();
    assert_eq!((finish.reason, finish.stop), (FinishReason::Stop, None));
    let shown = engine.text().decode(&tokens(&outputs)[..2], false);
    assert_eq!(text(&outputs), shown);
    let ignoring = Sampling { ignore_eos: true, min_tokens: 0, ..request.sampling.clone() };
    engine.add(Request { sampling: ignoring, ..request }).unwrap();
    assert_eq!(tokens(&run(&mut engine)), [eos; 9]);
}

#[test]
fn logprobs_agree_with_prompt_logprobs_of_the_same_text() {
    let mut engine = engine();
    let first = request(&engine, "ROMEO:\n", Sampling { logprobs: Some(3), ..greedy(8) });
    engine.add(first.clone()).unwrap();
    let outputs = run(&mut engine);
    let generated: Vec<_> = outputs
        .iter()
        .flat_map(|output| &output.tokens)
        .map(|token| token.logprobs.clone().unwrap())
        .collect();
    let mut prompt = first.prompt.to_vec();
    prompt.extend(tokens(&outputs));
    let sampling = Sampling { prompt_logprobs: Some(3), ..greedy(1) };
    engine.add(Request { sampling, ..Request::new(RequestId(2), prompt.clone()) }).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(outputs[0].cached_tokens, 0, "nothing is read from the prefix cache");
    let of_prompt = outputs[0].prompt_logprobs.clone().unwrap();
    assert_eq!(of_prompt.len(), prompt.len());
    assert_eq!(of_prompt[0], None);
    for (position, expected) in (first.prompt.len()..).zip(&generated) {
        assert_eq!(of_prompt[position].as_ref(), Some(expected), "position {position}");
        assert_eq!(expected.top.len(), 3);
        assert_eq!(expected.chosen, expected.top[0], "greedy takes the most likely");
    }
}

#[test]
fn a_prefix_is_found_only_under_the_same_salt() {
    let mut engine = engine();
    let prompt: String = "Enter the Prince, with his train. ".repeat(6);
    let mut cached = Vec::new();
    for salt in [None, None, Some("a"), Some("b"), Some("a")] {
        let request = Request { cache_salt: salt.map(str::to_owned), ..request(&engine, &prompt, greedy(1)) };
        engine.add(request).unwrap();
        cached.push(run(&mut engine)[0].cached_tokens > 0);
    }
    assert_eq!(cached, [false, true, false, false, true]);
    let prefix = engine.snapshot().prefix;
    assert!(prefix.hits > 0 && prefix.hits < prefix.queries);
    assert!(engine.reset_prefix_cache());
    assert!(engine.snapshot().occupancy.iter().all(|&block| block == BlockUse::Free));
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let mut engine =
        load(&Options { max_model_len: Some(32), max_queued_requests: Some(2), ..Options::default() });
    let refusal = |engine: &mut Engine, prompt: Vec<u32>, sampling: Sampling| {
        engine.add(Request { sampling, ..Request::new(RequestId(7), prompt) }).unwrap_err()
    };
    assert_eq!(refusal(&mut engine, vec![], greedy(1)), Refusal::EmptyPrompt);
    let long = Refusal::PromptTooLong { prompt: 32, context: 32 };
    assert_eq!(refusal(&mut engine, vec![1; 32], greedy(1)), long);
    let vocab_size = engine.vocab_size();
    let unknown = Refusal::UnknownToken { token: vocab_size, vocab_size };
    assert_eq!(refusal(&mut engine, vec![1, vocab_size], greedy(1)), unknown);
    let bad = refusal(&mut engine, vec![1], Sampling { top_p: 2.0, ..greedy(1) });
    assert_eq!((bad.parameter(), bad.is_temporary()), (Some("top_p"), false));
    engine.add(Request::new(RequestId(7), vec![1])).unwrap();
    assert_eq!(refusal(&mut engine, vec![1], greedy(1)), Refusal::Duplicate(7));
    engine.add(Request::new(RequestId(8), vec![1])).unwrap();
    let full = engine.add(Request::new(RequestId(9), vec![1])).unwrap_err();
    assert!(full.is_temporary(), "{full}");
    engine.check().unwrap();
}

#[test]
fn the_context_ends_an_answer_that_has_no_limit() {
    let mut engine = load(&Options { max_model_len: Some(24), ..Options::default() });
    let sampling = Sampling { max_tokens: None, ..greedy(1) };
    engine.add(request(&engine, "ROMEO:\n", sampling)).unwrap();
    let outputs = run(&mut engine);
    let last = outputs.last().unwrap();
    assert_eq!(last.prompt_tokens + last.output_tokens, 24);
    assert_eq!(last.finish.clone().unwrap().reason, FinishReason::Length);
}

#[test]
fn options_that_do_not_fit_are_refused_by_name() {
    let refused = |options: Options| match Engine::load(&ModelFiles::bundled(), &options) {
        Err(LoadError::Options { option, .. }) => option,
        other => panic!("{other:?}"),
    };
    let base = Options::default;
    assert_eq!(refused(Options { max_model_len: Some(1 << 20), ..base() }), "max_model_len");
    assert_eq!(
        refused(Options { max_model_len: Some(256), kv: KvSize::Blocks(3), ..base() }),
        "num_gpu_blocks_override"
    );
    assert_eq!(refused(Options { kv: KvSize::Bytes(10), ..base() }), "kv_cache_memory_bytes");
    assert_eq!(refused(Options { max_num_seqs: 0, ..base() }), "max_num_seqs");
    assert_eq!(refused(Options { max_num_batched_tokens: 1, ..base() }), "max_num_batched_tokens");
    let small = load(&Options { kv: KvSize::Blocks(3), ..base() });
    assert_eq!(small.model_tokens_max(), 48, "without a wish, the longest sequence is what fits");
}

/// The bundled model as a directory with one file changed; what loading it says.
fn refusal_with(name: &str, file: &str, change: impl Fn(String) -> String) -> String {
    let bundled = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bundled");
    let directory = std::env::temp_dir().join(format!("quayline-engine-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    for entry in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(bundled.join(entry), directory.join(entry)).unwrap();
    }
    let changed = change(std::fs::read_to_string(bundled.join(file)).unwrap());
    std::fs::write(directory.join(file), changed).unwrap();
    let loaded = ModelFiles::open(&directory).and_then(|files| Engine::load(&files, &Options::default()));
    // A directory left behind in the temporary folder harms nobody.
    let _ = std::fs::remove_dir_all(&directory);
    let message = loaded.expect_err("this must not load").to_string();
    let told = message.strip_prefix(&format!("{}: ", directory.display()));
    told.expect("the message names the directory").to_owned()
}

#[test]
fn text_that_does_not_fit_the_model_is_refused_by_name() {
    let config = "tokenizer_config.json";
    let message = refusal_with("vocabulary", config, |json| {
        json.replace(
            "\"added_tokens_decoder\": {",
            "\"added_tokens_decoder\": {\"1536\": {\"content\": \"<x>\"},",
        )
    });
    assert_eq!(message, "tokenizer.json names token 1536 but config.json has vocab_size 1536");
    let message = refusal_with("template", config, |json| json.replace("{%- endfor -%}", "{%- endfro -%}"));
    assert!(message.starts_with("chat template: syntax error"), "{message}");
    let message = refusal_with("broken", "tokenizer.json", |json| json[..json.len() / 2].to_owned());
    assert!(message.starts_with("tokenizer.json: "), "{message}");
}

#[test]
fn a_snapshot_tells_what_is_going_on() {
    let mut engine = load(&Options {
        max_model_len: Some(64),
        max_num_seqs: 2,
        max_num_batched_tokens: 16,
        ..Options::default()
    });
    for id in 0..4 {
        engine.add(Request { sampling: greedy(4), ..Request::new(RequestId(id), vec![5; 20]) }).unwrap();
    }
    let mut outputs = Vec::new();
    assert_eq!(engine.step(Tick(9), &mut outputs), 16);
    assert!(outputs.is_empty(), "the prompt is not read yet");
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.running.len(), snapshot.waiting.len(), snapshot.waiting_requests), (1, 3, 3));
    let first = &snapshot.running[0];
    assert_eq!((first.id, first.computed_tokens, first.started), (RequestId(0), 16, Some(Tick(9))));
    assert!(snapshot.waiting.iter().all(|request| request.waits_for.is_some()), "{snapshot:?}");
    assert_eq!((snapshot.last_step.prefill_tokens, snapshot.last_step.decode_requests), (16, 0));
    assert_eq!(snapshot.occupancy.len(), snapshot.blocks.total as usize);
    let held = snapshot.occupancy.iter().filter(|&&block| block != BlockUse::Free).count();
    assert_eq!(held, snapshot.blocks.used as usize);
    assert!(engine.cancel(RequestId(3)) && !engine.cancel(RequestId(3)));
    engine.step(Tick(10), &mut outputs);
    let started: Vec<_> = outputs.iter().map(|output| (output.id, output.started)).collect();
    assert_eq!(started[0], (RequestId(0), Some(Tick(9))));
    run(&mut engine);
    let totals = engine.snapshot().totals;
    assert_eq!((totals.accepted, totals.finished, totals.cancelled), (4, 3, 1));
    assert_eq!((totals.prompt_tokens, totals.output_tokens), (60, 12));
}

#[test]
fn hours_of_random_requests_and_cancels_leave_nothing_behind() {
    for async_scheduling in [false, true] {
        random_requests_and_cancels(async_scheduling);
    }
}

fn random_requests_and_cancels(async_scheduling: bool) {
    let mut engine = load(&Options {
        async_scheduling,
        kv: KvSize::Blocks(24),
        max_model_len: Some(160),
        max_num_seqs: 6,
        max_num_batched_tokens: 32,
        ..Options::default()
    });
    let mut state = 1_u64;
    let mut dice = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let (mut outputs, mut ended, mut cancelled, mut next) = (Vec::new(), 0, 0, 0);
    for now in 0..600 {
        if dice(3) == 0 && now < 500 {
            let prompt: Vec<u32> =
                (0..=dice(80)).map(|i| 3 + u32::try_from(i * (1 + dice(2)) % 90).unwrap()).collect();
            let seed = Some(dice(100));
            let max_tokens = Some(1 + u32::try_from(dice(40)).unwrap());
            let sampling = Sampling { seed, max_tokens, ..Sampling::default() };
            engine.add(Request { sampling, ..Request::new(RequestId(next), prompt) }).unwrap();
            next += 1;
        }
        if dice(9) == 0 && next > 0 {
            cancelled += u64::from(engine.cancel(RequestId(dice(next))));
        }
        engine.step(Tick(now), &mut outputs);
        ended += outputs.drain(..).filter(|output| output.finish.is_some()).count() as u64;
        if now % 10 == 0 {
            engine.check().unwrap();
        }
    }
    ended += run(&mut engine).iter().filter(|output| output.finish.is_some()).count() as u64;
    let snapshot = engine.snapshot();
    assert!(snapshot.totals.preemptions > 0 && cancelled > 5, "{:?}", snapshot.totals);
    assert_eq!(ended + cancelled, next, "every request has one end");
    assert_eq!((snapshot.blocks.used, snapshot.blocks.free), (0, 24));
    assert!(engine.reset_prefix_cache());
}

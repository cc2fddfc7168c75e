//! The tokens that a grammar takes, over tokenizers of every kind: exactly those that can begin what is left to say.
//!
//! Most tokenizers lie in the folder `../shared/data` beside the repository; what is absent is skipped aloud.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![expect(clippy::panic, reason = "a test that cannot set itself up has failed")]
#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use quayline_engine::{Constraint, Grammars, Guide, GuideState, ModelFiles, Text, look_ahead};
use quayline_gpu_kernels::cpu::Workers;
use serde_json::{Map, Value, json};

#[path = "text/tiktoken.rs"]
mod tiktoken;

fn workers(threads: usize) -> Workers {
    Workers::new(NonZeroUsize::new(threads)).unwrap()
}

#[test]
fn threads_change_no_mask() {
    let text = Arc::new(Text::load(&ModelFiles::bundled()).unwrap());
    let grammars = Grammars::new(Arc::clone(&text), &[]);
    let grammar = grammars.compile(&Constraint::Regex("[a-z]+( [A-Z]+)*".into())).unwrap();
    let begun = |at| {
        let mut guide = grammar.guide();
        let first = (0..text.vocab_size()).filter(|&id| guide.allows(id)).nth(at).unwrap();
        guide.push(first);
        guide
    };
    let masks = |count, threads| {
        let mut guides: Vec<Guide> = (0..count).map(begun).collect();
        look_ahead(&mut guides, &workers(threads));
        let allowed =
            |guide: &Guide| -> Vec<u32> { (0..text.vocab_size()).filter(|&id| guide.allows(id)).collect() };
        guides.iter().map(allowed).collect::<Vec<_>>()
    };
    for count in [0, 1, 2, 5] {
        assert_eq!(masks(count, 3), masks(count, 1), "{count} guides");
    }
    assert!(masks(5, 3).iter().all(|allowed| !allowed.is_empty()));
}

/// A file of the shared data, unpacked; `None`, aloud, where it is absent.
fn shared(path: &str) -> Option<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/tokenizers").join(path);
    if !path.exists() {
        eprintln!("skipped: no {}", path.display());
        return None;
    }
    let output = std::process::Command::new("gzip").arg("-dc").arg(path).output().unwrap();
    assert!(output.status.success());
    Some(output.stdout)
}

fn text(tokenizer: Vec<u8>) -> Arc<Text> {
    let files = Box::leak(Box::new([("tokenizer.json", &*tokenizer.leak())]));
    Arc::new(Text::load(&ModelFiles::from_memory("tokenizer", files)).unwrap())
}

/// Pieces of text with `▁` for the space, single bytes, one special token, and a byte that also has a piece.
fn sentencepiece_like() -> Arc<Text> {
    let mut vocab: Map<String, Value> =
        (0..=255).map(|byte| (format!("<0x{byte:02X}>"), json!(byte))).collect();
    for piece in ["▁", "a", "an", "▁a", "▁an", "é", "né", "▁▁", "</s>", "!", "{\"", "\":"] {
        let id = vocab.len();
        vocab.insert(piece.into(), json!(id));
    }
    let special = json!({"id": vocab["</s>"], "content": "</s>", "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false});
    let back = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let decoder = json!({"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]});
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}});
    text(tokenizer.to_string().into_bytes())
}

fn bundled() -> Arc<Text> {
    Arc::new(Text::load(&ModelFiles::bundled()).unwrap())
}

/// Every tokenizer there is, with its end-of-sequence.
static TOKENIZERS: LazyLock<Vec<(&str, Arc<Text>, u32)>> = LazyLock::new(tokenizers);

fn tokenizers() -> Vec<(&'static str, Arc<Text>, u32)> {
    let json = |path| shared(path).map(text);
    let llama = || {
        shared("llama3/tokenizer.model.gz").map(|ranks| text(tiktoken::to_json(&ranks, tiktoken::LLAMA_3)))
    };
    let all = [
        ("bundled", Some(bundled()), "<|end|>"),
        ("sentencepiece-like", Some(sentencepiece_like()), "</s>"),
        ("phi-2", json("phi-2/tokenizer.json.gz"), "<|endoftext|>"),
        ("phi-3-mini", json("phi-3-mini/tokenizer.json.gz"), "<|endoftext|>"),
        ("llama3", llama(), "!"),
    ];
    let known = all.into_iter().filter_map(|(name, text, eos)| Some((name, text?, eos)));
    known.map(|(name, text, eos)| (name, Arc::clone(&text), text.token_id(eos).unwrap())).collect()
}

/// One of the tokens that may come next, by a number.
fn pick(guide: &Guide, vocab_size: u32, number: u64) -> u32 {
    let allowed: Vec<u32> = (0..vocab_size).filter(|&id| guide.allows(id)).collect();
    allowed[usize::try_from(number % allowed.len() as u64).unwrap()]
}

fn dice(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 11
    }
}

#[test]
fn what_may_come_is_what_begins_the_rest_of_a_choice() {
    let choices = [" an apple", "an \u{e9}t\u{e9}", "\u{2764}\u{fe0f} {\"a\": 1}", "an", "\t\n"];
    let choice = Constraint::Choice(choices.map(str::to_owned).to_vec());
    for (name, text, eos) in &*TOKENIZERS {
        let grammar = Grammars::new(Arc::clone(text), &[*eos]).compile(&choice).unwrap();
        let bytes: Vec<Vec<u8>> = (0..text.vocab_size())
            .map(|id| text.token(id).map(|token| token.bytes).unwrap_or_default())
            .collect();
        for seed in 0..4 {
            let (mut guide, mut next, mut said) = (grammar.guide(), dice(seed), Vec::new());
            loop {
                let rest = |choice: &&str| choice.as_bytes().strip_prefix(&*said).map(<[u8]>::to_vec);
                let rests: Vec<Vec<u8>> = choices.iter().filter_map(rest).collect();
                for (id, bytes) in (0..).zip(&bytes) {
                    let is_end = id == *eos || text.is_special(id);
                    let begins = !bytes.is_empty() && rests.iter().any(|rest| rest.starts_with(bytes));
                    let expected =
                        if is_end { id == *eos && rests.iter().any(Vec::is_empty) } else { begins };
                    assert_eq!(
                        guide.allows(id),
                        expected,
                        "{name}, seed {seed}: {id} {bytes:?} after {said:?}"
                    );
                }
                let id = pick(&guide, text.vocab_size(), next());
                let state = guide.push(id);
                if id != *eos {
                    said.extend(&bytes[id as usize]);
                }
                assert_eq!(state == GuideState::Ended, id == *eos, "{name}, seed {seed}");
                if state != GuideState::Open {
                    break;
                }
                assert_eq!(guide.look_ahead(), GuideState::Open, "{name}, seed {seed}");
            }
            let said = String::from_utf8(said).unwrap();
            assert!(choices.contains(&said.as_str()), "{name}, seed {seed}: {said:?}");
        }
    }
}

#[test]
fn whatever_may_come_in_the_end_is_what_the_schema_says() {
    let schema = json!({ "type": "object", "properties": { "n": { "type": "integer", "minimum": 0, "maximum": 999 },
        "caf\u{e9}": { "type": "string", "maxLength": 5 } }, "required": ["n", "caf\u{e9}"],
        "additionalProperties": false });
    for (name, text, eos) in &*TOKENIZERS {
        let grammars = Grammars::new(Arc::clone(text), &[*eos]);
        let grammar = grammars.compile(&Constraint::Json(schema.clone())).unwrap();
        for seed in 0..4 {
            let (mut guide, mut next, mut said) = (grammar.guide(), dice(seed), Vec::new());
            let mut state = GuideState::Open;
            while state == GuideState::Open {
                let id = pick(&guide, text.vocab_size(), next());
                said.extend(text.token(id).unwrap().bytes);
                state = guide.push(id);
                if state == GuideState::Open {
                    state = guide.look_ahead();
                }
            }
            assert_eq!(state, GuideState::Complete, "{name}, seed {seed}");
            let said = String::from_utf8(said).unwrap();
            let value: Value =
                serde_json::from_str(&said).unwrap_or_else(|e| unreachable!("{name}: {said}: {e}"));
            assert!(value["n"].as_u64().unwrap() < 1000, "{name}, seed {seed}: {said}");
            assert!(value["caf\u{e9}"].as_str().unwrap().chars().count() <= 5, "{name}, seed {seed}: {said}");
        }
    }
}

/// Prints what a mask costs: `cargo test --release -p quayline-engine --test masks -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn what_a_mask_costs() {
    let schema = json!({ "type": "object", "properties": { "name": { "type": "string" },
        "tags": { "type": "array", "items": { "type": "string", "pattern": "^[a-z]+$" } },
        "age": { "type": "integer", "minimum": 0, "maximum": 120 } }, "required": ["name", "tags", "age"],
        "additionalProperties": false });
    let said = r#"{"name": "Juliet Capulet of Verona", "tags": ["fair", "young", "sad"], "age": 13}"#;
    for (name, text, eos) in &*TOKENIZERS {
        let start = Instant::now();
        let grammars = Grammars::new(Arc::clone(text), &[*eos]);
        grammars.compile(&Constraint::JsonObject).unwrap();
        let tree = start.elapsed();
        let start = Instant::now();
        let grammar = grammars.compile(&Constraint::Json(schema.clone())).unwrap();
        let compiled = start.elapsed();
        let start = Instant::now();
        let mut guide = grammar.guide();
        let copied = start.elapsed();
        let bytes: Vec<Vec<u8>> = (0..text.vocab_size())
            .map(|id| text.token(id).map_or_else(Vec::new, |token| token.bytes))
            .collect();
        let mut rest = said.as_bytes();
        let mut row = vec![0.0_f32; text.vocab_size() as usize];
        let (mut masks, mut applied) = (Vec::new(), Duration::ZERO);
        let mut eights: [Vec<Guide>; 2] = std::array::from_fn(|_| (0..8).map(|_| grammar.guide()).collect());
        let mut together = [Duration::ZERO; 2];
        let threads = [1, 2].map(workers);
        while !rest.is_empty() {
            let begins = |&id: &u32| guide.allows(id) && rest.starts_with(&bytes[id as usize]);
            let id =
                (0..text.vocab_size()).filter(begins).max_by_key(|&id| bytes[id as usize].len()).unwrap();
            rest = &rest[bytes[id as usize].len()..];
            let start = Instant::now();
            let state = guide.push(id);
            if state == GuideState::Open {
                guide.look_ahead();
            }
            masks.push(start.elapsed());
            for ((eight, together), workers) in eights.iter_mut().zip(&mut together).zip(&threads) {
                let open = eight.iter_mut().all(|guide| guide.push(id) == GuideState::Open);
                let start = Instant::now();
                if open {
                    look_ahead(eight, workers);
                }
                *together += start.elapsed();
            }
            let start = Instant::now();
            guide.apply(&mut row);
            applied += start.elapsed();
        }
        let count = u32::try_from(masks.len()).unwrap();
        masks.sort_unstable();
        let (mean, worst) = (masks.iter().sum::<Duration>() / count, masks[masks.len() - 1]);
        let median = masks[masks.len() / 2];
        let vocab = text.vocab_size();
        eprintln!(
            "{name}, {vocab} ids: tree {tree:?}, schema {compiled:?}, copy {copied:?}, mask median {median:?} \
             mean {mean:?} worst {worst:?}, put on a row {:?}; eight masks {:?} on one thread, {:?} on two",
            applied / count,
            together[0] / count,
            together[1] / count
        );
    }
}

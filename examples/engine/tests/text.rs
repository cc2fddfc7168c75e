//! Tokenizers, chat templates and streams of text against what the libraries of others make of them.
//!
//! `text/` holds small goldens made by `text/make_goldens.py`. The rest needs the folder `../shared/data`
//! beside the repository and says so where it is absent.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![expect(clippy::panic, reason = "a test that cannot set itself up has failed")]
#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use directory::Directory;
use proptest::prelude::*;
use quayline_engine::{Chat, ModelFiles, Text, TextError};
use serde_json::{Map, Value, json};

#[path = "common/directory.rs"]
mod directory;
#[path = "text/tiktoken.rs"]
mod tiktoken;

fn here(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/text").join(file)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A file of the shared data, unpacked; `None`, aloud, where it is absent.
fn shared(path: &str) -> Option<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    let Ok(bytes) = fs::read(&path) else {
        eprintln!("skipped: no {}", path.display());
        return None;
    };
    if path.extension().is_some_and(|extension| extension == "gz") {
        return Some(unpack(&path));
    }
    Some(bytes)
}

/// The standard tool unpacks; the data is only there on machines that have it.
fn unpack(path: &Path) -> Vec<u8> {
    let output = std::process::Command::new("gzip").arg("-dc").arg(path).output().unwrap();
    assert!(output.status.success(), "gzip -dc {}", path.display());
    output.stdout
}

/// A checkpoint directory with nothing but text in it.
fn directory_of(name: &str, files: &[(&str, &[u8])]) -> Directory {
    let directory = Directory::new(name);
    fs::write(directory.0.join("config.json"), "{}").unwrap();
    files.iter().for_each(|(file, bytes)| fs::write(directory.0.join(file), bytes).unwrap());
    directory
}

impl Directory {
    fn text(&self) -> Arc<Text> {
        Arc::new(Text::load(&ModelFiles::open(&self.0).unwrap()).unwrap())
    }
}

fn text_of(name: &str, files: &[(&str, &[u8])]) -> Arc<Text> {
    directory_of(name, files).text()
}

fn bundled() -> Arc<Text> {
    static TEXT: LazyLock<Arc<Text>> =
        LazyLock::new(|| Arc::new(Text::load(&ModelFiles::bundled()).unwrap()));
    Arc::clone(&TEXT)
}

/// A vocabulary of the sentencepiece kind: `▁` for a space, single bytes, one leading space dropped.
fn sentencepiece_like() -> Arc<Text> {
    static TEXT: LazyLock<Arc<Text>> = LazyLock::new(make_sentencepiece_like);
    Arc::clone(&TEXT)
}

fn make_sentencepiece_like() -> Arc<Text> {
    let mut vocab = Map::new();
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(byte));
    }
    for piece in ["▁", "a", "b", "é", "▁a", "ab", "▁▁", "<s>", "!"] {
        let id = vocab.len();
        vocab.insert(piece.into(), json!(id));
    }
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let back = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let special = json!({"id": vocab["<s>"], "content": "<s>", "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false});
    let merges = ["▁ a", "a b", "▁ ▁"];
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": merges}});
    text_of("sentencepiece", &[("tokenizer.json", tokenizer.to_string().as_bytes())])
}

#[test]
fn the_bundled_tokenizer_gives_the_ids_of_transformers() {
    let text = bundled();
    for case in read_json(&here("tokenizer.json")).as_array().unwrap() {
        let (string, ids) = (case["text"].as_str().unwrap(), &case["ids"]);
        let encoded = text.encode(string, false).unwrap();
        assert_eq!(&json!(encoded), ids, "{string:?}");
        assert_eq!(text.decode(&encoded, false), string);
    }
}

/// Whatever streams out, in pieces, is what decoding at once gives.
fn streamed(text: &Arc<Text>, ids: &[u32], skip: bool) -> String {
    let mut stream = text.stream(skip, &[]);
    let mut out = String::new();
    for &id in ids {
        stream.push(id, &mut out);
    }
    stream.finish(&mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn text_comes_back_whole_from_any_tokens(string in "\\PC{0,40}", newline in "[\n\t ]{0,3}") {
        let string = format!("{string}{newline}");
        for text in [bundled(), sentencepiece_like()] {
            let ids = text.encode(&string, false).unwrap();
            prop_assert_eq!(&text.decode(&ids, false), &string);
            prop_assert_eq!(&streamed(&text, &ids, false), &string);
            // No step shows half a character.
            let mut stream = text.stream(false, &[]);
            let mut shown = String::new();
            for &id in &ids {
                stream.push(id, &mut shown);
                prop_assert!(string.starts_with(&shown), "{:?} is no beginning of {:?}", shown, string);
            }
        }
    }

    #[test]
    fn any_tokens_stream_as_they_decode(ids in prop::collection::vec(0_u32..300, 0..60), skip: bool) {
        for text in [bundled(), sentencepiece_like()] {
            prop_assert_eq!(streamed(&text, &ids, skip), text.decode(&ids, skip));
        }
    }

    #[test]
    fn a_text_that_continues_another_is_the_rest_of_both(
        string in "[a-c é]{1,20}", at in 0_usize..20,
    ) {
        for text in [bundled(), sentencepiece_like()] {
            let ids = text.encode(&string, false).unwrap();
            let (before, after) = ids.split_at(at.min(ids.len()));
            let mut stream = text.stream(false, before);
            let mut rest = String::new();
            after.iter().for_each(|&id| stream.push(id, &mut rest));
            stream.finish(&mut rest);
            let shown = text.decode(before, false);
            // Where the cut is inside a character neither side has it.
            if !shown.contains('\u{FFFD}') {
                prop_assert_eq!(shown + &rest, string.clone());
            }
        }
    }
}

#[test]
fn special_tokens_are_skipped_or_shown() {
    let text = sentencepiece_like();
    let special = text.token_id("<s>").unwrap();
    assert!(text.is_special(special));
    let a = text.token_id("▁a").unwrap();
    assert_eq!(text.decode(&[special, a, special], true), "a");
    assert_eq!(text.decode(&[special, a, special], false), "<s> a<s>");
    assert_eq!(text.token(a).unwrap().bytes, b" a");
    assert_eq!(text.token(0xC3).unwrap().bytes, [0xC3]);
    assert_eq!(text.token(0xC3).unwrap().text, "\u{FFFD}");
    assert_eq!(text.token(100_000), None);
}

fn cases() -> BTreeMap<String, Chat> {
    let Value::Object(cases) = read_json(&here("cases.json")) else { panic!("cases.json is no object") };
    let variables =
        json!({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"});
    let chat = |case: Value| {
        let list = |name: &str| case.get(name).and_then(Value::as_array).cloned();
        let flag = |name: &str| case.get(name).and_then(Value::as_bool).unwrap_or(false);
        Chat {
            messages: list("messages").unwrap(),
            tools: list("tools"),
            add_generation_prompt: flag("add_generation_prompt"),
            continue_final_message: flag("continue_final_message"),
            variables: variables.as_object().unwrap().clone(),
            ..Chat::default()
        }
    };
    cases.into_iter().map(|(name, case)| (name, chat(case))).collect()
}

/// The rendered text with dates made equal, or `None` where the template refuses.
fn render(text: &Text, source: &str, chat: &Chat) -> Option<String> {
    let rendered = text.render_chat(&Chat { template: Some(source.into()), ..chat.clone() });
    match rendered {
        Ok(rendered) => Some(without_dates(&rendered)),
        Err(TextError::Raised(_) | TextError::Template(_) | TextError::FinalMessageNotRendered) => None,
        Err(error) => panic!("{error}"),
    }
}

/// A template may say the day it is; whatever is written like one of these is such a day.
const DATES: [&str; 2] = ["2026-11-21", "21 Nov 2026"];

fn without_dates(text: &str) -> String {
    let alike = |shown: char, date: char| match date {
        _ if date.is_ascii_digit() => shown.is_ascii_digit(),
        _ if date.is_ascii_uppercase() => shown.is_ascii_uppercase(),
        _ if date.is_ascii_lowercase() => shown.is_ascii_lowercase(),
        _ => shown == date,
    };
    let begins_with = |text: &str, date: &str| {
        text.chars().take(date.len()).count() == date.len()
            && text.chars().zip(date.chars()).all(|(s, d)| alike(s, d))
    };
    let (mut out, mut rest) = (String::new(), text);
    while let Some(first) = rest.chars().next() {
        let date = DATES.iter().find(|date| begins_with(rest, date));
        match date {
            Some(_) => out.push_str("DATE"),
            None => out.push(first),
        }
        rest = &rest[date.map_or(first.len_utf8(), |date| date.len())..];
    }
    out
}

#[test]
fn the_day_makes_no_difference() {
    assert_eq!(without_dates("é 2026-11-22, 01 Jan 2030\n"), "é DATE, DATE\n");
    assert_eq!(
        without_dates("2026-11-2 and 1 Jan 2030, 21 NOV 2026"),
        "2026-11-2 and 1 Jan 2030, 21 NOV 2026"
    );
}

#[test]
fn templates_render_what_transformers_renders() {
    let text = bundled();
    let cases = cases();
    let Value::Object(goldens) = read_json(&here("rendered.json")) else { panic!("no object") };
    assert!(goldens.len() >= 4);
    for (template, expected) in &goldens {
        let source = fs::read_to_string(here("templates").join(template)).unwrap();
        for (case, chat) in &cases {
            let rendered = render(&text, &source, chat);
            assert_eq!(rendered.as_deref(), expected[case].as_str(), "{template}, case {case}");
        }
    }
}

/// Templates that transformers cannot render without tools.
const WANT_TOOLS: [&str; 2] = [
    "llama.cpp/CohereForAI-c4ai-command-r-plus-tool_use.jinja",
    "llama.cpp/NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja",
];

#[test]
fn all_published_templates_render_what_transformers_renders() {
    use sha2::Digest as _;
    let text = bundled();
    let cases = cases();
    let Value::Object(goldens) = read_json(&here("hashes.json")) else { panic!("no object") };
    let mut differ = Vec::new();
    for (template, expected) in &goldens {
        let Some(source) = shared(&format!("chat-templates/{template}")) else { return };
        let source = String::from_utf8(source).unwrap();
        for (case, chat) in &cases {
            let hash = render(&text, &source, chat).map(|rendered| {
                sha2::Sha256::digest(rendered).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
            });
            // Where Python cannot iterate over the tools that are not there, Jinja here finds none.
            let lenient =
                expected[case].is_null() && chat.tools.is_none() && WANT_TOOLS.contains(&&**template);
            if !lenient && hash.as_deref() != expected[case].as_str() {
                differ.push(format!("{template} {case}"));
            }
        }
    }
    assert_eq!(differ, Vec::<String>::new(), "of {} templates", goldens.len());
}

#[test]
fn conversations_with_tools_render_as_mistral_common_does() {
    let text = bundled();
    let variables = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().unwrap().clone();
    let folder = "tokenizers/golden/mistral-common";
    let mut compared = 0;
    for sample in ["no_tools", "get_weather_full", "get_weather_no_history", "get_weather_no_system_prompt"] {
        let Some(conversation) = shared(&format!("{folder}/{sample}/sample.json")) else { return };
        let conversation: Value = serde_json::from_slice(&conversation).unwrap();
        let chat = Chat {
            messages: conversation["messages"].as_array().unwrap().clone(),
            tools: conversation.get("tools").and_then(Value::as_array).cloned(),
            variables: variables.clone(),
            ..Chat::default()
        };
        for version in ["v2", "v3"] {
            let golden = shared(&format!("{folder}/{sample}/text_{version}.txt")).unwrap();
            let golden = String::from_utf8(golden).unwrap().replace('▁', " ").replace("<0x0A>", "\n");
            let golden = with_results_as_text(golden, &chat.messages);
            let source = shared(&format!("chat-templates/mistral-common/{version}_spm.jinja")).unwrap();
            let template = Some(String::from_utf8(source).unwrap());
            match text.render_chat(&Chat { template, ..chat.clone() }) {
                Ok(rendered) => assert_eq!(rendered, golden, "{sample} {version}"),
                Err(error) => panic!("{sample} {version}: {error}"),
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 8);
}

/// mistral-common reads the result of a tool as JSON where it is; its templates, which cannot, leave it text.
fn with_results_as_text(mut golden: String, messages: &[Value]) -> String {
    for message in messages {
        let content = message["content"].as_str().unwrap_or_default();
        if let Ok(Value::Object(fields)) = serde_json::from_str(content) {
            let fields: Vec<String> =
                fields.iter().map(|(name, value)| format!("{}: {value}", json!(name))).collect();
            golden = golden.replace(&format!("{{{}}}", fields.join(", ")), &json!(content).to_string());
        }
    }
    golden
}

/// The 47 hard strings of llama.cpp and the ids that a vocabulary gives to them; returns how many agree.
fn llama_cpp_goldens(text: &Text, name: &str) -> Option<usize> {
    let folder = "tokenizers/golden/llama.cpp";
    let strings = String::from_utf8(shared(&format!("{folder}/ggml-vocab.inp"))?).unwrap();
    let ids = String::from_utf8(shared(&format!("{folder}/ggml-vocab-{name}.out"))?).unwrap();
    let strings: Vec<&str> = strings.split("\n__ggml_vocab_test__\n").collect();
    let agree = strings.iter().zip(ids.split('\n')).filter(|(string, ids)| {
        let expected: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let encoded = text.encode(string, false).unwrap();
        if encoded == expected {
            assert_eq!(text.decode(&encoded, false), **string, "{name}");
        }
        encoded == expected
    });
    Some(agree.count())
}

#[test]
fn phi_3_and_phi_2_give_the_reference_ids() {
    for (model, golden, agree) in [("phi-3-mini", "phi-3", 47), ("phi-2", "gpt-2", 40)] {
        let folder = format!("tokenizers/{model}");
        let Some(tokenizer) = shared(&format!("{folder}/tokenizer.json.gz")) else { return };
        let config = shared(&format!("{folder}/tokenizer_config.json")).unwrap();
        let text = text_of(model, &[("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)]);
        assert_eq!(llama_cpp_goldens(&text, golden), Some(agree), "{model}");
        swift_goldens(&text, model);
    }
}

/// A French paragraph: ids both ways.
fn swift_goldens(text: &Arc<Text>, model: &str) {
    let (file, skip) = if model == "phi-2" { ("gpt2_encoded_tokens", 0) } else { ("llama_encoded", 1) };
    let golden = shared(&format!("tokenizers/golden/swift-transformers/{file}.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let paragraph = golden["text"].as_str().unwrap();
    let ids = ["token_ids", "bpe_token_ids", "ids"].iter().find_map(|name| golden[*name].as_array());
    let ids: Vec<u32> = ids.unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect();
    assert_eq!(text.encode(paragraph, false).unwrap(), ids[skip..], "{model}");
    assert_eq!(streamed(text, &ids[skip..], false), paragraph);
}

#[test]
fn llama_3_gives_the_reference_ids() {
    let Some(ranks) = shared("tokenizers/llama3/tokenizer.model.gz") else { return };
    let config = shared("tokenizers/llama3/meta-llama-3-8b-instruct/tokenizer_config.json").unwrap();
    let tokenizer = tiktoken::to_json(&ranks, tiktoken::LLAMA_3);
    let text = text_of("llama3", &[("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)]);
    assert_eq!(text.vocab_size(), 128_256);
    assert_eq!(text.token_id("<|eot_id|>"), Some(128_009));
    assert_eq!(llama_cpp_goldens(&text, "llama-bpe"), Some(47));
    assert!(text.has_chat_template());
}

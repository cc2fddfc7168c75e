//! Answers that must be something: every one of them is, whatever the model would rather say.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;

use quayline_engine::{
    Constraint, Engine, FinishReason, Grammar, ModelFiles, Options, Output, Request, RequestId, Sampling,
    Tick,
};
use serde::Deserialize;
use serde_json::{Value, json};

fn engine() -> Engine {
    let options = Options { max_model_len: Some(512), max_num_seqs: 16, ..Options::default() };
    Engine::load(&ModelFiles::bundled(), &options).unwrap()
}

fn compile(engine: &Engine, constraint: &Constraint) -> Grammar {
    engine.grammars().compile(constraint).unwrap()
}

/// All of one answer.
#[derive(Debug, Default)]
struct Answer {
    text: String,
    outputs: Vec<Output>,
}

impl Answer {
    fn reason(&self) -> FinishReason {
        self.outputs.last().unwrap().finish.clone().unwrap().reason
    }

    fn ids(&self) -> Vec<u32> {
        self.outputs.iter().flat_map(|output| &output.tokens).map(|token| token.id).collect()
    }
}

/// Runs one request for each sampling, all at once.
fn answers(engine: &mut Engine, grammar: &Grammar, samplings: Vec<Sampling>) -> Vec<Answer> {
    let prompt = engine.text().encode("ROMEO:\nWhat is it?\n\nJULIET:\n", true).unwrap();
    for (id, sampling) in (0..).zip(samplings) {
        let grammar = Some(grammar.clone());
        engine.add(Request { sampling, grammar, ..Request::new(RequestId(id), prompt.clone()) }).unwrap();
    }
    let mut answers: BTreeMap<RequestId, Answer> = BTreeMap::new();
    let mut outputs = Vec::new();
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
        for output in outputs.drain(..) {
            let answer = answers.entry(output.id).or_default();
            answer.text.push_str(&output.text);
            answer.outputs.push(output);
        }
    }
    engine.check().unwrap();
    answers.into_values().collect()
}

fn one(engine: &mut Engine, grammar: &Grammar, sampling: Sampling) -> Answer {
    answers(engine, grammar, vec![sampling]).remove(0)
}

/// Greedy, lukewarm, as it is and wild, with two seeds each.
fn samplings(max_tokens: u32) -> Vec<Sampling> {
    let with = |temperature, seed| Sampling {
        temperature,
        seed: Some(seed),
        max_tokens: Some(max_tokens),
        ..Sampling::default()
    };
    [0.0, 0.7, 1.0, 3.0].into_iter().flat_map(|heat| [with(heat, 1), with(heat, 2)]).collect()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "that they are there is what is checked")]
struct Person {
    name: String,
    age: u8,
    email: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tree {
    value: i64,
    children: Vec<Tree>,
}

impl Tree {
    fn is_small(&self) -> bool {
        (0..=9).contains(&self.value) && self.children.len() <= 2 && self.children.iter().all(Tree::is_small)
    }
}

fn is<T: for<'a> Deserialize<'a>>(value: &Value) -> bool {
    T::deserialize(value).is_ok()
}

fn short(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.chars().count() <= 12)
}

/// A schema, and what it says in words of Rust.
type Case = (&'static str, Value, fn(&Value) -> bool);

fn cases() -> Vec<Case> {
    let short_text = json!({ "type": "string", "maxLength": 12 });
    vec![
        ("boolean", json!({ "type": "boolean" }), Value::is_boolean),
        ("enum", json!({ "enum": ["red", "green", 3, null] }), |v| {
            [json!("red"), json!("green"), json!(3), json!(null)].contains(v)
        }),
        ("integer", json!({ "type": "integer", "minimum": -5, "maximum": 17 }), |v| {
            v.as_i64().is_some_and(|n| (-5..=17).contains(&n))
        }),
        ("number", json!({ "type": "number", "minimum": 0, "exclusiveMaximum": 1 }), |v| {
            v.as_f64().is_some_and(|n| (0.0..1.0).contains(&n))
        }),
        ("pattern", json!({ "type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$" }), |v| {
            let text = v.as_str().unwrap_or_default().as_bytes();
            let of = |range: std::ops::Range<usize>, is: fn(&u8) -> bool| text[range].iter().all(is);
            text.len() == 7
                && text[2] == b'-'
                && of(0..2, u8::is_ascii_uppercase)
                && of(3..7, u8::is_ascii_digit)
        }),
        ("text", short_text.clone(), short),
        ("date", json!({ "type": "string", "format": "date" }), |v| {
            v.as_str().is_some_and(|text| text.len() == 10 && text.split('-').count() == 3)
        }),
        (
            "array",
            json!({ "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 99 },
            "minItems": 2, "maxItems": 4 }),
            |v| {
                v.as_array().is_some_and(|list| {
                    (2..=4).contains(&list.len()) && list.iter().all(|n| n.as_u64().is_some_and(|n| n < 100))
                })
            },
        ),
        (
            "tuple",
            json!({ "type": "array", "prefixItems": [{ "type": "boolean" }, { "type": "null" }],
            "items": false, "minItems": 2 }),
            |v| v[0].is_boolean() && v[1].is_null() && v[2] == json!(null),
        ),
        (
            "optional",
            json!({
            "type": "object",
            "properties": { "name": short_text, "age": { "type": "integer", "minimum": 0, "maximum": 120 },
                "email": { "type": "string", "pattern": "^[a-z]{1,6}@[a-z]{1,6}\\.org$" } },
            "required": ["name", "age"], "additionalProperties": false }),
            is::<Person>,
        ),
        (
            "nested",
            json!({
            "type": "object",
            "properties": { "a": { "type": "object", "properties": { "b": { "type": "object", "properties": {
                "c": { "const": "deep" } }, "required": ["c"], "additionalProperties": false } },
                "required": ["b"], "additionalProperties": false } },
            "required": ["a"], "additionalProperties": false }),
            |v| *v == json!({ "a": { "b": { "c": "deep" } } }),
        ),
        (
            "either",
            json!({ "anyOf": [{ "type": "null" }, { "type": "object", "properties": {
            "kind": { "const": "x" } }, "required": ["kind"], "additionalProperties": false }] }),
            |v| v.is_null() || *v == json!({ "kind": "x" }),
        ),
        (
            "recursive",
            json!({
            "$ref": "#/$defs/tree",
            "$defs": { "tree": { "type": "object", "properties": {
                "value": { "type": "integer", "minimum": 0, "maximum": 9 },
                "children": { "type": "array", "items": { "$ref": "#/$defs/tree" }, "maxItems": 2 } },
                "required": ["value", "children"], "additionalProperties": false } } }),
            |v| Tree::deserialize(v).is_ok_and(|tree| tree.is_small()),
        ),
    ]
}

/// Most tokens of an answer to a schema.
const LONGEST: u32 = 160;

#[test]
fn what_a_schema_says_is_what_comes() {
    let mut engine = engine();
    let (mut whole, mut cut) = (0, 0);
    for (name, schema, holds) in cases() {
        let grammar = compile(&engine, &Constraint::Json(schema));
        for answer in answers(&mut engine, &grammar, samplings(LONGEST)) {
            match answer.reason() {
                FinishReason::Stop => {
                    let value: Value = serde_json::from_str(&answer.text)
                        .unwrap_or_else(|error| unreachable!("{name}: {}: {error}", answer.text));
                    assert!(holds(&value), "{name}: {}", answer.text);
                    whole += 1;
                }
                FinishReason::Length => {
                    // Objects and lists may have lines with deep indentation, trees may be large.
                    assert_eq!(answer.ids().len(), LONGEST as usize, "{name}: {}", answer.text);
                    assert!(answer.text.starts_with(['{', '[']), "{name}: {}", answer.text);
                    cut += 1;
                }
                FinishReason::Error => unreachable!("{name}: {}", answer.text),
            }
        }
    }
    assert!(whole >= 80, "{whole} whole, {cut} cut");
}

#[test]
fn an_answer_cut_by_its_length_is_the_beginning_of_one() {
    let mut engine = engine();
    let schema = json!({ "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 9 } });
    let grammar = compile(&engine, &Constraint::Json(schema));
    for max_tokens in 1..6 {
        let sampling = Sampling { max_tokens: Some(max_tokens), seed: Some(5), ..Sampling::default() };
        let answer = one(&mut engine, &grammar, sampling);
        assert!(answer.ids().len() <= max_tokens as usize);
        assert!(answer.text.starts_with('['), "{}", answer.text);
        let whole = serde_json::from_str::<Vec<u8>>(&answer.text).is_ok();
        assert_eq!(answer.reason() == FinishReason::Stop, whole, "{}", answer.text);
    }
}

type Judge = Box<dyn Fn(&str) -> bool>;

#[test]
fn objects_texts_choices_and_grammars() {
    let mut engine = engine();
    let choices = ["yes".to_owned(), "no".into(), "it \"may\" be\nso / \\ \u{2764}".into()];
    let kinds: [(Constraint, Judge); 4] = [
        (
            Constraint::JsonObject,
            Box::new(|text| is::<serde_json::Map<String, Value>>(&text.parse().unwrap())),
        ),
        (
            Constraint::Regex("(ab|c){2,3}/x".into()),
            Box::new(|text| {
                let rest = text.strip_suffix("/x").unwrap();
                (2..=6).contains(&rest.len()) && rest.replace("ab", "").chars().all(|c| c == 'c')
            }),
        ),
        (Constraint::Choice(choices.to_vec()), {
            let choices = choices.to_vec();
            Box::new(move |text| choices.iter().any(|choice| choice == text))
        }),
        (
            Constraint::Grammar("start: \"(\" sum \")\"\nsum: N | N \"+\" sum\nN: /[1-9]/".into()),
            Box::new(|text| {
                let inner = text.strip_prefix('(').and_then(|text| text.strip_suffix(')')).unwrap();
                inner.split('+').all(|n| n.len() == 1 && n != "0")
            }),
        ),
    ];
    let mut seen = 0;
    for (constraint, holds) in kinds {
        let grammar = compile(&engine, &constraint);
        for answer in answers(&mut engine, &grammar, samplings(100)) {
            if answer.reason() == FinishReason::Stop {
                assert!(holds(&answer.text), "{constraint:?}: {}", answer.text);
                seen += 1;
            }
        }
    }
    assert!(seen >= 20, "only {seen} answers were whole");
}

#[test]
fn a_choice_can_be_any_of_them_and_likes_what_the_model_likes() {
    let mut engine = engine();
    let grammar = compile(&engine, &Constraint::Choice(vec!["O".into(), "zq".into()]));
    let many =
        (0..12).map(|seed| Sampling { seed: Some(seed), temperature: 5.0, ..Sampling::default() }).collect();
    let texts: Vec<String> =
        answers(&mut engine, &grammar, many).into_iter().map(|answer| answer.text).collect();
    assert!(texts.iter().all(|text| text == "O" || text == "zq"), "{texts:?}");
    assert!(texts.iter().any(|text| text == "O") && texts.iter().any(|text| text == "zq"), "{texts:?}");
    assert_eq!(one(&mut engine, &grammar, Sampling::greedy()).text, "O");
}

#[test]
fn the_grammar_goes_before_the_other_rules() {
    let mut engine = engine();
    let grammar = compile(&engine, &Constraint::Choice(vec!["yes".into()]));
    let exclamation = engine.text().encode("!", false).unwrap();
    let others = [
        Sampling { allowed_token_ids: Some(exclamation.clone()), ..Sampling::greedy() },
        Sampling { bad_words: vec!["yes".into(), "y".into()], ..Sampling::greedy() },
        Sampling { min_tokens: 12, ..Sampling::greedy() },
        Sampling { ignore_eos: true, ..Sampling::greedy() },
        Sampling { logit_bias: vec![(exclamation[0], 100.0)], ..Sampling::default() },
        Sampling { top_k: 1, repetition_penalty: 5.0, presence_penalty: 2.0, ..Sampling::default() },
        Sampling { top_p: 0.01, min_p: 0.9, frequency_penalty: 2.0, ..Sampling::default() },
    ];
    for sampling in others {
        let answer = one(&mut engine, &grammar, sampling.clone());
        assert_eq!((answer.text.as_str(), answer.reason()), ("yes", FinishReason::Stop), "{sampling:?}");
    }
    let open = compile(&engine, &Constraint::Regex("[ab]+".into()));
    let sampling = Sampling { min_tokens: 9, max_tokens: Some(40), seed: Some(1), ..Sampling::default() };
    let answer = one(&mut engine, &open, sampling);
    assert!(answer.ids().len() > 9, "a grammar that can go on does so until min_tokens: {}", answer.text);
}

#[test]
fn logprobs_are_those_among_what_the_grammar_takes() {
    let mut engine = engine();
    let grammar = compile(&engine, &Constraint::Choice(vec!["yes".into(), "no".into()]));
    let sampling = Sampling { logprobs: Some(20), ..Sampling::greedy() };
    let answer = one(&mut engine, &grammar, sampling);
    for output in &answer.outputs {
        let logprobs = output.tokens[0].logprobs.as_ref().unwrap();
        let sum: f32 = logprobs.top.iter().map(|entry| entry.logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}: at most a handful of tokens may come");
        assert_eq!(logprobs.chosen, logprobs.top[0]);
    }
}

#[test]
fn what_cannot_be_compiled_is_named() {
    let engine = engine();
    let fails = |constraint: Constraint| {
        let problem = engine.grammars().compile(&constraint).unwrap_err().problem;
        assert!(problem.len() < 1000, "{problem}");
        problem
    };
    let schema = |schema: Value| fails(Constraint::Json(schema));
    let deep = "(".repeat(100_000) + &")".repeat(100_000);
    let cases = [
        (schema(json!({ "type": "strin" })), "strin"),
        (schema(json!(["a"])), "object"),
        (schema(json!(false)), "object"),
        (schema(json!({ "type": "array", "uniqueItems": true })), "uniqueItems"),
        (schema(json!({ "$ref": "#/$defs/nowhere" })), "nowhere"),
        (schema(json!({ "$ref": "https://example.org/schema.json" })), "example.org"),
        (schema(json!({ "type": "string", "pattern": "(" })), "("),
        (schema(json!({ "type": "integer", "minimum": 3, "maximum": 1 })), "3"),
        (
            schema(json!({ "type": "object", "uniqueItems": true, "x-guidance": { "lenient": true } })),
            "uniqueItems",
        ),
        (fails(Constraint::Regex("a(".into())), "("),
        (fails(Constraint::Regex(deep.clone())), "invalid regex"),
        (fails(Constraint::Choice(vec![])), "choose"),
        (fails(Constraint::Grammar("start: no_such_rule".into())), "no_such_rule"),
        (fails(Constraint::Grammar("  ".into())), "empty"),
        (fails(Constraint::Grammar(format!("start: {deep}"))), ""),
    ];
    for (problem, word) in cases {
        assert!(problem.contains(word), "{word:?} is not in: {problem}");
    }
}

#[test]
fn a_grammar_of_another_vocabulary_is_refused() {
    let mut engine = engine();
    let mut grammar = compile(&engine, &Constraint::JsonObject);
    let request =
        |grammar: &Grammar| Request { grammar: Some(grammar.clone()), ..Request::new(RequestId(1), vec![5]) };
    engine.add(request(&grammar)).unwrap();
    engine.cancel(RequestId(1));
    grammar = small_vocabulary();
    let refusal = engine.add(request(&grammar)).unwrap_err();
    assert_eq!(refusal.parameter(), Some("structured_outputs"), "{refusal}");
}

/// A grammar for a tokenizer of three tokens.
fn small_vocabulary() -> Grammar {
    const TOKENIZER: &[u8] = br#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
        "post_processor":null,"truncation":null,"padding":null,
        "decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
        "model":{"type":"WordLevel","vocab":{"a":0,"b":1,"</s>":2},"unk_token":"a"}}"#;
    let files = ModelFiles::from_memory("small", &[("tokenizer.json", TOKENIZER)]);
    let text = quayline_engine::Text::load(&files).unwrap();
    let grammars = quayline_engine::Grammars::new(text.into(), &[2]);
    grammars.compile(&Constraint::Regex("(ab)*".into())).unwrap()
}

#[test]
fn a_request_waits_in_its_place_until_its_grammar_is_there() {
    let options = Options { max_num_seqs: 1, ..Options::default() };
    let mut engine = Engine::load(&ModelFiles::bundled(), &options).unwrap();
    let prompt = engine.text().encode("ROMEO:\n", true).unwrap();
    let request = |id| {
        let sampling = Sampling { max_tokens: Some(40), ..Sampling::greedy() };
        Request { sampling, ..Request::new(RequestId(id), prompt.clone()) }
    };
    let grammar = compile(&engine, &Constraint::Regex("[a-z]{5}".into()));
    engine.add(Request { grammar: Some(grammar.clone()), ..request(0) }).unwrap();
    let mut outputs = Vec::new();
    let mut run = |engine: &mut Engine| {
        while engine.can_step() {
            engine.step(Tick(0), &mut outputs);
            engine.check().unwrap();
        }
        let ended = outputs.iter().filter(|output| output.finish.is_some()).map(|output| output.id.0);
        let ended: Vec<u64> = ended.collect();
        (ended, std::mem::take(&mut outputs))
    };
    let text = |outputs: &[Output], id| -> String {
        outputs.iter().filter(|output| output.id.0 == id).map(|output| output.text.as_str()).collect()
    };
    let known = text(&run(&mut engine).1, 0);
    engine.add_before_grammar(request(1)).unwrap();
    engine.add(request(2)).unwrap();
    engine.add_before_grammar(request(3)).unwrap();
    let (ended, _) = run(&mut engine);
    assert_eq!(ended, [2], "who needs no grammar passes those who wait for one");
    assert!(engine.has_work() && !engine.can_step());
    let waits = engine
        .snapshot()
        .waiting
        .iter()
        .map(|one| one.waits_for.map(|why| why.to_string()))
        .collect::<Vec<_>>();
    assert!(waits.iter().flatten().all(|why| why.contains("grammar")) && waits.len() == 2, "{waits:?}");
    engine.add(request(4)).unwrap();
    assert_eq!(engine.set_grammar(RequestId(1), &grammar), Ok(true));
    assert_eq!(engine.set_grammar(RequestId(1), &grammar), Ok(false), "it has one now");
    let (ended, outputs) = run(&mut engine);
    assert_eq!(ended, [1, 4], "it has kept its place");
    assert_eq!(text(&outputs, 1), known, "and is answered as if the grammar had been there from the start");
    assert!(engine.cancel(RequestId(3)));
    assert!(!engine.has_work());
    engine.check().unwrap();
}

#[test]
fn a_constraint_that_comes_again_is_not_compiled_again() {
    let grammars = engine().grammars();
    let schema = |name: &str| {
        Constraint::Json(json!({ "type": "object", "properties": { name: { "type": "null" } } }))
    };
    assert!(grammars.recent(&schema("a")).is_none());
    grammars.compile(&schema("a")).unwrap();
    assert!(grammars.recent(&schema("a")).is_some() && grammars.recent(&schema("b")).is_none());
    assert!(grammars.recent(&Constraint::Grammar("a".into())).is_none());
    assert!(grammars.compile(&Constraint::Regex("a".into())).is_ok());
    assert!(grammars.compile(&Constraint::Grammar("a".into())).is_err(), "the same text, of another kind");
    (0..200).for_each(|n| drop(grammars.compile(&schema(&n.to_string()))));
    assert!(grammars.recent(&schema("a")).is_none(), "others have taken its place");
    assert!(grammars.recent(&schema("199")).is_some());
}

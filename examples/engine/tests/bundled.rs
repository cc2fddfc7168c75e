//! The bundled model from a conversation to its answer, compared with what transformers makes of the same files.

use quayline_engine::{Chat, Engine, KvDtype, ModelFiles, Options, Request, RequestId, Sampling, Tick};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Value>,
    prompt: String,
    tokens: Vec<u32>,
    greedy: Vec<u32>,
    text: String,
}

#[test]
fn a_conversation_is_answered_as_transformers_answers_it() {
    let golden: Golden = serde_json::from_str(include_str!("../bundled/golden.json")).unwrap();
    assert!(golden.cases.len() > 2);
    let options = Options { kv_dtype: KvDtype::F32, ..Options::default() };
    let mut engine = Engine::load(&ModelFiles::bundled(), &options).unwrap();
    for case in golden.cases {
        let chat = Chat { messages: case.messages, add_generation_prompt: true, ..Chat::default() };
        let text = engine.text();
        assert_eq!(text.render_chat(&chat).unwrap(), case.prompt);
        let prompt = text.encode_chat(&chat).unwrap();
        assert_eq!(prompt, case.tokens, "{}", case.prompt);
        let sampling = Sampling { max_tokens: Some(40), ..Sampling::greedy() };
        engine.add(Request { sampling, ..Request::new(RequestId(1), prompt) }).unwrap();
        let (mut tokens, mut words, mut outputs) = (Vec::new(), String::new(), Vec::new());
        while engine.has_work() {
            engine.step(Tick(0), &mut outputs);
            for output in outputs.drain(..) {
                tokens.extend(output.tokens.iter().map(|token| token.id));
                words.push_str(&output.text);
            }
        }
        assert_eq!((words, tokens), (case.text, case.greedy), "{}", case.prompt);
    }
}

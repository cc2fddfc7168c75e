//! Answers that must be something, over the wire.

use axum::http::StatusCode;
use serde_json::{Value, json};

use super::support::{Server, chat, completion};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn person() -> Value {
    json!({ "type": "object", "properties": { "age": { "type": "integer", "minimum": 0, "maximum": 99 },
        "kind": { "enum": ["friend", "foe"] } }, "required": ["age", "kind"], "additionalProperties": false })
}

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

fn is_person(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap();
    value["age"].as_u64().is_some_and(|age| age < 100)
        && (value["kind"] == "friend" || value["kind"] == "foe")
}

#[tokio::test]
async fn a_schema_is_kept_in_chats_completions_and_streams() {
    let server = Server::start("").await;
    let format = json!({ "type": "json_schema",
        "json_schema": { "name": "person", "description": "one", "strict": true, "schema": person() } });
    let body = with(with(chat(300), "response_format", format), "n", json!(4));
    let answer = server.ok(CHAT, with(body.clone(), "seed", json!(7))).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for choice in choices {
        assert_eq!(choice["finish_reason"], "stop");
        assert!(is_person(choice["message"]["content"].as_str().unwrap()), "{choice}");
    }
    let mut texts = vec![String::new(); 4];
    for chunk in server.chunks(CHAT, with(body, "seed", json!(7))).await {
        for choice in chunk["choices"].as_array().unwrap() {
            let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
            texts[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        }
    }
    assert!(choices.iter().zip(&texts).all(|(choice, text)| choice["message"]["content"] == **text));
    for schema in [person(), json!(person().to_string())] {
        let body = with(completion(json!("ROMEO:"), 300), "structured_outputs", json!({ "json": schema }));
        let answer = server.ok(COMPLETIONS, body).await;
        assert!(is_person(answer["choices"][0]["text"].as_str().unwrap()), "{answer}");
    }
    server.idle().await;
    server.stop();
}

/// A value of `structured_outputs`, and what it says in words of Rust.
type Kind = (Value, fn(&str) -> bool);

#[tokio::test]
async fn every_other_kind_is_kept_too() {
    let server = Server::start("").await;
    let kinds: [Kind; 4] = [
        (json!({ "regex": "[0-9]{3}" }), |text| text.len() == 3 && text.parse::<u32>().is_ok()),
        (json!({ "choice": ["aye", "nay"] }), |text| text == "aye" || text == "nay"),
        (json!({ "grammar": "start: \"a\" b\nb: \"b\" | \"c\"" }), |text| text == "ab" || text == "ac"),
        (json!({ "json_object": true }), |text| text.starts_with('{')),
    ];
    for (kind, holds) in kinds {
        let answer = server.ok(CHAT, with(chat(40), "structured_outputs", kind)).await;
        let choice = &answer["choices"][0];
        assert!(holds(choice["message"]["content"].as_str().unwrap()), "{answer}");
    }
    server.stop();
}

#[tokio::test]
async fn what_cannot_be_kept_is_400_and_named() {
    let server = Server::start("").await;
    let format =
        |schema: Value| json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
    let cases = [
        (
            "response_format",
            format(json!({ "type": "strin" })),
            "response_format.json_schema.schema",
            "strin",
        ),
        (
            "response_format",
            format(json!({ "uniqueItems": true, "type": "array" })),
            "response_format.json_schema.schema",
            "uniqueItems",
        ),
        ("response_format", json!({ "type": "xml" }), "response_format.type", "json_schema"),
        ("structured_outputs", json!({ "json": "{" }), "structured_outputs.json", "no JSON"),
        ("structured_outputs", json!({ "regex": "(" }), "structured_outputs.regex", "("),
        ("structured_outputs", json!({ "choice": [] }), "structured_outputs.choice", "choose"),
        ("structured_outputs", json!({ "choice": vec!["a"; 1025] }), "structured_outputs.choice", "1024"),
        ("structured_outputs", json!({ "grammar": "start: x" }), "structured_outputs.grammar", "x"),
        (
            "structured_outputs",
            json!({ "structural_tag": {} }),
            "structured_outputs.structural_tag",
            "supported",
        ),
        ("structured_outputs", json!({ "regex": "a", "json_object": true }), "structured_outputs", "both"),
    ];
    for (field, value, param, word) in cases {
        let answer = server.post(CHAT, &with(chat(4), field, value.clone())).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{value}: {}", answer.text);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{value}: {error}");
        assert!(error["message"].as_str().unwrap().contains(word), "{word} is not in {error}");
    }
    let both = with(chat(4), "structured_outputs", json!({ "regex": "a" }));
    let answer = server.post(CHAT, &with(both, "response_format", json!({ "type": "json_object" }))).await;
    assert_eq!(answer.json()["error"]["param"], "structured_outputs", "{}", answer.text);
    server.stop();
}

#[tokio::test]
async fn a_request_whose_grammar_fails_is_no_request() {
    let server = Server::start("").await;
    for _ in 0..2 {
        let body = with(
            with(completion(json!("ROMEO:"), 9), "structured_outputs", json!({ "regex": "(" })),
            "n",
            json!(3),
        );
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text);
        assert!(answer.text.contains("structured_outputs.regex"), "{}", answer.text);
    }
    server.idle().await;
    let metrics = server.get("/metrics").await.text;
    assert!(
        metrics.lines().any(|line| line.contains("finished_reason=\"abort\"") && line.ends_with(" 0")),
        "{metrics}"
    );
    server.stop();
}

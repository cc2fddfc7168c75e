//! Streams say the same as whole answers, and end as they should.

use serde_json::{Value, json};

use super::support::{Server, chat, completion, keys};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn joined(chunks: &[Value], choice: u64, text: impl Fn(&Value) -> &Value) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let mine = choices.filter(|part| part["index"] == choice);
    mine.map(|part| text(part).as_str().unwrap_or_default()).collect()
}

#[tokio::test]
async fn a_chat_stream_says_what_the_whole_answer_says() {
    let server = Server::start("").await;
    let whole = server.ok(CHAT, chat(12)).await;
    let chunks = server.chunks(CHAT, chat(12)).await;
    let text = joined(&chunks, 0, |part| &part["delta"]["content"]);
    assert_eq!(whole["choices"][0]["message"]["content"], json!(text));
    assert_eq!(chunks.len(), 12, "one event per token");
    let first = &chunks[0];
    assert_eq!(keys(first), ["id", "object", "created", "model", "system_fingerprint", "choices"]);
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(keys(&chunks[1]["choices"][0]["delta"]), ["content"]);
    assert!(chunks.iter().all(|chunk| chunk["id"] == first["id"]));
    assert!(chunks[..11].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert_eq!(chunks[11]["choices"][0]["finish_reason"], "length");
    server.stop();
}

#[tokio::test]
async fn a_completion_stream_says_what_the_whole_answer_says() {
    let server = Server::start("").await;
    let mut body = completion(json!(["ROMEO:", "JULIET:"]), 6);
    body["echo"] = json!(true);
    body["logprobs"] = json!(0);
    let whole = server.ok(COMPLETIONS, body.clone()).await;
    let chunks = server.chunks(COMPLETIONS, body).await;
    for (index, choice) in (0..).zip(whole["choices"].as_array().unwrap()) {
        assert_eq!(choice["text"], json!(joined(&chunks, index, |part| &part["text"])));
        let parts = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|part| part["index"] == index);
        let offsets: Vec<Value> =
            parts.flat_map(|part| part["logprobs"]["text_offset"].as_array().unwrap().clone()).collect();
        assert_eq!(choice["logprobs"]["text_offset"], Value::Array(offsets));
    }
    server.stop();
}

#[tokio::test]
async fn usage_comes_at_the_end_or_with_every_chunk() {
    let server = Server::start("").await;
    let mut body = chat(3);
    body["stream_options"] = json!({ "include_usage": true });
    let chunks = server.chunks(CHAT, body.clone()).await;
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 3);
    assert!(others.iter().all(|chunk| keys(chunk).contains(&"usage") && chunk["usage"].is_null()));

    body["stream_options"] = json!({ "include_usage": true, "continuous_usage_stats": true });
    let chunks = server.chunks(CHAT, body).await;
    let counts: Vec<&Value> = chunks.iter().map(|chunk| &chunk["usage"]["completion_tokens"]).collect();
    assert_eq!(counts, [&json!(1), &json!(2), &json!(3), &json!(3)]);

    let without = server.chunks(CHAT, chat(3)).await;
    assert!(without.iter().all(|chunk| !keys(chunk).contains(&"usage")));
    server.stop();
}

#[tokio::test]
async fn usage_can_be_forced_by_the_server() {
    let server = Server::start("--enable-force-include-usage").await;
    let chunks = server.chunks(CHAT, chat(2)).await;
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 2);
    server.stop();
}

#[tokio::test]
async fn several_answers_interleave_and_each_begins_and_ends() {
    let server = Server::start("").await;
    let mut body = chat(4);
    body["n"] = json!(3);
    let chunks = server.chunks(CHAT, body).await;
    for index in 0..3 {
        let parts: Vec<&Value> =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|part| part["index"] == index).collect();
        assert_eq!(parts.len(), 4);
        assert_eq!(parts[0]["delta"]["role"], "assistant");
        assert_eq!(parts[3]["finish_reason"], "length");
    }
    server.stop();
}

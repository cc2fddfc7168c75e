//! Two servers on loopback: one reads prompts, the other answers, as one would alone.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::support::{Server, chat, completion, keys};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A server that others can reach, and what keeps it reachable.
async fn start(role: &str, more: &str) -> (Server, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = format!("{{\"kv_connector\":\"HttpConnector\",\"kv_role\":\"{role}\"{more}}}");
    let server = Server::start(&format!("--port {port} --kv-transfer-config {config}")).await;
    let (_, close, _) = server.listen_at(listener);
    (server, close)
}

fn prefill(body: &Value) -> Value {
    let mut body = body.clone();
    body["max_tokens"] = json!(1);
    body["kv_transfer_params"] = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": null, "remote_port": null,
    });
    body
}

fn decode(body: &Value, params: &Value) -> Value {
    let mut body = body.clone();
    body["kv_transfer_params"] = params.clone();
    body
}

fn long_prompt(begin: u32) -> Value {
    json!((0..100).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect::<Vec<u32>>())
}

/// Tokens of prompts that came from another server.
async fn delivered(server: &Server) -> f64 {
    let metrics = server.get("/metrics").await.text;
    let series = metrics.lines().find(|line| {
        line.starts_with("vllm:prompt_tokens_by_source_total") && line.contains("external_kv_transfer")
    });
    series.unwrap().rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[tokio::test]
async fn an_answer_is_the_same_wherever_its_prompt_was_read() {
    let alone = Server::start("").await;
    let (reader, _reader) = start("kv_producer", "").await;
    let (writer, _writer) = start("kv_consumer", "").await;
    let mut question = chat(12);
    question["messages"][0]["content"] = json!("Who art thou, that comest so late? ".repeat(6));
    for (path, body) in [(COMPLETIONS, completion(long_prompt(1), 12)), (CHAT, question)] {
        let whole = alone.ok(path, body.clone()).await;
        let first = reader.ok(path, prefill(&body)).await;
        let params = &first["kv_transfer_params"];
        assert_eq!(
            keys(params),
            [
                "do_remote_prefill",
                "do_remote_decode",
                "remote_engine_id",
                "remote_request_id",
                "remote_block_ids",
                "remote_host",
                "remote_port",
                "tp_size"
            ]
        );
        assert!(params["remote_block_ids"].as_array().unwrap().len() > 3, "{params}");
        let before = delivered(&writer).await;
        let second = writer.ok(path, decode(&body, params)).await;
        assert_eq!(second["choices"], whole["choices"]);
        assert_eq!(second["usage"]["completion_tokens"], 12);
        let prompt = second["usage"]["prompt_tokens"].as_f64().unwrap();
        let whole_blocks = ((prompt - 1.0) / 16.0).floor() * 16.0;
        assert_eq!(delivered(&writer).await - before, whole_blocks, "blocks are moved, not computed again");
        assert!(whole_blocks >= 48.0);
        // When they have been fetched, they are free.
        reader.idle().await;
        assert!(second.get("kv_transfer_params").is_none());
    }
    alone.stop();
    reader.stop();
    writer.stop();
}

#[tokio::test]
async fn a_stream_may_go_on_from_another_server() {
    let (server, _open) = start("kv_both", "").await;
    let (other, _other) = start("kv_both", "").await;
    let body = completion(long_prompt(2), 8);
    let whole = server.ok(COMPLETIONS, body.clone()).await;
    let params = server.ok(COMPLETIONS, prefill(&body)).await["kv_transfer_params"].take();
    let chunks = other.chunks(COMPLETIONS, decode(&body, &params)).await;
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(json!(text), whole["choices"][0]["text"]);
    assert_eq!(delivered(&other).await, 96.0);
    server.idle().await;
    other.idle().await;
    server.stop();
    other.stop();
}

#[tokio::test]
async fn what_does_not_come_is_computed_or_ends_the_request() {
    let (reader, _reader) = start("kv_producer", "").await;
    let (patient, _patient) = start("kv_consumer", "").await;
    let (strict, _strict) = start("kv_consumer", ",\"kv_load_failure_policy\":\"fail\"").await;
    let body = completion(long_prompt(3), 6);
    let whole = reader.ok(COMPLETIONS, body.clone()).await;
    let params = reader.ok(COMPLETIONS, prefill(&body)).await["kv_transfer_params"].take();
    let mut wrong = params.clone();
    wrong["remote_request_id"] = json!("0123456789abcdef0123456789abcdef");
    let mut nowhere = params.clone();
    nowhere["remote_port"] = json!(1);
    for params in [&wrong, &nowhere] {
        let answer = patient.ok(COMPLETIONS, decode(&body, params)).await;
        assert_eq!(answer["choices"], whole["choices"]);
        patient.idle().await;
        patient.post_text("/reset_prefix_cache", "").await;
    }
    assert_eq!(delivered(&patient).await, 0.0);
    let answer = strict.ok(COMPLETIONS, decode(&body, &wrong)).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "error");
    strict.idle().await;

    // Whoever does not fetch may say so.
    let key = params["remote_request_id"].as_str().unwrap();
    let delete = || Request::delete(format!("/kv_transfer/{key}")).body(Body::empty()).unwrap();
    assert_eq!(reader.send(delete()).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(reader.send(delete()).await.status(), StatusCode::NOT_FOUND);
    reader.idle().await;
    reader.stop();
    patient.stop();
    strict.stop();
}

#[tokio::test]
async fn what_nobody_fetches_is_free_when_the_lease_is_over() {
    let (reader, _reader) =
        start("kv_producer", ",\"kv_connector_extra_config\":{\"lease_seconds\":0}").await;
    let params =
        reader.ok(COMPLETIONS, prefill(&completion(long_prompt(4), 6))).await["kv_transfer_params"].take();
    assert!(params["remote_block_ids"].is_array());
    reader.idle().await;
    let key = params["remote_request_id"].as_str().unwrap();
    let status = reader.get(&format!("/kv_transfer/{key}?start=0&tokens=96")).await.status;
    assert_eq!(status, StatusCode::NOT_FOUND);
    reader.stop();
}

#[tokio::test]
async fn halves_that_make_no_sense_are_refused() {
    let plain = Server::start("").await;
    let (reader, _reader) = start("kv_producer", "").await;
    let (writer, _writer) = start("kv_consumer", "").await;
    let decodes = json!({ "do_remote_prefill": true, "remote_host": "127.0.0.1", "remote_port": 9,
        "remote_request_id": "0123456789abcdef0123456789abcdef" });
    let mut path = decodes.clone();
    path["remote_request_id"] = json!("../v1/models");
    let cases = [
        (&plain, json!({ "do_remote_decode": true }), "--kv-transfer-config"),
        (&reader, decodes.clone(), "kv_producer"),
        (&writer, json!({ "do_remote_decode": true }), "kv_consumer"),
        (&reader, json!({ "do_remote_decode": true, "do_remote_prefill": true }), "both"),
        (&writer, json!({ "do_remote_prefill": true }), "remote_host"),
        (&writer, path, "remote_request_id"),
        (&writer, json!("prefill"), "kv_transfer_params"),
    ];
    for (server, params, says) in cases {
        let answer = server.post(COMPLETIONS, &decode(&completion(json!("a"), 4), &params)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{params}: {}", answer.text);
        assert!(answer.text.contains(says), "{params}: {}", answer.text);
    }
    for (field, value) in [("stream", json!(true)), ("n", json!(2)), ("prompt", json!(["a", "b"]))] {
        let mut body = prefill(&completion(json!("a"), 4));
        body[field] = value;
        let answer = reader.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{field}: {}", answer.text);
    }
    plain.ok(COMPLETIONS, decode(&completion(json!("a"), 1), &json!({}))).await;
    for server in [plain, reader, writer] {
        server.stop();
    }
}

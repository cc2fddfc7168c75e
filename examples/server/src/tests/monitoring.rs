//! The live page's data, the OpenAPI document.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::support::{Server, chat, completion, keys, post};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn the_live_state_tells_sizes_and_reasons_but_no_text() {
    let server = Server::start("--max-num-seqs 1").await;
    let mut body = completion(json!("a secret prompt"), 900);
    body["stream"] = json!(true);
    server.app.engine.allow(Some(0));
    let first = server.send(post("/v1/completions", body.to_string())).await;
    let second = server.send(post("/v1/completions", body.to_string())).await;
    server.app.engine.allow(Some(2));
    let mut view = server.app.engine.view();
    view.wait_for(|view| view.snapshot.totals.steps == 2).await.unwrap();
    let answer = server.get("/debug/state").await;
    assert!(!answer.text.contains("secret"));
    let state = answer.json();
    assert_eq!(
        keys(&state),
        [
            "time_ms",
            "phase",
            "model",
            "context",
            "running_max",
            "output_tokens_per_second",
            "prompt_tokens_per_second",
            "blocks",
            "occupancy",
            "blocks_per_cell",
            "prefix",
            "host",
            "disk",
            "last_step",
            "totals",
            "reasons",
            "turned_away",
            "waiting_requests",
            "running",
            "waiting"
        ]
    );
    assert_eq!(state["phase"], "ready");
    assert_eq!(state["running"].as_array().unwrap().len(), 1);
    assert_eq!(state["running_max"], 1);
    assert_eq!(state["waiting_requests"], 1);
    assert_eq!(state["occupancy"].as_str().unwrap().len(), 256);
    assert!(state["occupancy"].as_str().unwrap().contains('2'));
    assert_eq!(state["running"][0]["output_tokens_max"], 900);
    assert_eq!(state["waiting"][0]["reason"]["code"], "running_full");
    assert_eq!(state["waiting"][0]["reason"]["running_max"], 1);
    assert!(state["reasons"]["skipped"]["running_full"].as_u64().unwrap() > 0, "{state}");
    drop((first, second));
    server.app.engine.allow(None);
    server.idle().await;
    server.stop();
}

#[tokio::test]
async fn a_request_is_explained_by_the_id_of_its_answer() {
    let server = Server::start("--max-num-seqs 1 --max-num-queued-reqs 1").await;
    let mut body = completion(json!("a secret prompt"), 900);
    body["stream"] = json!(true);
    body["request_id"] = json!("first");
    server.app.engine.allow(Some(1));
    let first = server.send(post("/v1/completions", body.to_string())).await;
    server.busy().await;
    body["request_id"] = json!("second");
    let second = server.send(post("/v1/completions", body.to_string())).await;
    body["request_id"] = json!("third");
    assert_eq!(server.post("/v1/completions", &body).await.status, StatusCode::TOO_MANY_REQUESTS);
    server.app.engine.allow(Some(1));
    let mut view = server.app.engine.view();
    view.wait_for(|view| view.snapshot.totals.steps == 2).await.unwrap();

    let answer = server.get("/debug/requests/cmpl-second").await;
    assert!(!answer.text.contains("secret"));
    let choices = answer.json()["choices"].take();
    assert_eq!(choices.as_array().unwrap().len(), 1, "{choices}");
    assert_eq!((&choices[0]["index"], &choices[0]["reason"]["code"]), (&json!(0), &json!("running_full")));
    let running = server.get("/debug/requests/cmpl-first").await.json();
    assert_eq!(running["choices"][0]["reason"], Value::Null);
    assert_eq!(server.get("/debug/requests/cmpl-third").await.status, StatusCode::NOT_FOUND);

    let refused = &server.get("/debug/state").await.json()["turned_away"][0];
    assert_eq!((&refused["outcome"], &refused["code"]), (&json!("refused"), &json!("queue_full")));
    let metrics = server.get("/metrics").await.text;
    let series = |outcome: &str, reason: &str| {
        let labels = format!("outcome=\"{outcome}\",reason=\"{reason}\"}}");
        let line = metrics.lines().find(|line| line.contains("requests_held_back") && line.contains(&labels));
        line.unwrap_or_else(|| panic!("{labels} is missing:\n{metrics}"))
            .rsplit_once(' ')
            .unwrap()
            .1
            .to_owned()
    };
    assert_eq!(series("refused", "queue_full"), "1");
    assert_ne!(series("skipped", "running_full"), "0");
    drop((first, second));
    server.app.engine.allow(None);
    server.idle().await;
    server.stop();
}

#[tokio::test]
async fn events_repeat_the_state_and_end_when_the_server_drains() {
    let server = Server::start("").await;
    let response = server.send(Request::get("/debug/events").body(Body::empty()).unwrap()).await;
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let mut events = response.into_body().into_data_stream();
    for _ in 0..2 {
        let event = String::from_utf8(events.next().await.unwrap().unwrap().into()).unwrap();
        let state: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap().trim_end()).unwrap();
        assert_eq!(state["phase"], "ready");
    }
    server.app.drain();
    while let Some(event) = events.next().await {
        event.unwrap();
    }
    server.stop();
}

#[tokio::test]
async fn load_counts_only_when_tracked() {
    for (line, expected) in [("", 0), ("--enable-server-load-tracking", 1)] {
        let server = Server::start(line).await;
        let mut body = chat(900);
        body["stream"] = json!(true);
        let response = server.send(post(CHAT, body.to_string())).await;
        assert_eq!(server.get("/load").await.json(), json!({ "server_load": expected }));
        drop(response);
        server.idle().await;
        server.stop();
    }
}

#[tokio::test]
async fn the_document_lists_every_route() {
    let server = Server::start("").await;
    let document = server.get("/openapi.json").await.json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let paths: BTreeSet<&str> = keys(&document["paths"]).into_iter().collect();
    let expected = [
        "/",
        "/debug/events",
        "/debug/requests/{id}",
        "/debug/state",
        "/detokenize",
        "/docs",
        "/health",
        "/livez",
        "/load",
        "/metrics",
        "/openapi.json",
        "/ping",
        "/readyz",
        "/startupz",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/version",
    ];
    assert_eq!(paths, BTreeSet::from(expected));
    let fields = &document["components"]["schemas"]["ChatRequest"]["allOf"];
    assert!(fields[0]["properties"]["messages"].is_object() && fields[1]["properties"]["top_k"].is_object());
    // Every reference leads somewhere.
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    assert_eq!(server.document.paths.paths.len(), expected.len());
    server.stop();
}

#[tokio::test]
async fn the_prefix_cache_is_reset_only_in_development() {
    let server = Server::start("").await;
    assert_eq!(server.post_text("/reset_prefix_cache", "").await.status, StatusCode::NOT_FOUND);
    server.stop();
    let server = Server::start("--server-dev-mode 1").await;
    server.ok("/v1/completions", completion(json!(vec![5; 64]), 2)).await;
    server.idle().await;
    assert!(server.app.engine.view().borrow().snapshot.blocks.cached > 0);
    assert_eq!(server.post_text("/reset_prefix_cache", "").await.status, StatusCode::OK);
    assert_eq!(server.app.engine.view().borrow().snapshot.blocks.cached, 0);
    server.stop();
}

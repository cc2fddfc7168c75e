//! Metrics, the live page's data, the OpenAPI document.

use std::collections::{BTreeMap, BTreeSet};

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::support::{Server, chat, completion, keys, post};

const CHAT: &str = "/v1/chat/completions";

/// Samples by series, after checking the text as Prometheus' parser would.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut kinds = BTreeMap::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|family| kinds.contains_key(*family)))
                .unwrap_or(name);
            assert!(kinds.contains_key(family), "{line} has no family");
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
        }
    }
    samples
}

#[tokio::test]
async fn metrics_have_vllm_s_names_and_real_values() {
    let server = Server::start("").await;
    server.ok(CHAT, chat(5)).await;
    server.ok(CHAT, chat(5)).await;
    server.idle().await;
    let answer = server.get("/metrics").await;
    assert_eq!(answer.headers[header::CONTENT_TYPE], "text/plain; version=0.0.4; charset=utf-8");
    let samples = parse(&answer.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let sample = |name: &str, more: &str| {
        let series = format!("{name}{{{labels}{more}}}");
        *samples.get(&series).unwrap_or_else(|| panic!("{series} is missing:\n{}", answer.text))
    };
    assert_eq!(sample("vllm:num_requests_running", ""), 0.0);
    assert_eq!(sample("vllm:num_requests_waiting", ""), 0.0);
    assert_eq!(sample("vllm:kv_cache_usage_perc", ""), 0.0);
    assert_eq!(sample("vllm:generation_tokens_total", ""), 10.0);
    assert!(sample("vllm:prompt_tokens_total", "") > 2.0);
    assert_eq!(sample("vllm:request_success_total", ",finished_reason=\"length\""), 2.0);
    assert_eq!(sample("vllm:num_preemptions_total", ""), 0.0);
    assert!(sample("vllm:prefix_cache_queries_total", "") >= sample("vllm:prefix_cache_hits_total", ""));
    for (name, count) in [
        ("time_to_first_token_seconds", 2.0),
        ("inter_token_latency_seconds", 8.0),
        ("request_time_per_output_token_seconds", 2.0),
        ("e2e_request_latency_seconds", 2.0),
        ("request_queue_time_seconds", 2.0),
        ("request_inference_time_seconds", 2.0),
        ("request_prefill_time_seconds", 2.0),
        ("request_decode_time_seconds", 2.0),
        ("request_prompt_tokens", 2.0),
        ("request_generation_tokens", 2.0),
        ("request_params_n", 2.0),
        ("request_params_max_tokens", 2.0),
        ("iteration_tokens_total", 10.0),
    ] {
        assert_eq!(sample(&format!("vllm:{name}_count"), ""), count, "{name}");
    }
    assert!(answer.text.contains("le=\"2560.0\"") && answer.text.contains("le=\"7680.0\""));
    assert!(answer.text.contains("vllm:cache_config_info{") && answer.text.contains("block_size=\"16\""));
    assert!(samples["process_resident_memory_bytes"] > 1e6);
    assert!(samples.keys().any(|series| series.starts_with("http_requests_total{") && series.contains(CHAT)));
    server.stop();
}

#[tokio::test]
async fn open_metrics_come_when_asked_for() {
    let server = Server::start("").await;
    let request = Request::get("/metrics").header(
        header::ACCEPT,
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4",
    );
    let answer = server.answer(request.body(Body::empty()).unwrap()).await;
    assert_eq!(
        answer.headers[header::CONTENT_TYPE],
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    assert!(answer.text.ends_with("# EOF\n"));
    assert!(answer.text.contains("# TYPE vllm:prompt_tokens counter\n"));
    assert!(answer.text.contains("\nvllm:prompt_tokens_total{"));
    server.stop();
}

#[tokio::test]
async fn routes_that_do_not_exist_are_one_label() {
    let server = Server::start("").await;
    for path in ["/a", "/b", "/c?d=1"] {
        server.get(path).await;
    }
    let metrics = server.get("/metrics").await.text;
    assert!(
        metrics.contains("http_requests_total{handler=\"none\",method=\"GET\",status=\"4xx\"} 3"),
        "{metrics}"
    );
    server.stop();
}

#[tokio::test]
async fn the_live_state_tells_sizes_and_reasons_but_no_text() {
    let server = Server::start("--max-num-seqs 1").await;
    let mut body = completion(json!("a secret prompt"), 900);
    body["stream"] = json!(true);
    let first = server.send(post("/v1/completions", body.to_string())).await;
    let second = server.send(post("/v1/completions", body.to_string())).await;
    server.busy().await;
    let mut view = server.app.engine.view();
    view.wait_for(|view| view.snapshot.waiting.len() == 1).await.unwrap();
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
            "last_step",
            "totals",
            "running",
            "waiting"
        ]
    );
    assert_eq!(state["phase"], "ready");
    assert_eq!(state["running"].as_array().unwrap().len(), 1);
    assert_eq!(state["running_max"], 1);
    assert_eq!(state["occupancy"].as_str().unwrap().len(), 256);
    assert!(state["occupancy"].as_str().unwrap().contains('2'));
    assert_eq!(state["running"][0]["output_tokens_max"], 900);
    drop((first, second));
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

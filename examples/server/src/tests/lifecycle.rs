//! Clients that leave, do not read, or stay silent; a server that drains, loads or fails.

use std::time::Duration;

use axum::body::Body;
use axum::http::{StatusCode, header};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::support::{Server, chat, completion, dial, flags, post, read_until};
use crate::app::{self, Phase};
use crate::engine::STEPS_UNREAD_MAX;
use crate::shutdown::{Drained, drain};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Long enough that it is still running when something happens to it.
fn long(stream: bool) -> Value {
    let mut body = chat(900);
    body["stream"] = json!(stream);
    body
}

#[tokio::test]
async fn dropping_a_stream_frees_its_blocks() {
    let server = Server::start("").await;
    let response = server.send(post(CHAT, long(true).to_string())).await;
    let mut body = response.into_body().into_data_stream();
    body.next().await.unwrap().unwrap();
    assert_eq!(*server.app.running().borrow(), 1);
    drop(body);
    server.idle().await;
    assert_eq!(*server.app.running().borrow(), 0);
    assert!(server.get("/metrics").await.text.contains("finished_reason=\"abort\"} 1"));
    server.stop();
}

#[tokio::test]
async fn a_client_that_hangs_up_is_cancelled_streaming_or_not() {
    let server = Server::start("").await;
    let (address, _close, _task) = server.listen().await;
    for stream in [true, false] {
        let head = format!("POST {CHAT} HTTP/1.1");
        let mut connection = dial(address, &head, &long(stream).to_string()).await;
        if stream {
            read_until(&mut connection, "data: ").await;
        } else {
            server.busy().await;
        }
        drop(connection);
        server.idle().await;
    }
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("finished_reason=\"abort\"} 2"));
    let gone = metrics.lines().any(|line| line.starts_with("http_requests_total") && line.contains("4xx"));
    assert!(gone, "both are counted as 499");
    server.stop();
}

#[tokio::test]
async fn a_reader_that_does_not_read_is_cut_off_and_holds_nobody_up() {
    // Two answers one after the other: together they take more steps than may wait for a reader.
    let server = Server::start("--max-num-seqs 1").await;
    let mut body = completion(json!(["a", "b"]), 900);
    body["stream"] = json!(true);
    let unread = server.send(post(COMPLETIONS, body.to_string())).await;
    let other = server.ok(CHAT, chat(4)).await;
    assert_eq!(other["usage"]["completion_tokens"], 4);
    server.idle().await;
    let mut text = String::new();
    let mut stream = unread.into_body().into_data_stream();
    while let Some(piece) = stream.next().await {
        text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
    }
    assert!(text.matches("data: ").count() <= STEPS_UNREAD_MAX + 2, "what is kept is bounded");
    assert!(text.contains("was not read in time"), "{}", &text[text.len().saturating_sub(300)..]);
    assert!(text.ends_with("data: [DONE]\n\n"));
    server.stop();
}

#[tokio::test]
async fn a_full_queue_is_429_and_says_when_to_come_back() {
    let server = Server::start("--max-num-seqs 1 --max-num-queued-reqs 1").await;
    let first = server.send(post(CHAT, long(true).to_string())).await;
    server.busy().await;
    let second = server.send(post(CHAT, long(true).to_string())).await;
    let third = server.post(CHAT, &chat(1)).await;
    assert_eq!(third.status, StatusCode::TOO_MANY_REQUESTS, "{}", third.text);
    assert_eq!(third.headers[header::RETRY_AFTER], "1");
    assert_eq!(third.json()["error"]["code"], "rate_limit_exceeded");
    // All or nothing: none of these stays behind.
    let several = server.post(COMPLETIONS, &completion(json!(["a", "b", "c"]), 1)).await;
    assert_eq!(several.status, StatusCode::TOO_MANY_REQUESTS);
    drop((first, second));
    server.idle().await;
    server.ok(CHAT, chat(1)).await;
    server.stop();
}

#[tokio::test]
async fn silent_connections_cost_nobody_anything() {
    let server = Server::start("").await;
    let (address, _close, _task) = server.listen().await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut half = dial(address, "GET /livez HTTP/1.1\r\nX-Half: 1", "").await;
    read_until(&mut half, "200 OK").await;
    let mut busy = dial(address, &format!("POST {CHAT} HTTP/1.1"), &chat(2).to_string()).await;
    read_until(&mut busy, "finish_reason").await;
    drop(silent);
    server.stop();
}

#[tokio::test]
async fn a_connection_is_kept_for_the_next_request() {
    let server = Server::start("").await;
    let (address, _close, _task) = server.listen().await;
    let mut connection = dial(address, "GET /livez HTTP/1.1", "").await;
    read_until(&mut connection, "ready").await;
    use tokio::io::AsyncWriteExt;
    connection.write_all(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n").await.unwrap();
    read_until(&mut connection, "version").await;
    connection.write_all(b"nonsense\r\n\r\n").await.unwrap();
    read_until(&mut connection, "400 Bad Request").await;
    server.stop();
}

#[tokio::test]
async fn draining_finishes_what_runs_and_refuses_what_is_new() {
    let server = Server::start("").await;
    let (address, close, task) = server.listen().await;
    let mut body = chat(40);
    body["stream"] = json!(true);
    let mut running = dial(address, &format!("POST {CHAT} HTTP/1.1"), &body.to_string()).await;
    read_until(&mut running, "data: ").await;
    let draining = tokio::spawn({
        let app = std::sync::Arc::clone(&server.app);
        async move { drain(&app, Duration::from_secs(60), std::future::pending()).await }
    });
    server.app.draining().wait_for(|draining| *draining).await.unwrap();
    assert_eq!(server.get("/readyz").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.get("/livez").await.status, StatusCode::OK);
    let late = server.post(CHAT, &chat(1)).await;
    assert_eq!(late.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(late.headers.contains_key(header::RETRY_AFTER));
    let rest = read_until(&mut running, "[DONE]").await;
    assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
    assert_eq!(draining.await.unwrap(), Drained::Complete);
    close.send_replace(true);
    task.await.unwrap();
    let mut end = Vec::new();
    running.read_to_end(&mut end).await.unwrap();
    server.stop();
}

#[tokio::test]
async fn a_second_signal_and_the_time_limit_cut_a_drain_short() {
    let server = Server::start("").await;
    let response = server.send(post(CHAT, long(true).to_string())).await;
    server.busy().await;
    let cut = drain(&server.app, Duration::from_secs(60), std::future::ready(())).await;
    assert_eq!(cut, Drained::Cut(1));
    assert_eq!(drain(&server.app, Duration::ZERO, std::future::pending()).await, Drained::Cut(1));
    server.app.engine.stop(std::time::Instant::now());
    let mut text = String::new();
    let mut stream = response.into_body().into_data_stream();
    while let Some(piece) = stream.next().await {
        text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
    }
    assert!(text.contains("shutting down") && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[tokio::test]
async fn while_loading_the_server_lives_but_is_not_ready() {
    let flags = flags("--threads 1");
    let started = app::start(flags.clone(), None).unwrap();
    let (router, _) = app::routes(&started.app, "", false, &flags.network.allowed_origins);
    assert_eq!(started.app.phase(), Phase::Loading);
    let ask = |path: &str| {
        use tower::ServiceExt;
        router.clone().oneshot(axum::http::Request::get(path).body(Body::empty()).unwrap())
    };
    for (path, status) in [
        ("/livez", StatusCode::OK),
        ("/health", StatusCode::OK),
        ("/readyz", StatusCode::SERVICE_UNAVAILABLE),
        ("/startupz", StatusCode::SERVICE_UNAVAILABLE),
        ("/v1/models", StatusCode::SERVICE_UNAVAILABLE),
        ("/metrics", StatusCode::OK),
    ] {
        assert_eq!(ask(path).await.unwrap().status(), status, "{path}");
    }
    started.app.begin(started.loaded.await.unwrap().unwrap());
    assert_eq!(ask("/readyz").await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn a_dead_engine_fails_the_probes() {
    let server = Server::start("").await;
    server.app.engine.stop(std::time::Instant::now());
    server.app.engine.ended().await;
    for path in ["/health", "/livez", "/readyz", "/ping"] {
        assert_eq!(server.get(path).await.status, StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    assert_eq!(server.post("/ping", &json!({})).await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.post(CHAT, &chat(1)).await.status, StatusCode::INTERNAL_SERVER_ERROR);
}

#[tokio::test]
async fn a_model_that_is_not_there_is_one_clear_line() {
    let error = app::start(flags("/no/such/model"), None).unwrap_err().to_string();
    assert!(error.contains("/no/such/model"), "{error}");
    assert!(!error.contains('\n'));
}

#[tokio::test]
async fn steps_that_are_planned_ahead_change_no_answer_and_leave_nothing() {
    let (ahead, plain) = (Server::start("--async-scheduling").await, Server::start("").await);
    let mut body = completion(json!(["ROMEO:", "What, "]), 30);
    body["n"] = json!(2);
    body["seed"] = json!(3);
    body["stop"] = json!("e ");
    let answers = (ahead.ok("/v1/completions", body.clone()).await, plain.ok("/v1/completions", body).await);
    assert_eq!(answers.0["choices"], answers.1["choices"]);
    ahead.idle().await;
    let snapshot = ahead.app.engine.view().borrow().snapshot.clone();
    assert!(snapshot.totals.steps_ahead > 0 && snapshot.blocks.used == 0);
    ahead.stop();
    plain.stop();
}

#[tokio::test]
async fn what_host_memory_holds_is_on_the_disk_when_the_server_ends() {
    let directory = std::env::temp_dir().join(format!("quayline-ends-{}", std::process::id()));
    let line = format!(
        "--kv-offloading-size 0.1 --kv-offloading-disk-path {} --kv-offloading-disk-size 0.1",
        directory.display()
    );
    let mut cached = Vec::new();
    for _ in 0..2 {
        let server = Server::start(&format!("{line} --enable-prompt-tokens-details")).await;
        // More blocks than are written at a time.
        for begin in 0..8 {
            let prompt: Vec<u32> = (0..200).map(|token| token + begin).collect();
            let answer = server.ok("/v1/completions", completion(json!(prompt), 1)).await;
            cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
        }
        let by = std::time::Instant::now() + std::time::Duration::from_secs(60);
        server.app.engine.stop(by);
        server.app.engine.ended().await;
        assert!(std::time::Instant::now() < by);
        server.stop();
    }
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(cached, [[0; 8], [192; 8]].concat());
}

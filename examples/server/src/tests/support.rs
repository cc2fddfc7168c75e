//! A server for one test.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tower::ServiceExt;

use crate::app::{self, App, Started};
use crate::config::Flags;
use crate::connection::{self, Listener};
use crate::kv_events::Outlet;

/// A loaded server.
pub(super) struct Server {
    pub(super) app: Arc<App>,
    pub(super) router: Router,
    pub(super) document: utoipa::openapi::OpenApi,
    started: Option<std::thread::JoinHandle<()>>,
}

/// An answer, read whole.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) text: String,
}

impl Answer {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }
}

pub(super) fn flags(line: &str) -> Flags {
    let arguments = std::iter::once("quayline-server").chain(line.split_whitespace());
    Flags::parse_from_command_line(arguments.map(OsString::from)).unwrap()
}

impl Server {
    /// With the bundled model, one thread and a small cache, and what `line` adds.
    pub(super) async fn start(line: &str) -> Self {
        Self::start_telling(line, None).await
    }

    /// The same, with somebody to tell what the cache does.
    pub(super) async fn start_telling(line: &str, events: Option<Outlet>) -> Self {
        let line = format!("--threads 1 --num-gpu-blocks-override 256 {line}");
        let flags = flags(&line);
        let Started { app, engine, loaded } = app::start(flags.clone(), events).unwrap();
        app.begin(loaded.await.unwrap().unwrap());
        let (router, document) =
            app::routes(&app, &flags.network.root_path, flags.dev_mode, &flags.network.allowed_origins);
        Self { app, router, document, started: Some(engine) }
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(super) async fn answer(&self, request: Request<Body>) -> Answer {
        let response = self.send(request).await;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        Answer { status, headers, text: String::from_utf8(bytes.into()).unwrap() }
    }

    pub(super) async fn get(&self, path: &str) -> Answer {
        self.answer(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(super) async fn post_text(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.answer(post(path, body)).await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    /// Posts what must succeed.
    pub(super) async fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{body}: {}", answer.text);
        answer.json()
    }

    /// The chunks of a stream, which must end as streams do.
    pub(super) async fn chunks(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = json!(true);
        let answer = self.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{body}: {}", answer.text);
        assert_eq!(answer.headers[header::CONTENT_TYPE], "text/event-stream");
        let events: Vec<&str> =
            answer.text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
        let (last, events) = events.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// Until the engine holds nothing any more: every request ended and every block is free.
    pub(super) async fn idle(&self) {
        let mut view = self.app.engine.view();
        let idle = view.wait_for(|view| {
            let snapshot = &view.snapshot;
            snapshot.running.is_empty() && snapshot.waiting.is_empty() && snapshot.blocks.used == 0
        });
        tokio::time::timeout(Duration::from_secs(60), idle).await.expect("the engine falls idle").unwrap();
        assert!(self.app.engine.is_alive(), "and its audit finds nothing");
    }

    /// Until something runs.
    pub(super) async fn busy(&self) {
        let mut view = self.app.engine.view();
        let busy = view.wait_for(|view| !view.snapshot.running.is_empty());
        tokio::time::timeout(Duration::from_secs(60), busy).await.expect("something runs").unwrap();
    }

    /// Serves on loopback until the sender says true or is dropped.
    pub(super) async fn listen(&self) -> (SocketAddr, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        self.listen_at(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    /// The same, where it was said.
    pub(super) fn listen_at(
        &self,
        listener: TcpListener,
    ) -> (SocketAddr, watch::Sender<bool>, tokio::task::JoinHandle<()>) {
        let address = listener.local_addr().unwrap();
        let (close, closing) = watch::channel(false);
        let router = self.router.clone();
        let task = tokio::spawn(connection::serve(Listener::Tcp(listener), router, 4096, closing));
        (address, close, task)
    }

    /// Ends the engine's thread, which must have nothing to complain of.
    pub(super) fn stop(mut self) {
        self.app.engine.stop(std::time::Instant::now());
        self.started.take().unwrap().join().unwrap();
    }
}

pub(super) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .unwrap()
}

/// A chat request with a deterministic answer of `max_tokens`.
pub(super) fn chat(max_tokens: u32) -> Value {
    json!({
        "messages": [{ "role": "user", "content": "Who art thou?" }],
        "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
    })
}

/// A completion request with a deterministic answer of `max_tokens`.
pub(super) fn completion(prompt: Value, max_tokens: u32) -> Value {
    json!({ "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

/// The names of an object's fields.
pub(super) fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// A connection that has sent one request.
pub(super) async fn dial(address: SocketAddr, head: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!(
        "{head}\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// Reads until `until` has come, and returns everything so far.
pub(super) async fn read_until(stream: &mut TcpStream, until: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&text).contains(until) {
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "closed before {until:?}: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

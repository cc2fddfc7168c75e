//! Server-sent events: one per engine step and choice, then usage, then `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;

use crate::api::fields::UsageReport;
use crate::api::generation::{Generation, given_up};
use crate::api::usage::{Tally, Usage};
use crate::app::App;
use crate::engine::Part;

/// Turns parts into chunks, each a JSON text.
pub(crate) trait Chunks: Send + 'static {
    /// What one step brought for one choice.
    fn chunk(&mut self, part: Part, usage: ChunkUsage) -> String;
    /// The chunk without choices that carries the usage of all.
    fn last(&mut self, usage: Usage) -> String;
}

/// `usage` in a chunk: absent, null, or there.
pub(crate) type ChunkUsage = Option<Option<Usage>>;

/// The response that streams a generation.
pub(crate) fn respond(
    app: Arc<App>,
    generation: Generation,
    report: UsageReport,
    chunks: impl Chunks,
) -> Response {
    let keep_alive = app.keep_alive;
    let state = Streaming { app, generation, report, chunks, ready: VecDeque::new(), ended: false };
    let events = stream::unfold(state, |mut state| async move {
        let text = state.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(text)), state))
    });
    let mut response = match keep_alive {
        Some(every) => Sse::new(events).keep_alive(KeepAlive::new().interval(every)).into_response(),
        None => Sse::new(events).into_response(),
    };
    // Proxies that buffer would hold tokens back.
    let buffering = HeaderName::from_static("x-accel-buffering");
    response.headers_mut().insert(buffering, HeaderValue::from_static("no"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// Seconds as `--sse-keep-alive-interval` has them.
pub(crate) fn keep_alive(seconds: u64) -> Option<Duration> {
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// The JSON text of a chunk.
pub(crate) fn json_text(chunk: &impl Serialize) -> String {
    serde_json::to_string(chunk).expect("our own types have string keys and finite numbers")
}

struct Streaming<C> {
    app: Arc<App>,
    generation: Generation,
    report: UsageReport,
    chunks: C,
    ready: VecDeque<String>,
    ended: bool,
}

impl<C: Chunks> Streaming<C> {
    async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() && !self.ended {
            match self.generation.ticket.next().await {
                Some(Ok(parts)) => parts.into_iter().for_each(|part| self.take(part)),
                Some(Err(_)) => {
                    self.ready.push_back(json_text(&given_up(&self.app).body()));
                    self.end();
                }
                None => {
                    if self.report != UsageReport::Never {
                        let usage = self.generation.tally.usage();
                        self.ready.push_back(self.chunks.last(usage));
                    }
                    self.end();
                }
            }
        }
        self.ready.pop_front()
    }

    fn take(&mut self, part: Part) {
        let tally: &mut Tally = &mut self.generation.tally;
        tally.note(&part);
        let usage = match self.report {
            UsageReport::Never => None,
            UsageReport::AtTheEnd => Some(None),
            UsageReport::Always => Some(Some(tally.usage_of(part.choice))),
        };
        self.ready.push_back(self.chunks.chunk(part, usage));
    }

    fn end(&mut self) {
        self.ready.push_back("[DONE]".into());
        self.ended = true;
    }
}

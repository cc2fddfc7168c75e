//! One log line and one count per request, also for those whose client went away (499).

use std::hash::{BuildHasher, Hasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::Response;

use crate::app::App;

const REQUEST_ID: &str = "x-request-id";

/// nginx's status for a client that closed before the answer was complete.
const CLIENT_GONE: u16 = 499;

/// A request's name in logs and answers, and when it came.
#[derive(Debug, Clone)]
pub(crate) struct Tag {
    pub(crate) id: Arc<str>,
    pub(crate) arrived: Instant,
}

/// Whether a text can name a request.
pub(crate) fn is_tag(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Names each request, and writes it down when its answer is complete or given up.
pub(crate) async fn log(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_tag(id));
    let id: Arc<str> = given.map_or_else(|| fresh_id().into(), Into::into);
    let tag = Tag { id: Arc::clone(&id), arrived: Instant::now() };
    request.extensions_mut().insert(tag.clone());
    let matched = request.extensions().get::<MatchedPath>();
    let mut entry = Entry {
        handler: matched.map_or("none", MatchedPath::as_str).to_owned(),
        method: request.method().as_str().to_owned(),
        path: request.uri().path().to_owned(),
        status: None,
        complete: false,
        tag,
        app: Arc::clone(&app),
    };
    let response = next.run(request).await;
    entry.status = Some(response.status().as_u16());
    let mut response = response.map(|body| Body::new(Watched { body, entry }));
    if app.request_id_headers
        && let Ok(id) = HeaderValue::from_str(&id)
    {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// What will be written down. It is, whatever becomes of the request, when this is dropped.
struct Entry {
    handler: String,
    method: String,
    path: String,
    status: Option<u16>,
    complete: bool,
    tag: Tag,
    app: Arc<App>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let status = if self.complete { self.status.unwrap_or(CLIENT_GONE) } else { CLIENT_GONE };
        let elapsed = self.tag.arrived.elapsed();
        let method = if is_standard(&self.method) { &self.method } else { "OTHER" };
        self.app.metrics.answered(&self.handler, method, status, elapsed);
        if !self.app.silent_paths.contains(&self.path) {
            tracing::info!(
                method = self.method,
                path = self.path,
                status,
                milliseconds = elapsed.as_secs_f64() * 1e3,
                request_id = &*self.tag.id,
                "request"
            );
        }
    }
}

/// Methods are labels of metrics, and clients can invent them.
fn is_standard(method: &str) -> bool {
    ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"].contains(&method)
}

/// A response body that knows whether it was sent to its end.
struct Watched {
    body: Body,
    entry: Entry,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if matches!(polled, Poll::Ready(None)) {
            self.entry.complete = true;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // A body of known length is not always polled past its last byte.
        self.entry.complete |= self.body.is_end_stream();
    }
}

/// 32 hexadecimal digits that no other request has.
pub(crate) fn fresh_id() -> String {
    let random = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", random(), random())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_can_be_tags() {
        let (one, other) = (fresh_id(), fresh_id());
        assert_ne!(one, other);
        assert!(is_tag(&one) && one.len() == 32);
        assert!(!is_tag("") && !is_tag("a b") && !is_tag("ä") && !is_tag(&"x".repeat(129)));
    }
}

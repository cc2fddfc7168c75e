//! One HTTP connection that asks and times the answer. It allocates little, because it runs on the server's
//! cores.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::time::{Duration, Instant};

use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::{Deserialize, Deserializer, IgnoredAny, Visitor};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::sse::Events;
use crate::workload::{Fate, Work};

/// The server that is asked.
#[derive(Clone, Debug)]
pub struct Target {
    address: SocketAddr,
    authority: String,
    base: String,
    key: Option<String>,
}

/// Why an address cannot be a target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The address does not have the form `http://host:port[/base]`.
    #[error("{0:?} is not of the form http://host:port[/base]")]
    Form(String),
    /// The host has no address.
    #[error("{host} cannot be resolved: {source}")]
    Unknown {
        /// The host and port.
        host: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The host is not this machine.
    #[error("{0} is not this machine; load on other machines needs --allow-remote")]
    Remote(SocketAddr),
}

impl Target {
    /// Reads `http://host:port[/base]`. Hosts other than this machine are refused unless `allow_remote`.
    ///
    /// # Errors
    /// When the address has another form, cannot be resolved, or is remote and that was not allowed.
    pub fn parse(url: &str, key: Option<String>, allow_remote: bool) -> Result<Self, TargetError> {
        let form = || TargetError::Form(url.to_owned());
        let rest = url.strip_prefix("http://").ok_or_else(form)?;
        let (authority, base) = rest.split_once('/').unwrap_or((rest, ""));
        let host = if authority.contains(':') { authority.to_owned() } else { format!("{authority}:80") };
        if authority.is_empty() || authority.contains('@') {
            return Err(form());
        }
        let address = host
            .to_socket_addrs()
            .and_then(|mut all| all.next().ok_or_else(|| std::io::ErrorKind::NotFound.into()))
            .map_err(|source| TargetError::Unknown { host, source })?;
        if !address.ip().is_loopback() && !allow_remote {
            return Err(TargetError::Remote(address));
        }
        let base = base.trim_end_matches('/');
        let base = if base.is_empty() { String::new() } else { format!("/{base}") };
        Ok(Self { address, authority: authority.to_owned(), base, key })
    }

    fn request(&self, method: &str, path: &str, body: String) -> Result<Request<String>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("host", &self.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.body(body).map_err(|_| Failure::Connection)
    }
}

/// Why a request brought no measurement.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Failure {
    /// No connection, or it broke before the answer began.
    Connection,
    /// Another status than 200.
    Status(u16),
    /// The stream carried an error object.
    ErrorEvent,
    /// The stream ended before it said that it was done.
    EndedEarly,
    /// An event or a body was not the JSON that the API promises.
    Malformed,
    /// The answer had no token counts.
    NoUsage,
    /// A wrong request was answered.
    NotRefused,
    /// The request took longer than its limit.
    Timeout,
    /// The whole run reached its limit first.
    CutOff,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection => f.write_str("connection"),
            Self::Status(code) => write!(f, "status {code}"),
            Self::ErrorEvent => f.write_str("error event"),
            Self::EndedEarly => f.write_str("ended early"),
            Self::Malformed => f.write_str("malformed"),
            Self::NoUsage => f.write_str("no usage"),
            Self::NotRefused => f.write_str("not refused"),
            Self::Timeout => f.write_str("timeout"),
            Self::CutOff => f.write_str("cut off"),
        }
    }
}

/// A measured answer.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// From sending to the first piece of text.
    pub first: Duration,
    /// From sending to the last piece of text.
    pub last: Duration,
    /// From sending to the end of the answer.
    pub end: Duration,
    /// Pieces of text.
    pub pieces: u32,
    /// What the server counted.
    pub usage: Usage,
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// With an answer.
    Answered(Answer),
    /// With a refusal, as it should.
    Refused,
    /// The client left, as it should.
    Left,
}

/// Token counts of an answer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize)]
#[serde(from = "WireUsage")]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// Tokens of the prompt that the server had computed before.
    pub cached_tokens: u64,
}

#[derive(serde::Deserialize)]
struct WireUsage {
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    prompt_tokens_details: Option<WireDetails>,
}

#[derive(serde::Deserialize)]
struct WireDetails {
    cached_tokens: Option<u64>,
}

impl From<WireUsage> for Usage {
    fn from(wire: WireUsage) -> Self {
        Self {
            prompt_tokens: wire.prompt_tokens,
            completion_tokens: wire.completion_tokens,
            cached_tokens: wire.prompt_tokens_details.and_then(|details| details.cached_tokens).unwrap_or(0),
        }
    }
}

#[derive(serde::Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<IgnoredAny>,
}

#[derive(serde::Deserialize)]
struct Choice {
    text: Option<HasText>,
    delta: Option<Message>,
    message: Option<Message>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(serde::Deserialize)]
struct Message {
    content: Option<HasText>,
    reasoning_content: Option<HasText>,
}

impl Choice {
    fn has_text(&self) -> bool {
        let message = |message: &Message| {
            [&message.content, &message.reasoning_content].into_iter().flatten().any(|text| text.0)
        };
        self.text.as_ref().is_some_and(|text| text.0)
            || self.delta.as_ref().is_some_and(message)
            || self.message.as_ref().is_some_and(message)
    }
}

/// Whether a JSON string is not empty, without a copy of it.
struct HasText(bool);

impl<'de> Deserialize<'de> for HasText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = HasText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E>(self, text: &str) -> Result<HasText, E> {
                Ok(HasText(!text.is_empty()))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A client: at most one connection, kept open between requests.
#[derive(Debug)]
pub struct Client {
    target: Target,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<String>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    /// Closes the socket at once, whatever is still in flight.
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    /// A client that has not connected yet.
    #[must_use]
    pub const fn new(target: Target) -> Self {
        Self { target, connection: None }
    }

    /// Sends `work` and measures the answer; microseconds between pieces of text are appended to `gaps`.
    ///
    /// # Errors
    /// When the answer is not what [`Work::expected`] says, or takes longer than `limit`.
    pub async fn send(
        &mut self,
        work: Work,
        limit: Duration,
        gaps: &mut Vec<u32>,
    ) -> Result<Outcome, Failure> {
        let (patience, at_the_limit) = match work.fate {
            Fate::LeaveAfter(patience) if patience < limit => (patience, Ok(Outcome::Left)),
            _ => (limit, Err(Failure::Timeout)),
        };
        let result = tokio::time::timeout(patience, self.exchange(work, gaps)).await.unwrap_or(at_the_limit);
        if !matches!(result, Ok(Outcome::Answered(_) | Outcome::Refused)) {
            self.connection = None;
        }
        result
    }

    /// Fetches `path` and gives back the body of a 200.
    ///
    /// # Errors
    /// When there is no such answer within ten seconds.
    pub async fn get(&mut self, path: &str) -> Result<String, Failure> {
        let request = self.target.request("GET", path, String::new())?;
        let fetch = async {
            let response = self.respond(request).await?;
            if response.status() != StatusCode::OK {
                return Err(Failure::Status(response.status().as_u16()));
            }
            String::from_utf8(collect(response.into_body()).await?).map_err(|_| Failure::Malformed)
        };
        let result =
            tokio::time::timeout(Duration::from_secs(10), fetch).await.unwrap_or(Err(Failure::Timeout));
        if result.is_err() {
            self.connection = None;
        }
        result
    }

    async fn exchange(&mut self, work: Work, gaps: &mut Vec<u32>) -> Result<Outcome, Failure> {
        let request = self.target.request("POST", work.endpoint.path(), work.body)?;
        let start = Instant::now();
        let response = self.respond(request).await?;
        let status = response.status();
        let body = response.into_body();
        match (status, work.expected) {
            (StatusCode::OK, crate::workload::Expected::Refusal) => Err(Failure::NotRefused),
            (StatusCode::OK, _) if work.stream => Stream::new(start, gaps).read(body, work.fate).await,
            (StatusCode::OK, _) => whole(start, &collect(body).await?),
            (status, crate::workload::Expected::Refusal) if status.is_client_error() => {
                collect(body).await.map(|_| Outcome::Refused)
            }
            (status, _) => {
                collect(body).await?;
                Err(Failure::Status(status.as_u16()))
            }
        }
    }

    /// Sends a request. A server may close a kept connection at the very moment it is used again: if nothing of an
    /// answer came over such a connection, the request is sent once more, over a new one.
    async fn respond(&mut self, request: Request<String>) -> Result<hyper::Response<Incoming>, Failure> {
        let again = request.clone();
        let (sender, kept) = self.sender().await?;
        let first = sender.send_request(request).await;
        if first.is_ok() || !kept {
            return first.map_err(|_| Failure::Connection);
        }
        self.connection = None;
        let (sender, _) = self.sender().await?;
        sender.send_request(again).await.map_err(|_| Failure::Connection)
    }

    /// The open connection if the server still holds it, else a new one; and whether it was open.
    async fn sender(&mut self) -> Result<(&mut SendRequest<String>, bool), Failure> {
        let mut kept = self.connection.take();
        if let Some(connection) = &mut kept
            && connection.sender.ready().await.is_err()
        {
            kept = None;
        }
        let (connection, is_kept) = match kept {
            Some(connection) => (connection, true),
            None => (self.connect().await?, false),
        };
        Ok((&mut self.connection.insert(connection).sender, is_kept))
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let stream = TcpStream::connect(self.target.address).await.map_err(|_| Failure::Connection)?;
        stream.set_nodelay(true).map_err(|_| Failure::Connection)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|_| Failure::Connection)?;
        let driver = tokio::task::spawn_local(async move {
            // How a connection ends is seen by the request that used it.
            let _ = connection.await;
        });
        Ok(Connection { sender, driver })
    }
}

async fn next_frame(body: &mut Incoming) -> Option<Result<Bytes, Failure>> {
    loop {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await?;
        match frame {
            Ok(frame) => {
                if let Ok(bytes) = frame.into_data() {
                    return Some(Ok(bytes));
                }
            }
            Err(_) => return Some(Err(Failure::EndedEarly)),
        }
    }
}

async fn collect(mut body: Incoming) -> Result<Vec<u8>, Failure> {
    let mut all = Vec::new();
    while let Some(bytes) = next_frame(&mut body).await {
        all.extend_from_slice(&bytes?);
    }
    Ok(all)
}

/// An answer that came in one piece: its first and its last text are its end.
fn whole(start: Instant, body: &[u8]) -> Result<Outcome, Failure> {
    let end = start.elapsed();
    let chunk: Chunk = serde_json::from_slice(body).map_err(|_| Failure::Malformed)?;
    if chunk.error.is_some() {
        return Err(Failure::ErrorEvent);
    }
    let usage = chunk.usage.ok_or(Failure::NoUsage)?;
    Ok(Outcome::Answered(Answer { first: end, last: end, end, pieces: 1, usage }))
}

/// A stream while it is read.
struct Stream<'a> {
    start: Instant,
    gaps: &'a mut Vec<u32>,
    first: Option<Duration>,
    last: Duration,
    pieces: u32,
    usage: Option<Usage>,
    finished: bool,
    done: bool,
    failure: Option<Failure>,
}

impl<'a> Stream<'a> {
    const fn new(start: Instant, gaps: &'a mut Vec<u32>) -> Self {
        Self {
            start,
            gaps,
            first: None,
            last: Duration::ZERO,
            pieces: 0,
            usage: None,
            finished: false,
            done: false,
            failure: None,
        }
    }

    async fn read(mut self, mut body: Incoming, fate: Fate) -> Result<Outcome, Failure> {
        let mut events = Events::default();
        while let Some(bytes) = next_frame(&mut body).await {
            let now = self.start.elapsed();
            events.push(&bytes?, |data| self.event(now, data));
            if let Some(failure) = self.failure {
                return Err(failure);
            }
            match fate {
                Fate::LeaveAfterPieces(limit) if self.pieces >= limit && !self.done => {
                    return Ok(Outcome::Left);
                }
                Fate::ReadSlowly(pause) => tokio::time::sleep(pause).await,
                _ => {}
            }
        }
        self.answer()
    }

    fn event(&mut self, now: Duration, data: &[u8]) {
        if data == b"[DONE]" {
            self.done = true;
            return;
        }
        match serde_json::from_slice::<Chunk>(data) {
            Ok(chunk) => self.chunk(now, &chunk),
            Err(_) => self.failure = Some(Failure::Malformed),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "microseconds between two tokens fit in 71 minutes")]
    fn chunk(&mut self, now: Duration, chunk: &Chunk) {
        if chunk.error.is_some() {
            self.failure = Some(Failure::ErrorEvent);
        }
        self.usage = chunk.usage.or(self.usage);
        self.finished |= chunk.choices.iter().any(|choice| choice.finish_reason.is_some());
        if !chunk.choices.iter().any(Choice::has_text) {
            return;
        }
        self.pieces += 1;
        if self.first.is_none() {
            self.first = Some(now);
        } else {
            self.gaps.push(now.saturating_sub(self.last).as_micros() as u32);
        }
        self.last = now;
    }

    fn answer(self) -> Result<Outcome, Failure> {
        let end = self.start.elapsed();
        if !(self.done && self.finished) {
            return Err(Failure::EndedEarly);
        }
        let usage = self.usage.ok_or(Failure::NoUsage)?;
        let first = self.first.unwrap_or(end);
        let last = if self.pieces == 0 { end } else { self.last };
        Ok(Outcome::Answered(Answer { first, last, end, pieces: self.pieces, usage }))
    }
}

/// The name of the first model that the server lists.
///
/// # Errors
/// When `/v1/models` does not answer with at least one model.
pub async fn first_model(client: &mut Client) -> Result<String, Failure> {
    #[derive(serde::Deserialize)]
    struct List {
        data: Vec<BTreeMap<String, serde_json::Value>>,
    }
    let list: List =
        serde_json::from_str(&client.get("/v1/models").await?).map_err(|_| Failure::Malformed)?;
    let id = list.data.first().and_then(|model| model.get("id")).and_then(|id| id.as_str());
    id.map(str::to_owned).ok_or(Failure::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(events: &[&str]) -> (Result<Outcome, Failure>, usize) {
        let mut gaps = Vec::new();
        let mut stream = Stream::new(Instant::now(), &mut gaps);
        for (index, event) in events.iter().enumerate() {
            stream.event(Duration::from_millis(index as u64 + 1), event.as_bytes());
        }
        let result = stream.failure.map_or_else(|| stream.answer(), Err);
        (result, gaps.len())
    }

    #[test]
    fn only_loopback_is_a_target_unless_allowed() {
        assert!(Target::parse("http://127.0.0.1:8000", None, false).is_ok());
        assert!(
            Target::parse("http://127.9.0.1:8000/base/", None, false)
                .is_ok_and(|target| target.base == "/base")
        );
        assert!(Target::parse("http://[::1]:8000", None, false).is_ok());
        assert!(matches!(Target::parse("http://10.0.0.1:8000", None, false), Err(TargetError::Remote(_))));
        assert!(Target::parse("http://10.0.0.1:8000", None, true).is_ok());
        assert!(matches!(Target::parse("https://127.0.0.1", None, false), Err(TargetError::Form(_))));
        assert!(matches!(Target::parse("http://", None, false), Err(TargetError::Form(_))));
    }

    #[test]
    fn tokens_come_from_usage_and_not_from_pieces() {
        let (result, gaps) = read(&[
            r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":"two tokens"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":"x"},"finish_reason":"length"}]}"#,
            concat!(
                r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"#,
                r#""prompt_tokens_details":{"cached_tokens":8}}}"#
            ),
            "[DONE]",
        ]);
        let Ok(Outcome::Answered(answer)) = result else { panic!("{result:?}") };
        assert_eq!(answer.usage, Usage { prompt_tokens: 9, completion_tokens: 3, cached_tokens: 8 });
        assert_eq!((answer.pieces, gaps), (2, 1));
        assert_eq!((answer.first.as_millis(), answer.last.as_millis()), (2, 3));
    }

    #[test]
    fn an_answer_that_is_not_whole_is_a_failure_with_a_name() {
        let text = r#"{"choices":[{"text":"a","finish_reason":"stop"}]}"#;
        let cases: [(&[&str], Failure); 5] = [
            (&[text], Failure::EndedEarly),
            (&["[DONE]"], Failure::EndedEarly),
            (&[text, "[DONE]"], Failure::NoUsage),
            (&[r#"{"error":{"message":"no"}}"#, "[DONE]"], Failure::ErrorEvent),
            (&["{"], Failure::Malformed),
        ];
        for (events, expected) in cases {
            let (result, _) = read(events);
            assert_eq!(result.err(), Some(expected), "{events:?}");
        }
    }
}

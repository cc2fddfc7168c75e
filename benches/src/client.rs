//! One HTTP connection that asks and times the answer. It allocates little, because it runs on the server's
//! cores.

mod answer;
mod target;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

pub use self::answer::{Answer, Usage};
use self::answer::{Stream, collect, whole};
pub use self::target::{Target, TargetError};
use crate::workload::{Expected, Fate, Work};

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
            (StatusCode::OK, Expected::Refusal) => Err(Failure::NotRefused),
            (StatusCode::OK, _) if work.stream => Stream::new(start, gaps).read(body, work.fate).await,
            (StatusCode::OK, _) => whole(start, &collect(body).await?),
            (status, Expected::Refusal) if status.is_client_error() => {
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

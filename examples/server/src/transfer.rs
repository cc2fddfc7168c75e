//! Prefill in one server, decode in another: what `kv_transfer_params` say, and the way of the blocks between.
//!
//! ```text
//!  client, or a proxy       prefill server                     decode server
//!   do_remote_decode  --->  reads the prompt, keeps its blocks
//!   do_remote_prefill <---  answer with where they are
//!   do_remote_prefill ---------------------------------------> waits for room
//!                           GET /kv_transfer/KEY     <-------  has room
//!                           blocks                   ------->  runs as if it had read the prompt
//!                           DELETE /kv_transfer/KEY  <-------  has them, or never wanted them
//! ```
//!
//! The fields are those that vLLM's connectors put there, and that llm-d's sidecar passes on. The key cannot be
//! guessed, and opens the blocks of one request.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use quayline_engine::{FailedLoads, Load, Options, Parcel};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::access::fresh_id;
use crate::api::error::ApiError;
use crate::app::App;
use crate::complaint::complaint;

/// `--kv-transfer-config`, in vLLM's form.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TransferConfig {
    #[expect(dead_code, reason = "there is one; naming another is refused when this is read")]
    kv_connector: Connector,
    #[serde(default)]
    kv_role: Role,
    /// Where other servers find this one; where it listens, if not said.
    kv_ip: Option<String>,
    kv_port: Option<u16>,
    #[serde(default)]
    kv_load_failure_policy: FailurePolicy,
    #[serde(default)]
    kv_connector_extra_config: Patience,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum Connector {
    HttpConnector,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum Role {
    #[default]
    #[serde(rename = "kv_both")]
    Both,
    #[serde(rename = "kv_producer")]
    Producer,
    #[serde(rename = "kv_consumer")]
    Consumer,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FailurePolicy {
    #[default]
    Recompute,
    Fail,
}

/// How long is waited for whom.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Patience {
    /// Blocks that nobody fetched are free after this.
    lease_seconds: u64,
    /// Blocks that have not come after this will not come.
    pull_seconds: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self { lease_seconds: 480, pull_seconds: 30 }
    }
}

impl TransferConfig {
    /// What the engine is told.
    pub(crate) fn add_to(&self, options: Options) -> Options {
        let lease = self.kv_connector_extra_config.lease_seconds;
        let failed_loads = match self.kv_load_failure_policy {
            FailurePolicy::Recompute => FailedLoads::Recompute,
            FailurePolicy::Fail => FailedLoads::End,
        };
        Options { handover_ticks_max: Some(lease.saturating_mul(1_000_000)), failed_loads, ..options }
    }
}

/// This server's end of transfers.
#[derive(Debug)]
pub(crate) struct Transfers {
    role: Role,
    host: String,
    port: u16,
    engine_id: String,
    pull_max: Duration,
}

/// What a request does of the two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Half {
    /// Another server goes on, who knows this key.
    Prefill(String),
    /// Another server has read the prompt.
    Decode(Remote),
}

/// Where blocks are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    host: String,
    port: u16,
    key: String,
}

/// The fields that matter here; connectors of others have more.
#[derive(Deserialize)]
struct Params {
    do_remote_decode: Option<bool>,
    do_remote_prefill: Option<bool>,
    remote_host: Option<String>,
    remote_port: Option<u16>,
    remote_request_id: Option<String>,
}

const FIELD: &str = "kv_transfer_params";
const MODEL: HeaderName = HeaderName::from_static("x-kv-model");
const BLOCK_SIZE: HeaderName = HeaderName::from_static("x-kv-block-size");

impl Transfers {
    pub(crate) fn new(config: TransferConfig, host: &str, port: u16) -> Self {
        Self {
            role: config.kv_role,
            host: config.kv_ip.unwrap_or_else(|| host.to_owned()),
            port: config.kv_port.unwrap_or(port),
            engine_id: fresh_id(),
            pull_max: Duration::from_secs(config.kv_connector_extra_config.pull_seconds),
        }
    }

    /// What a request wants of this server; `None` is all of the work.
    ///
    /// # Errors
    /// 400 for what makes no sense, and for the half that this server does not do.
    pub(crate) fn half(&self, params: &Value) -> Result<Option<Half>, ApiError> {
        let params: Params = serde_path_to_error::deserialize(params).map_err(|error| {
            let path = match error.path().to_string().as_str() {
                "." => FIELD.to_owned(),
                path => format!("{FIELD}.{path}"),
            };
            ApiError::value(path, complaint(error.inner()))
        })?;
        match (params.do_remote_decode == Some(true), params.do_remote_prefill == Some(true)) {
            (false, false) => Ok(None),
            (true, true) => Err(ApiError::field(FIELD, "cannot leave both prefill and decode to others")),
            (true, false) if self.role == Role::Consumer => {
                Err(ApiError::field(FIELD, "asks for a prefill, and this server is a kv_consumer"))
            }
            (false, true) if self.role == Role::Producer => {
                Err(ApiError::field(FIELD, "asks for a decode, and this server is a kv_producer"))
            }
            (true, false) => Ok(Some(Half::Prefill(fresh_id()))),
            (false, true) => {
                let (host, port) = params.remote_host.zip(params.remote_port).ok_or_else(|| {
                    ApiError::field(FIELD, "must say remote_host and remote_port with do_remote_prefill")
                })?;
                let is_key =
                    |key: &String| key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
                let key = params.remote_request_id.filter(is_key);
                let key = key.ok_or_else(|| {
                    ApiError::field(FIELD, "must have the remote_request_id of the prefill's answer")
                })?;
                Ok(Some(Half::Decode(Remote { host, port, key })))
            }
        }
    }

    /// What the answer of a prefill says to the decode.
    pub(crate) fn params(&self, key: &str, blocks: &[u32]) -> Value {
        json!({
            "do_remote_prefill": true,
            "do_remote_decode": false,
            "remote_engine_id": self.engine_id,
            "remote_request_id": key,
            "remote_block_ids": blocks,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1,
        })
    }
}

/// Waits until a request has room, brings it its blocks, and lets the other server free them.
pub(crate) async fn pull(app: Arc<App>, remote: Remote, load: oneshot::Receiver<Load>) {
    let Some(pull_max) = app.transfers.as_ref().map(|transfers| transfers.pull_max) else { return };
    // A request that found everything here, or was cancelled, never asks.
    if let Ok(load) = load.await {
        let fetched = tokio::time::timeout(pull_max, fetch(&app, &remote, load)).await;
        let fetched = fetched.unwrap_or_else(|_| Err(format!("nothing came in {pull_max:?}").into()));
        if let Err(error) = &fetched {
            tracing::warn!(host = remote.host, port = remote.port, %error, "blocks did not come");
        }
        app.engine.deliver(load.id, fetched.ok());
    }
    let released = send(&remote, Method::DELETE, "");
    // If this is lost, the lease ends it.
    let _ = tokio::time::timeout(pull_max, released).await;
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn fetch(app: &App, remote: &Remote, load: Load) -> Result<Parcel, Failure> {
    let model = app.loaded_model().ok_or("there is no model")?;
    let pool = app.engine.view().borrow().snapshot.blocks;
    let blocks = load.tokens / pool.size;
    let bytes_max = u64::from(blocks) * pool.bytes.div_ceil(u64::from(pool.total));
    let response =
        send(remote, Method::GET, &format!("?start={}&tokens={}", load.start, load.tokens)).await?;
    let (head, body) = response.into_parts();
    let said = |name: &HeaderName| head.headers.get(name).and_then(|value| value.to_str().ok());
    if head.status != StatusCode::OK {
        return Err(format!("the other server says {}", head.status).into());
    }
    if said(&MODEL) != Some(&model.fingerprint) {
        return Err("the other server has another model".into());
    }
    let block_size = said(&BLOCK_SIZE).and_then(|size| size.parse().ok()).ok_or("blocks of no size")?;
    let bytes = to_bytes(Body::new(body), usize::try_from(bytes_max)?).await?;
    let each = bytes.len() / (blocks as usize).max(1);
    let blocks = bytes.chunks(each.max(1)).map(Box::from).collect();
    Ok(Parcel { start: load.start, block_size, blocks })
}

async fn send(remote: &Remote, method: Method, query: &str) -> Result<Response<Incoming>, Failure> {
    let Remote { host, port, key } = remote;
    let stream = TcpStream::connect((host.as_str(), *port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(format!("/kv_transfer/{key}{query}"));
    let request = request.header(header::HOST, format!("{host}:{port}")).body(Body::empty())?;
    Ok(sender.send_request(request).await?)
}

/// Which tokens' blocks are fetched.
#[derive(Debug, Deserialize)]
pub(crate) struct Range {
    start: u32,
    tokens: u32,
}

/// The blocks of a prompt that was read for another server.
pub(crate) async fn give(
    State(app): State<Arc<App>>,
    Path(key): Path<String>,
    Query(range): Query<Range>,
) -> Result<impl IntoResponse, ApiError> {
    let model = app.model()?;
    let parcel = app.engine.fetch(key, range.start, range.tokens).await;
    let parcel = parcel.ok().flatten().ok_or_else(gone)?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/octet-stream"));
    headers.insert(BLOCK_SIZE, parcel.block_size.into());
    let fingerprint = header::HeaderValue::from_str(&model.fingerprint);
    headers.insert(MODEL, fingerprint.map_err(|_| ApiError::internal("the model's fingerprint is no text"))?);
    Ok((headers, parcel.blocks.concat()))
}

/// The other server has them, or does not want them.
pub(crate) async fn release(
    State(app): State<Arc<App>>,
    Path(key): Path<String>,
) -> Result<StatusCode, ApiError> {
    let released = app.engine.release(key).await.unwrap_or(false);
    if released { Ok(StatusCode::NO_CONTENT) } else { Err(gone()) }
}

fn gone() -> ApiError {
    ApiError::unknown_request("that hands its blocks over under this key")
}

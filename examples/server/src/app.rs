//! What all connections share, and the routes.

use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use quayline_engine::LoadError;
use serde_json::{Map, Value};
use tokio::sync::{oneshot, watch};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::api::body::Bodies;
use crate::api::error::ApiError;
use crate::api::fields::Limits;
use crate::api::stream::keep_alive;
use crate::api::{chat, completions, models, tokenize};
use crate::auth::{self, Keys};
use crate::config::{ContentFormat, Flags};
use crate::engine::{self, GivenUp, Handle};
use crate::kv_events::Outlet;
use crate::metrics::Metrics;
pub(crate) use crate::model::Model;
use crate::order::OrderFlags;
use crate::transfer::{self, Transfers};
use crate::{access, debug, model, page, probe};

/// The server's state and settings.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch on the command line")]
pub(crate) struct App {
    pub(crate) engine: Handle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) keys: Keys,
    pub(crate) bodies: Bodies,
    /// Where prompts are read for other servers, or others read them.
    pub(crate) transfers: Option<Transfers>,
    /// Names that the model answers to; the first is the one in metrics.
    pub(crate) names: Vec<String>,
    /// Where the model came from.
    pub(crate) root: String,
    model: OnceLock<Arc<Model>>,
    draining: watch::Sender<bool>,
    running: Arc<watch::Sender<usize>>,

    pub(crate) max_body_bytes: usize,
    pub(crate) keep_alive: Option<Duration>,
    pub(crate) silent_paths: Vec<String>,
    pub(crate) request_id_headers: bool,
    pub(crate) load_tracking: bool,
    pub(crate) prompt_tokens_details: bool,
    pub(crate) force_usage: bool,
    pub(crate) content_format: ContentFormat,
    pub(crate) template_variables: Map<String, Value>,
    pub(crate) trust_request_template: bool,
    pub(crate) running_max: u32,
    max_logprobs: u32,
    pub(crate) order: OrderFlags,
}

/// What the server is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The model is not there yet.
    Loading,
    /// Requests are answered.
    Ready,
    /// Running requests are finished, new ones refused.
    Draining,
    /// The engine is dead.
    Failed,
}

impl Phase {
    /// The word for it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Failed => "failed",
        }
    }
}

/// A server that loads its model.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) app: Arc<App>,
    pub(crate) engine: JoinHandle<()>,
    pub(crate) loaded: oneshot::Receiver<Result<Model, LoadError>>,
}

/// Starts the engine's thread, which loads the model, and returns at once. What its cache does is told to `events`.
///
/// # Errors
/// When the checkpoint is not there.
pub(crate) fn start(flags: Flags, events: Option<Outlet>) -> Result<Started, LoadError> {
    let files = flags.files()?;
    let metrics = Arc::new(Metrics::new());
    if let Some(outlet) = &events {
        metrics.add_kv_events(&flags.names(&files)[0], Arc::clone(&outlet.counts));
    }
    let (loaded_sender, loaded) = oneshot::channel();
    let load = {
        let (flags, files, metrics) = (flags.clone(), files.clone(), Arc::clone(&metrics));
        move |view: &watch::Receiver<engine::View>| model::load(&flags, &files, &metrics, view)
    };
    let audit = flags.dev_mode || cfg!(debug_assertions);
    let (handle, thread) = engine::spawn(load, events, loaded_sender, audit);
    let app = App {
        engine: handle,
        metrics,
        keys: Keys::new(flags.keys()),
        bodies: Bodies::default(),
        transfers: flags.transfers(),
        names: flags.names(&files),
        root: files.directory().map_or(files.name().to_owned(), |path| path.display().to_string()),
        model: OnceLock::new(),
        draining: watch::Sender::new(false),
        running: Arc::new(watch::Sender::new(0)),
        max_body_bytes: flags.network.max_body_bytes,
        keep_alive: keep_alive(flags.network.sse_keep_alive_interval),
        running_max: flags.options().max_num_seqs,
        request_id_headers: flags.network.enable_request_id_headers,
        load_tracking: flags.network.enable_server_load_tracking,
        prompt_tokens_details: flags.answers.enable_prompt_tokens_details,
        force_usage: flags.answers.enable_force_include_usage,
        content_format: flags.answers.chat_template_content_format,
        trust_request_template: flags.answers.trust_request_chat_template,
        max_logprobs: flags.answers.max_logprobs,
        order: flags.order,
        template_variables: flags.answers.default_chat_template_kwargs.unwrap_or_default(),
        silent_paths: flags.network.disable_access_log_for_endpoints,
    };
    Ok(Started { app: Arc::new(app), engine: thread, loaded })
}

impl App {
    /// The model is loaded: requests are answered from now on.
    pub(crate) fn begin(&self, model: Model) {
        let first = self.model.set(Arc::new(model)).is_ok();
        debug_assert!(first, "a server loads one model");
    }

    /// New requests are refused from now on.
    pub(crate) fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// Whether the server is about to end.
    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// To be told when the server is about to end.
    pub(crate) fn draining(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    /// What the server is doing.
    pub(crate) fn phase(&self) -> Phase {
        if self.is_draining() {
            Phase::Draining
        } else if !self.engine.is_alive() {
            Phase::Failed
        } else if self.model.get().is_none() {
            Phase::Loading
        } else {
            Phase::Ready
        }
    }

    /// The model, if it can be asked.
    ///
    /// # Errors
    /// 503 while loading and draining, 500 when the engine is dead.
    pub(crate) fn model(&self) -> Result<Arc<Model>, ApiError> {
        match (self.phase(), self.model.get()) {
            (Phase::Ready, Some(model)) => Ok(Arc::clone(model)),
            (Phase::Draining, _) => Err(ApiError::unavailable("the server is shutting down")),
            (Phase::Failed, _) => Err(ApiError::internal("the engine failed")),
            _ => Err(ApiError::unavailable("the model is still loading")),
        }
    }

    /// The model, whatever the phase.
    pub(crate) fn loaded_model(&self) -> Option<&Arc<Model>> {
        self.model.get()
    }

    /// Counts a request as running until the guard is dropped.
    ///
    /// # Errors
    /// 503 when the server drains.
    pub(crate) fn enter(&self) -> Result<InFlight, ApiError> {
        // Counted before asked: whoever drains after this sees it.
        let guard = InFlight::new(&self.running);
        match self.is_draining() {
            false => Ok(guard),
            true => Err(ApiError::unavailable("the server is shutting down")),
        }
    }

    /// How many requests run; can be awaited.
    pub(crate) fn running(&self) -> watch::Receiver<usize> {
        self.running.subscribe()
    }

    /// The name to answer under: the one asked for, or the first.
    ///
    /// # Errors
    /// 404 when nothing is served under that name.
    pub(crate) fn served_name(&self, asked: Option<&str>) -> Result<&str, ApiError> {
        let Some(asked) = asked else { return Ok(&self.names[0]) };
        let found = self.names.iter().find(|name| *name == asked);
        found.map(String::as_str).ok_or_else(|| ApiError::unknown_model(asked, &self.names))
    }

    /// What bounds a request's fields.
    pub(crate) fn limits<'a>(&'a self, model: &'a Model) -> Limits<'a> {
        Limits {
            defaults: &model.defaults,
            context: model.context,
            vocab_size: model.vocab_size,
            logprobs_max: self.max_logprobs,
            order: &self.order,
        }
    }

    /// Drops the prefix cache.
    ///
    /// # Errors
    /// When there is no engine any more.
    pub(crate) async fn reset_prefix_cache(&self) -> Result<bool, ApiError> {
        self.engine
            .reset_prefix_cache()
            .await
            .map_err(|GivenUp| ApiError::unavailable("there is no engine to ask"))
    }
}

/// Counts as one running request while it lives.
#[derive(Debug)]
pub(crate) struct InFlight(Arc<watch::Sender<usize>>);

impl InFlight {
    fn new(running: &Arc<watch::Sender<usize>>) -> Self {
        running.send_modify(|count| *count += 1);
        Self(Arc::clone(running))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |duration| duration.as_secs())
}

#[derive(OpenApi)]
#[openapi(info(title = "Quayline", description = "The OpenAI API over the Quayline engine"))]
struct Document;

/// All routes, and the document that describes them.
pub(crate) fn routes(
    app: &Arc<App>,
    root_path: &str,
    dev_mode: bool,
    origins: &[String],
) -> (Router, utoipa::openapi::OpenApi) {
    let mut guarded = OpenApiRouter::new()
        .routes(routes!(chat::create))
        .routes(routes!(completions::create))
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .routes(routes!(debug::state))
        .routes(routes!(debug::one_request))
        .routes(routes!(debug::events));
    if dev_mode {
        guarded = guarded.routes(routes!(debug::reset_prefix_cache));
    }
    let guarded = guarded.route_layer(middleware::from_fn_with_state(Arc::clone(app), auth::guard));
    let open = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(probe::health))
        .routes(routes!(probe::livez))
        .routes(routes!(probe::readyz))
        .routes(routes!(probe::startupz))
        .routes(routes!(probe::ping))
        .routes(routes!(probe::version))
        .routes(routes!(probe::load))
        .routes(routes!(probe::metrics))
        .routes(routes!(page::index))
        .routes(routes!(page::docs))
        .routes(routes!(page::openapi));
    let (mut router, mut document) = open.merge(guarded).split_for_parts();
    if app.transfers.is_some() {
        router = router.route("/kv_transfer/{key}", get(transfer::give).delete(transfer::release));
    }
    if !root_path.is_empty() {
        document.servers = Some(vec![utoipa::openapi::Server::new(root_path)]);
    }
    let document_text: Arc<str> = document.to_json().unwrap_or_default().into();
    let router = router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::Extension(page::Document(document_text)))
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("the server failed on this request").into_response()
        }))
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(Arc::clone(app), access::log))
        .layer(cors(origins))
        .with_state(Arc::clone(app));
    (under(root_path, router), document)
}

/// The routes as they are, and once more under the path a proxy may leave in place.
fn under(root_path: &str, router: Router) -> Router {
    let root = root_path.trim_end_matches('/');
    match root.is_empty() {
        true => router,
        false => Router::new().nest(root, router.clone()).merge(router),
    }
}

fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new().allow_methods([Method::GET, Method::POST]).allow_headers([
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        HeaderName::from_static("x-request-id"),
    ]);
    if origins.iter().any(|origin| origin == "*") {
        return layer.allow_origin(Any);
    }
    let origins = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
    layer.allow_origin(AllowOrigin::list(origins))
}

async fn no_route(request: Request) -> Response {
    ApiError::no_route(request.uri().path()).into_response()
}

async fn no_method(request: Request) -> Response {
    ApiError::method(request.method().as_str(), request.uri().path()).into_response()
}

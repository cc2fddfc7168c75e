//! Probes, and what monitoring asks.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::{App, Phase};

/// vLLM's health check: 200 until the engine fails, 503 from then on.
#[utoipa::path(get, path = "/health", tag = "Probes", responses(
    (status = 200, description = "Alive"), (status = 503, description = "The engine failed")))]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    answer(app.phase() != Phase::Failed, &app)
}

/// Liveness: also true while the model loads, while everything is busy and while the server drains.
#[utoipa::path(get, path = "/livez", tag = "Probes", responses(
    (status = 200, description = "Alive"), (status = 503, description = "The engine failed: restart")))]
pub(crate) async fn livez(State(app): State<Arc<App>>) -> Response {
    answer(app.phase() != Phase::Failed, &app)
}

/// Readiness: true only while requests are answered.
#[utoipa::path(get, path = "/readyz", tag = "Probes", responses(
    (status = 200, description = "Ready"), (status = 503, description = "Loading, draining or failed")))]
pub(crate) async fn readyz(State(app): State<Arc<App>>) -> Response {
    answer(app.phase() == Phase::Ready, &app)
}

/// Start-up: true from when the model is loaded.
#[utoipa::path(get, path = "/startupz", tag = "Probes", responses(
    (status = 200, description = "Loaded"), (status = 503, description = "Loading, or loading failed")))]
pub(crate) async fn startupz(State(app): State<Arc<App>>) -> Response {
    answer(app.loaded_model().is_some(), &app)
}

/// SageMaker's health check: as `/health`, by either method, as vLLM has it.
#[utoipa::path(method(get, post), path = "/ping", tag = "Probes", responses(
    (status = 200, description = "Alive"), (status = 503, description = "The engine failed")))]
pub(crate) async fn ping(state: State<Arc<App>>) -> Response {
    health(state).await
}

fn answer(yes: bool, app: &App) -> Response {
    let status = if yes { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, app.phase().as_str()).into_response()
}

/// Which server this is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Version {
    /// Of this program.
    version: &'static str,
}

/// Which server this is.
#[utoipa::path(get, path = "/version", tag = "Monitoring", responses((status = 200, body = Version)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// How much there is to do.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Load {
    /// Requests being answered; 0 without `--enable-server-load-tracking`.
    server_load: usize,
}

/// How much there is to do.
#[utoipa::path(get, path = "/load", tag = "Monitoring", responses((status = 200, body = Load)))]
pub(crate) async fn load(State(app): State<Arc<App>>) -> Json<Load> {
    let running = *app.running().borrow();
    Json(Load { server_load: if app.load_tracking { running } else { 0 } })
}

/// Prometheus metrics.
#[utoipa::path(get, path = "/metrics", tag = "Monitoring", responses(
    (status = 200, description = "OpenMetrics, or the older text format", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    app.metrics.expose(&headers).into_response()
}

//! The page at `/`, and the OpenAPI document.

use std::sync::Arc;

use axum::Extension;
use axum::http::header;
use axum::response::{Html, IntoResponse, Response};

/// The OpenAPI document as JSON.
#[derive(Debug, Clone)]
pub(crate) struct Document(pub(crate) Arc<str>);

/// A page to chat and to watch the engine.
#[utoipa::path(get, path = "/", tag = "Page", responses(
    (status = 200, description = "HTML", body = String, content_type = "text/html")))]
pub(crate) async fn index() -> Html<&'static str> {
    Html(include_str!("../page/index.html"))
}

/// What this server can do, for people.
#[utoipa::path(get, path = "/docs", tag = "Page", responses(
    (status = 200, description = "HTML", body = String, content_type = "text/html")))]
pub(crate) async fn docs() -> Html<&'static str> {
    Html(include_str!("../page/docs.html"))
}

/// What this server can do, for programs.
#[utoipa::path(get, path = "/openapi.json", tag = "Page", responses(
    (status = 200, description = "OpenAPI 3.1", body = Object, content_type = "application/json")))]
pub(crate) async fn openapi(Extension(document): Extension<Document>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document.0.to_string()).into_response()
}

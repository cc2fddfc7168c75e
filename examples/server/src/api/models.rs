//! `GET /v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::error::{ApiError, ErrorBody};
use crate::app::App;

/// The models served here.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// One name of the model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// Where the model came from.
    root: String,
    /// The model that this one adapts: none.
    parent: Option<String>,
    /// Tokens of prompt and answer together.
    max_model_len: u32,
}

/// List the names of the model.
#[utoipa::path(get, path = "/v1/models", tag = "OpenAI", responses(
    (status = 200, body = ModelList, description = "One entry per name"),
    (status = 503, body = ErrorBody, description = "Still loading, or stopping"),
))]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let model = app.model()?;
    let data = app.names.iter().map(|name| card(&app, &model, name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// Describe one name of the model.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "OpenAI", params(("model" = String, Path)), responses(
    (status = 200, body = ModelCard, description = "It is served here"),
    (status = 404, body = ErrorBody, description = "It is not"),
    (status = 503, body = ErrorBody, description = "Still loading, or stopping"),
))]
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    let model = app.model()?;
    // A directory as a name comes with its slash.
    let rooted = format!("/{name}");
    let name = if app.names.contains(&rooted) { &rooted } else { &name };
    app.served_name(Some(name)).map(|name| Json(card(&app, &model, name)))
}

fn card(app: &App, model: &crate::app::Model, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: model.created,
        owned_by: "quayline",
        root: app.root.clone(),
        parent: None,
        max_model_len: model.context,
    }
}

//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::extract::State;
use quayline_engine::Chat;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::api::body::{self, Json, Parse};
use crate::api::error::{ApiError, ErrorBody};
use crate::api::generation::aside;
use crate::api::message;
use crate::app::{App, Model};

/// A text or a conversation.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// One of the names in `/v1/models`.
    model: Option<String>,
    /// A text, or
    prompt: Option<String>,
    /// a conversation.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Vec<Value>>,
    /// Whether the tokenizer adds begin-of-sequence and the like: yes for a text, no for a conversation.
    add_special_tokens: Option<bool>,
    /// End with the opening of the assistant's turn (the default).
    add_generation_prompt: Option<bool>,
    /// Leave the final message open.
    continue_final_message: Option<bool>,
    /// Tools for the template.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// Variables for the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Also report the tokens' texts.
    return_token_strs: Option<bool>,
}

/// The tokens.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// Token ids.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    /// One of the names in `/v1/models`.
    model: Option<String>,
    /// The ids.
    #[schema(value_type = Vec<u32>)]
    tokens: Option<Vec<u32>>,
}

/// Their text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Detokenized {
    prompt: String,
}

impl Parse for TokenizeRequest {
    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let request = body::known(bytes)?;
        body::refuse_others::<Self, Self>(bytes)?;
        Ok(request)
    }
}

impl Parse for DetokenizeRequest {
    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let request = body::known(bytes)?;
        body::refuse_others::<Self, Self>(bytes)?;
        Ok(request)
    }
}

/// Turn text into tokens.
#[utoipa::path(post, path = "/tokenize", tag = "Text", request_body = TokenizeRequest, responses(
    (status = 200, body = Tokens, description = "The tokens"),
    (status = "4XX", body = ErrorBody, description = "The request is wrong"),
    (status = "5XX", body = ErrorBody, description = "Still loading, or stopping"),
))]
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Json(request, _share): Json<TokenizeRequest>,
) -> Result<axum::Json<Tokens>, ApiError> {
    let model = app.model()?;
    app.served_name(request.model.as_deref())?;
    let max_model_len = model.context;
    let strings = request.return_token_strs == Some(true);
    let tokens = match (request.prompt.clone(), request.messages.clone()) {
        (Some(text), None) => {
            let special = request.add_special_tokens.unwrap_or(true);
            let model = Arc::clone(&model);
            aside(move || Ok(model.text.encode(&text, special)?)).await?
        }
        (None, Some(messages)) => {
            let special = request.add_special_tokens.unwrap_or(false);
            let chat = request.chat(&app, &model, messages)?;
            let model = Arc::clone(&model);
            aside(move || Ok(model.text.encode(&model.text.render_chat(&chat)?, special)?)).await?
        }
        _ => return Err(ApiError::invalid("give either prompt or messages")),
    };
    let string = |id: &u32| model.text.token(*id).map_or_else(String::new, |token| token.text);
    let token_strs = strings.then(|| tokens.iter().map(string).collect());
    Ok(axum::Json(Tokens { count: tokens.len(), max_model_len, tokens, token_strs }))
}

impl TokenizeRequest {
    fn chat(self, app: &App, model: &Model, messages: Vec<Value>) -> Result<Chat, ApiError> {
        let mut variables = app.template_variables.clone();
        variables.extend(self.chat_template_kwargs.unwrap_or_default());
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        Ok(Chat {
            messages: message::prepare(messages, app.content_format)?,
            tools: self.tools.filter(|tools| !tools.is_empty()),
            documents: None,
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            template: model.template.clone(),
            variables,
        })
    }
}

/// Turn tokens into text.
#[utoipa::path(post, path = "/detokenize", tag = "Text", request_body = DetokenizeRequest, responses(
    (status = 200, body = Detokenized, description = "The text"),
    (status = "4XX", body = ErrorBody, description = "The request is wrong"),
    (status = "5XX", body = ErrorBody, description = "Still loading, or stopping"),
))]
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Json(request, _share): Json<DetokenizeRequest>,
) -> Result<axum::Json<Detokenized>, ApiError> {
    let model = app.model()?;
    app.served_name(request.model.as_deref())?;
    let tokens = request.tokens.ok_or_else(|| ApiError::field("tokens", "is missing"))?;
    if let Some(id) = tokens.iter().find(|id| model.text.token(**id).is_none()) {
        return Err(ApiError::field("tokens", format!("names {id}, which is no token of this model")));
    }
    let prompt = aside(move || Ok(model.text.decode(&tokens, false))).await?;
    Ok(axum::Json(Detokenized { prompt }))
}

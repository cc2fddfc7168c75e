//! Refusals as OpenAI error objects: one JSON body, the right status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use quayline_engine::{Refusal, TextError};
use serde::Serialize;
use utoipa::ToSchema;

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
    /// The field at fault, as a path into the body: `messages[2].role`.
    pub(crate) param: Option<String>,
    /// A word that a program can match on.
    pub(crate) code: Option<&'static str>,
}

/// The body of every answer that is not a success.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// What went wrong.
    pub(crate) error: ErrorObject,
}

/// OpenAI's error object.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorObject {
    /// For people.
    message: String,
    /// The class of the error.
    r#type: &'static str,
    /// The field at fault.
    param: Option<String>,
    /// For programs.
    code: Option<&'static str>,
}

/// Seconds after which a full or draining server may be asked again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>, code: Option<&'static str>) -> Self {
        Self { status, message: message.into(), param: None, code }
    }

    /// 400: the request is wrong as a whole.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message, None)
    }

    /// 400: one field is wrong. The message starts with its name.
    pub(crate) fn field(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        Self { param: Some(param.clone()), ..Self::invalid(format!("{param} {problem}")) }
    }

    /// 400: the value of one field is of the wrong kind.
    pub(crate) fn value(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        Self { param: Some(param.clone()), ..Self::invalid(format!("{param}: {problem}")) }
    }

    /// 400: prompt and answer do not fit the model's context.
    pub(crate) fn context(param: &'static str, message: String) -> Self {
        Self { param: Some(param.into()), code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    /// 401.
    pub(crate) fn unauthorized() -> Self {
        let message = "a valid API key is needed: send `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, message, Some("invalid_api_key"))
    }

    /// 403: the key does not allow what the header says.
    pub(crate) fn forbidden(param: &'static str, problem: &str) -> Self {
        let refusal = Self::new(StatusCode::FORBIDDEN, format!("{param} {problem}"), Some("tenant_mismatch"));
        Self { param: Some(param.into()), ..refusal }
    }

    /// 404: no such model.
    pub(crate) fn unknown_model(asked: &str, served: &[String]) -> Self {
        let message = format!("the model `{asked}` is not served here; there is `{}`", served.join("`, `"));
        let param = Some("model".into());
        Self { param, ..Self::new(StatusCode::NOT_FOUND, message, Some("model_not_found")) }
    }

    /// 404: no such address.
    pub(crate) fn no_route(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no {path} here; see /openapi.json"), None)
    }

    /// 404: no request by this name is in the engine.
    pub(crate) fn unknown_request(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("no request `{id}` waits or runs here"), None)
    }

    /// 405.
    pub(crate) fn method(method: &str, path: &str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, format!("{path} does not take {method}"), None)
    }

    /// 408: the body came too slowly.
    pub(crate) fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "the request body did not arrive in time", None)
    }

    /// 413.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the request body is larger than the limit of {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message, Some("request_too_large"))
    }

    /// 415.
    pub(crate) fn media_type() -> Self {
        let message = "the body must be JSON: send `Content-Type: application/json`";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message, None)
    }

    /// 429: try again later.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, message, Some("rate_limit_exceeded"))
    }

    /// 500: our fault.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message, None)
    }

    /// 503: not yet, or not any more.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message, None)
    }

    /// The JSON body.
    pub(crate) fn body(&self) -> ErrorBody {
        let r#type = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let Self { message, param, code, .. } = self.clone();
        ErrorBody { error: ErrorObject { message, r#type, param, code } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER);
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::PromptTooLong { .. } => Self::context("prompt", message),
            refusal if refusal.is_temporary() => Self::busy(message),
            refusal => Self { param: refusal.parameter().map(Into::into), ..Self::invalid(message) },
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        Self::invalid(error.to_string())
    }
}

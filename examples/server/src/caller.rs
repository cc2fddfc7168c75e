//! Who sends a request: what its headers say, and whose key it carries.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::request::Parts;

use crate::access::is_tag;
use crate::api::error::ApiError;
use crate::app::App;
use crate::auth::KeyHolder;

/// Headers as llm-d's router sends them: their names, and former names.
const TENANT: [&str; 2] = ["x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"];
const FIRST_TOKEN: [&str; 2] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"];
const TOKEN: [&str; 2] = ["x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"];

/// Latest target: a day.
const TARGET_MS_MAX: f64 = 86_400_000.0;

/// The tenant of whoever names none.
const NOBODY: &str = "default-flow";

/// The headers, for the document.
#[derive(utoipa::IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "read by the macro")]
pub(crate) struct Headers {
    /// With `--scheduling-policy fair`: the tenant whose tokens are counted, unless the API key says it. Also
    /// `x-gateway-inference-fairness-id`.
    #[param(rename = "x-llm-d-inference-fairness-id", min_length = 1, max_length = 128)]
    tenant: Option<String>,
    /// With `--scheduling-policy deadline`: milliseconds to the first token. Also `x-slo-ttft-ms`.
    #[param(rename = "x-llm-d-slo-ttft-ms", exclusive_minimum = 0)]
    first_token: Option<f64>,
    /// With `--scheduling-policy deadline`: milliseconds from token to token. Also `x-slo-tpot-ms`.
    #[param(rename = "x-llm-d-slo-tpot-ms", exclusive_minimum = 0)]
    token: Option<f64>,
}

/// Who sends a request, as far as its key and its headers tell.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller {
    /// Whose key it carries, or else what the header says.
    tenant: Option<Arc<str>>,
    pub(crate) first_token_ms: Option<f64>,
    pub(crate) token_ms: Option<f64>,
}

impl Caller {
    /// Whose tokens are counted: the key decides, then the header, then the `user` of the body.
    pub(crate) fn tenant(&self, user: Option<&str>) -> Arc<str> {
        let user = user.filter(|user| !user.is_empty());
        self.tenant.clone().unwrap_or_else(|| user.unwrap_or(NOBODY).into())
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let holder = parts.extensions.get::<KeyHolder>().and_then(|holder| holder.0.clone());
        let headers = &parts.headers;
        Ok(Self {
            tenant: tenant(headers, holder, |name| app.keys.has_key(name))?,
            first_token_ms: milliseconds(headers, FIRST_TOKEN)?,
            token_ms: milliseconds(headers, TOKEN)?,
        })
    }
}

/// The tenant of the key, whom no header changes; without one the header's, which cannot name who has a key.
fn tenant(
    headers: &HeaderMap,
    holder: Option<Arc<str>>,
    has_key: impl Fn(&str) -> bool,
) -> Result<Option<Arc<str>>, ApiError> {
    let Some((name, said)) = header(headers, TENANT)? else { return Ok(holder) };
    if !is_tag(said) {
        return Err(ApiError::field(name, "must be 1 to 128 visible ASCII characters"));
    }
    match holder {
        Some(holder) if &*holder == said => Ok(Some(holder)),
        Some(_) => Err(ApiError::forbidden(name, "names another tenant than the one whose API key this is")),
        None if has_key(said) => Err(ApiError::forbidden(name, "names a tenant whose API key this is not")),
        None => Ok(Some(said.into())),
    }
}

fn milliseconds(headers: &HeaderMap, names: [&'static str; 2]) -> Result<Option<f64>, ApiError> {
    let Some((name, text)) = header(headers, names)? else { return Ok(None) };
    match target_ms(text.trim()) {
        Ok(time) => Ok(Some(time)),
        Err(problem) => Err(ApiError::field(name, format!("{problem}, not {text:?}"))),
    }
}

/// Milliseconds of a target, which headers and flags set.
///
/// # Errors
/// What they must be.
pub(crate) fn target_ms(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(time) if time > 0.0 && time <= TARGET_MS_MAX => Ok(time),
        _ => Err(format!("must be a number of milliseconds above 0, and {TARGET_MS_MAX} at most")),
    }
}

/// A header under the first of its names that is there, and that name.
fn header<'a>(
    headers: &'a HeaderMap,
    names: [&'static str; 2],
) -> Result<Option<(&'static str, &'a str)>, ApiError> {
    let Some(name) = names.into_iter().find(|name| headers.contains_key(*name)) else { return Ok(None) };
    let mut values = headers.get_all(name).iter();
    match (values.next().map(|value| value.to_str()), values.next()) {
        (Some(Ok(text)), None) => Ok(Some((name, text))),
        (_, Some(_)) => Err(ApiError::field(name, "is there more than once")),
        _ => Err(ApiError::field(name, "must be visible ASCII")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&'static str, &'static str)]) -> HeaderMap {
        all.iter().map(|&(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_target_is_a_time_and_nothing_else() {
        for nonsense in ["NaN", "inf", "0", "-5", "1e300", "soon", ""] {
            let sent = headers(&[("x-llm-d-slo-ttft-ms", nonsense)]);
            let refusal = milliseconds(&sent, FIRST_TOKEN).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some("x-llm-d-slo-ttft-ms"), "{nonsense:?}");
        }
        let sent = |name| headers(&[(name, "12.5")]);
        assert_eq!(milliseconds(&sent("x-slo-ttft-ms"), FIRST_TOKEN), Ok(Some(12.5)));
        assert_eq!(milliseconds(&sent("x-llm-d-slo-tpot-ms"), FIRST_TOKEN), Ok(None));
    }

    #[test]
    fn the_key_says_who_it_is_and_no_header_says_otherwise() {
        let has_key = |name: &str| name == "acme";
        let named = |name| headers(&[("x-llm-d-inference-fairness-id", name)]);
        let of = |name, holder: Option<&str>| tenant(&named(name), holder.map(Into::into), has_key);
        assert_eq!(of("acme", Some("acme")), Ok(Some("acme".into())));
        assert_eq!(of("other", None), Ok(Some("other".into())));
        for (name, holder) in [("other", Some("acme")), ("acme", None)] {
            let refusal = of(name, holder).unwrap_err();
            assert_eq!(refusal.status, axum::http::StatusCode::FORBIDDEN);
            assert_eq!(refusal.param.as_deref(), Some("x-llm-d-inference-fairness-id"));
        }
        assert_eq!(tenant(&HeaderMap::new(), Some("acme".into()), has_key), Ok(Some("acme".into())));
        assert_eq!(of("two words", None).unwrap_err().status, axum::http::StatusCode::BAD_REQUEST);
    }

    #[test]
    fn without_key_and_header_the_body_names_the_tenant() {
        let caller = Caller::default();
        assert_eq!(&*caller.tenant(Some("ann")), "ann");
        assert_eq!(&*caller.tenant(Some("")), NOBODY);
        let caller = Caller { tenant: Some("acme".into()), ..caller };
        assert_eq!(&*caller.tenant(Some("ann")), "acme");
    }

    #[test]
    fn a_header_that_comes_twice_is_refused() {
        let mut sent = headers(&[("x-slo-tpot-ms", "1")]);
        sent.append("x-slo-tpot-ms", "2".parse().unwrap());
        assert_eq!(milliseconds(&sent, TOKEN).unwrap_err().param.as_deref(), Some("x-slo-tpot-ms"));
    }
}

//! API keys, compared in constant time.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::api::error::ApiError;
use crate::app::App;

/// The keys that open the API, as hashes: equal in length, and no key stays in memory.
#[derive(Debug, Default)]
pub(crate) struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// None at all leaves the API open.
    pub(crate) fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        Self(keys.into_iter().map(hash).collect())
    }

    /// Whether the headers carry one of the keys. Takes the same time whichever key it is or is not.
    fn admit(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let header = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some((scheme, key)) = header.and_then(|value| value.split_once(' ')) else { return false };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return false;
        }
        let given = hash(key.trim());
        self.0.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(&given)).into()
    }
}

/// Lets a request through that carries a key, or needs none.
pub(crate) async fn guard(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if request.method() == Method::OPTIONS || app.keys.admit(request.headers()) {
        Ok(next.run(request).await)
    } else {
        Err(ApiError::unauthorized())
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        headers
    }

    #[test]
    fn without_keys_everybody_enters() {
        assert!(Keys::default().admit(&HeaderMap::new()));
    }

    #[test]
    fn any_of_several_keys_will_do_and_nothing_else() {
        let keys = Keys::new(["one", "two"]);
        for good in ["Bearer one", "bearer two"] {
            assert!(keys.admit(&headers(good)), "{good}");
        }
        for bad in ["Bearer three", "Bearer", "Bearer ", "one", "Basic one", "Bearer onetwo"] {
            assert!(!keys.admit(&headers(bad)), "{bad}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
    }
}

//! API keys, compared in constant time, and the tenants whose they are.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::api::error::ApiError;
use crate::app::App;

/// The keys that open the API, as hashes: equal in length, and no key stays in memory.
#[derive(Debug, Default)]
pub(crate) struct Keys(Vec<Key>);

#[derive(Debug)]
struct Key {
    hash: [u8; 32],
    holder: KeyHolder,
}

/// The tenant whose key came with a request, if it is one's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KeyHolder(pub(crate) Option<Arc<str>>);

impl Keys {
    /// Keys, and whose they are. None at all leaves the API open. A key that comes twice is whose it was first.
    pub(crate) fn new<'a>(keys: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) -> Self {
        let key = |(key, tenant): (&str, Option<&str>)| Key {
            hash: hash(key),
            holder: KeyHolder(tenant.map(Into::into)),
        };
        Self(keys.into_iter().map(key).collect())
    }

    /// Whether a tenant has a key.
    pub(crate) fn has_key(&self, tenant: &str) -> bool {
        self.0.iter().any(|key| key.holder.0.as_deref() == Some(tenant))
    }

    /// Whose key the headers carry; `None` if they carry none of them. Takes the same time whichever key it is or is
    /// not.
    fn admit(&self, headers: &HeaderMap) -> Option<KeyHolder> {
        if self.0.is_empty() {
            return Some(KeyHolder::default());
        }
        let header = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (scheme, key) = header.and_then(|value| value.split_once(' '))?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let given = hash(key.trim());
        let (mut found, mut at) = (Choice::from(0), 0_u64);
        for (place, key) in (0..).zip(&self.0) {
            let same = key.hash.ct_eq(&given);
            at.conditional_assign(&place, same & !found);
            found |= same;
        }
        bool::from(found).then(|| self.0[usize::try_from(at).unwrap_or(0)].holder.clone())
    }
}

/// Lets a request through that carries a key, or needs none.
pub(crate) async fn guard(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    if request.method() != Method::OPTIONS {
        let holder = app.keys.admit(request.headers()).ok_or_else(ApiError::unauthorized)?;
        request.extensions_mut().insert(holder);
    }
    Ok(next.run(request).await)
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
        assert_eq!(Keys::default().admit(&HeaderMap::new()), Some(KeyHolder(None)));
    }

    #[test]
    fn any_of_several_keys_will_do_and_nothing_else() {
        let keys = Keys::new([("one", Some("acme")), ("two", None), ("one", Some("other"))]);
        for good in ["Bearer one", "bearer two"] {
            assert!(keys.admit(&headers(good)).is_some(), "{good}");
        }
        assert_eq!(keys.admit(&headers("Bearer one")), Some(KeyHolder(Some("acme".into()))));
        assert_eq!(keys.admit(&headers("Bearer two")), Some(KeyHolder(None)));
        assert!(keys.has_key("acme") && !keys.has_key("nobody"));
        for bad in ["Bearer three", "Bearer", "Bearer ", "one", "Basic one", "Bearer onetwo"] {
            assert!(keys.admit(&headers(bad)).is_none(), "{bad}");
        }
        assert!(keys.admit(&HeaderMap::new()).is_none());
    }
}

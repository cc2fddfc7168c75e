//! A request body: read within limits, parsed with the field at fault in every complaint, nothing ignored.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use serde::de::value::Error as NoError;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::Value;

use crate::api::error::ApiError;
use crate::api::idle;
use crate::app::App;
use crate::complaint::complaint;

/// Longest time a body may take to arrive.
const ARRIVAL_MAX: Duration = Duration::from_secs(60);

/// Bytes of bodies that may be in memory at once, over all connections.
const IN_MEMORY_MAX: usize = 64 << 20;

/// A checked JSON body, and its share of the memory for bodies: to be dropped when its text has become tokens.
#[derive(Debug)]
pub(crate) struct Json<T>(pub(crate) T, pub(crate) Share);

impl<T: Parse> FromRequest<Arc<App>> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        require_json(request.headers())?;
        let read = read(request.into_body(), app.max_body_bytes, Share::of(&app.bodies));
        let arrived = tokio::time::timeout(ARRIVAL_MAX, read).await;
        let (bytes, share) = arrived.map_err(|_| ApiError::slow_body())??;
        Ok(Self(T::parse(&bytes)?, share))
    }
}

/// What can be read from a body.
pub(crate) trait Parse: Sized {
    /// # Errors
    /// A refusal that names the field.
    fn parse(bytes: &[u8]) -> Result<Self, ApiError>;
}

/// Bytes of all bodies in memory. Only what has arrived counts, so that promising much costs others nothing.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bodies(Arc<AtomicUsize>);

/// One body's share of the memory.
#[derive(Debug)]
pub(crate) struct Share {
    bytes: usize,
    all: Bodies,
}

impl Share {
    fn of(all: &Bodies) -> Self {
        Self { bytes: 0, all: all.clone() }
    }

    fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        self.bytes += bytes;
        let before = self.all.0.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > IN_MEMORY_MAX {
            return Err(ApiError::busy("too many request bodies at once"));
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.all.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

async fn read(body: Body, limit: usize, mut share: Share) -> Result<(Vec<u8>, Share), ApiError> {
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::too_large(limit));
    }
    let mut bytes = Vec::new();
    let mut stream = body.into_data_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| ApiError::invalid(format!("the body broke off: {error}")))?;
        if bytes.len() + piece.len() > limit {
            return Err(ApiError::too_large(limit));
        }
        share.grow(piece.len())?;
        bytes.extend_from_slice(&piece);
    }
    Ok((bytes, share))
}

fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        Ok(())
    } else {
        Err(ApiError::media_type())
    }
}

/// Reads the fields of `T` out of a JSON object and leaves the others alone.
///
/// # Errors
/// 400 with the path of the field that is of the wrong kind, or with what is wrong with the JSON.
pub(crate) fn known<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value: T = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_syntax() || inner.is_eof() {
            ApiError::invalid(format!("the body is not valid JSON: {inner}"))
        } else if path == "." {
            ApiError::invalid(complaint(&inner))
        } else {
            ApiError::value(path, complaint(&inner))
        }
    })?;
    json.end().map_err(|error| ApiError::invalid(format!("the body is not valid JSON: {error}")))?;
    Ok(value)
}

/// The fields of the object that are not among `names`.
///
/// # Errors
/// 400 when a field comes twice, or one value is too deep.
pub(crate) fn rest(bytes: &[u8], names: &[&[&str]]) -> Result<BTreeMap<String, Value>, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    Rest { names }.deserialize(&mut json).map_err(|error| ApiError::invalid(complaint(&error)))
}

/// Refuses every field of the body that `T` and `U` do not have, unless it asks for nothing.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn refuse_others<T: DeserializeOwned, U: DeserializeOwned>(bytes: &[u8]) -> Result<(), ApiError> {
    rest(bytes, &[names::<T>(), names::<U>()])?.iter().try_for_each(|(name, value)| idle::accept(name, value))
}

struct Rest<'a> {
    names: &'a [&'a [&'a str]],
}

impl<'de> DeserializeSeed<'de> for Rest<'_> {
    type Value = BTreeMap<String, Value>;
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Rest<'_> {
    type Value = BTreeMap<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut rest = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if self.names.iter().any(|names| names.contains(&name.as_str())) {
                map.next_value::<IgnoredAny>()?;
            } else if rest.insert(name.clone(), map.next_value()?).is_some() {
                return Err(serde::de::Error::custom(format!("duplicate field `{name}`")));
            }
        }
        Ok(rest)
    }
}

/// The schema of a body that is two structs side by side.
macro_rules! both_schemas {
    ($body:ident, $own:ident, $shared:ident) => {
        impl utoipa::PartialSchema for $body {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::schema::AllOfBuilder::new()
                    .item(<$own as utoipa::PartialSchema>::schema())
                    .item(<$shared as utoipa::PartialSchema>::schema())
                    .into()
            }
        }

        impl utoipa::ToSchema for $body {
            fn schemas(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::schema::Schema>)>) {
                <$own as utoipa::ToSchema>::schemas(schemas);
                <$shared as utoipa::ToSchema>::schemas(schemas);
            }
        }
    };
}
pub(crate) use both_schemas;

/// The names of a struct's fields, as its `Deserialize` asks for them.
fn names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut found = Names(&[]);
    // It always fails: there is nothing to read. What it asked for is what we came for.
    let _: Result<T, NoError> = T::deserialize(&mut found);
    found.0
}

struct Names(&'static [&'static str]);

impl<'de> Deserializer<'de> for &mut Names {
    type Error = NoError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NoError> {
        Err(serde::de::Error::custom("there is nothing to read"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, NoError> {
        self.0 = fields;
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Some {
        a: Option<f32>,
        b: Option<Vec<u32>>,
    }

    #[tokio::test]
    async fn memory_for_bodies_is_bounded_and_given_back() {
        let bodies = Bodies::default();
        let body = || Body::from(vec![0; IN_MEMORY_MAX / 2 + 1]);
        let first = read(body(), usize::MAX, Share::of(&bodies)).await.unwrap();
        let second = read(body(), usize::MAX, Share::of(&bodies)).await.unwrap_err();
        assert_eq!(second.status, axum::http::StatusCode::TOO_MANY_REQUESTS);
        drop(first);
        read(body(), usize::MAX, Share::of(&bodies)).await.unwrap();
        assert_eq!(bodies.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_struct_tells_its_names() {
        assert_eq!(names::<Some>(), ["a", "b"]);
    }

    #[test]
    fn a_wrong_type_is_reported_with_its_path() {
        let error = known::<Some>(br#"{"b": [1, "x"]}"#).unwrap_err();
        assert_eq!(error.param.as_deref(), Option::Some("b[1]"));
        assert_eq!(error.message, r#"b[1]: expected an integer, found "x""#);
        let value: Some = known(br#"{"a": 1e308, "b": [1]}"#).unwrap();
        assert_eq!((value.a, value.b), (Option::Some(f32::INFINITY), Option::Some(vec![1])));
    }

    #[test]
    fn broken_json_has_no_path() {
        for bytes in [&b"{\"a\": NaN}"[..], b"{\"a\": 1", b"{} {}", b"\xff", b"", b"{\"a\":1e999}"] {
            assert_eq!(known::<Some>(bytes).unwrap_err().param, None, "{bytes:?}");
        }
        assert!(rest(b"[]", &[]).is_err());
    }

    #[test]
    fn the_rest_is_what_nobody_knows() {
        let rest = rest(br#"{"a": 1, "c": 2}"#, &[names::<Some>()]).unwrap();
        assert_eq!(rest.into_iter().collect::<Vec<_>>(), [("c".to_owned(), Value::from(2))]);
        assert!(super::rest(br#"{"c": 1, "c": 2}"#, &[]).is_err());
    }
}

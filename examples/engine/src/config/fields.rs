//! The fields of a JSON object, asked for by name and kind.

use std::fmt;

use serde_json::{Map, Value};

use super::ConfigError;

/// A JSON object whose fields are asked for by name and kind. Null counts as absent, except for [`Fields::has`].
pub(super) struct Fields<'a> {
    pub(super) values: &'a Map<String, Value>,
    pub(super) path: String,
}

impl Fields<'_> {
    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    pub(super) fn wrong(&self, field: &str, expected: impl fmt::Display) -> ConfigError {
        let found = self.values.get(field).map_or_else(|| "absent".into(), short);
        ConfigError::Value { field: self.name(field), found, expected: expected.to_string() }
    }

    /// Whether the field is written down at all, be it as null.
    pub(super) fn has(&self, field: &str) -> bool {
        self.values.contains_key(field)
    }

    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.values.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    /// A finite number.
    pub(super) fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(field, "a finite number")),
            },
            Some(_) => Err(self.wrong(field, "a number")),
        }
    }

    pub(super) fn positive(&self, field: &str) -> Result<f64, ConfigError> {
        match self.number(field)? {
            Some(number) if number > 0.0 => Ok(number),
            Some(_) => Err(self.wrong(field, "a positive number")),
            None => Err(ConfigError::Missing { field: self.name(field) }),
        }
    }

    pub(super) fn factor(&self) -> Result<f64, ConfigError> {
        let factor = self.positive("factor")?;
        if (1.0..=1e6).contains(&factor) {
            Ok(factor)
        } else {
            Err(self.wrong("factor", "between 1 and 1e6"))
        }
    }

    /// A whole number that fits 32 bits.
    pub(super) fn count(&self, field: &str) -> Result<Option<u32>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|count| u32::try_from(count).ok()) {
                Some(count) => Ok(Some(count)),
                None => Err(self.wrong(field, "a whole number")),
            },
        }
    }

    pub(super) fn size(&self, field: &str, max: usize) -> Result<usize, ConfigError> {
        match self.get(field) {
            None => Err(ConfigError::Missing { field: self.name(field) }),
            Some(value) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) if (1..=max).contains(&size) => Ok(size),
                _ => Err(self.wrong(field, format!("a whole number from 1 to {max}"))),
            },
        }
    }

    pub(super) fn size_or(&self, field: &str, max: usize, default: usize) -> Result<usize, ConfigError> {
        if self.get(field).is_some() { self.size(field, max) } else { Ok(default) }
    }

    /// One token id or a list of them; absent is none.
    pub(super) fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(field) {
            None => return Ok(Vec::new()),
            // Old Llama files write -1 for "none".
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(id).collect::<Option<Vec<u32>>>(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(field, "a token id or a list of them"))
    }
}

/// A value as one short piece of text.
pub(super) fn short(value: &Value) -> String {
    const SHOWN_MAX: usize = 60;
    let text = match value {
        Value::Object(_) => "an object".into(),
        Value::String(text) => text.replace(['\n', '\r'], " "),
        other => other.to_string(),
    };
    if text.chars().count() <= SHOWN_MAX {
        return text;
    }
    text.chars().take(SHOWN_MAX).chain("…".chars()).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "settings are used in f32")]
pub(super) fn narrow(number: f64) -> f32 {
    number as f32
}

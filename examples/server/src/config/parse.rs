//! Values on the command line: counts with units, JSON, switches.

use std::num::{NonZeroU32, NonZeroUsize};

use axum::http::HeaderValue;

use crate::complaint::complaint;

/// A count as vLLM reads it: `4096`, `4k` is 4000, `4K` is 4096, `1.5G`.
pub(crate) fn count_u64(text: &str) -> Result<u64, String> {
    const UNITS: [(char, u64); 8] = [
        ('k', 1000),
        ('m', 1_000_000),
        ('g', 1_000_000_000),
        ('t', 1_000_000_000_000),
        ('K', 1 << 10),
        ('M', 1 << 20),
        ('G', 1 << 30),
        ('T', 1 << 40),
    ];
    let unit = UNITS.iter().find(|(letter, _)| text.ends_with(*letter));
    let Some((letter, factor)) = unit else {
        return text.parse().map_err(|_| format!("{text:?} is not a count; 4096, 4k and 4K are"));
    };
    let number: f64 =
        text.trim_end_matches(*letter).parse().map_err(|_| format!("{text:?} is not a count"))?;
    let value = number * *factor as f64;
    if !(0.0..=1e15).contains(&value) || value.fract() != 0.0 {
        return Err(format!("{text:?} is not a whole count up to 1000t"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, checked above")]
    Ok(value as u64)
}

pub(crate) fn count_u32(text: &str) -> Result<u32, String> {
    u32::try_from(count_u64(text)?).map_err(|_| format!("{text} is above {}", u32::MAX))
}

pub(crate) fn count_usize(text: &str) -> Result<usize, String> {
    usize::try_from(count_u64(text)?).map_err(|_| format!("{text} is above {}", usize::MAX))
}

pub(crate) fn positive_u32(text: &str) -> Result<NonZeroU32, String> {
    NonZeroU32::new(count_u32(text)?).ok_or_else(|| "at least 1".into())
}

pub(crate) fn positive_usize(text: &str) -> Result<NonZeroUsize, String> {
    NonZeroUsize::new(count_usize(text)?).ok_or_else(|| "at least 1".into())
}

pub(crate) fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| {
        format!("not the JSON expected here: {}, at character {}", complaint(&error), error.column())
    })
}

/// Origins that a browser can name.
pub(crate) fn origins(text: &str) -> Result<Vec<String>, String> {
    let origins: Vec<String> = json(text)?;
    match origins.iter().find(|origin| HeaderValue::from_str(origin).is_err()) {
        Some(origin) => Err(format!("{origin:?} is no origin")),
        None => Ok(origins),
    }
}

pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" | "" => Ok(false),
        other => Err(format!("{other:?} is neither 0 nor 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_read_as_vllm_reads_them() {
        assert_eq!(count_u64("1k"), Ok(1000));
        assert_eq!(count_u64("1K"), Ok(1024));
        assert_eq!(count_u64("1.5G"), Ok(3 << 29));
        assert!(count_u64("1.0001K").is_err());
        assert!(count_u64("-1").is_err());
        assert!(count_u64("1e400G").is_err());
    }

    #[test]
    fn what_is_wrong_is_said_in_words() {
        assert_eq!(positive_u32("0").unwrap_err(), "at least 1");
        assert_eq!(positive_usize("2k").unwrap().get(), 2000);
        let error = json::<Vec<u32>>("[1, true]").unwrap_err();
        assert!(error.ends_with("expected an integer, found true, at character 8"), "{error}");
        assert!(origins("[\"https://a.example\", \"*\"]").is_ok());
        assert_eq!(origins("[\"a\\nb\"]").unwrap_err(), r#""a\nb" is no origin"#);
    }
}

//! What serde says of a JSON value that it cannot take, in the words of JSON: `expected an integer, found "ten"`.

/// Characters of a text that are shown of what was found.
const SHOWN_MAX: usize = 40;

/// The complaint without its line and column, which nobody counts in a body or on a command line.
pub(crate) fn complaint(error: &serde_json::Error) -> String {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = error.to_string();
    let text = text.strip_suffix(&place).unwrap_or(&text);
    let wrong_type = text.strip_prefix("invalid type: ").map(|rest| (rest, false));
    let wrong_value = || text.strip_prefix("invalid value: ").map(|rest| (rest, true));
    match wrong_type.or_else(wrong_value).map(|(rest, is_range)| (rest.rsplit_once(", expected "), is_range))
    {
        Some((Some((found, wanted)), is_range)) => {
            format!("expected {}, found {}", expected(wanted, is_range), shown(found))
        }
        _ => text.to_owned(),
    }
}

/// Rust's name of what was expected, in the words of JSON; of numbers with their limits, where those were passed.
fn expected(wanted: &str, is_range: bool) -> String {
    let integer = |least: i64, most: u64| match is_range {
        true => format!("an integer from {least} to {most}"),
        false => "an integer".to_owned(),
    };
    match wanted {
        "u16" => integer(0, u16::MAX.into()),
        "u32" => integer(0, u32::MAX.into()),
        "u64" | "usize" => integer(0, u64::MAX),
        "i32" => integer(i32::MIN.into(), i32::MAX.unsigned_abs().into()),
        "i64" => integer(i64::MIN, i64::MAX.unsigned_abs()),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a sequence" => "an array".to_owned(),
        "a map" => "an object".to_owned(),
        structure if structure.starts_with("struct ") => "an object".to_owned(),
        other => other.to_owned(),
    }
}

/// What was found, without the name of its kind where the value shows it; a long text is cut.
fn shown(found: &str) -> String {
    let value = ["string ", "integer ", "floating point ", "boolean "];
    let value = value.iter().find_map(|kind| found.strip_prefix(kind)).map(|value| value.trim_matches('`'));
    match (value, found) {
        (None, "sequence") => "an array".to_owned(),
        (None, "map") => "an object".to_owned(),
        (value, found) => {
            let text = value.unwrap_or(found);
            let cut: String = text.chars().take(SHOWN_MAX).collect();
            if cut.len() < text.len() { format!("{cut}…") } else { cut }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde::de::DeserializeOwned;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Named {
        #[expect(dead_code, reason = "nothing is ever read")]
        name: String,
    }

    fn of<T: DeserializeOwned + std::fmt::Debug>(json: &str) -> String {
        complaint(&serde_json::from_str::<T>(json).unwrap_err())
    }

    #[test]
    fn a_wrong_kind_is_named_as_json_names_it() {
        assert_eq!(of::<u32>(r#""ten""#), r#"expected an integer, found "ten""#);
        assert_eq!(of::<u32>("1.5"), "expected an integer, found 1.5");
        assert_eq!(of::<f32>("true"), "expected a number, found true");
        assert_eq!(of::<bool>("1"), "expected true or false, found 1");
        assert_eq!(of::<String>("null"), "expected a string, found null");
        assert_eq!(of::<Vec<u32>>("{}"), "expected an array, found an object");
        assert_eq!(of::<BTreeMap<String, f32>>("[]"), "expected an object, found an array");
        assert_eq!(of::<Named>("3"), "expected an object, found 3");
    }

    #[test]
    fn a_number_out_of_range_is_told_the_range() {
        assert_eq!(of::<u32>("-1"), "expected an integer from 0 to 4294967295, found -1");
        assert_eq!(
            of::<i32>("2147483648"),
            "expected an integer from -2147483648 to 2147483647, found 2147483648"
        );
    }

    #[test]
    fn other_complaints_lose_their_place_alone() {
        assert_eq!(of::<Named>("{}"), "missing field `name`");
        assert_eq!(of::<Named>(r#"{"name": "a", "name": "b"}"#), "duplicate field `name`");
    }

    #[test]
    fn a_long_text_is_cut() {
        let found = of::<u32>(&format!("{:?}", "ä, expected u32".repeat(9)));
        assert!(
            found.starts_with(r#"expected an integer, found "ä, expected"#) && found.ends_with('…'),
            "{found}"
        );
        assert!(found.chars().count() < 80, "{found}");
    }
}

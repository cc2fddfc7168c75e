//! JSON as Python's `json.dumps` writes it, byte for byte: what `tojson` means in a chat template.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind};

/// How to write.
#[derive(Debug, Clone)]
pub(crate) struct Style {
    /// One level of indentation; `None` writes everything on one line.
    pub(crate) indent: Option<String>,
    pub(crate) between_items: String,
    pub(crate) after_key: String,
    pub(crate) ensure_ascii: bool,
    pub(crate) sort_keys: bool,
}

/// Writes a template's value. What JSON has no form for is an error, as in Python.
pub(crate) fn write(value: &Value, style: &Style) -> Result<String, String> {
    let mut out = String::new();
    write_value(value, style, 0, &mut out)?;
    Ok(out)
}

/// Nesting deeper than this is refused.
const DEPTH_MAX: usize = 128;

fn write_value(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), String> {
    if depth > DEPTH_MAX {
        return Err(format!("nested deeper than {DEPTH_MAX}"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => _ = write!(out, "{value}"),
        ValueKind::Number => out.push_str(&float(f64::try_from(value.clone()).map_err(|e| e.to_string())?)),
        ValueKind::String => write_string(value.as_str().unwrap_or_default(), style.ensure_ascii, out),
        ValueKind::Seq | ValueKind::Iterable => write_list(value, style, depth, out)?,
        ValueKind::Map => write_map(value, style, depth, out)?,
        kind => return Err(format!("{kind} has no form in JSON")),
    }
    Ok(())
}

fn write_list(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), String> {
    out.push('[');
    let mut empty = true;
    for item in value.try_iter().map_err(|error| error.to_string())? {
        next_item(std::mem::replace(&mut empty, false), style, depth, out);
        write_value(&item, style, depth + 1, out)?;
    }
    close(empty, ']', style, depth, out);
    Ok(())
}

fn write_map(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), String> {
    let mut keys: Vec<Value> = value.try_iter().map_err(|error| error.to_string())?.collect();
    if style.sort_keys {
        keys.sort();
    }
    out.push('{');
    let mut empty = true;
    for key in keys {
        next_item(std::mem::replace(&mut empty, false), style, depth, out);
        let name = match key.kind() {
            ValueKind::String => key.to_string(),
            _ => write(&key, style)?,
        };
        write_string(&name, style.ensure_ascii, out);
        out.push_str(&style.after_key);
        write_value(&value.get_item(&key).map_err(|error| error.to_string())?, style, depth + 1, out)?;
    }
    close(empty, '}', style, depth, out);
    Ok(())
}

fn next_item(first: bool, style: &Style, depth: usize, out: &mut String) {
    if !first {
        out.push_str(&style.between_items);
    }
    new_line(style, depth + 1, out);
}

fn close(empty: bool, bracket: char, style: &Style, depth: usize, out: &mut String) {
    if !empty {
        new_line(style, depth, out);
    }
    out.push(bracket);
}

fn new_line(style: &Style, depth: usize, out: &mut String) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        out.push_str(&indent.repeat(depth));
    }
}

fn write_string(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\u{1f}' => _ = write!(out, "\\u{:04x}", u32::from(character)),
            '\u{7f}'.. if ensure_ascii => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    _ = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}

/// A float as Python's `repr`: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => {
            let plain = format!("{value}");
            if plain.contains('.') { plain } else { plain + ".0" }
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;

    use super::*;

    fn style(indent: Option<&str>) -> Style {
        let between_items = if indent.is_some() { "," } else { ", " };
        Style {
            indent: indent.map(str::to_owned),
            between_items: between_items.into(),
            after_key: ": ".into(),
            ensure_ascii: false,
            sort_keys: false,
        }
    }

    #[test]
    fn floats_are_written_as_python_does() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.25e100, "-1.25e+100"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        for (value, text) in cases {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn one_line_and_indented() {
        let json = r#"{"b": [1, 2.5, null, true], "a": {}, "c": [], "d": "\u00e9\n\u007f\u0001"}"#;
        let value = Value::from(Serde(serde_json::from_str::<serde_json::Value>(json).unwrap()));
        let line = "{\"b\": [1, 2.5, null, true], \"a\": {}, \"c\": [], \"d\": \"\u{e9}\\n\u{7f}\\u0001\"}";
        assert_eq!(write(&value, &style(None)).unwrap(), line);
        let sorted = Style { sort_keys: true, ensure_ascii: true, ..style(None) };
        let line = r#"{"a": {}, "b": [1, 2.5, null, true], "c": [], "d": "\u00e9\n\u007f\u0001"}"#;
        assert_eq!(write(&value, &sorted).unwrap(), line);
        let indented = "{\n  \"x\": [\n    1,\n    {}\n  ]\n}";
        let value = Value::from(Serde(serde_json::json!({"x": [1, {}]})));
        assert_eq!(write(&value, &style(Some("  "))).unwrap(), indented);
    }

    #[test]
    fn what_has_no_form_is_an_error() {
        assert!(write(&Value::UNDEFINED, &style(None)).is_err());
    }
}

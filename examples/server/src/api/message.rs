//! The messages of a chat: checked, then handed to the template as they are.

use serde_json::{Value, json};

use crate::api::error::ApiError;
use crate::config::ContentFormat;

/// Checks each message and brings its content into the form the template expects. Fields of a message that
/// we do not know are left in it: the template decides what they mean.
///
/// # Errors
/// The first message that is not one, or that has content other than text.
pub(crate) fn prepare(messages: Vec<Value>, format: ContentFormat) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "must have at least one message"));
    }
    messages.into_iter().enumerate().map(|(index, message)| one(index, message, format)).collect()
}

fn one(index: usize, mut message: Value, format: ContentFormat) -> Result<Value, ApiError> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let Some(fields) = message.as_object_mut() else {
        return Err(ApiError::field(at(""), "must be an object"));
    };
    match fields.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        _ => return Err(ApiError::field(at(".role"), "must be a string such as user")),
    }
    let calls = fields.get("tool_calls").is_some_and(|calls| !calls.is_null());
    let content = fields.entry("content").or_insert(Value::Null);
    match content {
        Value::String(_) => {}
        Value::Null if calls => return Ok(message),
        Value::Array(parts) => {
            let texts = parts.iter().enumerate().map(|(part, value)| {
                text_of(value).map_err(|problem| ApiError::field(at(&format!(".content[{part}]")), problem))
            });
            let texts: Vec<&str> = texts.collect::<Result<_, _>>()?;
            *content = Value::String(texts.join("\n"));
        }
        _ => return Err(ApiError::field(at(".content"), "must be a string or an array of text parts")),
    }
    if format == ContentFormat::Openai {
        *content = json!([{ "type": "text", "text": content.take() }]);
    }
    Ok(message)
}

fn text_of(part: &Value) -> Result<&str, String> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text"), None) => Err("must have a text".into()),
        (Some(kind), _) => Err(format!("is of type {kind:?}; only text is supported")),
        (None, _) => Err("must be an object with a type".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(message: Value, format: ContentFormat) -> Result<Value, Option<String>> {
        prepare(vec![message], format).map(|mut all| all.remove(0)).map_err(|error| error.param)
    }

    #[test]
    fn parts_become_one_text_or_stay_parts() {
        let message = json!({ "role": "user", "content": [
            { "type": "text", "text": "a" }, { "type": "text", "text": "b" }] });
        let joined = prepared(message.clone(), ContentFormat::Auto).unwrap();
        assert_eq!(joined["content"], "a\nb");
        let parts = prepared(message, ContentFormat::Openai).unwrap();
        assert_eq!(parts["content"], json!([{ "type": "text", "text": "a\nb" }]));
    }

    #[test]
    fn a_bad_message_is_named() {
        let cases = [
            (json!("x"), "messages[0]"),
            (json!({ "content": "x" }), "messages[0].role"),
            (json!({ "role": 1, "content": "x" }), "messages[0].role"),
            (json!({ "role": "user" }), "messages[0].content"),
            (json!({ "role": "user", "content": 3 }), "messages[0].content"),
            (
                json!({ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }),
                "messages[0].content[0]",
            ),
            (json!({ "role": "user", "content": [[]] }), "messages[0].content[0]"),
        ];
        for (message, at) in cases {
            assert_eq!(prepared(message, ContentFormat::Auto), Err(Some(at.to_owned())));
        }
    }

    #[test]
    fn an_assistant_that_called_a_tool_needs_no_content() {
        let message = json!({ "role": "assistant", "tool_calls": [{}] });
        assert!(prepared(message, ContentFormat::Auto).is_ok());
    }
}

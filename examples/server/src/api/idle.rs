//! Request fields that are known and do nothing here: accepted while they ask for nothing.

use serde_json::Value;

use crate::api::error::ApiError;

/// Accepts a field that asks for nothing this server would not do anyway.
///
/// # Errors
/// 400 that names the field: it asks for something that is not done here, or nobody knows it.
pub(crate) fn accept(name: &str, value: &Value) -> Result<(), ApiError> {
    let Some((_, idle, what)) = IDLE.iter().find(|(known, ..)| *known == name) else {
        return Err(ApiError::field(name, "is not a field of this request"));
    };
    if value.is_null() || idle(value) { Ok(()) } else { Err(ApiError::field(name, what)) }
}

type Idle = (&'static str, fn(&Value) -> bool, &'static str);

const UNSUPPORTED: &str = "is not supported";

/// Fields that are known and do nothing: the values that ask for nothing, and what is said to the others.
const IDLE: &[Idle] = &[
    // Labels and hints: they change no answer.
    ("safety_identifier", Value::is_string, "must be a string"),
    ("prompt_cache_key", Value::is_string, "must be a string"),
    ("session_id", Value::is_string, "must be a string"),
    ("parallel_tool_calls", Value::is_boolean, "must be true or false"),
    ("metadata", Value::is_object, "must be an object"),
    // Switches that are off.
    ("store", off, "cannot be true: nothing is stored"),
    ("service_tier", |v| one_of(v, &["auto", "default"]), "can only be auto or default"),
    ("verbosity", |v| v == "medium", "can only be medium"),
    ("modalities", |v| *v == serde_json::json!(["text"]), "can only be [\"text\"]"),
    ("reasoning_effort", |v| v == "none", "can only be none"),
    ("include_reasoning", |v| *v == true, "can only be true: reasoning is not told apart from the answer"),
    ("thinking_token_budget", never, UNSUPPORTED),
    ("functions", empty, "is not supported"),
    ("function_call", |v| v == "none", "can only be none"),
    ("early_stopping", off, "is not supported: a beam search goes on to the end"),
    ("stream_interval", |v| *v == 1, "can only be 1: each step is one event"),
    ("vllm_xargs", empty, UNSUPPORTED),
    ("mm_processor_kwargs", empty, UNSUPPORTED),
    ("logits_processors", empty, UNSUPPORTED),
    ("repetition_detection", empty, UNSUPPORTED),
    ("logprob_token_ids", empty, UNSUPPORTED),
    ("prompt_embeds", never, UNSUPPORTED),
    ("prediction", never, UNSUPPORTED),
    ("audio", never, UNSUPPORTED),
    ("web_search_options", never, UNSUPPORTED),
    ("suffix", |v| v == "", "is not supported: text is only continued, not filled in"),
];

fn off(value: &Value) -> bool {
    *value == false
}

fn never(_: &Value) -> bool {
    false
}

fn empty(value: &Value) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

fn one_of(value: &Value, words: &[&str]) -> bool {
    value.as_str().is_some_and(|word| words.contains(&word))
}

//! Conversations: from the form they have on the OpenAI wire to the one chat templates expect.

use minijinja::value::{Serde, Value as Variables};
use serde_json::{Map, Value};

use crate::error::TextError;
use crate::template::{Content, Templates};

/// A conversation to be rendered by the chat template.
#[derive(Debug, Clone, Default)]
pub struct Chat {
    /// Messages as on the OpenAI wire: objects with `role`, `content` (a string or a list of parts), …
    pub messages: Vec<Value>,
    /// Tool definitions as on the OpenAI wire; also picks the template called `tool_use`, if there is one.
    pub tools: Option<Vec<Value>>,
    /// Documents for retrieval templates.
    pub documents: Option<Vec<Value>>,
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the final message open, to be continued.
    pub continue_final_message: bool,
    /// A template to use in place of the model's: its source, or the name of one of the model's own.
    pub template: Option<String>,
    /// Further variables for the template (`chat_template_kwargs`).
    pub variables: Map<String, Value>,
}

impl Chat {
    /// A conversation of one message.
    #[must_use]
    pub fn of(role: &str, content: &str) -> Self {
        let message = serde_json::json!({"role": role, "content": content});
        Self { messages: vec![message], ..Self::default() }
    }
}

/// Put behind the text of a final message that is to be continued, to find where it went.
const OPEN_END: &str = "quayline-continues-here ";

/// Renders `chat` with one of `templates`. `special` holds `bos_token` and its like.
pub(crate) fn render(
    templates: &Templates,
    special: &Map<String, Value>,
    chat: &Chat,
) -> Result<String, TextError> {
    if chat.add_generation_prompt && chat.continue_final_message {
        return Err(TextError::ContradictoryPrompt);
    }
    let pick = templates.pick(chat.template.as_deref(), chat.tools.is_some())?;
    let mut messages = Vec::with_capacity(chat.messages.len());
    for message in &chat.messages {
        messages.push(as_expected(message, pick.content)?);
    }
    if chat.continue_final_message {
        mark_open_end(&mut messages)?;
    }
    let text = pick.render(&variables(special, chat, messages))?;
    if chat.continue_final_message { cut_at_open_end(text) } else { Ok(text) }
}

fn variables(special: &Map<String, Value>, chat: &Chat, messages: Vec<Value>) -> Variables {
    let mut variables = special.clone();
    variables.insert("messages".into(), messages.into());
    variables.insert("tools".into(), chat.tools.clone().into());
    variables.insert("documents".into(), chat.documents.clone().into());
    variables.insert("add_generation_prompt".into(), chat.add_generation_prompt.into());
    variables.extend(chat.variables.clone());
    Variables::from(Serde(variables))
}

/// One message with its content in a form the template renders, arguments of tool calls as objects, and
/// reasoning under both of its names.
fn as_expected(message: &Value, content: Content) -> Result<Value, TextError> {
    let Value::Object(fields) = message else {
        return Err(TextError::Message(format!("a message must be an object, not {message}")));
    };
    let mut fields = fields.clone();
    if let Some(given) = fields.get_mut("content") {
        let converted = match (&*given, content) {
            (Value::Array(parts), Content::Text) => Value::String(joined(parts)?),
            (Value::String(text), Content::Parts) => serde_json::json!([{"type": "text", "text": text}]),
            _ => given.take(),
        };
        *given = converted;
    }
    for call in fields.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments") {
            parse_arguments(arguments);
        }
    }
    for (from, to) in [("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")] {
        if let Some(reasoning) = fields.get(from).cloned()
            && !fields.contains_key(to)
        {
            fields.insert(to.into(), reasoning);
        }
    }
    Ok(Value::Object(fields))
}

/// On the wire the arguments are JSON in a string; templates expect the object.
fn parse_arguments(arguments: &mut Value) {
    let Value::String(text) = &*arguments else { return };
    if text.trim().is_empty() {
        *arguments = Value::Object(Map::new());
    } else if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
        *arguments = object;
    }
}

/// The texts of a list of parts, a line each.
fn joined(parts: &[Value]) -> Result<String, TextError> {
    let mut texts = Vec::with_capacity(parts.len());
    for part in parts {
        let text =
            part.as_str().or_else(|| part.get("text")?.as_str()).or_else(|| part.get("refusal")?.as_str());
        match text {
            Some(text) => texts.push(text),
            None => {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("without a type");
                return Err(TextError::Message(format!(
                    "this model's chat template renders text only, not a content part {kind:?}"
                )));
            }
        }
    }
    Ok(texts.join("\n"))
}

fn mark_open_end(messages: &mut [Value]) -> Result<(), TextError> {
    let content = messages.last_mut().and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        other => other,
    };
    match text {
        Some(Value::String(text)) => text.push_str(OPEN_END),
        _ => return Err(TextError::FinalMessageNotRendered),
    }
    Ok(())
}

/// Ends the text where the final message ends. A template that trims messages has taken the space of the
/// mark away; then the spaces before the mark go too.
fn cut_at_open_end(mut text: String) -> Result<String, TextError> {
    let Some(at) = text.rfind(OPEN_END.trim_end()) else { return Err(TextError::FinalMessageNotRendered) };
    let trimmed = !text[at..].starts_with(OPEN_END);
    text.truncate(at);
    if trimmed {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn render_with(source: &str, chat: &Chat) -> Result<String, TextError> {
        let templates = Templates::new(BTreeMap::from([("default".to_owned(), source.to_owned())]))?;
        let special = json!({"bos_token": "<s>"});
        render(&templates, special.as_object().unwrap(), chat)
    }

    fn chat(messages: Value) -> Chat {
        Chat { messages: messages.as_array().unwrap().clone(), ..Chat::default() }
    }

    const PLAIN: &str = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}\
        {% if add_generation_prompt %}[assistant]{% endif %}";

    #[test]
    fn parts_become_lines_for_a_template_of_strings() {
        let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        assert_eq!(render_with(PLAIN, &chat(parts)).unwrap(), "<s>[user]a\nb[/]");
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]);
        assert!(render_with(PLAIN, &chat(image)).unwrap_err().to_string().contains("image_url"));
    }

    #[test]
    fn strings_become_parts_for_a_template_of_parts() {
        let source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
        assert_eq!(render_with(source, &chat(json!([{"role": "user", "content": "a"}]))).unwrap(), "a");
    }

    #[test]
    fn arguments_of_tool_calls_are_objects() {
        let source = "{{ messages[0].tool_calls[0].function.arguments.city }}";
        let call = json!({"function": {"name": "f", "arguments": "{\"city\": \"Oslo\"}"}});
        let messages = json!([{"role": "assistant", "content": null, "tool_calls": [call]}]);
        assert_eq!(render_with(source, &chat(messages)).unwrap(), "Oslo");
    }

    #[test]
    fn the_final_message_is_left_open() {
        let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure, "}]);
        let open = Chat { continue_final_message: true, ..chat(messages) };
        assert_eq!(render_with(PLAIN, &open).unwrap(), "<s>[user]q[/][assistant]Sure, ");
        let trimming = PLAIN.replace("m.content", "m.content.strip()");
        assert_eq!(render_with(&trimming, &open).unwrap(), "<s>[user]q[/][assistant]Sure,");
        let dropped = render_with("{{ messages|length }}", &open);
        assert!(matches!(dropped, Err(TextError::FinalMessageNotRendered)));
        let both = Chat { add_generation_prompt: true, ..open };
        assert!(matches!(render_with(PLAIN, &both), Err(TextError::ContradictoryPrompt)));
    }

    #[test]
    fn variables_of_the_request_win() {
        let variables = json!({"bos_token": "<x>", "thinking": true}).as_object().unwrap().clone();
        let chat = Chat { variables, ..chat(json!([])) };
        assert_eq!(render_with("{{ bos_token }}{{ thinking }}", &chat).unwrap(), "<x>True");
    }
}

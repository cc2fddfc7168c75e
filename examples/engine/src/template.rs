//! Chat templates: Jinja as the Hugging Face libraries set it up, on an engine that cannot reach out.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind};

use crate::error::TextError;
use crate::json;

/// The templates of a checkpoint, compiled, by name. One that has no name is called `default`.
pub(crate) struct Templates {
    environment: Environment<'static>,
    contents: BTreeMap<String, Content>,
}

/// Which forms of a message's `content` a template can render.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Only strings.
    Text,
    /// Only lists of parts.
    Parts,
    /// Either.
    Both,
}

impl std::fmt::Debug for Templates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(&self.contents).finish()
    }
}

impl Templates {
    /// Compiles templates.
    pub(crate) fn new(sources: BTreeMap<String, String>) -> Result<Self, TextError> {
        let mut environment = environment();
        for (name, source) in &sources {
            environment.add_template_owned(name.clone(), prepared(source)).map_err(|error| failed(&error))?;
        }
        let mut contents = BTreeMap::new();
        for name in sources.into_keys() {
            let template = environment.get_template(&name).map_err(|error| failed(&error))?;
            let content = probe(|variables| template.render(variables).ok());
            contents.insert(name, content);
        }
        Ok(Self { environment, contents })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.contents.is_empty()
    }

    /// The template for a conversation: `asked` for by name or given in full, else the one for tools if
    /// there are tools, else the default one.
    pub(crate) fn pick(&self, asked: Option<&str>, tools: bool) -> Result<Pick<'_>, TextError> {
        let own = |name: &str| self.contents.get_key_value(name).map(|(name, &content)| (name, content));
        let (name, content) = match asked {
            Some(asked) => match own(asked) {
                Some(found) => found,
                None if asked.contains(['{', '\n', ' ']) => return self.compile(asked),
                None => return Err(TextError::UnknownTemplate(asked.into())),
            },
            None if self.is_empty() => return Err(TextError::NoTemplate),
            None => own("tool_use")
                .filter(|_| tools)
                .or_else(|| own("default"))
                .ok_or_else(|| TextError::UnknownTemplate("default".into()))?,
        };
        let template = self.environment.get_template(name).map_err(|error| failed(&error))?;
        Ok(Pick { template: Compiled::Own(template), content })
    }

    fn compile(&self, source: &str) -> Result<Pick<'_>, TextError> {
        let source = prepared(source);
        let render = |variables: &Value| self.environment.render_named_str("request", &source, variables);
        let content = probe(|variables| render(variables).ok());
        // An empty conversation may be refused by the template, but only a syntax error is one here.
        if let Err(error) = render(&Value::UNDEFINED)
            && error.kind() == ErrorKind::SyntaxError
        {
            return Err(failed(&error));
        }
        Ok(Pick { template: Compiled::Given(&self.environment, source), content })
    }
}

/// A template chosen for one conversation.
pub(crate) struct Pick<'a> {
    template: Compiled<'a>,
    pub(crate) content: Content,
}

enum Compiled<'a> {
    Own(minijinja::Template<'a, 'a>),
    Given(&'a Environment<'static>, String),
}

impl Pick<'_> {
    pub(crate) fn render(&self, variables: &Value) -> Result<String, TextError> {
        match &self.template {
            Compiled::Own(template) => template.render(variables),
            Compiled::Given(environment, source) => {
                environment.render_named_str("request", source, variables)
            }
        }
        .map_err(|error| failed(&error))
    }
}

/// Finds out which forms of content a template renders, by trying both.
fn probe(render: impl Fn(&Value) -> Option<String>) -> Content {
    const MARK: &str = "quayline-probe";
    let shows = |content: serde_json::Value| {
        let message = serde_json::json!({"role": "user", "content": content});
        let variables = serde_json::json!({"messages": [message], "add_generation_prompt": true,
            "tools": null, "documents": null, "bos_token": "", "eos_token": ""});
        let text = render(&Value::from(Serde(variables))).unwrap_or_default();
        // A list that is printed as it is shows the mark in quotes.
        text.contains(MARK) && !text.contains("'text'") && !text.contains("\"text\"")
    };
    let text = shows(MARK.into());
    let parts = shows(serde_json::json!([{"type": "text", "text": MARK}]));
    match (text, parts) {
        (true, true) => Content::Both,
        (false, true) => Content::Parts,
        _ => Content::Text,
    }
}

/// Most instructions one rendering may take: enough for thousands of messages, not enough to hang.
const FUEL: u64 = if cfg!(test) { 100_000 } else { 20_000_000 };

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let trimming = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(trimming.expect("only the usual delimiters, which do not clash"));
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment
}

/// `int(default=0)` as in Jinja: a text that is no number gives the default.
fn int(value: &Value, default: Option<Value>) -> Value {
    let text = value.to_string();
    let text = text.trim();
    if let Ok(whole) = text.parse::<i64>() {
        return whole.into();
    }
    match number(value).map(f64::trunc) {
        #[expect(clippy::cast_possible_truncation, reason = "a float beyond i64 saturates")]
        Some(number) if number.is_finite() => Value::from(number as i64),
        _ => default.unwrap_or_else(|| 0.into()),
    }
}

/// `float(default=0.0)` as in Jinja.
fn float(value: &Value, default: Option<Value>) -> Value {
    number(value).map(Value::from).or(default).unwrap_or_else(|| 0.0.into())
}

fn number(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.is_true() && value.kind() == ValueKind::Bool => Some(1.0),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// Lines end in one way, as in Jinja. `{% generation %}` marks assistant text for training; here it only groups.
fn prepared(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = &*source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        let word = body.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => {
                rest = tag;
                continue;
            }
        };
        out.push_str(&tag[..tag.len() - body.len()]);
        out.push_str(replacement);
        rest = &body[word.len()..];
    }
    out.push_str(rest);
    out
}

/// How `raise_exception` is told from other failures.
const RAISED: &str = "raise_exception: ";

fn raise_exception(message: &str) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    use std::fmt::Write as _;
    let mut out = String::new();
    match write!(out, "{}", chrono::Local::now().format(format)) {
        Ok(()) => Ok(out),
        Err(_) => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")))
        }
    }
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, by position or by name.
fn tojson(value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let arguments = arguments.into_values();
    let (by_position, by_name): (&[Value], Kwargs) = from_args(&arguments)?;
    if by_position.len() > NAMES.len() {
        return Err(ErrorKind::TooManyArguments.into());
    }
    let mut given = [const { None }; NAMES.len()];
    for (at, (given, name)) in given.iter_mut().zip(NAMES).enumerate() {
        let named = by_name.get::<Option<Value>>(name)?;
        *given = by_position.get(at).cloned().or(named).filter(|value| !value.is_none());
    }
    by_name.assert_all_used()?;
    let [ensure_ascii, indent, separators, sort_keys] = given;
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = match indent {
        None => None,
        Some(indent) if indent.as_str().is_some() => Some(indent.to_string()),
        Some(indent) => Some(" ".repeat(usize::try_from(indent)?)),
    };
    let (mut between_items, mut after_key) =
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".into());
    if let Some(separators) = separators {
        between_items = separators.get_item_by_index(0)?.to_string();
        after_key = separators.get_item_by_index(1)?.to_string();
    }
    let style = json::Style {
        indent,
        between_items,
        after_key,
        ensure_ascii: is_true(ensure_ascii),
        sort_keys: is_true(sort_keys),
    };
    json::write(value, &style)
        .map(Value::from)
        .map_err(|problem| Error::new(ErrorKind::InvalidOperation, format!("tojson: {problem}")))
}

fn failed(error: &Error) -> TextError {
    let detail = error.detail().unwrap_or_default();
    if let Some(message) = detail.strip_prefix(RAISED) {
        return TextError::Raised(message.into());
    }
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    TextError::Template(format!(
        "{}{}{detail}{line}",
        error.kind(),
        if detail.is_empty() { "" } else { ": " }
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, variables: serde_json::Value) -> Result<String, TextError> {
        let templates = Templates::new(BTreeMap::from([("default".into(), source.into())]))?;
        templates.pick(None, false)?.render(&Value::from(Serde(variables)))
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_does() {
        let source = "  {% if true %}\nx\n  {% endif %}\ny\n";
        assert_eq!(render(source, serde_json::json!({})).unwrap(), "x\ny");
    }

    #[test]
    fn all_line_ends_are_one() {
        assert_eq!(render("a\r\n{% if true %}\r\nb\r{% endif %}", serde_json::json!({})).unwrap(), "a\nb\n");
    }

    #[test]
    fn nothing_is_not_iterable() {
        let source = "{{ none is iterable }} {{ x is iterable }} {{ [] is iterable }} {{ 'a' is iterable }} {{ 1 is iterable }}";
        assert_eq!(render(source, serde_json::json!({})).unwrap(), "False True True True False");
    }

    #[test]
    fn generation_only_groups() {
        let source = "a {%- generation -%} b {%- endgeneration %} c{% set generation = 1 %}{{ generation }}";
        assert_eq!(render(source, serde_json::json!({})).unwrap(), "ab c1");
    }

    #[test]
    fn raise_exception_speaks_for_itself() {
        let error =
            render("{{ raise_exception('roles must alternate') }}", serde_json::json!({})).unwrap_err();
        assert!(matches!(&error, TextError::Raised(message) if message == "roles must alternate"), "{error}");
    }

    #[test]
    fn failures_name_the_line() {
        let error = render("a\n{{ x.y.z }}", serde_json::json!({})).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        let error = render("{% if %}", serde_json::json!({})).unwrap_err();
        assert!(error.to_string().starts_with("chat template: syntax error"), "{error}");
    }

    #[test]
    fn a_template_cannot_run_forever() {
        let source = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}";
        assert!(render(source, serde_json::json!({})).unwrap_err().to_string().contains("fuel"));
    }

    #[test]
    fn python_values_print_as_in_python() {
        let source = "{{ true }} {{ none }} {{ [1, 'a'] }} {{ {'k': 1.0} }}";
        assert_eq!(render(source, serde_json::json!({})).unwrap(), "True None [1, 'a'] {'k': 1.0}");
    }

    #[test]
    fn tojson_takes_the_options_of_json_dumps() {
        let value = serde_json::json!({"v": {"b": [1], "a": "<\u{e9}>"}});
        assert_eq!(render("{{ v|tojson }}", value.clone()).unwrap(), "{\"b\": [1], \"a\": \"<\u{e9}>\"}");
        let source = "{{ v|tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}";
        assert_eq!(render(source, value.clone()).unwrap(), r#"{"a":"<\u00e9>","b":[1]}"#);
        let indented = "{\n    \"b\": [\n        1\n    ],\n    \"a\": \"<\u{e9}>\"\n}";
        assert_eq!(render("{{ v|tojson(false, 4) }}", value.clone()).unwrap(), indented);
        assert_eq!(render("{{ v|tojson(indent=4) }}", value).unwrap(), indented);
    }

    #[test]
    fn texts_become_numbers_or_the_default() {
        let source = "{{ '22'|int }} {{ 'x'|int }} {{ '2.9'|int }} {{ 'x'|int(7) }} {{ '1.5'|float }} {{ 'x'|float }} {{ none|int }}";
        assert_eq!(render(source, serde_json::json!({})).unwrap(), "22 0 2 7 1.5 0.0 0");
    }

    #[test]
    fn the_date_is_formatted_or_refused() {
        assert_eq!(render("{{ strftime_now('%Y')|length }}", serde_json::json!({})).unwrap(), "4");
        assert!(render("{{ strftime_now('%!') }}", serde_json::json!({})).is_err());
    }

    #[test]
    fn named_templates_are_picked_by_name_tools_and_default() {
        let named = [("default", "d"), ("tool_use", "t"), ("rag", "r")];
        let sources = named.into_iter().map(|(name, source)| (name.to_owned(), source.to_owned())).collect();
        let templates = Templates::new(sources).unwrap();
        let text =
            |asked, tools| templates.pick(asked, tools).and_then(|pick| pick.render(&Value::UNDEFINED));
        assert_eq!(text(None, false).unwrap(), "d");
        assert_eq!(text(None, true).unwrap(), "t");
        assert_eq!(text(Some("rag"), true).unwrap(), "r");
        assert_eq!(text(Some("{{ 1 + 1 }}"), true).unwrap(), "2");
        assert!(matches!(text(Some("nothing"), false), Err(TextError::UnknownTemplate(_))));
        assert!(matches!(text(Some("{% if %}"), false), Err(TextError::Template(_))));
    }

    #[test]
    fn the_form_of_content_is_found_by_trying() {
        let text = "{% for m in messages %}{{ m.content }}{% endfor %}";
        let parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}";
        let both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
            {% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}";
        let of = |source: &str| {
            let sources = BTreeMap::from([("default".to_owned(), source.to_owned())]);
            Templates::new(sources).unwrap().contents["default"]
        };
        assert_eq!((of(text), of(parts), of(both)), (Content::Text, Content::Parts, Content::Both));
    }
}

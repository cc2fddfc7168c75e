//! What an answer must be, in the words of the wire, and as the grammar that says so.

use llguidance::JsonCompileOptions;
use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

/// What an answer must be. The kinds are those of vLLM's `structured_outputs`.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// A JSON value that this schema describes.
    Json(Value),
    /// A JSON object, whatever is in it.
    JsonObject,
    /// A text that matches this regular expression from its beginning to its end. The syntax is the `regex` crate's.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this grammar: Lark, in the dialect that `llguidance` documents. It begins at the rule `start`.
    Grammar(String),
}

/// Why no grammar could be made of a constraint, in words for whoever wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct ConstraintError {
    /// What is wrong, naming the keyword, the place or the limit.
    pub problem: String,
}

/// Between the tokens of JSON there may be a space, or a new line with its indentation. Without the bound, a model that
/// begins to indent may go on until its tokens are used up.
const WHITESPACE: &str = r"\x20|\x0A[\x20\x09]{0,32}";

impl Constraint {
    /// A text that no other constraint has.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Json(schema) => format!("json {schema}"),
            Self::JsonObject => "json_object".into(),
            Self::Regex(regex) => format!("regex {regex}"),
            Self::Choice(texts) => format!("choice {}", Value::from(texts.as_slice())),
            Self::Grammar(lark) => format!("grammar {lark}"),
        }
    }

    /// The grammar's source.
    pub(crate) fn source(&self) -> Result<TopLevelGrammar, ConstraintError> {
        match self {
            Self::Json(schema) => json_schema(schema.clone()),
            Self::JsonObject => json_schema(json!({ "type": "object" })),
            Self::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
            Self::Choice(texts) => choice(texts),
            Self::Grammar(lark) if lark.trim().is_empty() => {
                Err(ConstraintError::new("the grammar is empty"))
            }
            Self::Grammar(lark) => Ok(TopLevelGrammar::from_lark(lark.clone())),
        }
    }
}

impl ConstraintError {
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self { problem: problem.into() }
    }

    /// What `llguidance` complains about, without the dumps that it appends.
    pub(crate) fn from_report(report: &str) -> Self {
        let end = ["\n<", "<non-verbose/>"].iter().filter_map(|mark| report.find(mark)).min();
        let report: Vec<char> = report[..end.unwrap_or(report.len())].trim().chars().collect();
        let text = |part: &[char]| part.iter().collect::<String>();
        match report.len() {
            // What is wrong stands in front of what was given, or behind it.
            0..=PROBLEM_CHARS_MAX => Self::new(text(&report)),
            length => {
                let half = PROBLEM_CHARS_MAX / 2;
                Self::new(text(&report[..half]) + " … " + &text(&report[length - half..]))
            }
        }
    }
}

const PROBLEM_CHARS_MAX: usize = 600;

fn json_schema(mut schema: Value) -> Result<TopLevelGrammar, ConstraintError> {
    if schema == true {
        schema = json!({});
    }
    if !schema.is_object() {
        return Err(ConstraintError::new("a schema must be an object, or true"));
    }
    let options = JsonCompileOptions { whitespace_pattern: Some(WHITESPACE.into()), ..Default::default() };
    // These go before options that the schema itself brings: some of them give up what the schema promises.
    options.apply_to(&mut schema);
    Ok(TopLevelGrammar::from_json_schema(schema))
}

fn choice(texts: &[String]) -> Result<TopLevelGrammar, ConstraintError> {
    if texts.is_empty() {
        return Err(ConstraintError::new("there is nothing to choose from"));
    }
    // A string of Lark is written as one of JSON.
    let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
    Ok(TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | "))))
}

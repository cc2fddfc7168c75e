//! What an answer must be: OpenAI's `response_format` and vLLM's `structured_outputs`.

use quayline_engine::{Constraint, ConstraintError, Grammar};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::api::error::ApiError;
use crate::app::Model;

/// Most texts to choose from.
const CHOICES_MAX: usize = 1024;

/// OpenAI's way to say it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ResponseFormat {
    /// Any text.
    Text,
    /// A JSON object.
    JsonObject,
    /// A JSON value that a schema describes.
    JsonSchema {
        /// The schema and its name.
        json_schema: NamedSchema,
    },
}

/// A schema and its name.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedSchema {
    /// For people.
    #[expect(dead_code, reason = "it changes no answer")]
    name: Option<String>,
    /// For people.
    #[expect(dead_code, reason = "it changes no answer")]
    description: Option<String>,
    /// The schema; without it, any JSON object.
    #[schema(value_type = Option<Object>)]
    schema: Option<Value>,
    /// Every schema is kept to the letter, whatever this says.
    #[expect(dead_code, reason = "it changes no answer")]
    strict: Option<bool>,
}

/// vLLM's way to say it: one of these.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StructuredOutputs {
    /// A JSON schema, as an object or as text.
    #[schema(value_type = Option<Object>)]
    json: Option<Value>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A regular expression for the whole answer.
    regex: Option<String>,
    /// Texts of which the answer is one.
    choice: Option<Vec<String>>,
    /// A Lark grammar with a rule `start`.
    grammar: Option<String>,
    /// Not supported.
    #[schema(value_type = Option<Object>)]
    structural_tag: Option<Value>,
}

/// What an answer must be, with the field that says so.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wanted {
    field: &'static str,
    constraint: Constraint,
}

impl Wanted {
    /// What a request wants of its answer, if anything.
    ///
    /// # Errors
    /// Two wishes, or one that is not granted here.
    pub(crate) fn new(
        format: Option<&ResponseFormat>,
        structured: Option<&StructuredOutputs>,
    ) -> Result<Option<Self>, ApiError> {
        let of_format = format.and_then(ResponseFormat::wanted);
        let of_structured = structured.map(StructuredOutputs::wanted).transpose()?.flatten();
        match (of_format, of_structured) {
            (Some(_), Some(_)) => {
                Err(ApiError::field("structured_outputs", "cannot be combined with response_format"))
            }
            (wanted, None) | (None, wanted) => Ok(wanted),
        }
    }

    /// Its grammar, if that was compiled lately.
    pub(crate) fn recent(&self, model: &Model) -> Option<Grammar> {
        model.grammars.recent(&self.constraint)
    }

    /// Compiles it, which takes milliseconds.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn compile(&self, model: &Model) -> Result<Grammar, ApiError> {
        let refuse = |ConstraintError { problem }| {
            ApiError::field(self.field, format!("cannot be made a grammar: {problem}"))
        };
        model.grammars.compile(&self.constraint).map_err(refuse)
    }
}

impl ResponseFormat {
    fn wanted(&self) -> Option<Wanted> {
        let (field, constraint) = match self {
            Self::Text => return None,
            Self::JsonObject => ("response_format", Constraint::JsonObject),
            Self::JsonSchema { json_schema: NamedSchema { schema: None, .. } } => {
                ("response_format.json_schema", Constraint::JsonObject)
            }
            Self::JsonSchema { json_schema: NamedSchema { schema: Some(schema), .. } } => {
                ("response_format.json_schema.schema", Constraint::Json(schema.clone()))
            }
        };
        Some(Wanted { field, constraint })
    }
}

impl StructuredOutputs {
    fn wanted(&self) -> Result<Option<Wanted>, ApiError> {
        if self.structural_tag.is_some() {
            return Err(ApiError::field("structured_outputs.structural_tag", "is not supported"));
        }
        let json = match &self.json {
            // As text it is JSON in JSON.
            Some(Value::String(text)) => Some(serde_json::from_str(text).map_err(|error| {
                ApiError::field("structured_outputs.json", format!("is a text that is no JSON: {error}"))
            })?),
            schema => schema.clone(),
        };
        let choices = self.choice.as_ref().map_or(0, Vec::len);
        if choices > CHOICES_MAX {
            let problem = format!("may have {CHOICES_MAX} entries, not {choices}");
            return Err(ApiError::field("structured_outputs.choice", problem));
        }
        let object = self.json_object.filter(|&wanted| wanted).map(|_| Constraint::JsonObject);
        let all = [
            ("structured_outputs.json", json.map(Constraint::Json)),
            ("structured_outputs.json_object", object),
            ("structured_outputs.regex", self.regex.clone().map(Constraint::Regex)),
            ("structured_outputs.choice", self.choice.clone().map(Constraint::Choice)),
            ("structured_outputs.grammar", self.grammar.clone().map(Constraint::Grammar)),
        ];
        let mut given = all.into_iter().filter_map(|(field, constraint)| Some((field, constraint?)));
        match (given.next(), given.next()) {
            (Some((first, _)), Some((second, _))) => {
                let problem = format!("can say one thing, not both {first} and {second}");
                Err(ApiError::field("structured_outputs", problem))
            }
            (one, _) => Ok(one.map(|(field, constraint)| Wanted { field, constraint })),
        }
    }
}

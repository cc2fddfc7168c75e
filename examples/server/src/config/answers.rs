//! What answers look like, where requests do not say.

use std::path::Path;

use clap::{Args, ValueEnum};
use quayline_engine::{GenerationConfig, LoadError, ModelFiles};
use serde_json::{Map, Value};

use super::parse::json;

/// What answers look like, where requests do not say.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Answers")]
pub(crate) struct AnswerFlags {
    /// Report cached tokens in `usage`
    #[arg(long)]
    pub(crate) enable_prompt_tokens_details: bool,
    /// Report usage at the end of every stream, asked for or not
    #[arg(long)]
    pub(crate) enable_force_include_usage: bool,
    /// A chat template in place of the model's: a file, or the template itself
    #[arg(long)]
    chat_template: Option<String>,
    /// How message contents reach the template
    #[arg(long, value_enum, default_value_t = ContentFormat::Auto)]
    pub(crate) chat_template_content_format: ContentFormat,
    /// Variables for the chat template, as a JSON object; a request may override them
    #[arg(long, value_parser = json::<Map<String, Value>>)]
    pub(crate) default_chat_template_kwargs: Option<Map<String, Value>>,
    /// Let requests bring their own chat template
    #[arg(long)]
    pub(crate) trust_request_chat_template: bool,
    /// Where sampling defaults come from: `auto` is the model, `vllm` none, or a directory
    #[arg(long, default_value = "auto")]
    generation_config: String,
    /// Sampling defaults that come first, as a JSON object
    #[arg(long, value_parser = sampling_defaults)]
    override_generation_config: Option<Map<String, Value>>,
    /// Most log-probabilities per token that a request may ask for
    #[arg(long, default_value_t = 20)]
    pub(crate) max_logprobs: u32,
    /// Seeds requests that bring no seed
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
}

/// How message contents reach the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ContentFormat {
    /// Text parts joined to one string.
    Auto,
    /// The same.
    String,
    /// Every content as a list of parts.
    Openai,
}

/// Sampling defaults of the server, below what a request says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Defaults {
    pub(crate) generation: GenerationConfig,
}

impl AnswerFlags {
    /// Sampling defaults: `--override-generation-config` over `--generation-config`.
    ///
    /// # Errors
    /// When a file or a value of them is wrong.
    pub(crate) fn defaults(&self, files: &ModelFiles) -> Result<Defaults, LoadError> {
        const FILE: &str = "generation_config.json";
        let (directory, fields) = match self.generation_config.as_str() {
            "auto" => (files.directory(), files.json(FILE)?),
            "vllm" => (None, None),
            directory => (Some(Path::new(directory)), ModelFiles::open(directory)?.json(FILE)?),
        };
        let read = |fields: &Map<String, Value>, source: &Path| {
            GenerationConfig::from_json(fields).map_err(|error| LoadError::Invalid {
                file: source.display().to_string(),
                problem: error.to_string(),
            })
        };
        let mut fields = fields.unwrap_or_default();
        read(&fields, &directory.unwrap_or(Path::new("")).join(FILE))?;
        fields.extend(self.override_generation_config.clone().unwrap_or_default());
        Ok(Defaults { generation: read(&fields, Path::new("--override-generation-config"))? })
    }

    /// The chat template that replaces the model's.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn template(&self) -> Result<Option<String>, LoadError> {
        let Some(given) = &self.chat_template else { return Ok(None) };
        if given.contains("{{") || given.contains("{%") || given.contains('\n') {
            return Ok(Some(given.clone()));
        }
        let read = std::fs::read_to_string(given);
        read.map(Some).map_err(|source| LoadError::Read { path: given.into(), source })
    }
}

fn sampling_defaults(text: &str) -> Result<Map<String, Value>, String> {
    let fields: Map<String, Value> = json(text)?;
    match fields.keys().find(|name| !GenerationConfig::FIELDS.contains(&name.as_str())) {
        Some(name) => Err(format!("{name:?} is none of {}", GenerationConfig::FIELDS.join(", "))),
        None => Ok(fields),
    }
}

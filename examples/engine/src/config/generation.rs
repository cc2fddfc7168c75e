//! `generation_config.json`: the sampling that a checkpoint asks for.

use serde_json::{Map, Value};

use super::ConfigError;
use super::fields::{Fields, narrow};

/// The defaults for sampling that a checkpoint asks for in `generation_config.json`. `None` where it is silent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a sequence, beside those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Keep this many of the likeliest tokens.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens up to this probability in sum.
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the likeliest.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that have occurred.
    pub repetition_penalty: Option<f32>,
    /// How many tokens to generate at most.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// The fields that are read.
    pub const FIELDS: [&str; 7] =
        ["eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"];

    /// Reads the fields of a `generation_config.json`.
    ///
    /// # Errors
    /// When a field that it uses is of the wrong kind.
    pub fn from_json(values: &Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields { values, path: String::new() };
        Ok(Self {
            eos_token_ids: fields.token_ids("eos_token_id")?,
            temperature: fields.number("temperature")?.map(narrow),
            top_k: fields.count("top_k")?,
            top_p: fields.number("top_p")?.map(narrow),
            min_p: fields.number("min_p")?.map(narrow),
            repetition_penalty: fields.number("repetition_penalty")?.map(narrow),
            max_new_tokens: fields.count("max_new_tokens")?,
        })
    }
}

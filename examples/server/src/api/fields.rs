//! The request fields that chat and completions share.

use std::collections::BTreeMap;

use quayline_engine::Sampling;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::api::error::ApiError;
use crate::api::structured::{ResponseFormat, StructuredOutputs, Wanted};
use crate::caller::Caller;
use crate::config::Defaults;
use crate::order::{OrderFlags, Turn, Wishes};

/// Most continuations of one prompt.
pub(crate) const N_MAX: u32 = 128;
/// Most stop strings, and most bytes in each.
const STOP_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 1024;
/// Most entries in the other lists.
const LIST_MAX: usize = 1024;

/// Fields of OpenAI and vLLM that both endpoints take.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(crate) struct Shared {
    /// One of the names in `/v1/models`; without it, the first.
    pub(crate) model: Option<String>,
    /// Most tokens to answer with.
    #[schema(minimum = 0)]
    pub(crate) max_tokens: Option<u32>,
    /// Fewest tokens to answer with.
    min_tokens: Option<u32>,
    /// Answers per prompt.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<u32>,
    /// Search for the `n` likeliest answers in place of drawing: `n` is the beam width. They come at the end.
    use_beam_search: Option<bool>,
    /// Of a beam search: above 0, long answers are worth more; 1 is the default.
    length_penalty: Option<f32>,
    /// Send tokens as they come, as server-sent events.
    pub(crate) stream: Option<bool>,
    /// What else a stream carries.
    pub(crate) stream_options: Option<StreamOptions>,
    /// Makes a random answer repeatable.
    seed: Option<i64>,
    /// Divides the logits; 0 is greedy.
    #[schema(minimum = 0)]
    temperature: Option<f32>,
    /// Keep the most likely tokens up to this probability in sum.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Keep this many of the most likely tokens; 0 or -1 keeps all.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Keep tokens at least this likely relative to the most likely one.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Taken off the logits of tokens that are in the answer.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// The same, once per occurrence.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Above 1 makes tokens of prompt and answer less likely.
    #[schema(exclusive_minimum = 0)]
    repetition_penalty: Option<f32>,
    /// Added to the logits, by token id.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// Nothing else may be chosen.
    allowed_token_ids: Option<Vec<u32>>,
    /// Words that must not appear.
    bad_words: Option<Vec<String>>,
    /// The text ends before one of these.
    stop: Option<Stop>,
    /// The text ends when one of these is chosen.
    stop_token_ids: Option<Vec<u32>>,
    /// Keep the stop string in the text.
    include_stop_str_in_output: Option<bool>,
    /// Go on past end-of-sequence.
    ignore_eos: Option<bool>,
    /// Leave special tokens out of the text (the default).
    skip_special_tokens: Option<bool>,
    /// Only `true`.
    spaces_between_special_tokens: Option<bool>,
    /// Report so many log-probabilities for each token of the prompt. Not with `stream`.
    prompt_logprobs: Option<u32>,
    /// Keep so many tokens of a longer prompt; -1 is as many as fit.
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    /// Which side is cut off: `left` (the default) or `right`.
    truncation_side: Option<Side>,
    /// Whether the tokenizer adds begin-of-sequence and the like.
    pub(crate) add_special_tokens: Option<bool>,
    /// Lower runs first; with `--scheduling-policy priority`.
    priority: Option<i32>,
    /// How many tokens the answer will probably have: fewer run first; with `--scheduling-policy shortest`.
    #[schema(minimum = 1)]
    expected_output_tokens: Option<u32>,
    /// Who asks. With `--scheduling-policy fair`, the tenant, if neither the API key nor a header names it.
    user: Option<String>,
    /// Becomes part of the answer's `id`.
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    pub(crate) request_id: Option<String>,
    /// Which half of the work is another server's; with `--kv-transfer-config`.
    #[schema(value_type = Option<Object>)]
    pub(crate) kv_transfer_params: Option<Value>,
    /// Cached prefixes are shared only among equal salts.
    cache_salt: Option<String>,
    /// What the answer must be, in OpenAI's words.
    response_format: Option<ResponseFormat>,
    /// What the answer must be, in vLLM's words.
    structured_outputs: Option<StructuredOutputs>,
    /// Report token ids of prompt and answer.
    pub(crate) return_token_ids: Option<bool>,
    /// Write tokens in `logprobs` as `token_id:N`.
    pub(crate) return_tokens_as_token_ids: Option<bool>,
}

/// What else a stream carries.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// End with a chunk that has the usage.
    include_usage: Option<bool>,
    /// Every chunk has the usage so far.
    continuous_usage_stats: Option<bool>,
    /// Only `false`.
    include_obfuscation: Option<bool>,
}

/// One stop string or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a string or an array of strings")]
pub(crate) enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// A side of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// Its beginning.
    Left,
    /// Its end.
    Right,
}

/// When a stream reports usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UsageReport {
    Never,
    AtTheEnd,
    Always,
}

/// What the server knows and a request cannot change.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits<'a> {
    pub(crate) defaults: &'a Defaults,
    pub(crate) context: u32,
    pub(crate) vocab_size: u32,
    pub(crate) logprobs_max: u32,
    pub(crate) order: &'a OrderFlags,
}

impl Shared {
    /// How many answers per prompt.
    ///
    /// # Errors
    /// Out of range.
    pub(crate) fn n(&self) -> Result<u32, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=N_MAX => Ok(n),
            n => Err(ApiError::field("n", format!("must be from 1 to {N_MAX}, not {n}"))),
        }
    }

    /// The length penalty, if this asks for a beam search.
    ///
    /// # Errors
    /// A penalty without a search, or a search for what must be something.
    pub(crate) fn beams(&self) -> Result<Option<f32>, ApiError> {
        match (self.use_beam_search == Some(true), self.length_penalty.unwrap_or(1.0)) {
            (true, _) if self.wanted()?.is_some() => {
                Err(ApiError::field("structured_outputs", "are not done in a beam search"))
            }
            (true, penalty) => Ok(Some(penalty)),
            (false, 1.0) => Ok(None),
            (false, _) => Err(ApiError::field("length_penalty", "needs use_beam_search")),
        }
    }

    /// When a stream reports usage.
    ///
    /// # Errors
    /// Options without a stream, or ones that are not done here.
    pub(crate) fn usage_report(&self, forced: bool) -> Result<UsageReport, ApiError> {
        let options = self.stream_options.unwrap_or_default();
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::field("stream_options", "is only allowed with stream: true"));
        }
        if options.include_obfuscation == Some(true) {
            return Err(ApiError::field("stream_options.include_obfuscation", "is not supported"));
        }
        let include = forced || options.include_usage == Some(true);
        Ok(match (include, options.continuous_usage_stats == Some(true)) {
            (true, true) => UsageReport::Always,
            (true, false) => UsageReport::AtTheEnd,
            (false, _) => UsageReport::Never,
        })
    }

    /// What decides when the request runs.
    ///
    /// # Errors
    /// A wish that this server's order does not grant.
    pub(crate) fn turn(&self, caller: &Caller, limits: Limits<'_>) -> Result<Turn, ApiError> {
        let Self { priority, expected_output_tokens, .. } = *self;
        limits.order.turn(Wishes { priority, expected_output_tokens, user: self.user.as_deref() }, caller)
    }

    /// What the answer must be.
    ///
    /// # Errors
    /// Two wishes, or one that is not granted here.
    pub(crate) fn wanted(&self) -> Result<Option<Wanted>, ApiError> {
        Wanted::new(self.response_format.as_ref(), self.structured_outputs.as_ref())
    }

    /// The salt of the prefix cache.
    ///
    /// # Errors
    /// An empty one.
    pub(crate) fn cache_salt(&self) -> Result<Option<String>, ApiError> {
        match self.cache_salt.as_deref() {
            Some("") => Err(ApiError::field("cache_salt", "must not be empty")),
            salt => Ok(salt.map(Into::into)),
        }
    }

    /// Cuts a prompt as the request asks, and makes sure that it leaves room for an answer.
    ///
    /// # Errors
    /// With the numbers, when prompt and `max_tokens` do not fit the context.
    pub(crate) fn fit(
        &self,
        mut prompt: Vec<u32>,
        asked: Option<u32>,
        name: &'static str,
        limits: Limits<'_>,
    ) -> Result<Vec<u32>, ApiError> {
        if let Some(keep) = self.kept_tokens(asked, limits)? {
            let excess = prompt.len().saturating_sub(keep);
            match self.truncation_side {
                Some(Side::Right) => prompt.truncate(keep),
                _ => drop(prompt.drain(..excess)),
            }
        }
        let context = limits.context as usize;
        let wanted = asked.unwrap_or(1).max(1) as usize;
        if prompt.is_empty() {
            return Err(ApiError::field(name, "must have at least one token"));
        }
        if prompt.len() + wanted > context {
            return Err(ApiError::context(
                name,
                format!(
                    "the model's context is {context} tokens; the prompt has {} and the answer may take {wanted}",
                    prompt.len()
                ),
            ));
        }
        Ok(prompt)
    }

    fn kept_tokens(&self, asked: Option<u32>, limits: Limits<'_>) -> Result<Option<usize>, ApiError> {
        let room = limits.context.saturating_sub(asked.unwrap_or(1).max(1)) as usize;
        match self.truncate_prompt_tokens {
            None => Ok(None),
            Some(-1) => Ok(Some(room)),
            Some(keep) => match usize::try_from(keep) {
                Ok(keep) if (1..=limits.context as usize).contains(&keep) => Ok(Some(keep)),
                _ => {
                    let range = format!("must be -1 or from 1 to {}, not {keep}", limits.context);
                    Err(ApiError::field("truncate_prompt_tokens", range))
                }
            },
        }
    }

    /// Sampling parameters: the request's over the server's over vLLM's.
    ///
    /// `max_tokens` is what the request asked for; without it the context is the limit. `logprobs` comes with
    /// the name of its field.
    ///
    /// # Errors
    /// The first parameter that is out of range.
    pub(crate) fn sampling(
        &self,
        max_tokens: Option<u32>,
        (logprobs_name, logprobs): (&'static str, Option<u32>),
        limits: Limits<'_>,
    ) -> Result<Sampling, ApiError> {
        let model = &limits.defaults.generation;
        let base = Sampling::default();
        let most = |name, asked: Option<u32>| match asked {
            Some(asked) if asked > limits.logprobs_max => {
                Err(ApiError::field(name, format!("must be at most {}, not {asked}", limits.logprobs_max)))
            }
            asked => Ok(asked),
        };
        let sampling = Sampling {
            temperature: self.temperature.or(model.temperature).unwrap_or(base.temperature),
            top_k: self.top_k()?.or(model.top_k).unwrap_or(base.top_k),
            top_p: self.top_p.or(model.top_p).unwrap_or(base.top_p),
            min_p: self.min_p.or(model.min_p).unwrap_or(base.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(model.repetition_penalty)
                .unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            logit_bias: self.logit_bias()?,
            allowed_token_ids: bounded("allowed_token_ids", self.allowed_token_ids.as_deref(), usize::MAX)?,
            bad_words: bounded("bad_words", self.bad_words.as_deref(), LIST_MAX)?.unwrap_or_default(),
            seed: self.seed.map(i64::cast_unsigned),
            max_tokens: [max_tokens, model.max_new_tokens].into_iter().flatten().min(),
            min_tokens: self.min_tokens.unwrap_or(0),
            stop: self.stop()?,
            stop_token_ids: bounded("stop_token_ids", self.stop_token_ids.as_deref(), LIST_MAX)?
                .unwrap_or_default(),
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            spaces_between_special_tokens: self.spaces()?,
            logprobs: most(logprobs_name, logprobs)?,
            prompt_logprobs: most("prompt_logprobs", self.prompt_logprobs)?,
        };
        if sampling.prompt_logprobs.is_some() && self.stream == Some(true) {
            return Err(ApiError::field("prompt_logprobs", "cannot be streamed"));
        }
        sampling.check(limits.vocab_size)?;
        Ok(sampling)
    }

    fn top_k(&self) -> Result<Option<u32>, ApiError> {
        match self.top_k {
            None => Ok(None),
            Some(-1) => Ok(Some(0)),
            Some(k) => u32::try_from(k)
                .map(Some)
                .map_err(|_| ApiError::field("top_k", format!("must be -1, 0 or a count, not {k}"))),
        }
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let Some(bias) = &self.logit_bias else { return Ok(Vec::new()) };
        if bias.len() > LIST_MAX {
            return Err(ApiError::field(
                "logit_bias",
                format!("may have {LIST_MAX} entries, not {}", bias.len()),
            ));
        }
        let entry = |(token, &bias): (&String, &f32)| {
            let id = token.parse().map_err(|_| {
                ApiError::field("logit_bias", format!("has the key {token:?}, which is no token id"))
            })?;
            if !(-100.0..=100.0).contains(&bias) {
                return Err(ApiError::field("logit_bias", format!("must be from -100 to 100, not {bias}")));
            }
            Ok((id, bias))
        };
        bias.iter().map(entry).collect()
    }

    fn stop(&self) -> Result<Vec<String>, ApiError> {
        let stop = match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(one)) => vec![one],
            Some(Stop::Many(many)) => many,
        };
        if stop.len() > STOP_MAX || stop.iter().any(|text| text.len() > STOP_BYTES_MAX) {
            let limit = format!("may have {STOP_MAX} strings of {STOP_BYTES_MAX} bytes");
            return Err(ApiError::field("stop", limit));
        }
        Ok(stop)
    }

    fn spaces(&self) -> Result<bool, ApiError> {
        match self.spaces_between_special_tokens {
            Some(false) => Err(ApiError::field("spaces_between_special_tokens", "can only be true")),
            _ => Ok(true),
        }
    }
}

fn bounded<T: Clone>(
    name: &'static str,
    list: Option<&[T]>,
    most: usize,
) -> Result<Option<Vec<T>>, ApiError> {
    match list {
        Some(list) if list.len() > most => {
            Err(ApiError::field(name, format!("may have {most} entries, not {}", list.len())))
        }
        list => Ok(list.map(<[T]>::to_vec)),
    }
}

//! `--speculative-config`: vLLM's JSON, of which this server has the method `ngram`.

use std::num::NonZeroU32;

use quayline_engine::Speculation;
use serde::Deserialize;

/// vLLM's default of both lengths when neither is given.
const PROMPT_LOOKUP: NonZeroU32 = NonZeroU32::new(5).expect("5 is not 0");

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SpeculativeConfig {
    method: Method,
    num_speculative_tokens: NonZeroU32,
    prompt_lookup_max: Option<NonZeroU32>,
    prompt_lookup_min: Option<NonZeroU32>,
    disable_by_batch_size: Option<u32>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    Ngram,
}

impl SpeculativeConfig {
    /// What the engine is told. As in vLLM, one length alone is both.
    pub(crate) fn speculation(self) -> Speculation {
        let Self { method: Method::Ngram, num_speculative_tokens, disable_by_batch_size, .. } = self;
        let (max, min) = (self.prompt_lookup_max, self.prompt_lookup_min);
        Speculation {
            num_speculative_tokens,
            prompt_lookup_max: max.or(min).unwrap_or(PROMPT_LOOKUP),
            prompt_lookup_min: min.or(max).unwrap_or(PROMPT_LOOKUP),
            disable_by_batch_size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Speculation, String> {
        let config = serde_json::from_str::<SpeculativeConfig>(json).map_err(|error| error.to_string())?;
        Ok(config.speculation())
    }

    #[test]
    fn lengths_that_are_not_given_are_vllm_s() {
        let lengths = |more: &str| {
            let read = read(&format!(r#"{{"method": "ngram", "num_speculative_tokens": 4{more}}}"#)).unwrap();
            (read.prompt_lookup_min.get(), read.prompt_lookup_max.get())
        };
        assert_eq!(lengths(""), (5, 5));
        assert_eq!(lengths(r#", "prompt_lookup_max": 3"#), (3, 3));
        assert_eq!(lengths(r#", "prompt_lookup_min": 2"#), (2, 2));
        assert_eq!(lengths(r#", "prompt_lookup_min": 2, "prompt_lookup_max": 4"#), (2, 4));
    }

    #[test]
    fn what_is_not_here_is_named() {
        let refused = |json| read(json).unwrap_err();
        assert!(refused(r#"{"method": "eagle", "num_speculative_tokens": 4}"#).contains("eagle"));
        assert!(refused(r#"{"method": "ngram"}"#).contains("num_speculative_tokens"));
        assert!(refused(r#"{"method": "ngram", "num_speculative_tokens": 0}"#).contains("nonzero"));
        let model = r#"{"method": "ngram", "num_speculative_tokens": 1, "draft_tensor_parallel_size": 1}"#;
        assert!(refused(model).contains("draft_tensor_parallel_size"));
    }
}

//! What is asked of the engine: one prompt, one continuation.

use std::collections::BTreeSet;
use std::sync::Arc;

use quayline_batching::{self as batching, StopRules, Targets, TenantId};

use crate::error::Refusal;
use crate::grammar::Grammar;

/// Names a request while it is queued or running. The caller chooses it and may reuse it after the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A moment, in microseconds since an origin of the caller's choice. Never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tick(pub u64);

/// One prompt to be continued once. Several continuations of one prompt (`n` on the wire) are several
/// requests, of which all but the first are [samples](Request::sample_of) of the first.
#[derive(Debug, Clone)]
pub struct Request {
    /// The caller's name for it.
    pub id: RequestId,
    /// Token ids, at least one.
    pub prompt: Arc<[u32]>,
    /// How tokens are chosen and when to stop.
    pub sampling: Sampling,
    /// What the answer must be, made by the engine's [`Grammars`](crate::Grammars). The answer ends where its
    /// grammar ends, whatever `min_tokens` and `ignore_eos` say.
    pub grammar: Option<Grammar>,
    /// Lower runs first. Only [`Policy::Priority`](crate::Policy::Priority) looks at it.
    pub priority: i32,
    /// Who shares the engine with others. Only [`Policy::Fair`](crate::Policy::Fair) looks at it.
    pub tenant: TenantId,
    /// By when it should answer, in microseconds. [`Policy::Deadline`](crate::Policy::Deadline) looks at it, and so
    /// does what waits for the disk: until the first token is due, and then it computes.
    pub targets: Option<Targets>,
    /// How many tokens it will probably be answered with. Only [`Policy::ShortestJob`](crate::Policy::ShortestJob)
    /// looks at it; without it, `max_tokens` counts.
    pub expected_new_tokens: Option<u32>,
    /// Requests share cached prefixes only with requests of the same salt.
    pub cache_salt: Option<String>,
    /// A request with the same prompt that was added before: this one waits until that one has read the prompt,
    /// and takes its keys and values over. It reads the prompt itself if there is no such request, if prompt or
    /// salt are others, or if it is to tell of each prompt token.
    pub sample_of: Option<RequestId>,
    /// Search for the likeliest answers, and draw nothing.
    pub beams: Option<Beams>,
    /// Keep its keys and values when it ends, until another engine has them
    /// ([`Engine::handed_over`](crate::Engine::handed_over)).
    pub hands_over: bool,
    /// Another engine has the keys and values of so many of the prompt's first tokens: wait for those of whole blocks
    /// that are not here ([`Engine::loads`](crate::Engine::loads)).
    pub remote_tokens: u32,
    /// When it arrived; orders the waiting line.
    pub arrival: Tick,
}

/// A search for the likeliest answers to a prompt. They come all at once, the best under the request's own id.
#[derive(Debug, Clone, PartialEq)]
pub struct Beams {
    /// The ids of the other answers, best first. One more than these is how many sequences are followed at a time
    /// (the beam width).
    pub others: Vec<RequestId>,
    /// An answer is worth the sum of its log-probabilities, divided by the length of prompt and answer (the end of
    /// sequence not counted) to the power of this: above 0 makes long ones better.
    pub length_penalty: f32,
}

impl Beams {
    /// How many sequences are followed, and answers given.
    #[must_use]
    pub fn width(&self) -> u32 {
        u32::try_from(self.others.len()).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// What a search cannot do: rules on single tokens, and ends other than end of sequence.
    pub(crate) fn check(&self, request: &Request, vocab_size: u32) -> Result<(), Refusal> {
        let Request { sampling, grammar, .. } = request;
        let all: BTreeSet<RequestId> = self.others.iter().copied().chain([request.id]).collect();
        require("n", all.len() == self.width() as usize, "must give each answer an id", self.width())?;
        require("n", self.width() <= vocab_size / 2, "must be at most half the vocabulary", self.width())?;
        let penalty = self.length_penalty;
        require("length_penalty", penalty.is_finite(), "must be finite", penalty)?;
        let plain = Sampling::default();
        let alone: [(&str, bool); 10] = [
            ("structured_outputs", grammar.is_none()),
            ("presence_penalty", sampling.presence_penalty == plain.presence_penalty),
            ("frequency_penalty", sampling.frequency_penalty == plain.frequency_penalty),
            ("repetition_penalty", sampling.repetition_penalty == plain.repetition_penalty),
            ("logit_bias", sampling.logit_bias.is_empty()),
            ("allowed_token_ids", sampling.allowed_token_ids.is_none()),
            ("bad_words", sampling.bad_words.is_empty()),
            ("min_tokens", sampling.min_tokens == 0),
            ("stop", sampling.stop.is_empty() && sampling.stop_token_ids.is_empty()),
            ("prompt_logprobs", sampling.prompt_logprobs.is_none()),
        ];
        match alone.into_iter().find(|&(_, holds)| !holds) {
            Some((parameter, _)) => refuse(parameter, "is not done in a beam search".into()),
            None => Ok(()),
        }
    }
}

impl Request {
    /// A request with default sampling, priority 0, arrived at the origin, with nothing special about it.
    #[must_use]
    pub fn new(id: RequestId, prompt: impl Into<Arc<[u32]>>) -> Self {
        Self {
            id,
            prompt: prompt.into(),
            sampling: Sampling::default(),
            grammar: None,
            priority: 0,
            tenant: TenantId(0),
            targets: None,
            expected_new_tokens: None,
            cache_salt: None,
            sample_of: None,
            beams: None,
            hands_over: false,
            remote_tokens: 0,
            arrival: Tick::default(),
        }
    }

    /// What the batcher must know of it.
    pub(crate) fn planned(
        &self,
        id: batching::RequestId,
        prompt_tokens: u32,
        stop: StopRules,
    ) -> batching::Request {
        batching::Request {
            arrival: batching::Tick(self.arrival.0),
            priority: self.priority,
            tenant: self.tenant,
            targets: self.targets,
            expected_new_tokens: self.expected_new_tokens,
            ..batching::Request::new(id, prompt_tokens, stop)
        }
    }
}

/// How tokens are chosen and when to stop. Names, defaults and meaning are those of vLLM's
/// `SamplingParams`, whose first fields are OpenAI's.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits. Below `1e-5` the most likely token is taken.
    pub temperature: f32,
    /// Only the `k` most likely tokens stay; 0 keeps all.
    pub top_k: u32,
    /// Only the fewest most likely tokens whose probabilities reach this sum stay; 1 keeps all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the most likely one stay; 0 keeps all.
    pub min_p: f32,
    /// Above 1 makes tokens of the prompt and the output less likely; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken off the logit of each token that is in the output.
    pub presence_penalty: f32,
    /// Taken off the logit of a token once for each time it is in the output.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Nothing else may be chosen, if given.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Words that must not appear. The last token of each spelling is forbidden after the ones before it.
    pub bad_words: Vec<String>,
    /// Makes a random answer repeatable. Without it the engine draws one from its own seed and the id.
    pub seed: Option<u64>,
    /// At most this many new tokens; `None` is as many as the context holds.
    pub max_tokens: Option<u32>,
    /// Neither end-of-sequence nor a stop id is chosen before this many new tokens, and no stop
    /// string ends the text.
    pub min_tokens: u32,
    /// The text ends where one of these appears.
    pub stop: Vec<String>,
    /// The text ends when one of these is chosen.
    pub stop_token_ids: Vec<u32>,
    /// Keep the stop string (or the text of the stop token) in the text.
    pub include_stop_str_in_output: bool,
    /// Go on past end-of-sequence.
    pub ignore_eos: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Keep the spaces that some tokenizers put between special tokens. The tokens of those read here are
    /// put together as they are, so it makes no difference; it is accepted for compatibility.
    pub spaces_between_special_tokens: bool,
    /// Report the log-probability of each chosen token and of this many most likely ones.
    pub logprobs: Option<u32>,
    /// The same for each prompt token. Such a request reads nothing from the prefix cache.
    pub prompt_logprobs: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: None,
            max_tokens: Some(16),
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            skip_special_tokens: true,
            spaces_between_special_tokens: true,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// Below this temperature the most likely token is taken.
const GREEDY_BELOW: f32 = 1e-5;

impl Sampling {
    /// The most likely token, every time.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether no random number is needed.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }

    /// Checks each parameter's range, as [`Engine::add`](crate::Engine::add) does; a server can call it early.
    ///
    /// # Errors
    /// [`Refusal::Sampling`] naming the parameter, what it must be and what it was.
    pub fn check(&self, vocab_size: u32) -> Result<(), Refusal> {
        self.check_numbers()?;
        self.check_tokens(vocab_size)?;
        self.check_words()
    }

    fn check_numbers(&self) -> Result<(), Refusal> {
        require("temperature", self.temperature >= 0.0, "must be a number of at least 0", self.temperature)?;
        require("temperature", self.temperature.is_finite(), "must be finite", self.temperature)?;
        require("top_p", self.top_p > 0.0 && self.top_p <= 1.0, "must be in (0, 1]", self.top_p)?;
        require("min_p", (0.0..=1.0).contains(&self.min_p), "must be in [0, 1]", self.min_p)?;
        let repetition = self.repetition_penalty;
        require(
            "repetition_penalty",
            repetition > 0.0 && repetition.is_finite(),
            "must be above 0",
            repetition,
        )?;
        let range = -2.0..=2.0;
        let presence = self.presence_penalty;
        require("presence_penalty", range.contains(&presence), "must be in [-2, 2]", presence)?;
        let frequency = self.frequency_penalty;
        require("frequency_penalty", range.contains(&frequency), "must be in [-2, 2]", frequency)?;
        if let Some(max) = self.max_tokens {
            require("max_tokens", max >= 1, "must be at least 1", max)?;
            let fits = self.min_tokens <= max;
            require("min_tokens", fits, "must be at most max_tokens", self.min_tokens)?;
        }
        Ok(())
    }

    fn check_tokens(&self, vocab_size: u32) -> Result<(), Refusal> {
        let known = |parameter, ids: &[u32]| match ids.iter().find(|&&id| id >= vocab_size) {
            Some(id) => refuse(parameter, format!("names token {id} of a vocabulary of {vocab_size}")),
            None => Ok(()),
        };
        let biased: Vec<u32> = self.logit_bias.iter().map(|&(id, _)| id).collect();
        known("stop_token_ids", &self.stop_token_ids)?;
        known("logit_bias", &biased)?;
        known("allowed_token_ids", self.allowed_token_ids.as_deref().unwrap_or_default())?;
        if let Some(&(_, bias)) = self.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
            return refuse("logit_bias", format!("must be finite, not {bias}"));
        }
        if self.allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            return refuse("allowed_token_ids", "must name at least one token".into());
        }
        let most = self.logprobs.max(self.prompt_logprobs).unwrap_or(0);
        require("logprobs", most <= vocab_size, "must be at most the vocabulary", most)
    }

    fn check_words(&self) -> Result<(), Refusal> {
        if self.stop.iter().any(String::is_empty) {
            return refuse("stop", "must not contain an empty string".into());
        }
        if self.bad_words.iter().any(|word| word.trim().is_empty()) {
            return refuse("bad_words", "must not contain an empty string".into());
        }
        Ok(())
    }
}

fn require(
    parameter: &'static str,
    holds: bool,
    must: &str,
    was: impl std::fmt::Display,
) -> Result<(), Refusal> {
    if holds { Ok(()) } else { refuse(parameter, format!("{must}, not {was}")) }
}

fn refuse(parameter: &'static str, problem: String) -> Result<(), Refusal> {
    Err(Refusal::Sampling { parameter, problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_in_range() {
        assert_eq!(Sampling::default().check(10), Ok(()));
        assert_eq!(Sampling::greedy().check(10), Ok(()));
    }

    #[test]
    fn each_bad_parameter_is_named() {
        let base = Sampling::default;
        let cases: Vec<(&str, Sampling)> = vec![
            ("temperature", Sampling { temperature: -0.1, ..base() }),
            ("temperature", Sampling { temperature: f32::NAN, ..base() }),
            ("temperature", Sampling { temperature: f32::INFINITY, ..base() }),
            ("top_p", Sampling { top_p: 0.0, ..base() }),
            ("top_p", Sampling { top_p: 1.01, ..base() }),
            ("min_p", Sampling { min_p: 1.5, ..base() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..base() }),
            ("presence_penalty", Sampling { presence_penalty: 2.5, ..base() }),
            ("frequency_penalty", Sampling { frequency_penalty: f32::NAN, ..base() }),
            ("max_tokens", Sampling { max_tokens: Some(0), ..base() }),
            ("min_tokens", Sampling { max_tokens: Some(3), min_tokens: 4, ..base() }),
            ("stop_token_ids", Sampling { stop_token_ids: vec![10], ..base() }),
            ("logit_bias", Sampling { logit_bias: vec![(3, f32::INFINITY)], ..base() }),
            ("allowed_token_ids", Sampling { allowed_token_ids: Some(vec![]), ..base() }),
            ("stop", Sampling { stop: vec![String::new()], ..base() }),
            ("bad_words", Sampling { bad_words: vec![" ".into()], ..base() }),
            ("logprobs", Sampling { logprobs: Some(11), ..base() }),
        ];
        for (name, sampling) in cases {
            let refusal = sampling.check(10).unwrap_err();
            assert_eq!(refusal.parameter(), Some(name), "{refusal}");
        }
    }
}

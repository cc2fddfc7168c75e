//! What the engine gives back after a step.

use crate::request::{RequestId, Tick};

/// What one step brought for one request. Steps that only advance its prompt bring nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Whose it is.
    pub id: RequestId,
    /// The tokens chosen in this step, oldest first. The token that ended the request is among them.
    pub tokens: Vec<SampledToken>,
    /// The text that became certain in this step. It may lag behind the tokens: half a character or what
    /// could still become a stop string is held back, and comes later or never.
    pub text: String,
    /// For each prompt token its log-probability given the ones before; `None` for the first. Comes once,
    /// with the first chosen token, if it was asked for.
    pub prompt_logprobs: Option<Vec<Option<Logprobs>>>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// How many of them were found in the prefix cache when the request first ran.
    pub cached_tokens: u32,
    /// How many of those were not in the cache, and came from host memory or another engine.
    pub loaded_tokens: u32,
    /// Tokens chosen so far, these included.
    pub output_tokens: u32,
    /// The step in which the request first took part; `None` if it ended without.
    pub started: Option<Tick>,
    /// How often it had to give its blocks back so far.
    pub preemptions: u32,
    /// Of an answer that a search found: what it is worth.
    pub beam_score: Option<f64>,
    /// Set on the last output of a request.
    pub finish: Option<Finish>,
}

/// One chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// If `logprobs` was asked for.
    pub logprobs: Option<Logprobs>,
}

/// Log-probabilities at one position, from the logits as the model gave them: before temperature,
/// penalties and masks, but of the tokens that the grammar takes, if there is one (as in vLLM).
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// The token that is there.
    pub chosen: TokenLogprob,
    /// The most likely ones, best first; as many as were asked for.
    pub top: Vec<TokenLogprob>,
}

/// How likely one token was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// 1 for the most likely token: how many tokens are at least as likely.
    pub rank: u32,
}

/// Why a request ended, and on what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finish {
    /// The kind of end.
    pub reason: FinishReason,
    /// What stopped it; `None` for end-of-sequence and for a limit.
    pub stop: Option<StopReason>,
}

/// The kind of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// End-of-sequence, a stop id, a stop string, or the end of the grammar.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
    /// The grammar of the answer became too large to be followed any further, what another engine has of it did not
    /// come, or the machine failed.
    Error,
}

impl FinishReason {
    /// The word on the OpenAI wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Error => "error",
        }
    }
}

/// What stopped a request: vLLM's `stop_reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    String(String),
}

//! What is asked: how long the prompt is, how much may be generated, when to stop.

use crate::id::{AdapterId, RequestId, TenantId, Tick, TokenId};

/// One sequence to be generated. The tokens themselves stay with the caller: batching only counts them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Request {
    /// The caller's name for it.
    pub id: RequestId,
    /// Tokens of the prompt; at least one, and fewer than the model's maximum.
    pub prompt_tokens: u32,
    /// When it came. Breaks ties, and dates its waiting.
    pub arrival: Tick,
    /// When to stop generating.
    pub stop: StopRules,
    /// Lower goes first. Only [`Policy::Priority`](crate::Policy::Priority) looks at it.
    pub priority: i32,
    /// Who pays. Only [`Policy::Fair`](crate::Policy::Fair) looks at it.
    pub tenant: TenantId,
    /// By when it should answer. Only [`Policy::Deadline`](crate::Policy::Deadline) looks at it.
    pub targets: Option<Targets>,
    /// How many tokens it will probably generate. Only
    /// [`Policy::ShortestJob`](crate::Policy::ShortestJob) looks at it; without it, the maximum counts.
    pub expected_new_tokens: Option<u32>,
    /// The adapter it runs with.
    pub adapter: Option<AdapterId>,
    /// Whether a grammar says which tokens it may generate.
    pub grammar: Grammar,
    /// The request whose prompt this one shares, as another sample of the same question: it waits until
    /// that one has read the prompt, then forks from it. If that one is gone, it reads the prompt itself.
    pub sample_of: Option<RequestId>,
    /// Keep its room when it ends, until [`Batcher::handed_over`](crate::Batcher::handed_over): another
    /// machine fetches what it computed and goes on.
    pub hands_over: bool,
    /// Pieces of the prompt that an encoder must see first (images, sound), by their place, apart from each
    /// other.
    pub encoder_items: Vec<EncoderItem>,
}

/// When answers are due, from the arrival on. The moment of the nth new token is
/// `arrival + first_token_ticks + (n - 1) * token_ticks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Targets {
    /// From the arrival to the first token (TTFT).
    pub first_token_ticks: u64,
    /// From each token to the next (TPOT).
    pub token_ticks: u64,
}

/// Whether a grammar says which tokens may be generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Grammar {
    /// Any token may be.
    #[default]
    None,
    /// One does, and is being compiled: the request is not admitted before
    /// [`Batcher::grammar_ready`](crate::Batcher::grammar_ready).
    Compiling,
    /// One does. [`Scheduled::needs_mask`](crate::Scheduled::needs_mask) asks for its mask.
    Ready,
}

/// A piece of a prompt that an encoder must see first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EncoderItem {
    /// What it is: equal items have equal contents, and are encoded once.
    pub content: u64,
    /// Its first token in the prompt.
    pub start: u32,
    /// How many tokens it has there, and costs to encode; at least one.
    pub tokens: u32,
}

impl EncoderItem {
    /// One past its last token.
    pub fn end(&self) -> u32 {
        self.start.saturating_add(self.tokens)
    }
}

impl Request {
    /// A request of nobody in particular: priority 0, arrived at tick 0, with nothing special about it.
    pub fn new(id: RequestId, prompt_tokens: u32, stop: StopRules) -> Request {
        Request {
            id,
            prompt_tokens,
            arrival: Tick(0),
            stop,
            priority: 0,
            tenant: TenantId(0),
            targets: None,
            expected_new_tokens: None,
            adapter: None,
            grammar: Grammar::None,
            sample_of: None,
            hands_over: false,
            encoder_items: Vec::new(),
        }
    }
}

/// When a request ends by itself. Checked for every generated token in this order: end of sequence, stop
/// ids, number of tokens. Stop strings are text and so the caller's: see
/// [`Batcher::finish`](crate::Batcher::finish).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StopRules {
    /// Tokens to generate at most; at least one.
    pub new_tokens_max: u32,
    /// Tokens to generate before `eos` or a stop id may appear. Keeping them from appearing is the
    /// sampler's work: [`Scheduled::masks_stops`](crate::Scheduled::masks_stops) tells it when. One that
    /// appears all the same ends the request.
    pub new_tokens_min: u32,
    /// The end-of-sequence token. `None` to go on after it (`ignore_eos`).
    pub eos: Option<TokenId>,
    /// Further tokens that end the request.
    pub stop_ids: Vec<TokenId>,
}

impl StopRules {
    /// Generate `new_tokens_max` tokens, whatever they are.
    pub fn after(new_tokens_max: u32) -> StopRules {
        StopRules { new_tokens_max, new_tokens_min: 0, eos: None, stop_ids: Vec::new() }
    }

    /// Why a request that just generated `token` ends, or `None` if it goes on. `new_tokens` and
    /// `known_tokens` count this token. [`Batcher::apply`](crate::Batcher::apply) asks for each token; a caller
    /// that chooses several tokens at once asks before it chooses the next.
    pub fn verdict(
        &self,
        token: TokenId,
        new_tokens: u32,
        known_tokens: u32,
        model_tokens_max: u32,
    ) -> Option<FinishReason> {
        if self.eos == Some(token) {
            Some(FinishReason::Eos)
        } else if self.stop_ids.contains(&token) {
            Some(FinishReason::StopId(token))
        } else if new_tokens >= self.new_tokens_max {
            Some(FinishReason::NewTokensMax(self.new_tokens_max))
        } else if known_tokens >= model_tokens_max {
            Some(FinishReason::ModelTokensMax(model_tokens_max))
        } else {
            None
        }
    }
}

/// Why a request ended by its own rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum FinishReason {
    /// The end-of-sequence token was generated.
    Eos,
    /// This stop id was generated.
    StopId(TokenId),
    /// It generated as many tokens as it asked for.
    NewTokensMax(u32),
    /// Prompt and generated tokens reached the model's maximum.
    ModelTokensMax(u32),
}

impl FinishReason {
    /// True when the text was cut by a limit rather than ended by the model (`finish_reason: "length"`).
    pub fn is_length(self) -> bool {
        matches!(self, FinishReason::NewTokensMax(_) | FinishReason::ModelTokensMax(_))
    }
}

impl std::fmt::Display for FinishReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FinishReason::Eos => write!(f, "end of sequence"),
            FinishReason::StopId(token) => write!(f, "stop id {token}"),
            FinishReason::NewTokensMax(tokens) => write!(f, "new_tokens_max {tokens} is reached"),
            FinishReason::ModelTokensMax(tokens) => write!(f, "model_tokens_max {tokens} is reached"),
        }
    }
}

/// A generated token, handed to [`Batcher::apply`](crate::Batcher::apply). A request that had drafts may
/// have several, one behind the other: the accepted drafts, then the token that the model put behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampled {
    /// Who generated it.
    pub id: RequestId,
    /// What was generated.
    pub token: TokenId,
}

/// A request that ended in [`Batcher::apply`](crate::Batcher::apply). Its room is released, unless it
/// [hands over](Request::hands_over).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Who ended.
    pub id: RequestId,
    /// Why.
    pub reason: FinishReason,
    /// Tokens of its last burst that came behind the end and are no part of the answer.
    pub dropped_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_sequence_wins_over_stop_ids_and_length() {
        let rules = StopRules {
            eos: Some(TokenId(2)),
            stop_ids: vec![TokenId(2), TokenId(7)],
            ..StopRules::after(1)
        };
        assert_eq!(rules.verdict(TokenId(2), 1, 10, 10), Some(FinishReason::Eos));
        assert_eq!(rules.verdict(TokenId(7), 1, 10, 10), Some(FinishReason::StopId(TokenId(7))));
        assert_eq!(rules.verdict(TokenId(1), 1, 10, 10), Some(FinishReason::NewTokensMax(1)));
    }

    #[test]
    fn the_minimum_does_not_hold_back_the_end() {
        let rules = StopRules { eos: Some(TokenId(2)), new_tokens_min: 5, ..StopRules::after(9) };
        assert_eq!(rules.verdict(TokenId(2), 1, 4, 100), Some(FinishReason::Eos));
        assert_eq!(rules.verdict(TokenId(3), 1, 4, 100), None);
        assert_eq!(rules.verdict(TokenId(3), 2, 100, 100), Some(FinishReason::ModelTokensMax(100)));
    }
}

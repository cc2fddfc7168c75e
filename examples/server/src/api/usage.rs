//! How many tokens a request took.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::Part;

/// OpenAI's usage object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Usage {
    /// Of all prompts; a prompt counts once, however many answers it gets.
    prompt_tokens: u64,
    /// Of all answers.
    completion_tokens: u64,
    /// The sum.
    total_tokens: u64,
    /// With `--enable-prompt-tokens-details`.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptTokensDetails>,
}

/// What became of the prompt's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct PromptTokensDetails {
    /// Found in the prefix cache.
    cached_tokens: u64,
}

/// Adds up usage as parts come.
#[derive(Debug, Clone)]
pub(crate) struct Tally {
    n: u32,
    details: bool,
    /// Answers that exist only to score the prompt (`max_tokens: 0`) do not count.
    counts_answers: bool,
    prompts: Vec<u64>,
    choices: BTreeMap<u32, (u64, u64)>,
}

impl Tally {
    /// For prompts of these lengths, each answered `n` times.
    pub(crate) fn new(prompts: Vec<u64>, n: u32, details: bool, counts_answers: bool) -> Self {
        Self { n, details, counts_answers, prompts, choices: BTreeMap::new() }
    }

    /// Notes how far a choice has come.
    pub(crate) fn note(&mut self, part: &Part) {
        let output = &part.output;
        self.choices.insert(part.choice, (u64::from(output.output_tokens), u64::from(output.cached_tokens)));
    }

    /// Everything so far.
    pub(crate) fn usage(&self) -> Usage {
        let prompt_tokens = self.prompts.iter().sum();
        let answered: u64 = self.choices.values().map(|(answered, _)| answered).sum();
        let completion_tokens = if self.counts_answers { answered } else { 0 };
        // The first answer to a prompt tells what the cache saved; the others always find the prompt cached.
        let cached_tokens = self.first_choices().map(|(_, cached)| cached).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: self.details.then_some(PromptTokensDetails { cached_tokens }),
        }
    }

    /// Usage of one choice alone, for chunks of a stream.
    pub(crate) fn usage_of(&self, choice: u32) -> Usage {
        let prompt_tokens = self.prompts.get((choice / self.n) as usize).copied().unwrap_or(0);
        let (answered, cached_tokens) = self.choices.get(&choice).copied().unwrap_or((0, 0));
        let completion_tokens = if self.counts_answers { answered } else { 0 };
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: self.details.then_some(PromptTokensDetails { cached_tokens }),
        }
    }

    fn first_choices(&self) -> impl Iterator<Item = (u64, u64)> {
        self.choices.iter().filter(|(choice, _)| *choice % self.n == 0).map(|(_, counts)| *counts)
    }
}

//! How many drafts each request has verified: guesses of its next tokens, computed beside the last known
//! one and kept as far as the model agrees (Leviathan et al., ICML 2023, arXiv 2211.17192).

use crate::error::ConfigError;

/// How many drafts are verified.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Drafts {
    /// The most for one request in one step. 0: no speculation.
    pub tokens_max: u32,
    /// Fewer when many run, as then the machine is busy without: each says how many drafts at most while
    /// more than `above_running` run. In the order of `above_running`.
    pub limits: Vec<DraftLimit>,
    /// Fewer for a request whose drafts are rejected, more again when all are accepted.
    pub adaptive: bool,
    /// Give every request that generates as many tokens as drafts are wanted, filled up with padding:
    /// graphs that were recorded for one shape fit (vLLM's `-1` drafts). Padding is always rejected.
    pub padding: bool,
    /// Slots that a proposer inside the model writes behind each request that generates (EAGLE, MTP). They
    /// take room, and tokens of the step.
    pub slots: u32,
}

/// A limit while many run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DraftLimit {
    /// Holds while more than so many run.
    pub above_running: u32,
    /// The most for one request.
    pub tokens_max: u32,
}

impl Drafts {
    /// No speculation.
    pub const NONE: Drafts =
        Drafts { tokens_max: 0, limits: Vec::new(), adaptive: false, padding: false, slots: 0 };

    /// Up to `tokens_max` drafts for everybody, always.
    pub fn up_to(tokens_max: u32) -> Drafts {
        Drafts { tokens_max, ..Drafts::NONE }
    }

    /// The most for one request while `running` run.
    pub(crate) fn tokens_max(&self, running: usize) -> u32 {
        let holds = |limit: &&DraftLimit| running > limit.above_running as usize;
        let limit = self.limits.iter().rev().find(holds);
        limit.map_or(self.tokens_max, |limit| limit.tokens_max.min(self.tokens_max))
    }

    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let rising = self.limits.is_sorted_by(|one, other| one.above_running < other.above_running);
        if rising { Ok(()) } else { Err(ConfigError::DraftLimitsUnsorted) }
    }

    /// How many drafts a request is worth that had `drafts`, of which `accepted` were accepted: two more
    /// after a clean run, one less after any other, as in assisted generation of transformers. At least
    /// one, so that it can recover.
    pub(crate) fn reach(&self, reach: u32, drafts: u32, accepted: u32) -> u32 {
        if !self.adaptive || drafts == 0 {
            reach
        } else if accepted == drafts {
            (reach + 2).min(self.tokens_max)
        } else {
            (reach.saturating_sub(1)).max(1)
        }
    }
}

//! How a layer attends.

use std::fmt;

use crate::{Heads, Ops};

/// What every layer says of its attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads, kv heads, head size.
    pub heads: Heads,
    /// Factor on the scores, usually `1 / sqrt(dim)`.
    pub scale: f32,
    /// Positions that a query sees, its own included (Mistral's sliding window), at least 1; `None` sees all before
    /// it.
    pub window: Option<u32>,
}

/// What else shapes the scores, in this order: `scale`, then `softcap`, then `slopes`, then what is not seen. By
/// default, nothing: causal attention.
pub struct Scores<'a, O: Ops + ?Sized> {
    /// A query sees nothing after itself.
    pub causal: bool,
    /// Scores become `softcap · tanh(score / softcap)` (Gemma 2, arXiv 2408.00118).
    pub softcap: Option<f32>,
    /// ALiBi (arXiv 2108.12409): `slope · (key position - query position)` is added; one per query head.
    pub slopes: Option<&'a O::Floats>,
    /// A score per query head that weighs nothing: it is in the denominator alone, and in the LSE (gpt-oss).
    pub sinks: Option<&'a O::Floats>,
    /// Replaces `causal` ([`Ops::tree_mask`]).
    pub mask: Option<&'a O::TreeMask>,
}

impl<O: Ops + ?Sized> Default for Scores<'_, O> {
    fn default() -> Self {
        Self { causal: true, softcap: None, slopes: None, sinks: None, mask: None }
    }
}

impl<O: Ops + ?Sized> Clone for Scores<'_, O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O: Ops + ?Sized> Copy for Scores<'_, O> {}

impl<O: Ops + ?Sized> fmt::Debug for Scores<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scores")
            .field("causal", &self.causal)
            .field("softcap", &self.softcap)
            .field("slopes", &self.slopes.is_some())
            .field("sinks", &self.sinks.is_some())
            .field("mask", &self.mask.is_some())
            .finish()
    }
}

//! Every token attends to all before it.

use std::ops::Range;

use super::{Holds, Kind, Progress};
use crate::TokenIndex;

/// Full causal attention: multi-head, grouped-query, or over latents (MLA), whose smaller pages hold more tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Full;

impl Kind for Full {
    fn holds(&self) -> Holds {
        Holds::EveryToken
    }

    fn skipped(&self, _: Progress) -> Range<TokenIndex> {
        TokenIndex(0)..TokenIndex(0)
    }
}

//! A state takes the place of all tokens before it.

use std::ops::Range;

use super::{Holds, Kind, Progress, capped};
use crate::{BlockCount, BlockSize, TokenCount, TokenIndex};

/// A recurrent layer (Mamba, linear attention): its block holds the state after the last token computed. Steps that
/// end at the end of a block leave a state behind that others can begin from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recurrent;

impl Kind for Recurrent {
    fn holds(&self) -> Holds {
        Holds::State
    }

    fn skipped(&self, progress: Progress) -> Range<TokenIndex> {
        TokenIndex(0)..TokenIndex(progress.computed.get().saturating_sub(1))
    }

    /// The state that a step begins from, and the one that it leaves.
    fn blocks_max(&self, tokens: TokenCount, _: TokenCount, size: BlockSize) -> BlockCount {
        capped(tokens, 2, size)
    }
}

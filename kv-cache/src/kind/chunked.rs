//! A token attends to those before it in its own chunk.

use std::ops::Range;

use super::{Holds, Kind, Progress, capped};
use crate::{BlockCount, BlockSize, Error, TokenCount, TokenIndex};

/// Chunked local attention (Llama 4): the sequence is cut into chunks of a fixed length, and no token sees past the
/// beginning of its chunk.
#[derive(Clone, Copy, Debug)]
pub struct ChunkedLocal {
    chunk: TokenCount,
}

impl ChunkedLocal {
    /// Chunks of `chunk` tokens.
    ///
    /// # Errors
    /// [`Error::EmptyWindow`] when it is zero.
    pub const fn new(chunk: TokenCount) -> Result<ChunkedLocal, Error> {
        if chunk.get() == 0 { Err(Error::EmptyWindow) } else { Ok(ChunkedLocal { chunk }) }
    }
}

impl Kind for ChunkedLocal {
    fn holds(&self) -> Holds {
        Holds::NeededTokens
    }

    fn skipped(&self, progress: Progress) -> Range<TokenIndex> {
        let into_chunk = progress.computed.get() % self.chunk.get();
        TokenIndex(0)..TokenIndex(progress.computed.get() - into_chunk)
    }

    fn blocks_max(&self, tokens: TokenCount, step: TokenCount, size: BlockSize) -> BlockCount {
        let held = (u64::from(self.chunk.get()) + u64::from(step.get())).div_ceil(size.get().into());
        capped(tokens, held, size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_before_the_chunk_is_skipped() {
        let local = ChunkedLocal::new(TokenCount(4)).unwrap();
        let skipped = |computed| {
            local.skipped(Progress { computed: TokenCount(computed), prompt: TokenCount(0) }).end.0
        };
        assert_eq!([0, 3, 4, 6, 12].map(skipped), [0, 0, 4, 4, 12]);
        assert_eq!(ChunkedLocal::new(TokenCount(0)).unwrap_err(), Error::EmptyWindow);
    }
}

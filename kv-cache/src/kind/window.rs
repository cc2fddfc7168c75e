//! A token attends to the last few before it.

use std::ops::Range;

use super::{Holds, Kind, Progress, capped};
use crate::{BlockCount, BlockSize, Error, TokenCount, TokenIndex};

/// Sliding-window attention: a token attends to itself and the `window - 1` before it, and to what else is kept.
#[derive(Clone, Copy, Debug)]
pub struct SlidingWindow {
    window: TokenCount,
    keeps: Keeps,
}

/// What is attended to however long ago it was.
#[derive(Clone, Copy, Debug)]
enum Keeps {
    First(TokenCount),
    Prompt,
}

impl SlidingWindow {
    /// A window of `window` tokens.
    ///
    /// # Errors
    /// [`Error::EmptyWindow`] when it is zero.
    pub const fn new(window: TokenCount) -> Result<SlidingWindow, Error> {
        if window.get() == 0 {
            return Err(Error::EmptyWindow);
        }
        Ok(SlidingWindow { window, keeps: Keeps::First(TokenCount(0)) })
    }

    /// The first `sinks` tokens are attended to for ever
    /// ([arXiv 2309.17453](https://arxiv.org/abs/2309.17453), section 3.2).
    #[must_use]
    pub const fn with_sinks(self, sinks: TokenCount) -> SlidingWindow {
        SlidingWindow { keeps: Keeps::First(sinks), ..self }
    }

    /// The tokens that the sequence was opened with are attended to for ever. Of a sequence that was opened with none
    /// nobody knows where its prompt ends, and nothing is skipped.
    #[must_use]
    pub const fn with_prompt(self) -> SlidingWindow {
        SlidingWindow { keeps: Keeps::Prompt, ..self }
    }
}

impl Kind for SlidingWindow {
    fn holds(&self) -> Holds {
        Holds::NeededTokens
    }

    fn skipped(&self, progress: Progress) -> Range<TokenIndex> {
        let kept = match self.keeps {
            Keeps::First(sinks) => sinks.get(),
            Keeps::Prompt if progress.prompt == TokenCount(0) => progress.computed.get(),
            Keeps::Prompt => progress.prompt.get(),
        };
        let window = progress.computed.get().saturating_sub(self.window.get() - 1);
        TokenIndex(kept)..TokenIndex(window.max(kept))
    }

    fn blocks_max(&self, tokens: TokenCount, step: TokenCount, size: BlockSize) -> BlockCount {
        let Keeps::First(sinks) = self.keeps else { return size.blocks_for(tokens) };
        let moving = u64::from(self.window.get()) - 1 + u64::from(step.get());
        let held = moving.div_ceil(size.get().into()) + 1 + u64::from(size.blocks_for(sinks).get());
        capped(tokens, held, size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(kind: SlidingWindow, computed: u32, prompt: u32) -> Range<u32> {
        let progress = Progress { computed: TokenCount(computed), prompt: TokenCount(prompt) };
        let range = kind.skipped(progress);
        range.start.0..range.end.0
    }

    #[test]
    fn the_window_of_the_next_token_stays() {
        let window = SlidingWindow::new(TokenCount(4)).unwrap();
        assert_eq!([3, 4, 5, 11].map(|computed| skipped(window, computed, 0)), [0..0, 0..1, 0..2, 0..8]);
        let sinks = window.with_sinks(TokenCount(2));
        assert_eq!([4, 5, 6, 11].map(|computed| skipped(sinks, computed, 0)), [2..2, 2..2, 2..3, 2..8]);
        let prompt = window.with_prompt();
        assert_eq!([9, 20].map(|computed| skipped(prompt, computed, 8)), [8..8, 8..17]);
        assert!(skipped(prompt, 20, 0).is_empty(), "no prompt is known");
    }

    #[test]
    fn a_window_holds_no_more_than_itself_a_step_and_a_block() {
        let window = SlidingWindow::new(TokenCount(128)).unwrap();
        let size = BlockSize::new(16).unwrap();
        let cap = |tokens, step| window.blocks_max(TokenCount(tokens), TokenCount(step), size).get();
        assert_eq!(cap(100_000, 512), (127_u32 + 512).div_ceil(16) + 1);
        assert_eq!(cap(100, 512), 7);
        assert_eq!(cap(u32::MAX, u32::MAX), u32::MAX.div_ceil(16));
    }

    #[test]
    fn a_window_of_no_tokens_is_refused() {
        assert_eq!(SlidingWindow::new(TokenCount(0)).unwrap_err(), Error::EmptyWindow);
    }
}

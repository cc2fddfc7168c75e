//! What a kind of attention needs of its blocks.
//!
//! The whole cache follows from one question: once so many tokens are computed, which tokens will nobody attend to
//! any more? Their blocks are given back, and a cached prefix is usable when all the others are cached.
//!
//! | kind | tokens skipped once `n` are computed |
//! |---|---|
//! | [`Full`] (and multi-head latent attention) | none |
//! | [`SlidingWindow`] of w tokens | all before n - w + 1, but for the sinks or the prompt |
//! | [`ChunkedLocal`] of c tokens | all before the chunk that n is in |
//! | [`Recurrent`] | all: the state after token n is all there is |
//! | [`Cross`] | does not grow with the tokens |

mod chunked;
mod cross;
mod full;
mod recurrent;
mod window;

use std::fmt::Debug;
use std::ops::Range;

pub use chunked::ChunkedLocal;
pub use cross::Cross;
pub use full::Full;
pub use recurrent::Recurrent;
pub use window::SlidingWindow;

use crate::{BlockCount, BlockSize, TokenCount, TokenIndex};

/// A kind of attention, or of what stands in its place. The crate ships the usual ones; others are yours to add.
///
/// # Example
/// Attention that only ever looks at the first four tokens and at the last:
/// ```
/// use std::ops::Range;
/// use quayline_kv_cache::kind::{Holds, Kind, Progress};
/// use quayline_kv_cache::TokenIndex;
///
/// #[derive(Debug)]
/// struct SinkOnly;
///
/// impl Kind for SinkOnly {
///     fn holds(&self) -> Holds {
///         Holds::NeededTokens
///     }
///     fn skipped(&self, progress: Progress) -> Range<TokenIndex> {
///         TokenIndex(4)..TokenIndex(progress.computed.get().max(4))
///     }
/// }
/// ```
pub trait Kind: Debug + Send + Sync {
    /// What is in its blocks.
    fn holds(&self) -> Holds;

    /// The tokens that no token from `progress.computed` on attends to. With more computed tokens the range may grow
    /// and must not shrink. Asked of [`Holds::NeededTokens`] only.
    fn skipped(&self, progress: Progress) -> Range<TokenIndex>;

    /// The most blocks that a sequence of `tokens` tokens holds at once, when no step computes more than `step`
    /// tokens and what is skipped is given back before each. By default room for all tokens.
    fn blocks_max(&self, tokens: TokenCount, step: TokenCount, size: BlockSize) -> BlockCount {
        let _ = step;
        size.blocks_for(tokens)
    }
}

/// What the blocks of a group hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// K and V of every token, for as long as the sequence lives.
    EveryToken,
    /// K and V of the tokens that later ones attend to. Blocks that hold only others are given back.
    NeededTokens,
    /// The state after the last token of the step that wrote the block. A sequence has one that goes on; a cached
    /// one stands for the whole prefix before it.
    State,
    /// K and V of an encoder's output. They come with the first claim, do not grow and are not shared.
    Encoder,
}

/// How far a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tokens whose K and V are there.
    pub computed: TokenCount,
    /// Tokens that it was opened with.
    pub prompt: TokenCount,
}

/// The rounding of a cap: no more than what all `tokens` need.
fn capped(tokens: TokenCount, held: u64, size: BlockSize) -> BlockCount {
    let blocks = held.min(u64::from(size.blocks_for(tokens).get()));
    BlockCount(u32::try_from(blocks).expect("no more than the blocks for all tokens"))
}

//! What batching asks about room, in its own words.

use crate::id::RequestId;

/// The place where keys and values live: a paged cache, a slab, a simulation. Whoever implements it knows
/// the tokens of each request; batching only counts them.
///
/// A request holds room from the first [`Room::Granted`] until [`release`](Memory::release). Between the
/// two its room only grows. No method may be called back into the batcher.
pub trait Memory {
    /// How many tokens of a request that holds no room are already here, from its first token on, because
    /// another request (or its own earlier life) left them. Fewer than its known tokens: the last one must
    /// be computed, since its output is what is wanted. Changes nothing. Followed by
    /// [`allocate`](Memory::allocate) for the same request, or by nothing.
    fn cached_tokens(&mut self, id: RequestId) -> u32;

    /// Makes room as `need` says, or changes nothing.
    fn allocate(&mut self, id: RequestId, need: Need) -> Room;

    /// The room that [`allocate`](Memory::allocate) made for this request in this step will not be filled:
    /// the request yields its place in the step to another. Followed by [`release`](Memory::release).
    ///
    /// A memory that lets others find tokens as soon as it makes room for them (only those up to
    /// [`Need::held_tokens`]) must take that back here.
    fn withdraw(&mut self, id: RequestId);

    /// Takes back everything the request holds. Its tokens may stay to be found by others, and by itself.
    fn release(&mut self, id: RequestId);
}

/// Room for one request in one step.
///
/// ```text
///   | computed_tokens | new_tokens |            |
///   |<---------- held from now on >|            |
///   |<----------- whole_tokens, must fit now -->|   and watermark_tokens more must stay free
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Tokens that are there: computed before, or cached as [`Memory::cached_tokens`] just said.
    pub computed_tokens: u32,
    /// Tokens that this step will compute; at least one.
    pub new_tokens: u32,
    /// On admission with the whole-sequence check: all known tokens. The answer is [`Room::Granted`] only
    /// if all of them would fit, though room is taken for `computed_tokens + new_tokens`.
    pub whole_tokens: Option<u32>,
    /// Room that must stay free beyond it. Zero for a request that runs, and for the first that is
    /// admitted.
    pub watermark_tokens: u32,
}

impl Need {
    /// Tokens for which room must be held after the grant.
    pub fn held_tokens(&self) -> u32 {
        self.computed_tokens + self.new_tokens
    }
}

/// The answer to a [`Need`]. The numbers are in the memory's own unit (blocks, usually): batching only
/// repeats them in its reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// There is room, and it is taken.
    Granted {
        /// The request's first so many tokens have room now; at least [`Need::held_tokens`]. Batching does
        /// not ask again before it needs more: a cache of 16-token blocks that says where its last block
        /// ends is asked once in 16 steps. A memory that wants to be asked every step says `held_tokens()`.
        covered_tokens: u32,
    },
    /// Not now. Nothing was taken.
    Short {
        /// What would have to be free.
        need: u32,
        /// What is free.
        free: u32,
    },
    /// Not ever: it would not fit if everything were free. The request ends.
    Never {
        /// What would have to be there.
        need: u32,
        /// What there is.
        total: u32,
    },
}

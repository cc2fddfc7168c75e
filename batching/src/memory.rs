//! What batching asks about room, in its own words.

use crate::id::RequestId;

/// The place where keys and values live: a paged cache, a slab, a simulation. Whoever implements it knows
/// the tokens of each request; batching only counts them.
///
/// A request holds room from the first [`Room::Granted`] until [`release`](Memory::release) or
/// [`swap_out`](Memory::swap_out). Between the two its room only grows. No method may be called back into
/// the batcher.
///
/// The first four methods are what every memory has. The others have defaults that say no: a memory without
/// tiers, forks or peers leaves them out.
pub trait Memory {
    /// How many tokens of a request that holds no room are already here, from its first token on, because
    /// another request (or its own earlier life) left them. Fewer than its known tokens: the last one must
    /// be computed, since its output is what is wanted. Changes nothing. Followed by
    /// [`allocate`](Memory::allocate) for the same request, or by nothing.
    fn cached_tokens(&mut self, id: RequestId) -> u32;

    /// Makes room as `need` says, or changes nothing.
    fn allocate(&mut self, id: RequestId, need: Need) -> Room;

    /// The room that [`allocate`](Memory::allocate) made for this request in this step will not be filled:
    /// the request yields its place in the step to another. Followed by [`release`](Memory::release) or
    /// [`swap_out`](Memory::swap_out).
    ///
    /// A memory that lets others find tokens as soon as it makes room for them (only those up to
    /// [`Need::findable_tokens`]) must take that back here.
    fn withdraw(&mut self, id: RequestId);

    /// Takes back everything the request holds, here and in other tiers. Its tokens may stay to be found by
    /// others, and by itself.
    fn release(&mut self, id: RequestId);

    /// What room for `tokens` tokens takes, in tokens: a memory of blocks rounds up.
    fn rounded_tokens(&self, tokens: u32) -> u32 {
        tokens
    }

    /// Where a chunk that begins at token `start` and would end before token `end` should end instead, so
    /// that what follows can be shared (a state-space model saves its state only at such places). Between
    /// `start` and `end`; `end` when it does not matter.
    fn chunk_end(&mut self, id: RequestId, start: u32, end: u32) -> u32 {
        let _ = (id, start);
        end
    }

    /// Moves the first `tokens` tokens of a request to a slower tier, and takes the room here back. The
    /// bytes are copied before the step computes anything: [`Preempted`](crate::Preempted) says whose.
    ///
    /// Returns how many are kept, from the first on: all, or those in full blocks if only these can be moved. 0,
    /// and nothing changes, if there is no such tier or no room in it.
    fn swap_out(&mut self, id: RequestId, tokens: u32) -> u32 {
        let _ = (id, tokens);
        0
    }

    /// Makes room as `need` says for a request that was swapped out, whose first
    /// [`computed_tokens`](Need::computed_tokens) come back from the slower tier before the step computes;
    /// or changes nothing.
    fn swap_in(&mut self, id: RequestId, need: Need) -> Room {
        let _ = need;
        unreachable!("request {id} was never swapped out")
    }

    /// Lets `child`, which holds no room, share the first `tokens` tokens of `parent`. False, and nothing
    /// changes, if the memory does not share like this.
    ///
    /// What one writes behind them must not be seen by the other: both ask [`allocate`](Memory::allocate)
    /// before they write again, and the first that would write into a shared block gets a copy of its own
    /// (copy on write).
    fn fork(&mut self, parent: RequestId, child: RequestId, tokens: u32) -> bool {
        let _ = (parent, child, tokens);
        false
    }

    /// What another machine, or whatever the memory reads from at leisure (a disk), has of a request, behind the
    /// `cached_tokens` that are here. Changes nothing.
    fn remote_tokens(&mut self, id: RequestId, cached_tokens: u32) -> Remote {
        let _ = (id, cached_tokens);
        Remote::Nothing
    }

    /// The first `tokens` tokens of a request have arrived from another machine, and may be found by others
    /// from now on.
    fn publish(&mut self, id: RequestId, tokens: u32) {
        let _ = (id, tokens);
    }

    /// Only the first `tokens` tokens of a request are worth anything: what is behind was not loaded, or
    /// was a draft that the model rejected. The room may stay with the request.
    fn truncate(&mut self, id: RequestId, tokens: u32) {
        let _ = (id, tokens);
    }
}

/// Room for one request in one step.
///
/// ```text
///   | computed | external | new | lookahead |         |
///   |<------ held_tokens, from now on ----->|         |
///   |<-- findable by others ---->|                    |
///   |<------------ whole_tokens, must fit now ------->|   and watermark + reserved must stay free
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Need {
    /// Tokens that are there: computed before, or cached as [`Memory::cached_tokens`] just said.
    pub computed_tokens: u32,
    /// Tokens behind them that come from another machine, as [`Memory::remote_tokens`] just said. Nobody
    /// may find them before they have come ([`Memory::publish`]), except that those of [`Remote::Now`] come
    /// in this very step.
    pub external_tokens: u32,
    /// Known tokens that this step will compute.
    pub new_tokens: u32,
    /// Slots behind them for tokens that may turn out to be others: drafts, and the output of a step that
    /// is still in flight. They must never be found by others.
    pub lookahead_tokens: u32,
    /// Tokens, of the computed ones, whose steps have been applied. What has fallen out of a sliding window
    /// behind them can be given away; what is in flight may still be read.
    pub settled_tokens: u32,
    /// On admission with the whole-sequence check: all known tokens. The answer is [`Room::Granted`] only
    /// if all of them would fit, though less room is taken.
    pub whole_tokens: Option<u32>,
    /// Room that must stay free beyond it. Zero for a request that runs, and for the first that is
    /// admitted.
    pub watermark_tokens: u32,
    /// Room that must stay free because others were promised it: what those still need whose tokens are on
    /// the way. Already [rounded](Memory::rounded_tokens).
    pub reserved_tokens: u32,
}

impl Need {
    /// Tokens for which room must be held after the grant.
    pub fn held_tokens(&self) -> u32 {
        self.findable_tokens() + self.lookahead_tokens
    }

    /// Tokens that others may find, of those that are held after the grant.
    pub fn findable_tokens(&self) -> u32 {
        self.computed_tokens + self.external_tokens + self.new_tokens
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

/// What another machine has of a request, or a disk that takes its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remote {
    /// Nothing beyond what is here.
    Nothing,
    /// It does not know yet. The request keeps its place, and is asked about again in the next step.
    Unknown,
    /// So many tokens more, which come within the step that admits the request.
    Now {
        /// How many.
        tokens: u32,
    },
    /// So many tokens more, which take a while. The request gets room for them, waits, and
    /// [`Batcher::loaded`](crate::Batcher::loaded) lets it run.
    Later {
        /// How many.
        tokens: u32,
    },
}

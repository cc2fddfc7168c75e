//! Where the batcher meets the cache: what batching asks about room, answered by the paged cache. The only
//! file that knows both.

use quayline_batching::{Memory, Need, RequestId, Room};
use quayline_kv_cache::{Admission, BlockCount, Claim, KvCache, SequenceId, TokenCount};

/// A [`KvCache`] as the batcher sees it. A request's sequence bears the request's number.
#[derive(Debug)]
pub(crate) struct PagedMemory {
    pub(crate) cache: KvCache,
}

/// The cache's name for a request's sequence.
pub(crate) fn sequence(id: RequestId) -> SequenceId {
    SequenceId(id.0)
}

/// Every request is opened in the cache when it is added and closed when it ends.
pub(crate) const OPEN: &str = "a request that the batcher knows is open in the cache";

impl Memory for PagedMemory {
    fn cached_tokens(&mut self, id: RequestId) -> u32 {
        self.cache.lookup(sequence(id)).expect("the batcher asks before the request holds room").tokens.get()
    }

    fn allocate(&mut self, id: RequestId, need: Need) -> Room {
        let blocks_for = |tokens| self.cache.config().block_size.blocks_for(TokenCount(tokens));
        let watermark = blocks_for(need.watermark_tokens).get() + blocks_for(need.reserved_tokens).get();
        let claim = Claim {
            computed: TokenCount(need.computed_tokens),
            // There are no drafts. What is looked ahead to is an output on its way, which the trace foretells.
            new_tokens: TokenCount(need.new_tokens + need.lookahead_tokens),
            external: TokenCount(need.external_tokens),
            lookahead: TokenCount(0),
            whole_sequence: need.whole_tokens.is_some(),
            watermark: BlockCount(watermark),
        };
        match self.cache.reserve(sequence(id), claim).expect("the batcher counts as the cache does") {
            Admission::Admit(reservation) => {
                Room::Granted { covered_tokens: reservation.commit().covered.get() }
            }
            Admission::Wait { need, watermark, reserved, free } => {
                Room::Short { need: need.get() + watermark.get() + reserved.get(), free: free.get() }
            }
            Admission::Never { need, blocks } => Room::Never { need: need.get(), total: blocks.get() },
            Admission::OverLimit(_) | Admission::NextStep => {
                unreachable!("the simulated cache has no quotas, and its model no recurrent state")
            }
        }
    }

    fn rounded_tokens(&self, tokens: u32) -> u32 {
        tokens.next_multiple_of(self.cache.config().block_size.get())
    }

    fn withdraw(&mut self, id: RequestId) {
        self.cache.withdraw(sequence(id)).expect(OPEN);
    }

    fn release(&mut self, id: RequestId) {
        self.cache.release(sequence(id)).expect(OPEN);
    }
}

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
const OPEN: &str = "a request that the batcher knows is open in the cache";

/// Every layer of this engine keeps every token.
const GOES_BACK: &str = "a fork can go back to any of its tokens";

impl Memory for PagedMemory {
    fn cached_tokens(&mut self, id: RequestId) -> u32 {
        self.cache.lookup(sequence(id)).expect("the batcher asks before the request holds room").tokens.get()
    }

    fn allocate(&mut self, id: RequestId, need: Need) -> Room {
        let blocks_for = |tokens| self.cache.config().block_size.blocks_for(TokenCount(tokens));
        let watermark = blocks_for(need.watermark_tokens).get() + blocks_for(need.reserved_tokens).get();
        let claim = Claim {
            computed: TokenCount(need.computed_tokens),
            new_tokens: TokenCount(need.new_tokens),
            external: TokenCount(need.external_tokens),
            lookahead: TokenCount(need.lookahead_tokens),
            whole_sequence: need.whole_tokens.is_some(),
            watermark: BlockCount(watermark),
        };
        match self.cache.reserve(sequence(id), claim).expect("the batcher counts as the cache does") {
            Admission::Admit(reservation) => {
                // The cache wants to hear of a block that fills up; what it has room for may reach further.
                let covered = reservation.commit().covered.get();
                Room::Granted { covered_tokens: covered.max(need.held_tokens()) }
            }
            Admission::Wait { need, watermark, reserved, free } => {
                Room::Short { need: need.get() + watermark.get() + reserved.get(), free: free.get() }
            }
            Admission::OverLimit(_) => unreachable!("this engine sets no quotas"),
            Admission::NextStep => unreachable!("no model of this engine keeps a state"),
            Admission::Never { need, blocks } => Room::Never { need: need.get(), total: blocks.get() },
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

    fn fork(&mut self, parent: RequestId, child: RequestId, tokens: u32) -> bool {
        let (parent, child) = (sequence(parent), sequence(child));
        // A sample is open, and knows its prompt, of which the parent may know more by now. A beam is not.
        let own = self.cache.known(child).ok();
        if own.is_some() {
            self.cache.close(child).expect(OPEN);
        }
        self.cache.fork(parent, child).expect(OPEN);
        if let Some(prompt) = own {
            self.cache.truncate(child, prompt).expect(GOES_BACK);
        }
        self.cache.trim(child, TokenCount(tokens)).expect(GOES_BACK);
        true
    }
}

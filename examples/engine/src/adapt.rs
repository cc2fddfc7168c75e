//! Where the batcher meets the cache: what batching asks about room, answered by the paged cache. The only
//! file that knows both.

use std::collections::BTreeSet;

use quayline_batching::{Memory, Need, Remote, RequestId, Room};
use quayline_kv_cache::hash::{AnyHash, AnyHasher};
use quayline_kv_cache::{
    Admission, BlockCount, Claim, Event, KvCache, SequenceId, Snapshot, Tick, TokenCount,
};

use crate::handover::Elsewhere;
use crate::host_tier::HostTier;

/// The cache, whose blocks are named as [`Options::hash`](crate::Options::hash) says.
pub(crate) type Cache = KvCache<AnyHasher>;

/// A [`Cache`], and the host memory behind it if there is some, as the batcher sees them. A request's sequence bears
/// the request's number.
#[derive(Debug)]
pub(crate) struct PagedMemory {
    pub(crate) cache: Cache,
    pub(crate) host: Option<HostTier>,
    pub(crate) elsewhere: Elsewhere,
    /// Sequences whose requests have ended, but whose blocks a step that was planned ahead still writes.
    pub(crate) closing: BTreeSet<SequenceId>,
}

impl PagedMemory {
    /// Forgets a sequence; one that holds room, as soon as the batcher gives it back.
    ///
    /// # Panics
    /// When it is not open: a bug of ours.
    pub(crate) fn close(&mut self, sequence: SequenceId) {
        if !self.cache.table(sequence).expect(OPEN).blocks().is_empty() {
            self.closing.insert(sequence);
            return;
        }
        self.elsewhere.wanted.remove(&sequence);
        match &mut self.host {
            Some(host) => host.close(&mut self.cache, sequence),
            None => self.cache.close(sequence).expect(OPEN),
        }
    }

    /// A step has computed the keys and values of a request's tokens before `end`, and what it chose is known.
    pub(crate) fn computed(&mut self, id: RequestId, end: u32) {
        if let Some(host) = &mut self.host {
            // A beam may have been given up.
            let Ok(known) = self.cache.known(sequence(id)) else { return };
            // What was drafted and rejected is not known any more; the last known token was not computed.
            let end = end.min(known.get().saturating_sub(1));
            host.computed(&mut self.cache, sequence(id), TokenCount(end));
        }
    }

    /// Forgets all content; false, and nothing changes, while somebody needs it.
    pub(crate) fn reset(&mut self) -> bool {
        match &mut self.host {
            Some(host) => host.reset(&mut self.cache),
            None => self.cache.reset(),
        }
    }

    /// What the caller's clock says.
    pub(crate) fn set_now(&mut self, now: Tick) {
        self.cache.set_now(now);
        if let Some(host) = &mut self.host {
            host.set_now(now);
        }
    }

    /// Shows what has changed of what can be found, here and in the host's memory.
    pub(crate) fn drain_events(&mut self, hear: impl FnMut(u64, Event<'_, AnyHash>)) {
        match &mut self.host {
            Some(host) => host.drain_events(&mut self.cache, hear),
            None => self.cache.drain_events(hear),
        }
    }

    /// Everything that can be found, if the cache tells.
    pub(crate) fn event_snapshot(&mut self) -> Option<Snapshot<AnyHash>> {
        match &mut self.host {
            Some(host) => host.event_snapshot(&mut self.cache),
            None => self.cache.snapshot(),
        }
    }

    fn claim(&mut self, id: RequestId, claim: Claim) -> Room {
        let Self { cache, host, elsewhere, .. } = self;
        match cache.reserve(sequence(id), claim).expect("the batcher counts as the cache does") {
            Admission::Admit(reservation) => {
                // The cache wants to hear of a block that fills up; what it has room for may reach further.
                let held = claim.computed_after().plus(claim.lookahead);
                let covered_tokens = reservation.commit().covered.max(held).get();
                let arrives = elsewhere.begin(sequence(id), claim.computed, claim.external);
                if let Some(host) = host {
                    let loads = if arrives { TokenCount(0) } else { claim.external };
                    host.granted(cache, sequence(id), loads);
                }
                Room::Granted { covered_tokens }
            }
            Admission::Wait { need, watermark, reserved, free } => {
                Room::Short { need: need.get() + watermark.get() + reserved.get(), free: free.get() }
            }
            Admission::OverLimit(_) => unreachable!("this engine sets no quotas"),
            Admission::NextStep => unreachable!("no model of this engine keeps a state"),
            Admission::Never { need, blocks } => Room::Never { need: need.get(), total: blocks.get() },
        }
    }

    fn claim_of(&self, need: Need) -> Claim {
        let blocks_for = |tokens| self.cache.config().block_size.blocks_for(TokenCount(tokens));
        let watermark = blocks_for(need.watermark_tokens).get() + blocks_for(need.reserved_tokens).get();
        // A step that is planned ahead may compute nothing but a token that is not known yet.
        let nothing_known = need.new_tokens == 0 && need.external_tokens == 0;
        let (new_tokens, lookahead) = match nothing_known {
            true => (need.lookahead_tokens, 0),
            false => (need.new_tokens, need.lookahead_tokens),
        };
        Claim {
            computed: TokenCount(need.computed_tokens),
            new_tokens: TokenCount(new_tokens),
            external: TokenCount(need.external_tokens),
            lookahead: TokenCount(lookahead),
            whole_sequence: need.whole_tokens.is_some(),
            watermark: BlockCount(watermark),
        }
    }
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
        self.claim(id, self.claim_of(need))
    }

    fn rounded_tokens(&self, tokens: u32) -> u32 {
        tokens.next_multiple_of(self.cache.config().block_size.get())
    }

    fn withdraw(&mut self, id: RequestId) {
        self.cache.withdraw(sequence(id)).expect(OPEN);
    }

    fn release(&mut self, id: RequestId) {
        let sequence = sequence(id);
        match &mut self.host {
            Some(host) => host.release(&mut self.cache, sequence),
            None => self.cache.release(sequence).expect(OPEN),
        }
        if self.closing.remove(&sequence) || self.elsewhere.handing_over.remove(&sequence).is_some() {
            self.close(sequence);
        }
    }

    fn remote_tokens(&mut self, id: RequestId, cached_tokens: u32) -> Remote {
        if let Some(&tokens) = self.elsewhere.wanted.get(&sequence(id)) {
            return Remote::Later { tokens: tokens.saturating_sub(cached_tokens) };
        }
        match &mut self.host {
            Some(host) => match host.loadable(&mut self.cache, sequence(id)) {
                Some(tokens) => Remote::Now { tokens },
                None => Remote::Unknown,
            },
            None => Remote::Nothing,
        }
    }

    fn publish(&mut self, id: RequestId, tokens: u32) {
        self.elsewhere.arrived(&mut self.cache, sequence(id), tokens);
    }

    fn truncate(&mut self, id: RequestId, tokens: u32) {
        // Rejected drafts were never published: nothing is to be done about them.
        self.elsewhere.cut(&mut self.cache, sequence(id), tokens);
    }

    fn swap_out(&mut self, id: RequestId, tokens: u32) -> u32 {
        match &mut self.host {
            Some(host) => host.swap_out(&mut self.cache, sequence(id), TokenCount(tokens)).get(),
            None => 0,
        }
    }

    fn swap_in(&mut self, id: RequestId, need: Need) -> Room {
        // What the device still has need not come back.
        let kept = need.computed_tokens;
        let here = self.cached_tokens(id).min(kept);
        let claim = self.claim_of(Need { computed_tokens: here, external_tokens: kept - here, ..need });
        self.claim(id, claim)
    }

    fn fork(&mut self, parent: RequestId, child: RequestId, tokens: u32) -> bool {
        let (parent, child) = (sequence(parent), sequence(child));
        // A sample is open, and knows its prompt, of which the parent may know more by now. A beam is not.
        let own = self.cache.known(child).ok();
        if own.is_some() {
            self.close(child);
        }
        self.cache.fork(parent, child).expect(OPEN);
        if let Some(prompt) = own {
            self.cache.truncate(child, prompt).expect(GOES_BACK);
        }
        self.cache.trim(child, TokenCount(tokens)).expect(GOES_BACK);
        true
    }
}

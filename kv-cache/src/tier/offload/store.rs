//! Stores: what was computed, what is about to be lost, and what a sequence leaves behind when it yields.

use std::collections::BTreeSet;

use super::external::Path;
use super::{NEAREST, Offload, OffloadError};
use crate::sequence::Loading;
use crate::tier::content::{BlockKey, Needed};
use crate::tier::{Lookup, Occasion, Outcome, Store, TierError};
use crate::{BlockHasher, BlockId, Digest, Eviction, KvCache, SequenceId, TokenCount};

impl<D: Digest> Offload<D> {
    /// The K and V of a sequence's first `tokens` tokens exist, in a step that has been computed: its full blocks are
    /// offered to the nearest tier, those it found in the cache as well, each once in its life. They are kept until
    /// the copies are made, even if the sequence ends.
    ///
    /// # Errors
    /// [`Error::NotOpen`](crate::Error::NotOpen).
    pub fn computed<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        sequence: SequenceId,
        tokens: TokenCount,
    ) -> Result<Store, OffloadError> {
        let view = cache.sequences.get(sequence)?;
        let to = cache.whole_blocks_in(tokens.min(view.known));
        let from = self.sequences.get(&sequence).map_or(TokenCount(0), |afar| afar.offered);
        if to <= from {
            return Ok(Store::Nothing);
        }
        let found = cache.findable(view, from, to);
        let items: Vec<_> = found.iter().map(|found| (found.key, found.leaving.block)).collect();
        let store = self.tiers.offer(Occasion::Use, &items)?;
        self.sequences.entry(sequence).or_default().offered = to;
        self.keep_sources(cache, store, &found);
        Ok(store)
    }

    /// Offers what the claims since the last call have pushed out of the cache, to a nearest tier that is written back:
    /// as much of it as there is room for, what was pushed out last first; what a sequence has claimed and not begun to
    /// [load](Offload::load) makes no room for it. The copies must be made before the step writes, and before a load
    /// does. Needs [`Config::report_lost`](crate::Config::report_lost).
    ///
    /// # Errors
    /// None, as long as all loads began here.
    pub fn rescue<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
    ) -> Result<Store, OffloadError> {
        let key = |digest, group| BlockKey { digest, group };
        let lost: Vec<_> =
            cache.drain_lost().map(|lost| (key(lost.digest, lost.group), lost.block)).collect();
        if lost.is_empty() {
            return Ok(Store::Nothing);
        }
        let claimed = self.claimed(cache);
        let claimed = if claimed.is_empty() { None } else { self.tiers.pin(&claimed).ok() };
        let store = self.offer_lost(&lost);
        if let Some(pin) = claimed {
            self.tiers.complete(pin, Outcome::All)?;
        }
        Ok(store?)
    }

    fn offer_lost(&mut self, lost: &[(BlockKey<D>, BlockId)]) -> Result<Store, TierError> {
        let store = self.tiers.offer(Occasion::Leaving, lost)?;
        let Store::NoRoom { free, evictable, .. } = store else { return Ok(store) };
        let room = (free.get() + evictable.get()) as usize;
        if room == 0 {
            return Ok(store);
        }
        self.tiers.offer(Occasion::Leaving, &lost[lost.len() - room.min(lost.len())..])
    }

    /// What sequences have room for, and have not begun to load; as far as it is there.
    fn claimed<H: BlockHasher<Digest = D>, E: Eviction>(&self, cache: &KvCache<H, E>) -> Vec<BlockKey<D>> {
        let mut claimed = Vec::new();
        for view in cache.sequences.iter() {
            let under_way = self.sequences.get(&view.id).is_some_and(|afar| afar.load.is_some());
            if let Some(Loading { from, to, .. }) = view.loading.filter(|_| !under_way) {
                let to = cache.whole_blocks_in(to).min(cache.named_to(view)).max(from);
                claimed.extend(self.keys(Path { cache, view, from, to }, to));
            }
        }
        claimed.retain(|key| matches!(self.tiers.find(key), Lookup::Hit(_) | Lookup::Pending(_)));
        claimed
    }

    /// Stores the full blocks of a sequence's first `tokens` tokens, wanted or not, and pins them until it loads them
    /// again or is closed. For a sequence that yields: [`release`](Offload::release) it next, and the blocks stay
    /// until they are copied. The tokens behind the last full block are computed again when it comes back.
    ///
    /// # Errors
    /// [`Error::NotOpen`](crate::Error::NotOpen).
    pub fn swap_out<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        sequence: SequenceId,
        tokens: TokenCount,
    ) -> Result<Store, OffloadError> {
        let view = cache.sequences.get(sequence)?;
        let found = cache.findable(view, TokenCount(0), cache.whole_blocks_in(tokens.min(view.known)));
        let items: Vec<_> = found.iter().map(|found| (found.key, found.leaving.block)).collect();
        let store = self.tiers.store(NEAREST, &items)?;
        if !matches!(store, Store::NoRoom { .. }) {
            self.keep_sources(cache, store, &found);
            self.unpin(sequence);
            let keys: Vec<_> = items.iter().map(|item| item.0).collect();
            self.pin_for(sequence, &keys);
        }
        Ok(store)
    }

    /// Keeps the sources of a store that has begun.
    fn keep_sources<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        store: Store,
        found: &[Needed<D>],
    ) {
        if let Store::Begun { job, .. } = store {
            let copied: BTreeSet<BlockKey<D>> = self
                .tiers
                .transfers(job)
                .iter()
                .flat_map(|copies| copies.iter())
                .map(|copy| copy.key)
                .collect();
            let sources: Vec<Needed<D>> =
                found.iter().filter(|found| copied.contains(&found.key)).copied().collect();
            sources.iter().for_each(|source| cache.blocks.prefix.remember(source.leaving.block));
            self.at_work(cache, job, &sources, None);
        }
    }
}

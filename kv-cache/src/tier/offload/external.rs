//! What a sequence finds in the tiers, and whether it waits for it.

use super::{NEAREST, Offload, OffloadError};
use crate::sequence::Sequence;
use crate::tier::content::{BlockKey, Needed};
use crate::tier::{JobId, Lookup, Store, Verdict};
use crate::{BlockCount, BlockHasher, Digest, Eviction, KvCache, Reuse, SequenceId, Tick, TokenCount};

/// What a sequence finds in the tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct External {
    /// What it does now.
    pub advice: Advice,
    /// A promotion that has begun with this call: its copies are to be made, whatever the sequence does.
    pub begun: Option<JobId>,
}

/// What a sequence does about content that is not in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Nothing is worth loading: it computes.
    Compute,
    /// It loads so many tokens behind its hit: claim them as [`external`](crate::Claim::external), then
    /// [`Offload::load`].
    Load(TokenCount),
    /// It waits: content is on its way to where it can be loaded from. Ask again when a job has ended, an answer has
    /// come, or the time is there.
    Wait {
        /// Tokens behind its hit that could be loaded already.
        loadable: TokenCount,
        /// Tokens that it waits for, those included.
        coming: TokenCount,
        /// When it stops waiting.
        until: Option<Tick>,
    },
}

/// The tokens of a sequence between its hit and the farthest that it could be loaded to.
#[derive(Debug)]
pub(super) struct Path<'a, H: BlockHasher, E: Eviction> {
    pub(super) cache: &'a KvCache<H, E>,
    pub(super) view: &'a Sequence<H::Digest>,
    pub(super) from: TokenCount,
    pub(super) to: TokenCount,
}

impl<H: BlockHasher, E: Eviction> Clone for Path<'_, H, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H: BlockHasher, E: Eviction> Copy for Path<'_, H, E> {}

impl<D: Digest> Offload<D> {
    /// What a sequence that holds no blocks finds in the tiers behind its hit in the cache. What a staged tier has is
    /// promoted; while it waits, what it waits for is pinned.
    ///
    /// # Errors
    /// As [`KvCache::lookup`].
    pub fn external<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        sequence: SequenceId,
        now: Tick,
    ) -> Result<External, OffloadError> {
        self.tell(cache);
        let from = cache.lookup(sequence)?.tokens;
        let view = cache.sequences.get(sequence)?;
        let to = cache.loadable_to(view);
        let reads = view.reuse == Reuse::ReadWrite && to > from && !cache.groups.share_nothing();
        let path = Path { cache, view, from, to };
        let asked = reads && self.ask(path);
        let begun = if reads { self.promote(path) } else { None };
        let (mut loadable, mut coming) = (from, from);
        if reads {
            loadable = self.extent(path, |found| self.is_readable(found));
            coming =
                self.extent(path, |found| self.is_readable(found) || matches!(found, Lookup::Pending(_)));
        }
        let size = cache.config.block_size;
        let behind = |end: TokenCount| TokenCount(end.get() - from.get());
        let blocks = |end: TokenCount| size.full_blocks(behind(end));
        let worth = |end: TokenCount| end > from && blocks(end) >= self.fetch.load_min;
        if asked || (coming > loadable && worth(coming)) {
            let wanted = BlockCount(blocks(coming).get() + u32::from(asked));
            let since = *self.sequences.entry(sequence).or_default().waits_since.get_or_insert(now);
            if let Verdict::Wait(until) = self.fetch.patience.judge(wanted, blocks(loadable), since, now) {
                self.pin_for(sequence, &self.keys(path, coming));
                let [loadable, coming] = [loadable, coming].map(behind);
                return Ok(External { advice: Advice::Wait { loadable, coming, until }, begun });
            }
        }
        if worth(loadable) {
            return Ok(External { advice: Advice::Load(behind(loadable)), begun });
        }
        self.unpin(sequence);
        Ok(External { advice: Advice::Compute, begun })
    }

    pub(super) fn is_readable(&self, found: Lookup) -> bool {
        matches!(found, Lookup::Hit(tier) if !self.tiers.level(tier).config.staged)
    }

    /// How far everything that is needed is as it should be.
    fn extent<H: BlockHasher<Digest = D>, E: Eviction>(
        &self,
        path: Path<'_, H, E>,
        is: impl Fn(Lookup) -> bool,
    ) -> TokenCount {
        let Path { cache, view, from, to } = path;
        let is_not = |needed: &Needed<D>| !is(self.tiers.find(&needed.key));
        let aligned = |tokens: TokenCount| cache.whole_blocks_in(tokens).max(from);
        let mut end = to;
        for (group, _) in cache.groups_that_hold_tokens().filter(|(_, keeps_all)| *keeps_all) {
            let hole = cache.needed(view, group, from, to).find(is_not);
            end = hole.map_or(end, |hole| end.min(hole.start));
        }
        end = aligned(TokenCount(end.get().saturating_sub(cache.groups.margin.get())));
        let others = || cache.groups_that_hold_tokens().filter(|(_, keeps_all)| !keeps_all);
        while end > from
            && others().any(|(group, _)| cache.needed(view, group, from, end).any(|n| is_not(&n)))
        {
            end = aligned(TokenCount(end.get() - 1));
        }
        end
    }

    /// The keys of all that is needed to go on from `end`.
    pub(super) fn keys<H: BlockHasher<Digest = D>, E: Eviction>(
        &self,
        path: Path<'_, H, E>,
        end: TokenCount,
    ) -> Vec<BlockKey<D>> {
        let Path { cache, view, from, .. } = path;
        let groups = cache.groups_that_hold_tokens();
        groups.flat_map(|(group, _)| cache.needed(view, group, from, end)).map(|needed| needed.key).collect()
    }

    /// Whether stores that others fill are being asked about something that is needed. Each sequence asks once: a store
    /// that cannot remember all its denials would be asked for ever.
    fn ask<H: BlockHasher<Digest = D>, E: Eviction>(&mut self, path: Path<'_, H, E>) -> bool {
        let Path { cache, view, from, to } = path;
        let before = std::mem::replace(&mut self.sequences.entry(view.id).or_default().asked, true);
        let mut asked = false;
        for (group, _) in cache.groups_that_hold_tokens() {
            let keys: Vec<BlockKey<D>> = cache.needed(view, group, from, to).map(|n| n.key).collect();
            if !before {
                self.tiers.reach(&keys);
            }
            let found = keys.iter().map(|key| self.tiers.find(key));
            let hole = found.into_iter().find(|found| !matches!(found, Lookup::Hit(_) | Lookup::Pending(_)));
            asked |= hole == Some(Lookup::Retry);
        }
        asked
    }

    /// Begins to promote what only staged tiers have, if that is worth it, can be done and was not tried before.
    fn promote<H: BlockHasher<Digest = D>, E: Eviction>(&mut self, path: Path<'_, H, E>) -> Option<JobId> {
        let end = self.extent(path, |found| matches!(found, Lookup::Hit(_)));
        let keys = self.keys(path, end);
        let found: Vec<(BlockKey<D>, Lookup)> = keys.iter().map(|key| (*key, self.tiers.find(key))).collect();
        let staged = found.iter().filter(|(_, found)| !self.is_readable(*found)).count();
        let tried = self.sequences.get(&path.view.id).is_some_and(|afar| afar.promoted);
        if tried || staged == 0 || staged < self.fetch.promote_min.get() as usize {
            return None;
        }
        self.sequences.entry(path.view.id).or_default().promoted = true;
        let near = |found: Lookup| !self.is_readable(found) || found == Lookup::Hit(NEAREST);
        let keys: Vec<BlockKey<D>> =
            found.iter().filter(|(_, found)| near(*found)).map(|(key, _)| *key).collect();
        match self.tiers.promote(NEAREST, &keys) {
            Ok(Store::Begun { job, .. }) => Some(job),
            _ => None,
        }
    }
}

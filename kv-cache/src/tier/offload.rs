//! A cache and its tiers together: what a sequence finds elsewhere, and what it leaves there.

use std::collections::{BTreeMap, BTreeSet};

use super::content::{BlockKey, Needed};
use super::{Ended, Fetch, JobId, Lookup, Occasion, Outcome, Store, TierError, TierId, Tiers, Verdict};
use crate::sequence::{Loading, Sequence};
use crate::{
    BlockCount, BlockHasher, BlockId, Digest, Error, Eviction, KvCache, Reuse, SequenceId, Tick, TokenCount,
};

/// Joins a [`KvCache`] with its [`Tiers`]: turns tokens of sequences into keys of blocks and back, and keeps the blocks
/// of the device that transfers are at work on.
///
/// | when | call |
/// |---|---|
/// | a sequence waits to be admitted | [`external`](Offload::external) says what it finds elsewhere, or that it waits |
/// | it was granted a claim with `external` tokens | [`load`](Offload::load) |
/// | a step was computed | [`computed`](Offload::computed), for each of its sequences |
/// | a step is about to write | [`rescue`](Offload::rescue), where the nearest tier is written back |
/// | a job ended | [`complete`](Offload::complete) |
/// | a sequence yields and will be back | [`swap_out`](Offload::swap_out), then [`release`](Offload::release) |
/// | a sequence yields or ends | [`release`](Offload::release), [`close`](Offload::close) instead of the cache's own |
#[derive(Clone, Debug)]
pub struct Offload<D> {
    pub(super) tiers: Tiers<BlockKey<D>>,
    fetch: Fetch,
    sequences: BTreeMap<SequenceId, Afar>,
    jobs: BTreeMap<JobId, AtWork>,
}

/// What is under way for a sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Afar {
    /// Since when it waits for content that is on its way.
    waits_since: Option<Tick>,
    /// Whether content was promoted for it. Once per wait: what cannot be had is not asked for again and again.
    promoted: bool,
    /// Whether stores that others fill were asked for it.
    asked: bool,
    load: Option<JobId>,
    /// Tokens whose blocks were offered.
    offered: TokenCount,
    /// What it was promised to find again.
    pin: Option<JobId>,
}

/// What a job does to the device.
#[derive(Clone, Debug, Default)]
struct AtWork {
    /// Blocks kept for it.
    held: Vec<BlockId>,
    load: Option<Load>,
}

/// A load, copy by copy.
#[derive(Clone, Debug)]
struct Load {
    sequence: SequenceId,
    /// How many tokens are there once so many leading copies are made: one number more than there are copies.
    tokens: Vec<TokenCount>,
}

/// What became of a load that was to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a job that has begun must be carried out and completed"]
pub enum LoadStart {
    /// Its copies are to be made.
    Begun(JobId),
    /// Not yet: content that this block held is still being copied away. Ask again when a job has ended.
    Later(BlockId),
    /// None of the content is there any more. The sequence has kept what it had, and computes from here on.
    Gone(TokenCount),
}

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

/// What the end of a job means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The K and V of the sequence's first `computed` tokens are there; it computes from there on. Those behind, if any
    /// were to come, could not be loaded, and their blocks were given back.
    Loaded {
        /// Whose load it was.
        sequence: SequenceId,
        /// Where it goes on.
        computed: TokenCount,
    },
    /// A load for a sequence that has given its room back meanwhile.
    LoadedForNobody,
    /// So many blocks are in another tier now.
    Moved(BlockCount),
    /// The tiers were reset since the job began.
    Late,
}

/// Wrong input to either half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// The cache refused.
    #[error(transparent)]
    Cache(#[from] Error),
    /// The tiers refused.
    #[error(transparent)]
    Tier(#[from] TierError),
    /// A load for a sequence whose claim named nothing external, or whose load is under way.
    #[error("sequence {sequence} has no external tokens to load, or is loading them")]
    NothingToLoad {
        /// Which.
        sequence: SequenceId,
    },
}

/// The nearest tier.
const NEAREST: TierId = TierId(0);

impl<D: Digest> Offload<D> {
    /// Joins tiers that are empty, or restored, to a cache.
    pub fn new(mut tiers: Tiers<BlockKey<D>>, fetch: Fetch) -> Offload<D> {
        tiers.join();
        Offload { tiers, fetch, sequences: BTreeMap::new(), jobs: BTreeMap::new() }
    }

    /// The tiers: what is where, in numbers, and the copies of a job.
    pub fn tiers(&self) -> &Tiers<BlockKey<D>> {
        &self.tiers
    }

    /// The tiers, to flush them and to answer their questions. Jobs that began here end here
    /// ([`complete`](Offload::complete)), not there, and their events are told here
    /// ([`drain_events`](Offload::drain_events)).
    pub fn tiers_mut(&mut self) -> &mut Tiers<BlockKey<D>> {
        &mut self.tiers
    }

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

    /// Begins the load of what a sequence was granted room for as external. If a part of it has gone since, or more was
    /// claimed than [`external`](Offload::external) advised, the leading part is loaded, and the end of the job tells.
    ///
    /// # Errors
    /// [`OffloadError::NothingToLoad`]; [`Error::NotOpen`].
    pub fn load<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        sequence: SequenceId,
    ) -> Result<LoadStart, OffloadError> {
        let view = cache.sequences.get(sequence)?;
        let under_way = self.sequences.get(&sequence).is_some_and(|afar| afar.load.is_some());
        let Some(Loading { from, to, .. }) = view.loading.filter(|_| !under_way) else {
            return Err(OffloadError::NothingToLoad { sequence });
        };
        // What has no name yet, or fills no whole block, lies in no tier, whatever was claimed.
        let to = cache.whole_blocks_in(to).min(cache.named_to(view)).max(from);
        let mut needed: Vec<Needed<D>> = cache
            .groups_that_hold_tokens()
            .flat_map(|(group, _)| cache.needed(view, group, from, to))
            .collect();
        needed.sort_by_key(|needed| (needed.start, needed.key.group));
        if let Some(busy) = needed.iter().find(|needed| !self.tiers.is_idle(needed.leaving.block)) {
            return Ok(LoadStart::Later(busy.leaving.block));
        }
        let has_room = |needed: &Needed<D>| needed.leaving.block != BlockId::NULL;
        let is_there =
            |needed: &&Needed<D>| has_room(needed) && self.is_readable(self.tiers.find(&needed.key));
        let there = needed.iter().take_while(is_there).count();
        let end = needed.get(there).map_or(to, |gone| gone.start.max(from));
        needed.truncate(there);
        if needed.is_empty() {
            self.unpin(sequence);
            return Ok(LoadStart::Gone(cache.load_failed(sequence, from)?));
        }
        let keys: Vec<BlockKey<D>> = needed.iter().map(|needed| needed.key).collect();
        let items: Vec<_> = needed.iter().map(|needed| (needed.key, needed.leaving.block)).collect();
        let job = self.tiers.load(&items)?;
        self.tiers.touch(&keys);
        self.unpin(sequence);
        let tokens = needed.iter().map(|needed| needed.start.max(from)).chain([end]).collect();
        self.at_work(cache, job, &needed, Some(Load { sequence, tokens }));
        *self.sequences.entry(sequence).or_default() = Afar { load: Some(job), ..Afar::default() };
        Ok(LoadStart::Begun(job))
    }

    /// The K and V of a sequence's first `tokens` tokens exist, in a step that has been computed: its full blocks are
    /// offered to the nearest tier, those it found in the cache as well, each once in its life. They are kept until
    /// the copies are made, even if the sequence ends.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
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
    /// [`Error::NotOpen`].
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

    /// The first `made` copies of a job were made: what they brought can be used already.
    ///
    /// # Errors
    /// As [`Tiers::progress`].
    pub fn progress<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        job: JobId,
        made: u32,
    ) -> Result<(), OffloadError> {
        self.tiers.progress(job, made)?;
        if let Some(Load { sequence, tokens }) = self.jobs.get(&job).and_then(|job| job.load.as_ref())
            && self.sequences.get(sequence).is_some_and(|afar| afar.load == Some(job))
            && tokens.len() > made as usize + 1
        {
            let there = cache.whole_blocks_in(tokens[made as usize]);
            // A hit that ends in a block is not left behind by the first copies.
            if cache.sequences.get(*sequence)?.loading.is_some_and(|loading| there > loading.from) {
                cache.loaded(*sequence, there)?;
            }
        }
        Ok(())
    }

    /// A job has ended. Blocks kept for it are let go; a sequence whose load it was goes on from what has come.
    ///
    /// # Errors
    /// As [`Tiers::complete`].
    pub fn complete<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        job: JobId,
        outcome: Outcome<'_>,
    ) -> Result<Finished, OffloadError> {
        let ended = self.tiers.complete(job, outcome)?;
        self.tell(cache);
        let AtWork { held, load } = self.jobs.remove(&job).unwrap_or_default();
        for block in held.into_iter().rev() {
            cache.let_go(block);
        }
        let leading = match ended {
            Ended::Counted { leading, .. } => leading.get() as usize,
            Ended::Late => 0,
        };
        match (load, ended) {
            (Some(load), _) => self.finish_load(cache, job, &load, leading),
            (None, Ended::Counted { made, .. }) => Ok(Finished::Moved(made)),
            (None, Ended::Late) => Ok(Finished::Late),
        }
    }

    fn finish_load<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        job: JobId,
        load: &Load,
        leading: usize,
    ) -> Result<Finished, OffloadError> {
        let Load { sequence, tokens } = load;
        let Some(afar) = self.sequences.get_mut(sequence).filter(|afar| afar.load == Some(job)) else {
            return Ok(Finished::LoadedForNobody);
        };
        afar.load = None;
        let there = tokens[leading];
        let whole = cache.sequences.get(*sequence)?.loading.is_some_and(|loading| loading.to == there);
        let computed = if whole {
            cache.loaded(*sequence, there)?;
            there
        } else {
            cache.load_failed(*sequence, there)?
        };
        Ok(Finished::Loaded { sequence: *sequence, computed })
    }

    /// Gives back the room of a sequence, which stays open: [`KvCache::release`], and its content in the tiers is put
    /// in order. A load under way goes on for nobody; its blocks are free when it ends.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn release<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        sequence: SequenceId,
    ) -> Result<(), OffloadError> {
        let view = cache.sequences.get(sequence)?;
        let all = Path { cache, view, from: TokenCount(0), to: cache.named_to(view) };
        self.tiers.settle(&self.keys(all, all.to));
        cache.release(sequence)?;
        if let Some(afar) = self.sequences.get_mut(&sequence) {
            *afar = Afar { pin: afar.pin, ..Afar::default() };
        }
        Ok(())
    }

    /// Releases a sequence, takes its pins off, and forgets it: [`KvCache::close`].
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn close<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        sequence: SequenceId,
    ) -> Result<(), OffloadError> {
        self.release(cache, sequence)?;
        self.unpin(sequence);
        self.sequences.remove(&sequence);
        Ok(cache.close(sequence)?)
    }

    /// Forgets all content, in the cache and in the tiers, pins included. Refuses, with `false` and no change, while
    /// any sequence holds a block. Jobs under way end late and change nothing.
    pub fn reset<H: BlockHasher<Digest = D>, E: Eviction>(&mut self, cache: &mut KvCache<H, E>) -> bool {
        let idle = cache.reset();
        if idle {
            self.tiers.reset();
            let pinned: Vec<SequenceId> = self.sequences.keys().copied().collect();
            pinned.into_iter().for_each(|sequence| self.unpin(sequence));
        }
        idle
    }

    /// Audits the tiers, and the blocks that are kept for their jobs.
    ///
    /// # Errors
    /// The first [`TierViolation`](super::TierViolation) found: a bug of this crate.
    pub fn check<H: BlockHasher<Digest = D>, E: Eviction>(
        &self,
        cache: &KvCache<H, E>,
    ) -> Result<(), super::TierViolation> {
        self.tiers.check()?;
        let mut held = BTreeMap::new();
        for &block in self.jobs.values().flat_map(|job| &job.held) {
            *held.entry(block).or_insert(0) += 1;
        }
        let counted: BTreeMap<BlockId, u32> =
            cache.kept.iter().map(|(&block, (times, _))| (block, *times)).collect();
        let differs = |block: &&BlockId| held.get(block) != counted.get(block);
        match held.keys().chain(counted.keys()).find(differs) {
            Some(&block) => Err(super::TierViolation::Device { block }),
            None => Ok(()),
        }
    }

    fn is_readable(&self, found: Lookup) -> bool {
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
    fn keys<H: BlockHasher<Digest = D>, E: Eviction>(
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

    fn at_work<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        job: JobId,
        needed: &[Needed<D>],
        load: Option<Load>,
    ) {
        needed.iter().for_each(|needed| cache.keep(needed.leaving));
        let held = needed.iter().map(|needed| needed.leaving.block).collect();
        self.jobs.insert(job, AtWork { held, load });
    }

    /// Pins content for a sequence, unless something is pinned for it already.
    fn pin_for(&mut self, sequence: SequenceId, keys: &[BlockKey<D>]) {
        let afar = self.sequences.entry(sequence).or_default();
        if afar.pin.is_none() && !keys.is_empty() {
            afar.pin = self.tiers.pin(keys).ok();
        }
    }

    fn unpin(&mut self, sequence: SequenceId) {
        if let Some(pin) = self.sequences.get_mut(&sequence).and_then(|afar| afar.pin.take()) {
            let _ended = self.tiers.complete(pin, Outcome::All);
        }
    }
}

/// The tokens of a sequence between its hit and the farthest that it could be loaded to.
#[derive(Debug)]
struct Path<'a, H: BlockHasher, E: Eviction> {
    cache: &'a KvCache<H, E>,
    view: &'a Sequence<H::Digest>,
    from: TokenCount,
    to: TokenCount,
}

impl<H: BlockHasher, E: Eviction> Clone for Path<'_, H, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H: BlockHasher, E: Eviction> Copy for Path<'_, H, E> {}

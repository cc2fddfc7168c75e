//! A cache and its tiers together: what a sequence finds elsewhere, and what it leaves there.

mod external;
mod load;
mod store;

use std::collections::BTreeMap;

use self::external::Path;
use self::load::Load;
use super::content::{BlockKey, Needed};
use super::{Ended, Fetch, JobId, Outcome, TierError, TierId, Tiers};
use crate::{
    BlockCount, BlockHasher, BlockId, Digest, Error, Eviction, KvCache, SequenceId, Tick, TokenCount,
};

pub use self::external::{Advice, External};
pub use self::load::LoadStart;

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

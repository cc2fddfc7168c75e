//! Loads: what a sequence has claimed as external comes to its blocks, from the first on.

use super::{Afar, Finished, Offload, OffloadError};
use crate::sequence::Loading;
use crate::tier::JobId;
use crate::tier::content::{BlockKey, Needed};
use crate::{BlockHasher, BlockId, Digest, Eviction, KvCache, SequenceId, TokenCount};

/// A load, copy by copy.
#[derive(Clone, Debug)]
pub(super) struct Load {
    pub(super) sequence: SequenceId,
    /// How many tokens are there once so many leading copies are made: one number more than there are copies.
    pub(super) tokens: Vec<TokenCount>,
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

impl<D: Digest> Offload<D> {
    /// Begins the load of what a sequence was granted room for as external. If a part of it has gone since, or more was
    /// claimed than [`external`](Offload::external) advised, the leading part is loaded, and the end of the job tells.
    ///
    /// # Errors
    /// [`OffloadError::NothingToLoad`]; [`Error::NotOpen`](crate::Error::NotOpen).
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
        // A copy writes whole blocks: where it fails, what was there before is gone as well.
        let before = cache.whole_blocks_in(from);
        let starts = needed.iter().map(|needed| if needed.start < from { before } else { needed.start });
        let tokens = starts.chain([end]).collect();
        self.at_work(cache, job, &needed, Some(Load { sequence, tokens }));
        *self.sequences.entry(sequence).or_default() = Afar { load: Some(job), ..Afar::default() };
        Ok(LoadStart::Begun(job))
    }

    /// The first `made` copies of a job were made: what they brought can be used already.
    ///
    /// # Errors
    /// As [`Tiers::progress`](crate::tier::Tiers::progress).
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

    pub(super) fn finish_load<H: BlockHasher<Digest = D>, E: Eviction>(
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
}

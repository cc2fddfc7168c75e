//! Host memory behind the cache, and a file behind that: what was computed is kept there when the device needs its
//! room, and comes back.

mod disk;
mod drive;
mod moves;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use quayline_gpu_kernels as kernels;
use quayline_kv_cache::hash::AnyHash;
use quayline_kv_cache::tier::{
    Advice, Fetch, Finished, JobId, LoadStart, Medium, Offload, Outcome, Patience, Place, Store, TierConfig,
    TierEviction, TierId, TierStats, TierViolation, Tiers, Write,
};
use quayline_kv_cache::{BlockCount, Event, SequenceId, Snapshot, Tick, TokenCount};

use self::disk::{DISK, Disk};
use self::moves::Move;
use crate::adapt::Cache;
use crate::block_file::Opened;
use crate::copies::Copied;
use crate::options::{Offloading, OffloadingWrite};

/// The tier, its bytes, and the copies that the next step begins with.
///
/// A job between device and host ends as soon as its copies are on the list: the list is carried out in its order
/// before anything else touches device or host, so that whoever comes later finds what it says. One with the file ends
/// when the file's thread says so.
#[derive(Debug)]
pub(crate) struct HostTier {
    offload: Offload<AnyHash>,
    /// A slot takes memory when it is first written. What is being written to the file is shared with its thread.
    slots: Vec<Arc<[u8]>>,
    block_bytes: usize,
    moves: Vec<Move>,
    /// Why some copies were not made.
    failure: Option<kernels::Error>,
    disk: Option<Disk>,
    /// Who waits for what is being read from the file.
    waiting: BTreeSet<SequenceId>,
    /// By when who has targets stops waiting.
    due: BTreeMap<SequenceId, Tick>,
    /// The time of the last step.
    now: Tick,
    /// Who was swapped out and needs what lies here.
    swapped: BTreeSet<SequenceId>,
    saved_blocks: u64,
    loaded_blocks: u64,
    /// The caller's, if copies are to be timed, and what was timed.
    clock: Option<fn() -> Instant>,
    timed: Vec<Copied>,
}

/// The tier of the host.
const HOST: TierId = TierId(0);

/// Blocks and sequences are those of this engine's own cache.
const OWN: &str = "the tier is asked about what the cache has";

impl HostTier {
    /// The host's memory in so many slots, and a file with what it was found to hold, if there is one.
    pub(crate) fn new(options: &Offloading, slots: u32, block_bytes: usize, disk: Option<Opened>) -> Self {
        let config = TierConfig {
            eviction: if options.arc { TierEviction::Arc } else { TierEviction::Lru },
            write: match options.write {
                OffloadingWrite::Through => Write::THROUGH,
                OffloadingWrite::AfterUses(offers) => {
                    Write::After { offers: offers.get(), tracked: slots.saturating_mul(4) }
                }
                OffloadingWrite::Back => Write::Back { ahead: 0 },
            },
            ..TierConfig::new(Medium::Host, BlockCount(slots))
        };
        // What lies in the file is read into the host's memory first, and checked.
        let behind = disk.as_ref().map(|disk| TierConfig {
            staged: true,
            eviction: config.eviction,
            ..TierConfig::new(Medium::Disk, BlockCount(disk.slots))
        });
        let configs: Vec<TierConfig> = [Some(config), behind].into_iter().flatten().collect();
        let mut tiers = Tiers::new(&configs, 0).expect("a tier with slots that the device reads");
        let disk = disk.map(|Opened { file, held, .. }| {
            let origin = tiers.origin(DISK).expect("there is a second tier");
            tiers.restore(DISK, origin, held).expect("each name and slot once, in an empty tier");
            Disk::new(file)
        });
        let one = BlockCount(1);
        let fetch = Fetch { load_min: one, promote_min: one, patience: Patience::WaitComplete };
        Self {
            offload: Offload::new(tiers, fetch),
            slots: vec![Arc::default(); slots as usize],
            block_bytes,
            moves: Vec::new(),
            failure: None,
            disk,
            waiting: BTreeSet::new(),
            due: BTreeMap::new(),
            now: Tick(0),
            swapped: BTreeSet::new(),
            saved_blocks: 0,
            loaded_blocks: 0,
            clock: None,
            timed: Vec::new(),
        }
    }

    /// From now on copies are timed, until they are [drained](HostTier::drain_copies).
    pub(crate) fn time_copies(&mut self, clock: fn() -> Instant) {
        self.clock = Some(clock);
    }

    pub(crate) fn drain_copies(&mut self) -> impl Iterator<Item = Copied> + '_ {
        self.timed.drain(..)
    }

    /// A sequence waits for the file until then, and no longer.
    pub(crate) fn set_due(&mut self, sequence: SequenceId, due: Tick) {
        self.due.insert(sequence, due);
    }

    /// What the caller's clock says.
    pub(crate) fn set_now(&mut self, now: Tick) {
        self.now = now;
    }

    /// When the first of those who wait for the file stops waiting.
    pub(crate) fn next_due(&self) -> Option<Tick> {
        let due = self.waiting.iter().filter_map(|sequence| self.due.get(sequence).copied());
        // Who is overdue had its chance when the time was said.
        due.filter(|&due| due > self.now).min()
    }

    /// Tokens that can be loaded behind what the device has of a sequence that holds no room; none while some of them
    /// are being read from the file, unless it is due.
    pub(crate) fn loadable(&mut self, cache: &mut Cache, sequence: SequenceId) -> Option<u32> {
        let found = self.offload.external(cache, sequence, self.now).expect(OWN);
        if let Some(job) = found.begun {
            self.bring_near(job);
        }
        match found.advice {
            Advice::Load(tokens) => Some(tokens.get()),
            Advice::Compute => Some(0),
            Advice::Wait { loadable, .. } if self.due.get(&sequence).is_some_and(|&due| due <= self.now) => {
                self.waiting.remove(&sequence);
                Some(loadable.get())
            }
            Advice::Wait { .. } => {
                self.waiting.insert(sequence);
                None
            }
        }
    }

    /// Room was granted. Saves what that pushes out of the device, if it is written back, and loads what was claimed as
    /// external.
    pub(crate) fn granted(&mut self, cache: &mut Cache, sequence: SequenceId, external: TokenCount) {
        if cache.config().report_lost
            && let Store::Begun { job, .. } = self.offload.rescue(cache).expect(OWN)
        {
            self.carry(cache, job);
        }
        if external > TokenCount(0) {
            let LoadStart::Begun(job) = self.offload.load(cache, sequence).expect(OWN) else {
                unreachable!("no copy is under way, and what was found a moment ago is pinned or there");
            };
            let Finished::Loaded { .. } = self.carry(cache, job) else { unreachable!("a load was begun") };
            self.swapped.remove(&sequence);
        }
    }

    /// Offers the full blocks of a sequence's first `tokens` tokens, which have been computed.
    pub(crate) fn computed(&mut self, cache: &mut Cache, sequence: SequenceId, tokens: TokenCount) {
        if let Store::Begun { job, .. } = self.offload.computed(cache, sequence, tokens).expect(OWN) {
            self.carry(cache, job);
        }
    }

    /// Keeps the full blocks of a sequence's first `tokens` tokens for it, and gives its room back. Returns how many
    /// tokens are kept; 0, and nothing has changed, if the tier has no room.
    pub(crate) fn swap_out(
        &mut self,
        cache: &mut Cache,
        sequence: SequenceId,
        tokens: TokenCount,
    ) -> TokenCount {
        let size = cache.config().block_size;
        let full = size.full_blocks(tokens).get() as usize;
        let blocks = cache.table(sequence).expect(OWN).blocks().iter().take(full);
        let named = blocks.take_while(|&&block| cache.hash_of(block).is_some()).count();
        let kept = size.tokens_in(BlockCount(u32::try_from(named).unwrap_or(u32::MAX)));
        if kept == TokenCount(0) {
            return kept;
        }
        match self.offload.swap_out(cache, sequence, kept).expect(OWN) {
            Store::NoRoom { .. } => return TokenCount(0),
            Store::Begun { job, .. } => drop(self.carry(cache, job)),
            Store::Nothing => {}
        }
        self.offload.release(cache, sequence).expect(OWN);
        self.swapped.insert(sequence);
        kept
    }

    pub(crate) fn release(&mut self, cache: &mut Cache, sequence: SequenceId) {
        self.offload.release(cache, sequence).expect(OWN);
        self.swapped.remove(&sequence);
        self.waiting.remove(&sequence);
    }

    pub(crate) fn close(&mut self, cache: &mut Cache, sequence: SequenceId) {
        self.offload.close(cache, sequence).expect(OWN);
        self.swapped.remove(&sequence);
        self.waiting.remove(&sequence);
        self.due.remove(&sequence);
    }

    /// Forgets everything, here and in the cache; false, and nothing changes, while somebody needs it.
    pub(crate) fn reset(&mut self, cache: &mut Cache) -> bool {
        let forgotten = self.swapped.is_empty() && self.offload.reset(cache);
        if let (true, Some(disk)) = (forgotten, &mut self.disk) {
            disk.clear();
        }
        if forgotten {
            self.moves.clear();
            self.failure = None;
        }
        forgotten
    }

    /// As [`Cache::drain_events`], with what happened in the tiers.
    pub(crate) fn drain_events(&mut self, cache: &mut Cache, hear: impl FnMut(u64, Event<'_, AnyHash>)) {
        self.offload.drain_events(cache, hear);
    }

    /// As [`Cache::snapshot`], with what the tiers have.
    pub(crate) fn event_snapshot(&mut self, cache: &mut Cache) -> Option<Snapshot<AnyHash>> {
        self.offload.snapshot(cache)
    }

    pub(crate) fn stats(&self) -> TierStats {
        self.offload.tiers().stats(HOST).expect("there is one tier")
    }

    /// Bytes copied to the tier, and from it.
    pub(crate) fn copied_bytes(&self) -> (u64, u64) {
        let bytes = self.block_bytes as u64;
        (self.saved_blocks * bytes, self.loaded_blocks * bytes)
    }

    pub(crate) fn check(&self, cache: &Cache) -> Result<(), TierViolation> {
        self.offload.check(cache)
    }

    /// Puts a job's copies on the list, and ends it.
    fn carry(&mut self, cache: &mut Cache, job: JobId) -> Finished {
        for transfer in self.offload.tiers().transfers(job).expect(OWN) {
            self.moves.push(match (transfer.from, transfer.to) {
                (Place::Device(block), Place::Tier(to)) => Move::Save { block: block.get(), slot: to.slot },
                (Place::Tier(from), Place::Device(block)) => {
                    Move::Load { slot: from.slot, block: block.get() }
                }
                _ => unreachable!("the device reads and writes the host's memory"),
            });
        }
        self.offload.complete(cache, job, Outcome::All).expect(OWN)
    }
}

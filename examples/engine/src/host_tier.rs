//! Host memory behind the cache, and a file behind that: what was computed is kept there when the device needs its
//! room, and comes back.

use std::collections::BTreeSet;

use quayline_kv_cache::tier::{
    Advice, Fetch, Finished, JobId, LoadStart, Medium, Offload, Outcome, Patience, Place, Store, TierConfig,
    TierEviction, TierId, TierStats, TierViolation, Tiers, Transfer, Write,
};
use quayline_kv_cache::{BlockCount, BlockHasher, KvCache, SequenceId, Tick, TokenCount, Xxh3};

use crate::block_file::{BlockFile, Key, Opened};
use crate::machine::Machine;
use crate::options::{Offloading, OffloadingWrite};
use crate::snapshot::DiskUse;

/// The tier, its bytes, and the copies that the next step begins with.
///
/// A job of the tiers ends as soon as its copies are on the list: the list is carried out in its order before
/// anything else touches device or host, so that whoever comes later finds what it says.
#[derive(Debug)]
pub(crate) struct HostTier {
    offload: Offload<<Xxh3 as BlockHasher>::Digest>,
    /// A slot takes memory when it is first written.
    slots: Vec<Box<[u8]>>,
    block_bytes: usize,
    moves: Vec<Move>,
    disk: Option<Disk>,
    /// Who was swapped out and needs what lies here.
    swapped: BTreeSet<SequenceId>,
    saved_blocks: u64,
    loaded_blocks: u64,
}

/// One block to copy.
#[derive(Debug)]
enum Move {
    Save {
        block: u32,
        slot: u32,
    },
    Load {
        slot: u32,
        block: u32,
    },
    /// What was read from the file.
    Put {
        bytes: Box<[u8]>,
        slot: u32,
    },
}

/// The file, and what it has done.
#[derive(Debug)]
struct Disk {
    file: BlockFile,
    saved_blocks: u64,
    loaded_blocks: u64,
    failed_blocks: u64,
}

/// The tier of the host.
const HOST: TierId = TierId(0);

/// The tier of the file.
const DISK: TierId = TierId(1);

/// The most blocks that are written to the file between two steps, so that nobody waits long for it.
const SPILLED_MAX: BlockCount = BlockCount(64);

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
            Disk { file, saved_blocks: 0, loaded_blocks: 0, failed_blocks: 0 }
        });
        let one = BlockCount(1);
        let fetch = Fetch { load_min: one, promote_min: one, patience: Patience::BestEffort };
        Self {
            offload: Offload::new(tiers, fetch),
            slots: (0..slots).map(|_| Box::default()).collect(),
            block_bytes,
            moves: Vec::new(),
            disk,
            swapped: BTreeSet::new(),
            saved_blocks: 0,
            loaded_blocks: 0,
        }
    }

    /// Tokens that could be loaded behind what the device has of a sequence that holds no room.
    pub(crate) fn loadable(&mut self, cache: &mut KvCache, sequence: SequenceId) -> u32 {
        loop {
            let found = self.offload.external(cache, sequence, Tick(0)).expect(OWN);
            match (found.begun, found.advice) {
                (Some(job), _) => self.bring_near(cache, job),
                (None, Advice::Load(tokens)) => return tokens.get(),
                (None, Advice::Compute | Advice::Wait { .. }) => return 0,
            }
        }
    }

    /// Reads from the file what a job promotes, now: what it does not deliver is not counted on.
    fn bring_near(&mut self, cache: &mut KvCache, job: JobId) {
        let disk = self.disk.as_mut().expect("only what the file has is promoted");
        let mut bad = Vec::new();
        for (index, transfer) in (0..).zip(self.offload.tiers().transfers(job).expect(OWN)) {
            let (Place::Tier(from), Place::Tier(to)) = (transfer.from, transfer.to) else {
                unreachable!("a promotion is from tier to tier");
            };
            match disk.file.read(from.slot, &transfer.key) {
                Some(bytes) => self.moves.push(Move::Put { bytes, slot: to.slot }),
                None => bad.push(index),
            }
        }
        let read = self.offload.tiers().transfers(job).expect(OWN).len() - bad.len();
        disk.loaded_blocks += read as u64;
        disk.failed_blocks += bad.len() as u64;
        let outcome = if bad.is_empty() { Outcome::All } else { Outcome::AllBut(&bad) };
        self.offload.complete(cache, job, outcome).expect(OWN);
    }

    /// Writes to the file what came to the host's memory. All copies on the list were made. Where the file takes no
    /// more (the drive is full), nothing is lost but what it would have kept.
    pub(crate) fn spill(&mut self, cache: &mut KvCache) {
        let Some(disk) = &mut self.disk else { return };
        let flushed = self.offload.tiers_mut().flush(DISK, SPILLED_MAX).expect("there is a second tier");
        let Store::Begun { job, copies, .. } = flushed else { return };
        let write = |transfer: &Transfer<Key>| {
            let (Place::Tier(from), Place::Tier(to)) = (transfer.from, transfer.to) else {
                unreachable!("a flush is from tier to tier");
            };
            disk.file.write(to.slot, &transfer.key, &self.slots[from.slot as usize]).is_ok()
        };
        let transfers = self.offload.tiers().transfers(job).expect(OWN);
        let written = transfers.iter().map(write).take_while(|&written| written).count();
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        disk.saved_blocks += u64::from(written);
        disk.failed_blocks += u64::from(copies.get() - written);
        self.offload.complete(cache, job, Outcome::First(written)).expect(OWN);
    }

    /// Room was granted. Saves what that pushes out of the device, if it is written back, and loads what was claimed as
    /// external.
    pub(crate) fn granted(&mut self, cache: &mut KvCache, sequence: SequenceId, external: TokenCount) {
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
    pub(crate) fn computed(&mut self, cache: &mut KvCache, sequence: SequenceId, tokens: TokenCount) {
        if let Store::Begun { job, .. } = self.offload.computed(cache, sequence, tokens).expect(OWN) {
            self.carry(cache, job);
        }
    }

    /// Keeps the full blocks of a sequence's first `tokens` tokens for it, and gives its room back. Returns how many
    /// tokens are kept; 0, and nothing has changed, if the tier has no room.
    pub(crate) fn swap_out(
        &mut self,
        cache: &mut KvCache,
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

    pub(crate) fn release(&mut self, cache: &mut KvCache, sequence: SequenceId) {
        self.offload.release(cache, sequence).expect(OWN);
        self.swapped.remove(&sequence);
    }

    pub(crate) fn close(&mut self, cache: &mut KvCache, sequence: SequenceId) {
        self.offload.close(cache, sequence).expect(OWN);
        self.swapped.remove(&sequence);
    }

    /// Forgets everything, here and in the cache; false, and nothing changes, while somebody needs it.
    pub(crate) fn reset(&mut self, cache: &mut KvCache) -> bool {
        let forgotten = self.swapped.is_empty() && self.offload.reset(cache);
        if let (true, Some(disk)) = (forgotten, &mut self.disk) {
            disk.failed_blocks += u64::from(disk.file.clear().is_err());
        }
        forgotten
    }

    /// Makes the copies on the list.
    pub(crate) fn carry_out(&mut self, machine: &mut dyn Machine) {
        let fits = "blocks and slots are of one size";
        for step in self.moves.drain(..) {
            match step {
                Move::Save { block, slot } => {
                    let bytes = &mut self.slots[slot as usize];
                    if bytes.is_empty() {
                        *bytes = vec![0; self.block_bytes].into();
                    }
                    machine.save_block(block, bytes).expect(fits);
                    self.saved_blocks += 1;
                }
                Move::Put { bytes, slot } => self.slots[slot as usize] = bytes,
                Move::Load { slot, block } => {
                    machine.load_block(block, &self.slots[slot as usize]).expect(fits);
                    self.loaded_blocks += 1;
                }
            }
        }
    }

    /// Copies a block that nobody reads there and back so often, for a caller with a clock. Returns how many bytes that
    /// is, both ways together.
    pub(crate) fn exercise(&self, machine: &mut dyn Machine, times: u32) -> u64 {
        let mut bytes = vec![0; self.block_bytes];
        for _ in 0..times {
            machine.save_block(0, &mut bytes).expect("the null block is a block");
            machine.load_block(0, &bytes).expect("the null block is a block");
        }
        2 * u64::from(times) * self.block_bytes as u64
    }

    pub(crate) fn stats(&self) -> TierStats {
        self.offload.tiers().stats(HOST).expect("there is one tier")
    }

    /// What the file holds and did, if there is one.
    pub(crate) fn disk_use(&self) -> Option<DiskUse> {
        let disk = self.disk.as_ref()?;
        let stats = self.offload.tiers().stats(DISK).expect("there is a second tier");
        let bytes = self.block_bytes as u64;
        Some(DiskUse {
            blocks: stats.free.get() + stats.ready.get() + stats.writing.get() + stats.gone.get(),
            used: stats.ready.get(),
            saved_bytes: disk.saved_blocks * bytes,
            loaded_bytes: disk.loaded_blocks * bytes,
            failed_blocks: disk.failed_blocks,
            evictions: stats.evictions,
        })
    }

    /// Bytes copied to the tier, and from it.
    pub(crate) fn copied_bytes(&self) -> (u64, u64) {
        let bytes = self.block_bytes as u64;
        (self.saved_blocks * bytes, self.loaded_blocks * bytes)
    }

    pub(crate) fn check(&self, cache: &KvCache) -> Result<(), TierViolation> {
        self.offload.check(cache)
    }

    /// Puts a job's copies on the list, and ends it.
    fn carry(&mut self, cache: &mut KvCache, job: JobId) -> Finished {
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

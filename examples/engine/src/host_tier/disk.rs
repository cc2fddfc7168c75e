//! The file behind host memory: what is read from it before it can be loaded, and what is written to it.

use std::collections::BTreeMap;
use std::sync::Arc;

use quayline_kv_cache::BlockCount;
use quayline_kv_cache::tier::{Finished, JobId, Outcome, Place, Store, TierId};

use super::drive::{Done, Drive, Task};
use super::{HostTier, Move, OWN};
use crate::adapt::Cache;
use crate::block_file::BlockFile;
use crate::snapshot::{DiskBacklog, DiskUse};

/// The tier of the file.
pub(super) const DISK: TierId = TierId(1);

/// The most blocks that are being written at a time: what a shutdown waits for.
const WRITTEN_AT_ONCE: u32 = 64;

/// The file's thread, what it is at, and what it has done.
#[derive(Debug)]
pub(super) struct Disk {
    drive: Drive,
    /// The slots of host memory that each read is for.
    reads: BTreeMap<JobId, Vec<u32>>,
    /// Blocks being written.
    writing: u32,
    saved_blocks: u64,
    loaded_blocks: u64,
    failed_blocks: u64,
}

impl Disk {
    pub(super) fn new(file: BlockFile) -> Self {
        let drive = Drive::start(file);
        Self {
            drive,
            reads: BTreeMap::new(),
            writing: 0,
            saved_blocks: 0,
            loaded_blocks: 0,
            failed_blocks: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.drive.give(Task::Clear);
    }

    #[cfg(test)]
    pub(super) fn by_hand(&mut self) -> super::drive::Worker {
        self.drive.by_hand()
    }
}

impl HostTier {
    /// Has read from the file what a job promotes.
    pub(super) fn bring_near(&mut self, job: JobId) {
        let disk = self.disk.as_mut().expect("only what the file has is promoted");
        let (mut slots, mut blocks) = (Vec::new(), Vec::new());
        for transfer in self.offload.tiers().transfers(job).expect(OWN) {
            let (Place::Tier(from), Place::Tier(to)) = (transfer.from, transfer.to) else {
                unreachable!("a promotion is from tier to tier");
            };
            slots.push(to.slot);
            blocks.push((from.slot, transfer.key));
        }
        disk.reads.insert(job, slots);
        disk.drive.give(Task::Read { job, blocks });
    }

    /// Has written to the file what came to the host's memory, unless copies to it are still to be made. Where the file
    /// takes no more (the drive is full), nothing is lost but what it would have kept.
    pub(crate) fn spill(&mut self) {
        let Some(disk) = self.disk.as_mut().filter(|_| self.moves.is_empty()) else { return };
        let room = BlockCount(WRITTEN_AT_ONCE.saturating_sub(disk.writing));
        if room == BlockCount(0) {
            return;
        }
        let flushed = self.offload.tiers_mut().flush(DISK, room).expect("there is a second tier");
        let Store::Begun { job, copies, .. } = flushed else { return };
        let mut blocks = Vec::new();
        for transfer in self.offload.tiers().transfers(job).expect(OWN) {
            let (Place::Tier(from), Place::Tier(to)) = (transfer.from, transfer.to) else {
                unreachable!("a flush is from tier to tier");
            };
            blocks.push((to.slot, transfer.key, Arc::clone(&self.slots[from.slot as usize])));
        }
        disk.writing += copies.get();
        disk.drive.give(Task::Write { job, blocks });
    }

    /// Blocks that the file is still to get: those that wait, and those being written.
    pub(crate) fn backlog(&self) -> DiskBacklog {
        let Some(disk) = &self.disk else { return DiskBacklog::default() };
        let due = self.offload.tiers().backlog(DISK).expect("there is a second tier");
        DiskBacklog { due_blocks: due.get(), writing_blocks: disk.writing }
    }

    /// Takes in what the file's thread has done. Whoever waited for it is asked again.
    pub(crate) fn take_in(&mut self, cache: &mut Cache) {
        while let Some(done) = self.disk.as_mut().and_then(|disk| disk.drive.take_done()) {
            self.note_done(cache, done);
        }
    }

    /// The same, after waiting for something to be done. False if nothing is under way.
    pub(crate) fn wait(&mut self, cache: &mut Cache) -> bool {
        let Some(done) = self.disk.as_mut().and_then(|disk| disk.drive.wait()) else { return false };
        self.note_done(cache, done);
        self.take_in(cache);
        true
    }

    /// Calls `wake`, from another thread, whenever there is something to take in.
    pub(crate) fn wake_with(&mut self, wake: impl Fn() + Send + 'static) {
        if let Some(disk) = &mut self.disk {
            disk.drive.give(Task::Wake(Box::new(wake)));
        }
    }

    fn note_done(&mut self, cache: &mut Cache, done: Done) {
        self.waiting.clear();
        let disk = self.disk.as_mut().expect("it has done something");
        match done {
            Done::Read { job, blocks } => self.note_read(cache, job, blocks),
            Done::Written { job, written, blocks } => {
                disk.writing -= blocks;
                disk.saved_blocks += u64::from(written);
                disk.failed_blocks += u64::from(blocks - written);
                self.offload.complete(cache, job, Outcome::First(written)).expect(OWN);
            }
            Done::Cleared { well } => disk.failed_blocks += u64::from(!well),
        }
    }

    /// What was read comes to its slots in its turn; what was not is not counted on.
    fn note_read(&mut self, cache: &mut Cache, job: JobId, blocks: Vec<Option<Arc<[u8]>>>) {
        let disk = self.disk.as_mut().expect("it has read something");
        let slots = disk.reads.remove(&job).expect("a read was begun");
        let bad: Vec<u32> =
            (0..).zip(&blocks).filter(|(_, block)| block.is_none()).map(|(index, _)| index).collect();
        disk.loaded_blocks += (blocks.len() - bad.len()) as u64;
        disk.failed_blocks += bad.len() as u64;
        let outcome = if bad.is_empty() { Outcome::All } else { Outcome::AllBut(&bad) };
        if self.offload.complete(cache, job, outcome).expect(OWN) != Finished::Late {
            let read = slots.into_iter().zip(blocks);
            self.moves.extend(read.filter_map(|(slot, bytes)| Some(Move::Put { bytes: bytes?, slot })));
        }
    }

    /// Whether a sequence can do nothing before the file's thread has done something.
    pub(crate) fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty() && self.disk.as_ref().is_some_and(|disk| disk.drive.under_way() > 0)
    }

    /// What the file holds and did, if there is one.
    pub(crate) fn disk_use(&self) -> Option<DiskUse> {
        let disk = self.disk.as_ref()?;
        let stats = self.offload.tiers().stats(DISK).expect("there is a second tier");
        let bytes = self.block_bytes as u64;
        let reading: usize = disk.reads.values().map(Vec::len).sum();
        Some(DiskUse {
            blocks: stats.free.get() + stats.ready.get() + stats.writing.get() + stats.gone.get(),
            used: stats.ready.get(),
            pending_blocks: disk.writing + u32::try_from(reading).unwrap_or(u32::MAX),
            saved_blocks: disk.saved_blocks,
            loaded_blocks: disk.loaded_blocks,
            failed_blocks: disk.failed_blocks,
            saved_bytes: disk.saved_blocks * bytes,
            loaded_bytes: disk.loaded_blocks * bytes,
            evictions: stats.evictions,
        })
    }
}

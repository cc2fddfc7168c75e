//! The copies between device and host, made in the order in which they were decided and many in a call.

use std::collections::BTreeSet;
use std::mem::{discriminant, take};
use std::sync::Arc;

use quayline_gpu_kernels as kernels;

use super::HostTier;
use crate::copies::{Copied, Direction};
use crate::failure::expected;
use crate::machine::Machine;

/// One block to copy.
#[derive(Debug)]
pub(super) enum Move {
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
        bytes: Arc<[u8]>,
        slot: u32,
    },
}

impl Move {
    /// Between device and host; what was read from the file is at hand.
    fn direction(&self) -> Option<Direction> {
        match self {
            Self::Save { .. } => Some(Direction::Store),
            Self::Load { .. } => Some(Direction::Load),
            Self::Put { .. } => None,
        }
    }

    /// The slot or block that it writes.
    fn target(&self) -> u32 {
        match *self {
            Self::Save { slot, .. } | Self::Put { slot, .. } => slot,
            Self::Load { block, .. } => block,
        }
    }
}

/// Cuts a list of copies into runs of one kind, none of which writes anything twice: each run is one call.
pub(super) fn runs(moves: &[Move]) -> Vec<&[Move]> {
    let (mut runs, mut start, mut written) = (Vec::new(), 0, BTreeSet::new());
    for (index, step) in moves.iter().enumerate() {
        let same_kind = discriminant(step) == discriminant(&moves[start]);
        if !same_kind || written.contains(&step.target()) {
            runs.push(&moves[start..index]);
            start = index;
            written.clear();
        }
        written.insert(step.target());
    }
    runs.push(&moves[start..]);
    runs
}

impl HostTier {
    /// Makes the copies on the list. Where the machine fails, the rest is lost, and every call says so until what is
    /// here is [forgotten](HostTier::reset).
    pub(crate) fn carry_out(&mut self, machine: &mut dyn Machine) -> Result<(), kernels::Error> {
        match &self.failure {
            Some(failure) => Err(failure.clone()),
            None => self.copy(machine).inspect_err(|error| self.failure = Some(error.clone())),
        }
    }

    fn copy(&mut self, machine: &mut dyn Machine) -> Result<(), kernels::Error> {
        let moves = take(&mut self.moves);
        for run in runs(&moves) {
            let begun = self.clock.map(|now| now());
            self.save(machine, run)?;
            self.load(machine, run)?;
            self.put(run);
            if let (Some(now), Some(begun)) = (self.clock, begun)
                && let Some(direction) = run.first().and_then(Move::direction)
            {
                let bytes = (run.len() * self.block_bytes) as u64;
                self.timed.push(Copied { direction, bytes, elapsed: now() - begun });
            }
        }
        Ok(())
    }

    /// The run's blocks to their slots, if that is what it is about.
    fn save(&mut self, machine: &dyn Machine, run: &[Move]) -> Result<(), kernels::Error> {
        let saves: Vec<(u32, usize)> = run
            .iter()
            .filter_map(|step| match *step {
                Move::Save { block, slot } => Some((block, slot as usize)),
                Move::Load { .. } | Move::Put { .. } => None,
            })
            .collect();
        let mut slots: Vec<Arc<[u8]>> = saves.iter().map(|&(_, slot)| take(&mut self.slots[slot])).collect();
        let targets = slots.iter_mut().map(|slot| own(slot, self.block_bytes));
        let mut list: Vec<_> = saves.iter().map(|&(block, _)| block).zip(targets).collect();
        let saved = expected(machine.save_blocks(&mut list));
        for (&(_, slot), bytes) in saves.iter().zip(slots) {
            self.slots[slot] = bytes;
        }
        self.saved_blocks += saves.len() as u64;
        saved
    }

    /// The run's slots to their blocks, if that is what it is about.
    fn load(&mut self, machine: &mut dyn Machine, run: &[Move]) -> Result<(), kernels::Error> {
        let list: Vec<(u32, &[u8])> = run
            .iter()
            .filter_map(|step| match *step {
                Move::Load { slot, block } => Some((block, &*self.slots[slot as usize])),
                Move::Save { .. } | Move::Put { .. } => None,
            })
            .collect();
        self.loaded_blocks += list.len() as u64;
        expected(machine.load_blocks(&list))
    }

    /// What the file's thread read to its slots, if that is what the run is about.
    fn put(&mut self, run: &[Move]) {
        for step in run {
            if let Move::Put { bytes, slot } = step {
                self.slots[*slot as usize] = Arc::clone(bytes);
            }
        }
    }

    /// Copies a block that nobody reads there and back so often, for a caller with a clock. Returns how many bytes that
    /// is, both ways together.
    pub(crate) fn exercise(&self, machine: &mut dyn Machine, times: u32) -> Result<u64, kernels::Error> {
        let mut bytes = vec![0; self.block_bytes];
        for _ in 0..times {
            expected(machine.save_blocks(&mut [(0, &mut bytes[..])]))?;
            expected(machine.load_blocks(&[(0, &bytes[..])]))?;
        }
        Ok(2 * u64::from(times) * self.block_bytes as u64)
    }
}

/// The bytes of a slot to be written over; its first, if it has none of its own.
fn own(slot: &mut Arc<[u8]>, block_bytes: usize) -> &mut [u8] {
    if slot.is_empty() || Arc::get_mut(slot).is_none() {
        *slot = vec![0; block_bytes].into();
    }
    Arc::get_mut(slot).expect("nobody else has what was just made")
}

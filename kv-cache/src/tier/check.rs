//! The audit of the tiers: everything that must hold between two calls, counted again from the beginning.

use std::collections::BTreeMap;

use super::job::Work;
use super::level::State;
use super::tiers::DeviceUse;
use super::{JobId, Key, Place, TierId, TierSlot, Tiers};
use crate::{BlockCount, BlockId};

/// An invariant that does not hold. Seeing one means that this crate has a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TierViolation {
    /// A slot is free and not listed, listed and not free, or listed twice.
    #[error("slot {slot} of tier {tier} and the list of free slots disagree")]
    Free {
        /// The tier.
        tier: TierId,
        /// The slot.
        slot: u32,
    },
    /// A slot whose content is not found under its key, or a key that leads to a slot without it.
    #[error("slot {slot} of tier {tier} and the index disagree")]
    Index {
        /// The tier.
        tier: TierId,
        /// The slot.
        slot: u32,
    },
    /// The index has more or fewer keys than there are slots with content.
    #[error("tier {tier} has content in {held} slots, its index has {indexed}")]
    Count {
        /// The tier.
        tier: TierId,
        /// Slots with content.
        held: usize,
        /// Keys.
        indexed: usize,
    },
    /// The lists of the eviction order disagree with each other.
    #[error("the eviction order of tier {tier} is broken")]
    Order {
        /// The tier.
        tier: TierId,
    },
    /// Other jobs are at work on a slot than it counts.
    #[error("{jobs} jobs are at work on slot {slot} of tier {tier}, it counts {counted}")]
    Jobs {
        /// The tier.
        tier: TierId,
        /// The slot.
        slot: u32,
        /// Jobs that name it.
        jobs: u32,
        /// Its count.
        counted: u32,
    },
    /// A slot that is being written by no job, or by two.
    #[error("slot {slot} of tier {tier} is being written by job {job}, which does not say so")]
    Writer {
        /// The tier.
        tier: TierId,
        /// The slot.
        slot: u32,
        /// The job it names.
        job: JobId,
    },
    /// A block of the device that jobs use otherwise than noted.
    #[error("the jobs use block {block} of the device otherwise than noted")]
    Device {
        /// The block.
        block: BlockId,
    },
    /// The states of all slots do not add up to the tier.
    #[error("tier {tier} has {slots} slots, their states add up to {sum}")]
    Sum {
        /// The tier.
        tier: TierId,
        /// Slots.
        slots: BlockCount,
        /// Their sum.
        sum: BlockCount,
    },
}

pub(super) fn check<K: Key>(tiers: &Tiers<K>) -> Result<(), TierViolation> {
    for (tier, _) in tiers.tiers() {
        check_free(tiers, tier)?;
        check_index(tiers, tier)?;
    }
    check_jobs(tiers)
}

fn check_free<K: Key>(tiers: &Tiers<K>, tier: TierId) -> Result<(), TierViolation> {
    let level = tiers.level(tier);
    let mut listed = vec![false; level.slots.len()];
    for &slot in &level.free {
        if std::mem::replace(&mut listed[slot as usize], true) {
            return Err(TierViolation::Free { tier, slot });
        }
    }
    for (slot, place) in (0..).zip(&level.slots) {
        let free = place.state == State::Free;
        let unused = place.jobs == 0;
        if listed[slot as usize] != free || (free && !unused) || (place.state == State::Gone && unused) {
            return Err(TierViolation::Free { tier, slot });
        }
    }
    let stats = level.stats(tiers.counted[usize::from(tier.0)]);
    let sum = BlockCount(stats.free.0 + stats.ready.0 + stats.writing.0 + stats.gone.0);
    let slots = level.config.slots;
    if sum == slots { Ok(()) } else { Err(TierViolation::Sum { tier, slots, sum }) }
}

fn check_index<K: Key>(tiers: &Tiers<K>, tier: TierId) -> Result<(), TierViolation> {
    let level = tiers.level(tier);
    let mut held = 0;
    for (slot, place) in (0..).zip(&level.slots) {
        if let State::Ready(key) | State::Writing(key, _) = place.state {
            held += 1;
            if level.slot(&key) != Some(slot) {
                return Err(TierViolation::Index { tier, slot });
            }
        }
    }
    let indexed = level.order.len();
    if held != indexed {
        return Err(TierViolation::Count { tier, held, indexed });
    }
    if level.order.is_sound() && level.due.is_sound() { Ok(()) } else { Err(TierViolation::Order { tier }) }
}

/// Counts again what all jobs hold.
fn check_jobs<K: Key>(tiers: &Tiers<K>) -> Result<(), TierViolation> {
    let mut counts: BTreeMap<TierSlot, u32> = BTreeMap::new();
    let mut writers: BTreeMap<TierSlot, JobId> = BTreeMap::new();
    let mut device: BTreeMap<BlockId, DeviceUse> = BTreeMap::new();
    for (&job, entry) in &tiers.jobs {
        let (places, transfers) = match &entry.work {
            Work::Pin(places) => (&places[..], &[][..]),
            Work::Copy { transfers, settled } => (&[][..], &transfers[*settled..]),
        };
        for &place in places {
            *counts.entry(place).or_default() += 1;
        }
        for transfer in transfers {
            match transfer.from {
                Place::Tier(from) => *counts.entry(from).or_default() += 1,
                Place::Device(block) => match device.entry(block).or_insert(DeviceUse::Read(0)) {
                    DeviceUse::Read(jobs) => *jobs += 1,
                    DeviceUse::Written => return Err(TierViolation::Device { block }),
                },
            }
            match transfer.to {
                Place::Tier(to) => {
                    *counts.entry(to).or_default() += 1;
                    if writers.insert(to, job).is_some() {
                        return Err(TierViolation::Writer { tier: to.tier, slot: to.slot, job });
                    }
                }
                Place::Device(block) if device.insert(block, DeviceUse::Written).is_some() => {
                    return Err(TierViolation::Device { block });
                }
                Place::Device(_) => {}
            }
        }
    }
    for (tier, level) in tiers.tiers() {
        for (slot, place) in (0..).zip(&level.slots) {
            let here = TierSlot { tier, slot };
            let jobs = counts.get(&here).copied().unwrap_or(0);
            if jobs != place.jobs {
                return Err(TierViolation::Jobs { tier, slot, jobs, counted: place.jobs });
            }
            match place.state {
                State::Writing(_, job) if writers.get(&here) != Some(&job) => {
                    return Err(TierViolation::Writer { tier, slot, job });
                }
                _ => {}
            }
        }
    }
    let noted = device.keys().chain(tiers.device.keys());
    match noted.into_iter().find(|block| device.get(block) != tiers.device.get(block)) {
        Some(&block) => Err(TierViolation::Device { block }),
        None => Ok(()),
    }
}

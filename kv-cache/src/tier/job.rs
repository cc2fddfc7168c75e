//! What is copied, and what became of it.

use std::fmt;

use crate::{BlockCount, BlockId};

/// A tier, counted from the device: 0 is the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TierId(pub u8);

/// A place for one block in a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TierSlot {
    /// The tier.
    pub tier: TierId,
    /// Its slot, from 0.
    pub slot: u32,
}

/// Where the bytes of a block lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// In the device's pool.
    Device(BlockId),
    /// In a tier.
    Tier(TierSlot),
}

/// One block to copy. The bytes of `from` stay as they are until the job has ended; those of `to` mean nothing
/// before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer<K> {
    /// What is copied. A store shared by several machines, or one without slots, files it under this.
    pub key: K,
    /// The source.
    pub from: Place,
    /// The target.
    pub to: Place,
}

/// A list of transfers under way, or a pin. Numbers are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// How a job ended. Copies are counted from 0, in the order of the job's transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// Every copy was made.
    All,
    /// The first so many were made. The others were given up (cancelled, timed out, or a rank has fewer): what they
    /// would have read is as good as before.
    First(u32),
    /// Every copy was made but these, which failed. What a tier could not deliver it is taken not to have: whoever
    /// asks again is not sent into the same failure.
    AllBut(&'a [u32]),
}

/// What the end of a job comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It counts.
    Counted {
        /// Copies made before the first that was not. A sequence whose load this was has so many blocks more and
        /// computes from there on: what lies behind a bad block is not trusted.
        leading: BlockCount,
        /// Copies made in all.
        made: BlockCount,
    },
    /// The tiers were reset since the job began: it gives its slots back and changes nothing else.
    Late,
}

/// A job as the tiers remember it.
#[derive(Clone, Debug)]
pub(super) struct Job<K> {
    pub(super) generation: u32,
    pub(super) work: Work<K>,
}

#[derive(Clone, Debug)]
pub(super) enum Work<K> {
    /// Copies, of which the first `settled` are done with.
    Copy { transfers: Vec<Transfer<K>>, settled: usize },
    /// Content that is kept where it is.
    Pin(Vec<TierSlot>),
}

impl Outcome<'_> {
    /// The copy that the outcome names and that is not among `first..end`, if any.
    pub(super) fn stranger(&self, first: usize, end: usize) -> Option<usize> {
        match self {
            Outcome::All => None,
            Outcome::First(made) => Some(*made as usize).filter(|made| *made < first || *made > end),
            Outcome::AllBut(bad) => {
                bad.iter().map(|&index| index as usize).find(|index| *index < first || *index >= end)
            }
        }
    }
}

impl fmt::Display for TierId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `d3` for block 3 of the device, `1:7` for slot 7 of tier 1.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Device(block) => write!(f, "d{block}"),
            Place::Tier(place) => write!(f, "{}:{}", place.tier, place.slot),
        }
    }
}

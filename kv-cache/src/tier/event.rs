//! What is told of the tiers: to indexes elsewhere, and to gauges.

use super::{Place, TierId};
use crate::BlockCount;

/// Something that happened to content in a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TierEvent<K> {
    /// It can be read here from now on.
    Stored {
        /// What.
        key: K,
        /// Where.
        tier: TierId,
        /// Where it was copied from, and may still be. None when it was there before we heard of it.
        from: Option<Place>,
    },
    /// It cannot be read here any more.
    Removed {
        /// What.
        key: K,
        /// Where.
        tier: TierId,
        /// The nearest tier that still has it.
        still_in: Option<TierId>,
    },
    /// Nothing can be read anywhere any more.
    Cleared {
        /// The generation that begins.
        generation: u32,
    },
}

/// A tier in numbers. The blocks are those of the moment, `free + ready + writing + gone` are all slots; the counters
/// only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Slots that hold nothing.
    pub free: BlockCount,
    /// Slots whose content can be read.
    pub ready: BlockCount,
    /// Slots that are being written.
    pub writing: BlockCount,
    /// Slots whose content was forgotten while a job was at work on them.
    pub gone: BlockCount,
    /// Of the `ready` ones: those that jobs read or pins keep.
    pub held: BlockCount,
    /// Blocks read from the tier.
    pub reads: u64,
    /// Reads that failed or were given up.
    pub failed_reads: u64,
    /// Blocks written to the tier.
    pub writes: u64,
    /// Writes that failed or were given up.
    pub failed_writes: u64,
    /// Blocks given up for others.
    pub evictions: u64,
}

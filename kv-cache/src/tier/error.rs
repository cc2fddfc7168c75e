//! What the tiers say to wrong input. No error changes anything.

use super::{JobId, TierId};
use crate::{BlockCount, BlockId};

/// Wrong input, with its numbers. An `index` counts the items of the call, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TierError {
    /// No tier at all, or more than can be named.
    #[error("there are 1 to {max} tiers, not {tiers}")]
    TierCount {
        /// The number given.
        tiers: usize,
        /// The most there can be.
        max: usize,
    },
    /// A tier without room.
    #[error("tier {tier} has no slot")]
    NoSlots {
        /// Which.
        tier: TierId,
    },
    /// A tier whose write rule can never be met.
    #[error(
        "tier {tier} would store after {offers} offers and remember {tracked} keys: nothing would be stored, or all"
    )]
    NeverWritten {
        /// Which.
        tier: TierId,
        /// Offers until it stores.
        offers: u32,
        /// Keys whose offers it counts.
        tracked: u32,
    },
    /// The nearest tier cannot be staged: there is none to promote its content to.
    #[error("tier {tier} is the nearest one, the device must reach it")]
    Unreachable {
        /// Which.
        tier: TierId,
    },
    /// There is no such tier.
    #[error("there is no tier {tier}, there are {tiers}")]
    NoTier {
        /// The one named.
        tier: TierId,
        /// How many there are.
        tiers: usize,
    },
    /// Content that is to be read is not there, or not there yet. Look it up first.
    #[error("item {index} is in no tier that could be read")]
    NotThere {
        /// The item.
        index: usize,
    },
    /// Content that the device cannot read where it is. Promote it first.
    #[error("item {index} is in tier {tier} only, which the device cannot read")]
    Staged {
        /// The item.
        index: usize,
        /// Where it is.
        tier: TierId,
    },
    /// The null block, or a block that a job under way reads or writes.
    #[error("block {block} of item {index} is the null block or in use by a transfer")]
    BlockBusy {
        /// The item.
        index: usize,
        /// The block.
        block: BlockId,
    },
    /// Something was said of a job that never began or has ended.
    #[error("job {job} is not under way, {next} is the next to begin")]
    UnknownJob {
        /// The one named.
        job: JobId,
        /// The number of the next.
        next: JobId,
    },
    /// An outcome that names a copy which the job does not have, or which was reported as made.
    #[error("job {job} has copies {first} to {end} under way, not {index}")]
    NoSuchCopy {
        /// The job.
        job: JobId,
        /// The copy named.
        index: usize,
        /// The first that is under way.
        first: usize,
        /// One past the last.
        end: usize,
    },
    /// An answer for a tier that asks nobody.
    #[error("tier {tier} knows what it has, nobody asked")]
    NotAsked {
        /// Which.
        tier: TierId,
    },
    /// A dump is restored into a tier that holds nothing and that no job touches.
    #[error("tier {tier} holds {held} blocks already: a dump is restored into an empty tier")]
    NotEmpty {
        /// Which.
        tier: TierId,
        /// Slots that are not free.
        held: BlockCount,
    },
    /// A dump of another tier, or from before a reset.
    #[error(
        "the dump is of identity {identity:#x}, generation {generation}; the tier of {own_identity:#x}, {own_generation}"
    )]
    Foreign {
        /// Identity of the dump.
        identity: u64,
        /// Generation of the dump.
        generation: u32,
        /// Identity of the tier.
        own_identity: u64,
        /// Generation of the tier.
        own_generation: u32,
    },
    /// A dump that names a slot which does not exist, or a slot or a key twice.
    #[error("item {index} of the dump names slot {slot}, which does not exist or is taken, or its key again")]
    BadDump {
        /// The item.
        index: usize,
        /// Its slot.
        slot: u32,
    },
}

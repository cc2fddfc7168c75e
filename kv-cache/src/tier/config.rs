//! What a tier is made of.

use super::TierError;
use crate::BlockCount;

/// One tier: a numbered row of slots, each as large as a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierConfig {
    /// What it is. Says nothing to the decisions, but events name it.
    pub medium: Medium,
    /// How many blocks it holds.
    pub slots: BlockCount,
    /// Whom it gives up when it is full.
    pub eviction: TierEviction,
    /// What is stored in it of all that the tier above (the device, for the nearest one) has.
    pub write: Write,
    /// Whether others put content into it too.
    pub contents: Contents,
    /// Whether the device cannot read it: its content is promoted to a nearer tier before it is loaded.
    pub staged: bool,
    /// Names what the bytes of a slot mean: model, layout, data type, hash algorithm and seed, as a number of your
    /// choice. A dump is restored only into a tier of equal identity.
    pub identity: u64,
}

/// Where the bytes of a tier lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Medium {
    /// Memory of this machine.
    Host,
    /// A file or a drive of this machine.
    Disk,
    /// Another machine, or a store that several machines share.
    Remote,
}

/// Which content makes room for new content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TierEviction {
    /// What was used longest ago.
    #[default]
    Lru,
    /// Adaptive replacement: what was used once and what was used more often have lists of their own, which
    /// trade room as what was given up comes back. One long document does not drive out what is used daily.
    Arc,
}

/// What a tier takes of what the tier above it offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// What has been offered `offers` times: 1 is write-through, 2 is write on the second hit. Counts are
    /// remembered for the `tracked` keys offered last; a write-through tier needs none.
    After {
        /// Offers until content is stored; at least one.
        offers: u32,
        /// Keys whose offers are remembered.
        tracked: u32,
    },
    /// What is about to leave the tier above, which then never gives up anything that this tier does not have.
    Back {
        /// How many of the next to leave the tier above [`flush`](super::Tiers::flush) copies ahead of need.
        /// Nothing is flushed from the device, whose content is offered when it leaves.
        ahead: u32,
    },
}

impl Write {
    /// Everything, at its first offer.
    pub const THROUGH: Write = Write::After { offers: 1, tracked: 0 };
}

/// Who knows what a tier has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Contents {
    /// We do: nobody else writes to it.
    #[default]
    Own,
    /// A store that others fill and empty as well. What we do not know of we ask for: a lookup says
    /// [`Retry`](super::Lookup::Retry), and an answer comes with [`Tiers::answer`](super::Tiers::answer).
    /// A "no" is believed for the `remembered` keys that were denied last.
    Asked {
        /// Keys whose absence is remembered.
        remembered: u32,
    },
}

impl TierConfig {
    /// A tier of this process alone that is written through, gives up the least recently used, and is read by the
    /// device directly unless it is remote.
    pub const fn new(medium: Medium, slots: BlockCount) -> TierConfig {
        TierConfig {
            medium,
            slots,
            eviction: TierEviction::Lru,
            write: Write::THROUGH,
            contents: Contents::Own,
            staged: matches!(medium, Medium::Remote),
            identity: 0,
        }
    }

    pub(super) fn validate(&self, tier: super::TierId) -> Result<(), TierError> {
        if self.slots == BlockCount(0) {
            return Err(TierError::NoSlots { tier });
        }
        if let Write::After { offers, tracked } = self.write
            && (offers == 0 || (offers > 1 && tracked == 0))
        {
            return Err(TierError::NeverWritten { tier, offers, tracked });
        }
        if tier.0 == 0 && self.staged {
            return Err(TierError::Unreachable { tier });
        }
        Ok(())
    }
}

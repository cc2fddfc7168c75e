//! Tiers behind the device: host memory, disks and stores that machines share, as one mechanism.
//!
//! ```text
//!            store                flush                 flush
//!  device  ---------->  tier 0  ---------->  tier 1  ---------->  tier 2
//!  blocks               host                 disk                 remote
//!          <----------          <----------          <----------
//!            load                promote               promote
//! ```
//!
//! [`Tiers`] says which copy to make and when a slot may be used again. It copies nothing, waits for nothing and knows
//! no clock: you make the [`Transfer`]s of a job, in any order and as slowly as you like, and say how it ended. It
//! knows content by a key of your choice, such as the hash of a block and its group.

mod begin;
mod check;
mod config;
mod content;
mod dump;
mod end;
mod error;
mod event;
mod flush;
mod job;
mod level;
mod lookup;
mod offload;
mod order;
mod prefetch;
mod recent;
mod tell;
mod tiers;

use std::fmt::Debug;

pub use begin::{Occasion, Store};
pub use check::TierViolation;
pub use config::{Contents, Medium, TierConfig, TierEviction, Write};
pub use content::BlockKey;
pub use dump::Origin;
pub use error::TierError;
pub use event::{TierEvent, TierStats};
pub use job::{Ended, JobId, Outcome, Place, TierId, TierSlot, Transfer};
pub use lookup::{Lookup, Reach};
pub use offload::{Advice, External, Finished, LoadStart, Offload, OffloadError};
pub use prefetch::{Fetch, Patience, Verdict, agreed};
pub use tiers::Tiers;

/// What content is known by. Equal keys mean equal bytes, in every process and for ever.
pub trait Key: Copy + Ord + Debug {}

impl<T: Copy + Ord + Debug> Key for T {}

#[cfg(test)]
mod testing {
    use super::*;
    use crate::{BlockCount, BlockId};

    pub(super) const HOST: TierId = TierId(0);
    pub(super) const DISK: TierId = TierId(1);

    pub(super) fn host(slots: u32) -> TierConfig {
        TierConfig::new(Medium::Host, BlockCount(slots))
    }

    /// A shared store that must be asked what it has, so many of whose answers are remembered.
    pub(super) fn store(remembered: u32) -> TierConfig {
        let contents = Contents::Asked { remembered };
        TierConfig { contents, ..TierConfig::new(Medium::Remote, BlockCount(3)) }
    }

    pub(super) fn tiers(configs: &[TierConfig]) -> Tiers<u32> {
        Tiers::new(configs, 0).unwrap()
    }

    /// Key `n` comes from block `n` of the device.
    pub(super) fn items(keys: &[u32]) -> Vec<(u32, BlockId)> {
        keys.iter().map(|&key| (key, BlockId(key))).collect()
    }

    /// Begins a store of what is to begin.
    pub(super) fn begin(store: Store) -> JobId {
        match store {
            Store::Begun { job, .. } => job,
            other => panic!("a job was to begin: {other:?}"),
        }
    }

    /// Stores keys in the nearest tier, all well.
    pub(super) fn put(tiers: &mut Tiers<u32>, keys: &[u32]) {
        let job = begin(tiers.store(HOST, &items(keys)).unwrap());
        tiers.complete(job, Outcome::All).unwrap();
        tiers.check().unwrap();
    }

    /// The keys that were given up since this was last asked.
    pub(super) fn removed(tiers: &mut Tiers<u32>) -> Vec<u32> {
        let removed = tiers.events().filter_map(|event| match event {
            TierEvent::Removed { key, .. } => Some(key),
            _ => None,
        });
        removed.collect()
    }
}

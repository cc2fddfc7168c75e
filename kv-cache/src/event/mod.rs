//! What others must hear to know what can be found here: routers that send a prompt to where its beginning is cached,
//! and indexers that they ask.
//!
//! One event is one change of what can be found, in the device or in a tier behind it, numbered without holes from 0.
//! In each of these places content is stored when its first copy can be found and removed when its last one cannot: who
//! applies the events in order has the index. [`Replica`](crate::Replica) does that and refuses a hole; after one,
//! [`Snapshot`] begins it anew. [`EventBatch`] writes them as vLLM sends them.

mod about;
mod batch;
mod log;
mod message_pack;
mod snapshot;
mod stored;

use crate::GroupId;
use crate::tier::{Medium, TierId};

pub use batch::{BlockNames, EventBatch};
pub(crate) use log::Events;
pub use snapshot::Snapshot;
pub use stored::Stored;

/// Where content lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// The pool of this cache; vLLM's `GPU`.
    #[default]
    Device,
    /// A tier; vLLM's `CPU` and `STORAGE`.
    Tier {
        /// Which, counted from the device.
        tier: TierId,
        /// What it is.
        medium: Medium,
    },
}

/// One change of what can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a, D> {
    /// Consecutive blocks of a sequence, or a block of a tier, can be found now where they could not.
    Stored(Stored<'a, D>),
    /// A block can be found there no longer: its last copy there is gone. Of a tier: no other tier has it.
    Removed {
        /// Its name.
        block: D,
        /// In which group it was found.
        group: GroupId,
        /// Where it lay.
        location: Location,
    },
    /// A tier has given up a block because of room, or failed to deliver it, and another one has it still.
    Moved {
        /// Its name.
        block: D,
        /// In which group it is found.
        group: GroupId,
        /// Where it lay.
        from: Location,
        /// Where it still lies.
        to: Location,
    },
    /// Nothing can be found there any more.
    Cleared {
        /// Where.
        location: Location,
    },
}

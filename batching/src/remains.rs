//! Room that outlives its use: steps in flight may still touch it, bytes are still arriving in it, or
//! another machine still reads it.

use std::collections::BTreeMap;

use crate::id::{RequestId, StepId, Tick};

/// Why the room of an id is not free yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Remains {
    /// This step, or an earlier one, is in flight and may touch it. The request may be here, and wait.
    Fenced(StepId),
    /// Its request left while its tokens were on their way.
    Arriving,
    /// Its request ended, and another machine fetches it.
    HandedOver { since: Tick },
}

/// All such room, by the id that had it.
pub(crate) type AllRemains = BTreeMap<RequestId, Remains>;

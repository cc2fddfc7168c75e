//! What the cache tells of itself: events for those who index it, and how long content stays.

use crate::event::{Event, Snapshot};
use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::residency::Residency;
use crate::{KvCache, Tick};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Shows every change of the index since the last call, with its number, and forgets it. Numbers begin at 0 and
    /// have no holes, unless more than [`Config::events_max`](crate::Config::events_max) events happened since:
    /// then all that were kept are lost, the numbers show it, and a [`snapshot`](KvCache::snapshot) helps.
    ///
    /// Where there are tiers, [`Offload::drain_events`](crate::tier::Offload::drain_events) shows what happened in them
    /// as well, in the same stream.
    pub fn drain_events(&mut self, hear: impl FnMut(u64, Event<'_, H::Digest>)) {
        if let Some(events) = &mut self.blocks.prefix.events {
            events.drain(hear);
        }
    }

    /// Everything that can be found now: what all events so far come to, those included that were not drained yet.
    /// None if the cache tells nothing ([`Config::events_max`](crate::Config::events_max)). What tiers have is in
    /// [`Offload::snapshot`](crate::tier::Offload::snapshot).
    ///
    /// Cost: O(n log n) in cached blocks.
    pub fn snapshot(&self) -> Option<Snapshot<H::Digest>> {
        let prefix = &self.blocks.prefix;
        prefix.events.as_ref().map(|events| Snapshot::new(events, prefix.all()))
    }

    /// What the caller's clock says, in a unit of his choice. Only residency is measured with it.
    pub fn set_now(&mut self, now: Tick) {
        if let Some(watch) = &mut self.blocks.watch {
            watch.set_now(now);
        }
    }

    /// How long content stayed that was lost since the last call, on every
    /// [`residency_every`](crate::Config::residency_every)-th block. At most 4096 are kept.
    pub fn drain_residency(&mut self) -> impl Iterator<Item = Residency> + '_ {
        self.blocks.watch.iter_mut().flat_map(|watch| watch.drain())
    }
}

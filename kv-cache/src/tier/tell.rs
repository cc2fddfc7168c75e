//! One stream of events for the device and the tiers behind it.

use super::{BlockKey, Key, Lookup, Medium, Offload, TierEvent, TierId, Tiers};
use crate::{BlockHasher, Digest, Event, Eviction, KvCache, Location, Snapshot, Stored};

impl<D: Digest> Offload<D> {
    /// Shows every change of what can be found since the last call, in the device and in the tiers, with its number,
    /// and forgets it: as [`KvCache::drain_events`], with the tiers' events in the same stream.
    pub fn drain_events<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        hear: impl FnMut(u64, Event<'_, D>),
    ) {
        self.tell(cache);
        cache.drain_events(hear);
    }

    /// Everything that can be found now, in the device and in the tiers: as [`KvCache::snapshot`], tier by tier behind
    /// it. None if the cache tells nothing.
    ///
    /// Cost: O(n log n) in cached blocks, and O(n log n) in what the tiers have.
    pub fn snapshot<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
    ) -> Option<Snapshot<D>> {
        self.tell(cache);
        let mut snapshot = cache.snapshot()?;
        let events = cache.blocks.prefix.events.as_ref()?;
        for (tier, level) in self.tiers.tiers() {
            let location = Location::Tier { tier, medium: level.config.medium };
            let there = level.order.oldest_first().map(|(key, _)| key);
            snapshot.add_tier(location, there.filter(|key| level.ready(key).is_some()), events);
        }
        Some(snapshot)
    }

    /// What blocks of a restored tier are about, which no sequence of this process had: as a
    /// [`snapshot`](Offload::snapshot) told it before the restart, and was kept beside the list. Said before events are
    /// drained, those tell it.
    pub fn describe<H: BlockHasher<Digest = D>, E: Eviction>(
        &mut self,
        cache: &mut KvCache<H, E>,
        stored: &Stored<'_, D>,
    ) {
        if let (Some(events), &[digest]) = (&mut cache.blocks.prefix.events, stored.blocks) {
            events.describe(BlockKey { digest, group: stored.group }, stored);
        }
    }

    /// Puts what happened in the tiers into the stream of the cache, if it tells.
    pub(super) fn tell<H: BlockHasher<Digest = D>, E: Eviction>(&mut self, cache: &mut KvCache<H, E>) {
        let happened = self.tiers.events.drain(..);
        if let Some(events) = &mut cache.blocks.prefix.events {
            let media: Vec<Medium> = self.tiers.levels.iter().map(|level| level.config.medium).collect();
            happened.for_each(|event| events.happened(event, &media));
            let slots: u32 = self.tiers.levels.iter().map(|level| level.config.slots.get()).sum();
            let tiers = &self.tiers;
            events.forget_afar(2 * slots as usize, |key| tiers.find(key) != Lookup::Miss);
        }
    }
}

impl<K: Key> Tiers<K> {
    /// From now on somebody else hears the events, from the beginning: what can be read now is told as if it had just
    /// been stored.
    pub(super) fn join(&mut self) {
        self.joined = true;
        self.events.clear();
        let mut there = Vec::new();
        for (tier, level) in self.tiers() {
            let ready = level.order.oldest_first().filter(|(key, _)| level.ready(key).is_some());
            there.extend(ready.map(|(key, _)| TierEvent::Stored { key, tier, from: None }));
        }
        self.events = there;
    }

    /// A tier does not have the content any more.
    pub(super) fn note_removed(&mut self, key: K, tier: TierId) {
        let still_in = self.tiers().find(|(_, level)| level.ready(&key).is_some()).map(|(other, _)| other);
        self.events.push(TierEvent::Removed { key, tier, still_in });
    }
}

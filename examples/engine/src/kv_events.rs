//! What the cache and the memory behind it tell routers and indexers.

use quayline_kv_cache::{BlockNames, EventBatch};

use crate::engine::Engine;

/// Events between two calls of [`Engine::tell`]: more are not told one by one, but as everything that can be found.
pub(crate) const EVENTS_MAX: u32 = 1 << 16;

impl Engine {
    /// What [`tell`](Engine::tell) adds to. None unless [`Options::kv_events`](crate::Options::kv_events) says so.
    #[must_use]
    pub fn event_batch(&self, names: BlockNames) -> Option<EventBatch> {
        let config = self.memory.cache.config();
        (config.events_max > 0).then(|| EventBatch::new(config.hash_unit(), names))
    }

    /// Adds every change of what can be found, here or in the memory behind the cache, since this was last called. It
    /// waits for nothing; a caller who tells after each step tells of blocks before their step's successor runs.
    ///
    /// # Panics
    /// When this engine makes no [batches](Engine::event_batch).
    pub fn tell(&mut self, batch: &mut EventBatch) {
        let memory = &mut self.memory;
        memory.drain_events(|number, event| batch.add(number, &event));
        if !batch.is_whole() {
            batch.begin_anew(&memory.event_snapshot().expect("an engine with batches tells"));
        }
    }
}

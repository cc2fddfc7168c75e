//! Bytes that move before a step computes.

use quayline_gpu_kernels::Ops;

use crate::engine::Engine;

impl Engine {
    /// Copies what forked sequences share in part, and are about to write into, to blocks of their own.
    ///
    /// # Panics
    /// When the cache names blocks that the pool does not have: a bug of ours.
    pub(crate) fn copy_on_write(&mut self) {
        let cache = &mut self.memory.cache;
        let pairs: Vec<(u32, u32)> =
            cache.copies().iter().map(|copy| (copy.from.get(), copy.to.get())).collect();
        if !pairs.is_empty() {
            let copied = self.model.ops().copy_blocks(&mut self.pool, &pairs);
            copied.expect("the cache and the pool have the same blocks");
            self.totals.copied_blocks += pairs.len() as u64;
        }
        cache.end_step();
    }
}

//! Bytes that move before a step computes.

use std::time::{Duration, Instant};

use quayline_batching::{Admitted, Costs, Preemption, Source};
use quayline_gpu_kernels as kernels;

use crate::engine::Engine;
use crate::failure::expected;
use crate::host_tier::HostTier;
use crate::options::Speeds;
use crate::request::RequestId;

/// Blocks that a step copied one after the other in one direction between the cache and host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Which way.
    pub direction: Direction,
    /// Of all of them.
    pub bytes: u64,
    /// As long as the engine's thread took.
    pub elapsed: Duration,
}

/// A way between the cache and host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To host memory.
    Store,
    /// Back to the cache.
    Load,
}

impl Engine {
    /// All copies that the plan asks for: what leaves the device and what comes back to it, in the order in which
    /// it was decided, then copies of shared blocks.
    ///
    /// # Panics
    /// When the cache names blocks that the pool does not have: a bug of ours.
    pub(crate) fn move_blocks(&mut self) -> Result<(), kernels::Error> {
        if let Some(host) = &mut self.memory.host {
            host.carry_out(&mut *self.machine)?;
            host.spill();
        }
        self.copy_on_write()
    }

    /// Books what host memory brought one who starts or resumes.
    pub(crate) fn note_host(&mut self, admitted: &Admitted) {
        if self.memory.host.is_none() {
            return;
        }
        // What is swapped in was promised, and a fork is another's: neither is looked for.
        if matches!(admitted.source, Source::Swap | Source::Fork(_)) {
            return;
        }
        let active = self.active.get(&RequestId(admitted.id.0));
        if active.is_some_and(|active| active.delivered && active.started.is_none()) {
            return;
        }
        let loaded = loaded_tokens(admitted);
        let found_here = admitted.cached_tokens - loaded;
        self.host_hits.queries += u64::from(admitted.known_tokens - found_here);
        self.host_hits.hits += u64::from(loaded);
    }

    /// Copies a block to host memory and back, so often, and returns the bytes of all copies: with your clock, what
    /// [`Speeds::bytes_per_second`] is. `None` without host memory, and where the machine fails.
    ///
    /// # Panics
    /// When the pool has no block: a bug of ours.
    pub fn exercise_copies(&mut self, times: u32) -> Option<u64> {
        let host = self.memory.host.as_ref()?;
        host.exercise(&mut *self.machine, times).ok()
    }

    /// From now on copies between the cache and host memory are timed with the caller's clock, for
    /// [`drain_copies`](Engine::drain_copies). Nothing else looks at it.
    pub fn time_copies(&mut self, clock: fn() -> Instant) {
        if let Some(host) = &mut self.memory.host {
            host.time_copies(clock);
        }
    }

    /// The copies that were [timed](Engine::time_copies) since this was last asked; until then all of them are kept.
    pub fn drain_copies(&mut self) -> impl Iterator<Item = Copied> + '_ {
        self.memory.host.iter_mut().flat_map(HostTier::drain_copies)
    }

    /// How fast copies and prompts are, as the caller, who has a clock, measured it. From now on this decides who is
    /// moved and who computes again, under [`Preemption::Cheaper`](crate::Preemption::Cheaper).
    pub fn set_speeds(&mut self, speeds: Speeds) {
        if let Preemption::Cheaper(costs) = self.batcher.config().preemption {
            let Speeds { bytes_per_second, prefill_tokens_per_second } = speeds;
            let costs = Costs { bytes_per_second, prefill_tokens_per_second, ..costs };
            self.batcher.set_preemption(Preemption::Cheaper(costs));
        }
    }

    /// Copies what forked sequences share in part, and are about to write into, to blocks of their own.
    fn copy_on_write(&mut self) -> Result<(), kernels::Error> {
        let cache = &mut self.memory.cache;
        let pairs: Vec<(u32, u32)> =
            cache.copies().iter().map(|copy| (copy.from.get(), copy.to.get())).collect();
        if !pairs.is_empty() {
            expected(self.machine.copy_blocks(&pairs))?;
            self.totals.copied_blocks += pairs.len() as u64;
        }
        cache.end_step();
        Ok(())
    }
}

/// How many tokens of one who starts or resumes were found in host memory.
pub(crate) fn loaded_tokens(admitted: &Admitted) -> u32 {
    match admitted.source {
        Source::Remote { tokens } => tokens,
        Source::Cache | Source::Swap | Source::Fork(_) => 0,
    }
}

//! The disk behind host memory, for who calls the engine: nobody waits for it but requests that need what lies there.

use crate::adapt::PagedMemory;
use crate::engine::Engine;
use crate::host_tier::HostTier;
use crate::request::Tick;
use crate::snapshot::DiskBacklog;

impl Engine {
    /// Whether some request can do nothing before the disk has done something.
    pub(crate) fn waits_for_disk(&self) -> bool {
        self.memory.host.as_ref().is_some_and(HostTier::is_waited_for)
    }

    /// A step has brought nothing because of the disk: nor will the next one, while the same requests are here and
    /// the disk has done nothing.
    pub(crate) fn note_stuck(&mut self, tokens: u32) {
        self.stuck = (tokens == 0 && self.waits_for_disk()).then(|| self.census());
    }

    /// Requests that are here, that wait for grammars, and that wait for another engine.
    pub(crate) fn census(&self) -> [usize; 3] {
        [self.active.len(), self.grammarless.len(), self.memory.elsewhere.arriving.len()]
    }

    /// By when a caller who has nothing to step must step all the same: then somebody who waits for the disk has waited
    /// [long enough](crate::Request::targets).
    #[must_use]
    pub fn steps_at(&self) -> Option<Tick> {
        let due = self.memory.host.as_ref().filter(|host| host.is_waited_for())?.next_due()?;
        Some(Tick(due.0))
    }

    /// Takes in what the disk has done since, as every step does, and gives it more to do: for a caller who is
    /// [woken](Engine::wake_for_disk) while there is nothing to step.
    pub fn take_in_disk(&mut self) {
        let PagedMemory { cache, host: Some(host), .. } = &mut self.memory else { return };
        host.take_in(cache);
        host.spill();
    }

    /// Makes the copies that the next step would begin with, takes in what the disk has done and gives it more, for a
    /// caller who is about to end: no step comes any more. When nothing is being written of what is left, the disk has
    /// no room for it, or the machine has failed; else ask again when [woken](Engine::wake_for_disk).
    ///
    /// # Panics
    /// When the cache names blocks that the pool does not have: a bug of ours.
    pub fn flush_to_disk(&mut self) -> DiskBacklog {
        let PagedMemory { cache, host: Some(host), .. } = &mut self.memory else {
            return DiskBacklog::default();
        };
        host.take_in(cache);
        // Where the machine fails, what lies here is not to be kept.
        if host.carry_out(&mut *self.machine).is_ok() {
            host.spill();
        }
        host.backlog()
    }

    /// Blocks until the disk has done something, and takes it in. False if it has nothing to do: then all that can be
    /// kept there is.
    pub fn wait_for_disk(&mut self) -> bool {
        let PagedMemory { cache, host: Some(host), .. } = &mut self.memory else { return false };
        let done = host.wait(cache);
        host.spill();
        done
    }

    /// From now on calls `wake`, from another thread, whenever the disk has done something.
    pub fn wake_for_disk(&mut self, wake: impl Fn() + Send + 'static) {
        if let Some(host) = &mut self.memory.host {
            host.wake_with(wake);
        }
    }
}

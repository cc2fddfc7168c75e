//! A machine that fails: a GPU that is gone, or without memory for a step. Everybody who is here ends with an error,
//! and what was cached is forgotten, for nobody knows what of it is still true. The engine goes on: whether the
//! machine does, the next step shows.

use quayline_batching::{self as batching, Plan};
use quayline_gpu_kernels as kernels;
use quayline_kv_cache::SequenceId;

use crate::engine::Engine;
use crate::output::{Finish, FinishReason, Output};
use crate::request::RequestId;

/// An error to be lived with. What the machine refuses, as opposed to what it fails at, is a bug of ours: inputs are
/// checked at the door, in [`Engine::add`].
pub(crate) fn expected<T>(result: Result<T, kernels::Error>) -> Result<T, kernels::Error> {
    result.inspect_err(|error| {
        let lived_with = matches!(error, kernels::Error::Device { .. } | kernels::Error::Memory { .. });
        assert!(lived_with, "the model accepts every step that the batcher plans: {error}");
    })
}

impl Engine {
    /// What the machine said, if the last step failed: all who were here have ended with
    /// [`FinishReason::Error`].
    #[must_use]
    pub fn failure(&self) -> Option<&kernels::Error> {
        self.failure.as_ref()
    }

    /// Ends everybody, in the middle of a step.
    pub(crate) fn fail(&mut self, error: kernels::Error, plan: &Plan, outputs: &mut Vec<Output>) {
        self.failure = Some(error);
        let finish = || Some(Finish { reason: FinishReason::Error, stop: None });
        for search in self.searches.ids() {
            let found = self.end_search(search);
            outputs.extend(found.into_iter().map(|output| Output { finish: finish(), ..output }));
        }
        let here: Vec<RequestId> = self.active.keys().copied().collect();
        for id in here {
            let planned = batching::RequestId(id.0);
            self.batcher.cancel(planned, &mut self.memory);
            self.batcher.loaded(planned, &mut self.memory);
            if let Some(mut active) = self.forget(id) {
                self.totals.finished += 1;
                outputs.push(active.end(FinishReason::Error));
            }
        }
        let kept: Vec<SequenceId> = self.memory.elsewhere.handing_over.keys().copied().collect();
        for sequence in kept {
            self.handed_over(RequestId(sequence.0));
        }
        // Nobody waits for the outputs of what was planned.
        let ahead = self.drop_planned();
        for plan in [Some(plan), ahead.as_ref()].into_iter().flatten().filter(|plan| !plan.is_empty()) {
            let applied = self.batcher.apply(plan.step, &[], &mut self.memory, &mut Vec::new());
            applied.expect("a step that was planned, and whose requests have left");
        }
        self.loads.clear();
        self.memory.cache.end_step();
        while !self.memory.reset() {
            assert!(self.wait_for_disk(), "nobody is here who could need the cache");
        }
    }
}

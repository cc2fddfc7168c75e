//! A step that is recorded once and then replayed: one call to the driver in the place of one per kernel.

use std::sync::{Arc, PoisonError};

use super::Cuda;
use super::device::{Device, Memory, Recording};
use crate::Error;

/// A recorded step. It keeps to the addresses that it was recorded with.
#[derive(Debug)]
pub struct Graph {
    device: Arc<dyn Device>,
    recording: Recording,
    /// What the recorded launches use and nobody else may hold on to.
    _workspace: Arc<Memory>,
}

impl Cuda {
    /// Records what `step` launches, which does not happen until [`Graph::replay`]. The step may call operators
    /// that neither allocate nor copy from or to the host: those of a layer, on tensors that are there, with a
    /// [`Cuda::fixed_batch`] with which the same step has run before (its work is planned then).
    ///
    /// # Errors
    /// The step's own; when it allocates or copies; when the device cannot record.
    ///
    /// # Safety
    /// Tensors, weights, tables, pools and the batch of the step live as long as the graph is replayed.
    #[expect(unsafe_code, reason = "the borrow checker does not see what a recording uses")]
    pub unsafe fn capture(&self, step: impl FnOnce(&Self) -> Result<(), Error>) -> Result<Graph, Error> {
        let mut step = Some(step);
        let recording = self.device.capture(&mut || step.take().map_or(Ok(()), |step| step(self)))?;
        let workspace = Arc::clone(&self.workspace.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Graph { device: Arc::clone(&self.device), recording, _workspace: workspace })
    }
}

impl Graph {
    /// Does the recorded step again, on what its tensors and its batch hold now.
    ///
    /// # Errors
    /// When the device fails.
    pub fn replay(&self) -> Result<(), Error> {
        // SAFETY: as `capture` was promised; the workspace is ours.
        #[expect(unsafe_code, reason = "as above")]
        unsafe {
            self.device.replay(self.recording)
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.forget(self.recording);
    }
}

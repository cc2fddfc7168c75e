//! A step that is recorded once and then replayed: one call to the driver in the place of one per kernel.

use std::sync::Arc;

use super::Cuda;
use super::device::Recording;
use super::memory::Keeper;
use crate::Error;

/// A recorded step. It keeps to the addresses that it was recorded with, and all memory that was there then stays for
/// as long as there are recordings.
#[derive(Debug)]
pub struct Graph {
    device: Arc<Keeper>,
    recording: Recording,
}

impl Cuda {
    /// Records what `step` launches, which does not happen until [`Graph::replay`]. The step may call operators
    /// that neither allocate nor copy from or to the host: those of a layer, on tensors that are there, with a
    /// [`Cuda::fixed_batch`] with which the same step has run before (its work is planned then).
    ///
    /// # Errors
    /// The step's own; when it allocates or copies; when the device cannot record.
    pub fn capture(&self, step: impl FnOnce(&Self) -> Result<(), Error>) -> Result<Graph, Error> {
        let mut step = Some(step);
        let recording = self.device.capture(&mut || step.take().map_or(Ok(()), |step| step(self)))?;
        Ok(Graph { device: Arc::clone(&self.device), recording })
    }
}

impl Graph {
    /// Does the recorded step again, on what its tensors and its batch hold now. The host does not see it: a tensor's
    /// rows are as many as before, see [`Tensor::resize`](super::Tensor::resize).
    ///
    /// # Errors
    /// When the device fails.
    pub fn replay(&self) -> Result<(), Error> {
        self.device.replay(self.recording)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.forget(self.recording);
    }
}

//! Steps of nobody's before the first request: a GPU's programs are loaded and a step of one row is recorded, a CPU's
//! threads and pages are there. Tokens go to no slot, so that no cache changes; they read the null block.

use quayline_gpu_kernels::{self as kernels, BatchInput, Span};

use crate::Device;
use crate::engine::Engine;
use crate::failure::expected;
use crate::machine::{Machine, no_draw};
use crate::model::StepInput;

/// Rows of a prompt for which a GPU takes its products and its attention of many rows.
const MANY: usize = 80;

impl Engine {
    /// Computes a step of nobody's, on a GPU a prompt and a token, so that the first request does not wait for what is
    /// done once. Nothing that can be asked of the engine changes. Cost: on a CPU, that of one token.
    ///
    /// # Errors
    /// When the machine fails.
    pub fn warm_up(&mut self) -> Result<(), kernels::Error> {
        let block_size = self.memory.cache.config().block_size.get() as usize;
        let limits = self.machine.limits();
        if self.machine.device() == Device::Cuda {
            compute(&mut *self.machine, MANY.min(limits.tokens).min(limits.positions), block_size)?;
        }
        compute(&mut *self.machine, 1, block_size)
    }
}

/// A prompt of so many tokens, and a token drawn after it.
fn compute(machine: &mut dyn Machine, rows: usize, block_size: usize) -> Result<(), kernels::Error> {
    let count = u32::try_from(rows).unwrap_or(u32::MAX);
    let batch = BatchInput {
        positions: &(0..count).collect::<Vec<_>>(),
        slots: &vec![-1; rows],
        spans: &[Span { query_start: 0, query_len: count, context_len: count }],
        block_tables: &vec![0; rows.div_ceil(block_size)],
        block_size,
    };
    expected(machine.run(&StepInput { tokens: &vec![0; rows], batch, logits_rows: &[count - 1] }))?;
    if machine.draws() {
        expected(machine.draw(0, &[no_draw()], &[]).map(drop))
    } else {
        expected(machine.logits(0..1).map(drop))
    }
}

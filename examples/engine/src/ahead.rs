//! Asynchronous scheduling: the next step is planned while this one computes.
//!
//! A step planned ahead does not know the last token of those who generate, nor whether it ends them. Their parts are
//! written down when it is chosen, and left out for those whom it ended; their blocks stay their own until then
//! (`Config::fenced_frees` of the batcher). With drafts it does not know either how many are accepted: it is planned
//! as if all were, with room for as many more; when the outcome is there, new drafts are made.
//!
//! What was known is written down at once, and computed even for a request that is cancelled meanwhile: others may
//! have been promised to find it.
//!
//! A thread is started for each step planned ahead: it borrows what it plans with, and is gone when the step is. That
//! takes 35 µs of the engine's thread where handing all of it to a thread that waits would take 15 (2 vCPU of a Zen 5,
//! beside 300 µs of other work): less than one percent of a step of 110 million weights.
//!
//! What goes to host memory or comes from it moves between two steps, in the order in which it was planned: a copy
//! that is planned while a step computes finds what that step leaves.

use std::thread;

use quayline_batching::Plan;
use quayline_gpu_kernels as kernels;

use crate::engine::Engine;
use crate::failure::expected;
use crate::request::Tick;
use crate::step::StepMemory;

/// The step after the one that computes.
#[derive(Default)]
pub(crate) struct Ahead {
    step: StepMemory,
    is_planned: bool,
}

impl Ahead {
    pub(crate) fn new(block_size: usize) -> Self {
        Self { step: StepMemory::new(block_size), is_planned: false }
    }
}

impl Engine {
    /// Whether a step is planned that has not been computed.
    pub(crate) fn is_planned_ahead(&self) -> bool {
        self.ahead.as_ref().is_some_and(|ahead| ahead.is_planned)
    }

    /// Replaces `step` by the one that was planned ahead, if there is one.
    pub(crate) fn take_planned(&mut self, step: &mut StepMemory) -> bool {
        let Some(ahead) = self.ahead.as_mut().filter(|ahead| ahead.is_planned) else { return false };
        std::mem::swap(step, &mut ahead.step);
        ahead.is_planned = false;
        true
    }

    /// Computes a step, and plans the next one meanwhile if that is asked for. A beam search needs the outcome of one
    /// step to plan the next: while there is one, nothing is planned ahead.
    pub(crate) fn run(&mut self, step: &mut StepMemory, now: Tick) -> Result<(), kernels::Error> {
        let is_free = self.searches.is_empty();
        let Self { ahead, batcher, memory, active, machine, .. } = self;
        let input = step.arrays.input();
        let mut run = || {
            // Everybody in a step that was planned ahead may have ended meanwhile.
            if input.tokens.is_empty() { Ok(()) } else { expected(machine.run(&input)) }
        };
        let Some(ahead) = ahead.as_mut().filter(|_| is_free) else { return run() };
        ahead.is_planned = true;
        thread::scope(|scope| {
            scope.spawn(|| ahead.step.plan(now, batcher, memory, active));
            run()
        })
    }

    /// Takes the plan of the step that was planned ahead, if there is one, out of the way: it will not be computed.
    pub(crate) fn drop_planned(&mut self) -> Option<Plan> {
        let ahead = self.ahead.as_mut().filter(|ahead| ahead.is_planned)?;
        ahead.is_planned = false;
        Some(std::mem::take(&mut ahead.step.plan))
    }
}

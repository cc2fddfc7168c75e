//! Asynchronous scheduling: the next step is planned while this one computes.
//!
//! A step planned ahead does not know the last token of those who generate, nor whether it ends them. The token is
//! filled in when it is chosen; what is computed for one that ended is dropped, and its blocks stay its own until
//! then (`Config::fenced_frees` of the batcher).

use std::thread;

use crate::engine::Engine;
use crate::request::Tick;
use crate::step::{CHECKED, StepMemory};

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
    pub(crate) fn run(&mut self, step: &mut StepMemory, now: Tick) {
        let is_free = self.searches.is_empty();
        let Self { ahead, batcher, memory, active, machine, .. } = self;
        let input = step.arrays.input();
        let Some(ahead) = ahead.as_mut().filter(|_| is_free) else {
            return machine.run(&input).expect(CHECKED);
        };
        ahead.is_planned = true;
        thread::scope(|scope| {
            scope.spawn(|| ahead.step.prepare(now, batcher, memory, active));
            machine.run(&input).expect(CHECKED);
        });
    }
}

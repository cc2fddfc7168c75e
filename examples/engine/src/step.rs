//! One step: what the batcher plans becomes flat arrays, their logits become tokens, and these outputs.

use quayline_batching::{self as batching, Finished, Plan, Sampled, Source, TokenId};

use crate::adapt::sequence;
use crate::engine::Engine;
use crate::input::StepArrays;
use crate::output::Output;
use crate::request::{RequestId, Tick};
use crate::sampling::Scratch;
use crate::snapshot::StepShape;

/// What one step leaves to the next: buffers, nothing else.
#[derive(Default)]
pub(crate) struct StepMemory {
    plan: Plan,
    arrays: StepArrays,
    wanted: Vec<Wanted>,
    sampled: Vec<Sampled>,
    finished: Vec<Finished>,
    row: Vec<f32>,
    scratch: Scratch,
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    id: RequestId,
    /// The prompt position it was computed at; `None` if the next token is to be chosen from it.
    prompt_position: Option<u32>,
}

/// Inputs are checked at the door, in [`Engine::add`].
const CHECKED: &str = "the model accepts every step that the batcher plans";

impl Engine {
    /// Runs one step and appends to `outputs` what it brought. Returns the number of tokens it processed;
    /// 0 when there was nothing to do.
    ///
    /// # Panics
    /// When the kernels refuse a step: a bug of ours.
    pub fn step(&mut self, now: Tick, outputs: &mut Vec<Output>) -> u32 {
        let mut step = std::mem::take(&mut self.step);
        self.batcher.step(batching::Tick(now.0), &mut self.memory, &mut step.plan);
        self.note(&step.plan, now, outputs);
        self.copy_on_write();
        if !step.plan.is_empty() {
            self.gather(&mut step);
            self.model.run(&mut self.pool, &step.arrays.input()).expect(CHECKED);
            self.choose(&mut step);
            self.settle(&mut step, outputs);
        }
        let tokens = step.plan.tokens;
        self.step = step;
        tokens
    }

    /// Books who started, who was preempted and who ended without computing.
    fn note(&mut self, plan: &Plan, now: Tick, outputs: &mut Vec<Output>) {
        self.reasons.note(plan, now);
        self.totals.preemptions += plan.preempted.len() as u64;
        for note in &plan.preempted {
            let active = self.active.get_mut(&RequestId(note.id.0)).expect("a preempted request is active");
            active.preemptions += 1;
            active.preempted_for = Some(note.reason);
        }
        for admitted in plan.admitted.iter().filter(|admitted| !admitted.resumed) {
            let Some(active) = self.active.get_mut(&RequestId(admitted.id.0)) else { continue };
            active.started = Some(now);
            active.cached_tokens = admitted.cached_tokens;
            self.totals.forks += u64::from(matches!(admitted.source, Source::Fork(_)));
            self.totals.prompt_tokens += u64::from(active.prompt_tokens);
        }
        for note in &plan.ended {
            if let Some(mut active) = self.forget(RequestId(note.id.0)) {
                self.totals.finished += 1;
                outputs.push(active.give_up());
            }
        }
        if !plan.is_empty() {
            self.totals.steps += 1;
            self.last_step = self.shape(plan);
        }
    }

    fn shape(&self, plan: &Plan) -> StepShape {
        let mut shape = StepShape {
            preempted: u32::try_from(plan.preempted.len()).unwrap_or(u32::MAX),
            tokens_max: self.sizes.step_tokens_max,
            ..StepShape::default()
        };
        for scheduled in &plan.scheduled {
            let prompt = self.active.get(&RequestId(scheduled.id.0)).map_or(0, |active| active.prompt_tokens);
            if scheduled.tokens > 1 || scheduled.start < prompt {
                shape.prefill_requests += 1;
                shape.prefill_tokens += scheduled.tokens;
            } else {
                shape.decode_requests += 1;
            }
        }
        shape
    }

    /// Writes down what the forward pass needs, and what its logits are for.
    fn gather(&self, step: &mut StepMemory) {
        step.arrays.clear();
        step.wanted.clear();
        for scheduled in &step.plan.scheduled {
            let id = RequestId(scheduled.id.0);
            let active = &self.active[&id];
            let (start, end) = (scheduled.start, scheduled.end());
            let table = self.memory.cache.table(sequence(scheduled.id)).expect("a planned sequence is open");
            let tokens = &active.tokens[start as usize..end as usize];
            let row = step.arrays.push(start, tokens, table.blocks().iter().map(|block| block.get()));
            for position in active.prompt_positions(start, end) {
                step.arrays.want_logits(row + position - start);
                step.wanted.push(Wanted { id, prompt_position: Some(position) });
            }
            if scheduled.samples {
                step.arrays.want_logits(row + scheduled.tokens - 1);
                step.wanted.push(Wanted { id, prompt_position: None });
            }
        }
    }

    /// Goes through the logits, in parts that fit into the model's room for them.
    fn choose(&mut self, step: &mut StepMemory) {
        step.sampled.clear();
        let vocab = self.model.config().vocab;
        let part = self.model.limits().logits_rows;
        let mut from = 0;
        for wanted in step.wanted.chunks(part) {
            let to = from + u32::try_from(wanted.len()).unwrap_or(u32::MAX);
            let logits = self.model.logits(from..to).expect(CHECKED);
            for (&Wanted { id, prompt_position }, logits) in wanted.iter().zip(logits.chunks_exact(vocab)) {
                let active = self.active.get_mut(&id).expect("a planned request is active");
                if let Some(position) = prompt_position {
                    active.note_prompt_logits(position, logits, &mut step.scratch);
                } else {
                    let token = TokenId(active.choose(logits, &mut step.row, &mut step.scratch));
                    step.sampled.push(Sampled { id: batching::RequestId(id.0), token });
                }
            }
            from = to;
        }
    }

    /// Tells cache and batcher what was chosen, makes the outputs, and lets go of who is done.
    fn settle(&mut self, step: &mut StepMemory, outputs: &mut Vec<Output>) {
        for &Sampled { id, token } in &step.sampled {
            let pushed = self.memory.cache.push(sequence(id), &[token.0]);
            pushed.expect("a chosen token is within the longest sequence");
        }
        let applied = self.batcher.apply(step.plan.step, &step.sampled, &mut self.memory, &mut step.finished);
        applied.expect("each chosen token was planned");
        let mut finished = step.finished.iter().peekable();
        for &Sampled { id, .. } in &step.sampled {
            let verdict = finished.next_if(|finished| finished.id == id).map(|finished| finished.reason);
            let own = RequestId(id.0);
            let output = self.active.get_mut(&own).expect("a planned request is active").advance(verdict);
            self.totals.output_tokens += 1;
            if output.finish.is_some() {
                if verdict.is_none() {
                    self.batcher.finish(id, &mut self.memory);
                }
                self.forget(own);
                self.totals.finished += 1;
            }
            outputs.push(output);
        }
    }
}

impl StepMemory {
    pub(crate) fn new(block_size: usize) -> Self {
        Self { arrays: StepArrays::new(block_size), ..Self::default() }
    }
}

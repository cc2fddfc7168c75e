//! One step: what the batcher plans becomes flat arrays, their logits become tokens (`rows.rs`), and these outputs.

use std::collections::BTreeMap;

use quayline_batching::{self as batching, Batcher, Finished, Plan, Sampled, Scheduled, Source, TokenId};
use quayline_gpu_kernels as kernels;

use crate::active::Active;
use crate::adapt::{PagedMemory, sequence};
use crate::copies::loaded_tokens;
use crate::engine::Engine;
use crate::grammar::{Guide, look_ahead};
use crate::handover::Load;
use crate::input::{StepArrays, count};
use crate::output::Output;
use crate::request::{RequestId, Tick};
use crate::rows::{Goal, Wanted};
use crate::sampling::Scratch;
use crate::snapshot::StepShape;

/// What one step leaves to the next: buffers, nothing else.
#[derive(Default)]
pub(crate) struct StepMemory {
    pub(crate) plan: Plan,
    pub(crate) arrays: StepArrays,
    pub(crate) wanted: Vec<Wanted>,
    /// How many drafts each output verified.
    pub(crate) drafted: Vec<u32>,
    /// Parts whose tokens are not all chosen yet.
    late: Vec<Scheduled>,
    sampled: Vec<Sampled>,
    finished: Vec<Finished>,
    /// What searches ended with.
    found: Vec<Output>,
    /// One for each thread.
    pub(crate) scratch: Vec<Scratch>,
}

impl Engine {
    /// Runs one step and appends to `outputs` what it brought. Returns the number of tokens it processed;
    /// 0 when there was nothing to do. Where the machine fails, everybody [ends with an error](Engine::failure).
    ///
    /// # Panics
    /// When the kernels refuse a step: a bug of ours.
    pub fn step(&mut self, now: Tick, outputs: &mut Vec<Output>) -> u32 {
        self.memory.set_now(quayline_kv_cache::Tick(now.0));
        self.take_in_disk();
        self.add_homeless_beams();
        let mut step = std::mem::take(&mut self.step);
        let mut was_planned = self.take_planned(&mut step);
        if was_planned {
            self.note(&step.plan, now, outputs);
            was_planned = !step.plan.is_empty();
        }
        if !was_planned {
            step.plan(now, &mut self.batcher, &mut self.memory, &self.active);
            self.note(&step.plan, now, outputs);
        }
        self.totals.steps_ahead += u64::from(was_planned);
        let before = outputs.len();
        match self.compute(&mut step, now, outputs) {
            Err(error) => {
                outputs.truncate(before);
                self.fail(error, &step.plan, outputs);
            }
            Ok(()) if step.plan.is_empty() => {}
            Ok(()) => {
                self.failure = None;
                self.settle(&mut step, &mut outputs[before..]);
                if self.speculation.is_some() {
                    self.draft(&step.drafted, &outputs[before..]);
                }
                outputs.append(&mut step.found);
            }
        }
        let tokens = step.plan.tokens;
        self.step = step;
        self.note_stuck(tokens);
        tokens
    }

    /// What the machine has to do of a step, up to the chosen tokens.
    fn compute(
        &mut self,
        step: &mut StepMemory,
        now: Tick,
        outputs: &mut Vec<Output>,
    ) -> Result<(), kernels::Error> {
        self.move_blocks()?;
        if step.plan.is_empty() {
            return Ok(());
        }
        step.complete(&self.memory, &self.active);
        self.run(step, now)?;
        self.choose(step, outputs)
    }

    /// Books who started, who was preempted and who ended without computing.
    fn note(&mut self, plan: &Plan, now: Tick, outputs: &mut Vec<Output>) {
        self.reasons.note(plan, now);
        self.totals.preemptions += plan.preempted.len() as u64;
        for note in &plan.preempted {
            // Planned ahead: it may have ended meanwhile.
            let Some(active) = self.active.get_mut(&RequestId(note.id.0)) else { continue };
            active.preemptions += 1;
            active.preempted_for = Some(note.reason);
        }
        plan.admitted.iter().for_each(|admitted| self.note_host(admitted));
        for admitted in plan.admitted.iter().filter(|admitted| !admitted.resumed) {
            let Some(active) = self.active.get_mut(&RequestId(admitted.id.0)) else { continue };
            if active.started.is_some() {
                // A beam that left and came back.
                continue;
            }
            active.started = Some(now);
            active.cached_tokens = admitted.cached_tokens;
            active.loaded_tokens = loaded_tokens(admitted);
            self.totals.forks += u64::from(matches!(admitted.source, Source::Fork(_)));
            self.totals.prompt_tokens += u64::from(active.prompt_tokens);
        }
        let load =
            |load: &batching::Load| Load { id: RequestId(load.id.0), start: load.start, tokens: load.tokens };
        self.loads.extend(plan.loads.iter().map(load));
        for note in &plan.ended {
            let Some(mut active) = self.forget(RequestId(note.id.0)) else { continue };
            if let Some(search) = active.search {
                outputs.extend(self.end_search(search));
            } else {
                self.totals.finished += 1;
                outputs.push(active.give_up(note.reason));
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
            if scheduled.tokens - scheduled.drafts > 1 || scheduled.start < prompt {
                shape.prefill_requests += 1;
                shape.prefill_tokens += scheduled.tokens;
            } else {
                shape.decode_requests += 1;
            }
        }
        shape
    }

    /// Completes the outputs, tells cache and batcher of them, and lets go of who is done.
    fn settle(&mut self, step: &mut StepMemory, outputs: &mut [Output]) {
        step.sampled.clear();
        for output in &mut *outputs {
            self.active.get_mut(&output.id).expect("a planned request is active").advance(output);
        }
        self.look_ahead(outputs);
        for output in &*outputs {
            let id = batching::RequestId(output.id.0);
            for token in &output.tokens {
                let pushed = self.memory.cache.push(sequence(id), &[token.id]);
                pushed.expect("a chosen token is within the longest sequence");
                step.sampled.push(Sampled { id, token: TokenId(token.id) });
            }
            self.totals.output_tokens += output.tokens.len() as u64;
        }
        self.advance_searches(&mut step.sampled, &mut step.found);
        for scheduled in &step.plan.scheduled {
            self.memory.computed(scheduled.id, scheduled.end());
        }
        let applied = self.batcher.apply(step.plan.step, &step.sampled, &mut self.memory, &mut step.finished);
        applied.expect("each chosen token was planned");
        for output in outputs.iter().filter(|output| output.finish.is_some()) {
            // The batcher has ended it already, unless it ended by its text.
            self.batcher.finish(batching::RequestId(output.id.0), &mut self.memory);
            if self.active.get(&output.id).is_some_and(|active| active.hands_over) {
                self.keep_for_handover(output.id);
            } else {
                self.forget(output.id);
            }
            self.totals.finished += 1;
        }
    }

    /// Makes masks for whoever goes on and has a grammar.
    fn look_ahead(&mut self, outputs: &mut [Output]) {
        let open = outputs.iter_mut().filter(|output| output.finish.is_none());
        let guided = open.filter_map(|output| {
            let guide = self.active.get_mut(&output.id)?.take_guide()?;
            Some((output, guide))
        });
        let (outputs, mut guides): (Vec<&mut Output>, Vec<Guide>) = guided.unzip();
        look_ahead(&mut guides, &self.workers);
        for (output, guide) in outputs.into_iter().zip(guides) {
            self.active.get_mut(&output.id).expect("it was there").guided(guide, output);
        }
    }

    /// Makes drafts for whoever goes on. Where a step is planned ahead, it verifies them, as many as it has room for;
    /// and as many are planned in the step behind it.
    fn draft(&mut self, drafted: &[u32], outputs: &[Output]) {
        for (&drafts, output) in drafted.iter().zip(outputs).filter(|&(&drafts, _)| drafts > 0) {
            self.totals.drafts.note(drafts, output.tokens.len() - 1);
        }
        for output in outputs.iter().filter(|output| output.finish.is_none()) {
            let active = self.active.get_mut(&output.id).expect("a request that goes on is active");
            if let Some(drafter) = &mut active.drafter {
                let id = batching::RequestId(output.id.0);
                let drafts = drafter.draft(self.batcher.drafts_wanted(id));
                self.batcher.propose(id, drafts);
            }
        }
    }
}

impl StepMemory {
    pub(crate) fn new(block_size: usize) -> Self {
        Self { arrays: StepArrays::new(block_size), ..Self::default() }
    }

    /// Plans a step, and writes down what its forward pass needs and what its logits are for, as far as that is known.
    pub(crate) fn plan(
        &mut self,
        now: Tick,
        batcher: &mut Batcher,
        memory: &mut PagedMemory,
        active: &BTreeMap<RequestId, Active>,
    ) {
        batcher.step(batching::Tick(now.0), memory, &mut self.plan);
        self.arrays.clear();
        self.wanted.clear();
        self.late.clear();
        for place in 0..self.plan.scheduled.len() {
            let part = self.plan.scheduled[place];
            let active = &active[&RequestId(part.id.0)];
            if (part.end() - part.drafts) as usize <= active.tokens.len() {
                self.lay_out(part, memory, active);
            } else {
                self.late.push(part);
            }
        }
    }

    /// Writes down the rest: of those who were choosing a token when the step was planned. Of those who have ended
    /// with it nothing is computed.
    fn complete(&mut self, memory: &PagedMemory, active: &BTreeMap<RequestId, Active>) {
        let mut late = std::mem::take(&mut self.late);
        for part in late.drain(..) {
            if let Some(active) = active.get(&RequestId(part.id.0)) {
                self.lay_out(part, memory, active);
            }
        }
        self.late = late;
    }

    /// A request's part of the step. One that was planned while drafts were in flight begins before the place where
    /// it would if all of them had been accepted.
    fn lay_out(&mut self, part: Scheduled, memory: &PagedMemory, active: &Active) {
        let table = memory.cache.table(sequence(part.id)).expect("a planned sequence is open");
        let blocks = table.blocks().iter().map(|block| block.get());
        let drafts = active.drafts(part.drafts);
        let start = part.start.min(count(active.tokens.len() - 1));
        let end = start + part.tokens - part.drafts;
        let row = self.arrays.push(start, [&active.tokens[start as usize..end as usize], drafts], blocks);
        let mut want = |row, goal, position| {
            self.arrays.want_logits(row);
            self.wanted.push(Wanted { id: active.id, goal, position });
        };
        for position in active.prompt_positions(start, end) {
            want(row + position - start, Goal::Prompt { position }, 0);
        }
        let next = end.saturating_sub(active.prompt_tokens);
        if part.samples {
            want(row + end - start - 1, Goal::Next { drafts: count(drafts.len()) }, next);
        }
        for (place, (row, &draft)) in (row + end - start..).zip(drafts).enumerate() {
            want(row, Goal::Behind { draft, place }, next + count(place) + 1);
        }
    }
}

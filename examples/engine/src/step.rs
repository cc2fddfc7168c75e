//! One step: what the batcher plans becomes flat arrays, their logits become tokens, and these outputs.

use std::collections::BTreeMap;

use quayline_batching::{self as batching, Batcher, Finished, Plan, Sampled, Scheduled, Source, TokenId};

use crate::active::Active;
use crate::adapt::{PagedMemory, sequence};
use crate::beam::is_beam;
use crate::copies::loaded_tokens;
use crate::engine::Engine;
use crate::grammar::Guide;
use crate::handover::Load;
use crate::input::StepArrays;
use crate::masks;
use crate::output::Output;
use crate::request::{RequestId, Tick};
use crate::sampling::Scratch;
use crate::snapshot::StepShape;

/// What one step leaves to the next: buffers, nothing else.
#[derive(Default)]
pub(crate) struct StepMemory {
    pub(crate) plan: Plan,
    pub(crate) arrays: StepArrays,
    wanted: Vec<Wanted>,
    /// Rows whose tokens are not chosen yet, and whose they are.
    to_come: Vec<(u32, RequestId)>,
    sampled: Vec<Sampled>,
    finished: Vec<Finished>,
    /// What searches ended with.
    found: Vec<Output>,
    row: Vec<f32>,
    scratch: Scratch,
}

/// A row of logits, and whose it is.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    id: RequestId,
    goal: Goal,
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy)]
enum Goal {
    /// To tell of the prompt token behind this position.
    Prompt { position: u32 },
    /// To choose the next token.
    Next,
    /// To choose the token behind a draft, if that one is chosen as the `place`th of the step.
    Behind { draft: u32, place: usize },
}

/// Inputs are checked at the door, in [`Engine::add`].
pub(crate) const CHECKED: &str = "the model accepts every step that the batcher plans";

impl Engine {
    /// Runs one step and appends to `outputs` what it brought. Returns the number of tokens it processed;
    /// 0 when there was nothing to do.
    ///
    /// # Panics
    /// When the kernels refuse a step: a bug of ours.
    pub fn step(&mut self, now: Tick, outputs: &mut Vec<Output>) -> u32 {
        self.memory.cache.set_now(quayline_kv_cache::Tick(now.0));
        self.add_homeless_beams();
        let mut step = std::mem::take(&mut self.step);
        let mut was_planned = self.take_planned(&mut step);
        if was_planned {
            self.note(&step.plan, now, outputs);
            was_planned = !step.plan.is_empty();
        }
        if !was_planned {
            step.prepare(now, &mut self.batcher, &mut self.memory, &self.active);
            self.note(&step.plan, now, outputs);
        }
        self.move_blocks();
        if !step.plan.is_empty() {
            self.totals.steps_ahead += u64::from(was_planned);
            step.complete(&self.active);
            self.run(&mut step, now);
            let before = outputs.len();
            self.choose(&mut step, outputs);
            self.settle(&mut step, &mut outputs[before..]);
            if self.speculation.is_some() {
                self.draft(&step.plan, &outputs[before..]);
            }
            outputs.append(&mut step.found);
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

    /// Goes through the logits, in parts that fit into the model's room for them, and chooses tokens. One that has
    /// drafts behind it becomes part of its output before the next is chosen; the last one of each request does not.
    fn choose(&mut self, step: &mut StepMemory, outputs: &mut Vec<Output>) {
        let vocab = self.machine.config().vocab;
        let part = self.machine.limits().logits_rows;
        let mut from = 0;
        for wanted in step.wanted.chunks(part) {
            let to = from + u32::try_from(wanted.len()).unwrap_or(u32::MAX);
            let logits = self.machine.logits(from..to).expect(CHECKED);
            for (&Wanted { id, goal }, logits) in wanted.iter().zip(logits.chunks_exact(vocab)) {
                // Planned ahead: it may have ended meanwhile.
                let Some(active) = self.active.get_mut(&id) else { continue };
                match goal {
                    Goal::Prompt { position } => {
                        active.note_prompt_logits(position, logits, &mut step.scratch);
                        continue;
                    }
                    Goal::Next if active.search.is_some() => {
                        self.searches.note(active, logits, &mut step.scratch);
                        continue;
                    }
                    Goal::Next => outputs.push(active.output()),
                    Goal::Behind { draft, place } => {
                        let output = outputs.last_mut().expect("its request has chosen before");
                        if output.tokens.len() != place || active.chosen() != Some(draft) {
                            continue;
                        }
                        active.advance(output);
                        active.look_ahead(output);
                        if output.finish.is_some() {
                            continue;
                        }
                    }
                }
                active.choose(logits, &mut step.row, &mut step.scratch);
            }
            from = to;
        }
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
        masks::look_ahead(&mut guides, self.machine.config().vocab, self.threads);
        for (output, guide) in outputs.into_iter().zip(guides) {
            self.active.get_mut(&output.id).expect("it was there").guided(guide, output);
        }
    }

    /// Makes drafts for whoever goes on.
    fn draft(&mut self, plan: &Plan, outputs: &[Output]) {
        let chooses = |part: &&Scheduled| part.samples && !is_beam(RequestId(part.id.0));
        let parts = plan.scheduled.iter().filter(chooses);
        for (part, output) in parts.zip(outputs).filter(|(part, _)| part.drafts > 0) {
            self.totals.drafts.note(part.drafts, output.tokens.len() - 1);
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

    /// Plans a step, and writes down what its forward pass needs and what its logits are for.
    pub(crate) fn prepare(
        &mut self,
        now: Tick,
        batcher: &mut Batcher,
        memory: &mut PagedMemory,
        active: &BTreeMap<RequestId, Active>,
    ) {
        batcher.step(batching::Tick(now.0), memory, &mut self.plan);
        self.arrays.clear();
        self.wanted.clear();
        self.to_come.clear();
        for scheduled in &self.plan.scheduled {
            let id = RequestId(scheduled.id.0);
            let active = &active[&id];
            let (start, end) = (scheduled.start, scheduled.end() - scheduled.drafts);
            let table = memory.cache.table(sequence(scheduled.id)).expect("a planned sequence is open");
            // A step that is planned ahead may begin with a token that is not chosen yet.
            let known = &active.tokens[start as usize..(end as usize).min(active.tokens.len())];
            let unknown = &[0][..end as usize - start as usize - known.len()];
            let drafts = active.drafts(scheduled.drafts);
            let blocks = table.blocks().iter().map(|block| block.get());
            let row = self.arrays.push(start, [known, unknown, drafts], blocks);
            if !unknown.is_empty() {
                self.to_come.push((row + end - start - 1, id));
            }
            let mut want = |row, goal| {
                self.arrays.want_logits(row);
                self.wanted.push(Wanted { id, goal });
            };
            for position in active.prompt_positions(start, end) {
                want(row + position - start, Goal::Prompt { position });
            }
            if scheduled.samples {
                want(row + end - start - 1, Goal::Next);
            }
            for (place, (row, &draft)) in (row + end - start..).zip(drafts).enumerate() {
                want(row, Goal::Behind { draft, place });
            }
        }
    }

    /// Fills in the tokens that were not chosen when the step was planned. Those of requests that have ended since do
    /// not matter: nobody reads what comes of them.
    fn complete(&mut self, active: &BTreeMap<RequestId, Active>) {
        for (row, id) in self.to_come.drain(..) {
            if let Some(&token) = active.get(&id).and_then(|active| active.tokens.last()) {
                self.arrays.set_token(row, token);
            }
        }
    }
}

//! The engine: add requests, step, take what came out.

use std::collections::BTreeMap;
use std::sync::Arc;

use quayline_batching::{
    self as batching, Batcher, Finished, Plan, RefusalReason, Sampled, Standing, TokenId,
};
use quayline_gpu_kernels::{Cpu, Ops};
use quayline_kv_cache::{
    self as kv_cache, BlockCount, BlockId, BlockSize, KvCache, Reuse, SequenceKey, TokenCount,
};

use crate::active::Active;
use crate::adapt::{PagedMemory, sequence};
use crate::error::{LoadError, Refusal};
use crate::files::ModelFiles;
use crate::grammar::Grammars;
use crate::input::StepArrays;
use crate::model::Model;
use crate::options::Options;
use crate::output::Output;
use crate::request::{Request, RequestId, Tick};
use crate::sampling::Scratch;
use crate::sizing::Sizes;
use crate::snapshot::{BlockUse, Blocks, PrefixUse, RequestState, Snapshot, StepShape, Totals};
use crate::text::Text;

/// A model that answers many requests at once, one step at a time. It has no thread of its own but those of
/// the arithmetic, and no clock: the caller calls [`step`](Engine::step) as long as there
/// [is work](Engine::has_work).
///
/// The tokens and log-probabilities of a request depend on the request and the model alone, to the last bit:
/// not on what else runs, on chunks, blocks, threads, cache hits or preemptions.
pub struct Engine {
    text: Arc<Text>,
    grammars: Arc<Grammars>,
    eos: Vec<u32>,
    seed: u64,
    sizes: Sizes,
    model: Model<Cpu>,
    pool: <Cpu as Ops>::KvPool,
    memory: PagedMemory,
    batcher: Batcher,
    active: BTreeMap<RequestId, Active>,
    step: StepMemory,
    totals: Totals,
    last_step: StepShape,
}

/// What one step leaves to the next: buffers, nothing else.
struct StepMemory {
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

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sizes, active, .. } = self;
        f.debug_struct("Engine")
            .field("sizes", sizes)
            .field("requests", &active.len())
            .finish_non_exhaustive()
    }
}

/// Inputs are checked at the door, in [`Engine::add`].
const CHECKED: &str = "the model accepts every step that the batcher plans";

impl Engine {
    /// Loads a model and makes its cache.
    ///
    /// # Errors
    /// A checkpoint that is incomplete, damaged or not supported, or options that do not fit it: in one line,
    /// by name.
    pub fn load(files: &ModelFiles, options: &Options) -> Result<Self, LoadError> {
        Self::make(files, options).map_err(|error| error.of(files))
    }

    fn make(files: &ModelFiles, options: &Options) -> Result<Self, LoadError> {
        let config = files.config()?;
        let text = Arc::new(Text::load(files)?);
        if text.vocab_size() as usize > config.vocab {
            let vocab_size = u32::try_from(config.vocab).unwrap_or(u32::MAX);
            return Err(LoadError::Vocabulary { token: text.vocab_size() - 1, vocab_size });
        }
        let eos = eos_tokens(&files.generation_config()?.eos_token_ids, &text, &config.eos_token_ids);
        let embedding = [config.vocab, config.hidden];
        let weights = files.weights()?.take("model.embed_tokens.weight", &embedding)?;
        let sizes = Sizes::new(options, &config, weights.dtype)?;
        let cpu = Cpu::new(options.threads, None)?;
        let model = Model::load(cpu, files, sizes.step_limits(options, config.vocab))?;
        let block_size = options.block_size.get();
        let pool = model.kv_pool(sizes.blocks as usize + 1, block_size as usize, sizes.dtype)?;
        let refused =
            |option, error: &dyn std::fmt::Display| LoadError::Options { option, problem: error.to_string() };
        let cache = KvCache::new(kv_cache::Config {
            prefix_caching: options.prefix_caching,
            hash_seed: options.seed,
            sequence_tokens_max: TokenCount(sizes.model_tokens_max),
            ..kv_cache::Config::new(
                BlockSize::new(block_size).map_err(|error| refused("block_size", &error))?,
                BlockCount(sizes.blocks + 1),
            )
        })
        .map_err(|error| refused("kv", &error))?;
        let batcher = Batcher::with_order(sizes.batching(options), Sizes::order(options))
            .map_err(|error| refused("max_num_batched_tokens", &error))?;
        Ok(Self {
            grammars: Arc::new(Grammars::new(Arc::clone(&text), &eos)),
            text,
            eos,
            seed: options.seed,
            sizes,
            model,
            pool,
            memory: PagedMemory { cache },
            batcher,
            active: BTreeMap::new(),
            step: StepMemory::new(block_size as usize),
            totals: Totals::default(),
            last_step: StepShape::default(),
        })
    }

    /// The tokenizer and the chat template, to be used from any thread.
    #[must_use]
    pub fn text(&self) -> Arc<Text> {
        Arc::clone(&self.text)
    }

    /// What makes grammars for [`Request::grammar`], to be used from any thread: compiling takes longer than a step.
    #[must_use]
    pub fn grammars(&self) -> Arc<Grammars> {
        Arc::clone(&self.grammars)
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model<Cpu> {
        &self.model
    }

    /// Longest sequence, prompt and output together.
    #[must_use]
    pub fn model_tokens_max(&self) -> u32 {
        self.sizes.model_tokens_max
    }

    /// Rows of the embedding table: every token id is below.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        u32::try_from(self.model.config().vocab).unwrap_or(u32::MAX)
    }

    /// The tokens that end an answer, the tokenizer's own first.
    #[must_use]
    pub fn eos_tokens(&self) -> &[u32] {
        &self.eos
    }

    /// Queues a request.
    ///
    /// # Errors
    /// A [`Refusal`] with the reason; the engine is as it was.
    ///
    /// # Panics
    /// When the cache disagrees about who is here: a bug of ours.
    pub fn add(&mut self, request: Request) -> Result<(), Refusal> {
        self.examine(&request)?;
        let active = Active::new(&request, &self.text, &self.eos, self.seed, self.sizes.model_tokens_max)?;
        let (id, stop) = (batching::RequestId(request.id.0), active.stop_rules(&request, &self.eos));
        let planned = batching::Request {
            priority: request.priority,
            arrival: batching::Tick(request.arrival.0),
            grammar: request.grammar.as_ref().map_or(batching::Grammar::None, |_| batching::Grammar::Ready),
            ..batching::Request::new(id, active.prompt_tokens, stop)
        };
        self.batcher.add(planned).map_err(|refusal| queue_refusal(&refusal))?;
        // A request that wants to know about every prompt token must compute them all.
        let reuse = match request.sampling.prompt_logprobs {
            Some(_) => Reuse::WriteOnly,
            None => Reuse::ReadWrite,
        };
        let key = SequenceKey { salt: request.cache_salt.as_deref(), ..SequenceKey::default() };
        let opened = self.memory.cache.open(kv_cache::SequenceId(request.id.0), key, &request.prompt, reuse);
        opened.expect("the id is new and the prompt is within the longest sequence");
        self.active.insert(request.id, active);
        self.totals.accepted += 1;
        Ok(())
    }

    fn examine(&self, request: &Request) -> Result<(), Refusal> {
        if self.active.contains_key(&request.id) {
            return Err(Refusal::Duplicate(request.id.0));
        }
        if request.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        let (prompt, context) = (request.prompt.len(), self.sizes.model_tokens_max);
        if prompt >= context as usize {
            return Err(Refusal::PromptTooLong {
                prompt: u32::try_from(prompt).unwrap_or(u32::MAX),
                context,
            });
        }
        let vocab_size = self.vocab_size();
        if let Some(&token) = request.prompt.iter().find(|&&token| token >= vocab_size) {
            return Err(Refusal::UnknownToken { token, vocab_size });
        }
        let known = self.text.vocab_size();
        if request.grammar.as_ref().is_some_and(|grammar| grammar.vocab_size() != known) {
            let problem = "was compiled for another vocabulary".into();
            return Err(Refusal::Sampling { parameter: "structured_outputs", problem });
        }
        request.sampling.check(vocab_size)
    }

    /// Runs one step and appends to `outputs` what it brought. Returns the number of tokens it processed;
    /// 0 when there was nothing to do.
    ///
    /// # Panics
    /// When the kernels refuse a step: a bug of ours.
    pub fn step(&mut self, now: Tick, outputs: &mut Vec<Output>) -> u32 {
        let mut step = std::mem::take(&mut self.step);
        self.batcher.step(batching::Tick(now.0), &mut self.memory, &mut step.plan);
        self.note(&step.plan, now, outputs);
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
        self.totals.preemptions += plan.preempted.len() as u64;
        for note in &plan.preempted {
            let active = self.active.get_mut(&RequestId(note.id.0)).expect("a preempted request is active");
            active.preemptions += 1;
        }
        for admitted in plan.admitted.iter().filter(|admitted| !admitted.resumed) {
            let Some(active) = self.active.get_mut(&RequestId(admitted.id.0)) else { continue };
            active.started = Some(now);
            active.cached_tokens = admitted.cached_tokens;
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

    /// Lets go of a request that the batcher has already let go of.
    fn forget(&mut self, id: RequestId) -> Option<Active> {
        let active = self.active.remove(&id)?;
        self.memory.cache.close(kv_cache::SequenceId(id.0)).expect("an active request is open in the cache");
        Some(active)
    }

    /// Forgets a request and frees its blocks. False when there is none by this id.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let found = self.batcher.cancel(batching::RequestId(id.0), &mut self.memory);
        if found {
            self.forget(id);
            self.totals.cancelled += 1;
        }
        found
    }

    /// Whether any request is queued or running.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.batcher.has_work()
    }

    /// Drops all cached prefixes. False when requests still hold blocks.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.memory.cache.reset()
    }

    /// What is going on. Cost: a pass over requests and blocks.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = |id| self.request_state(id);
        let occupancy = self.occupancy();
        let stats = self.memory.cache.stats();
        let cached = occupancy.iter().filter(|&&block| block == BlockUse::Cached).count();
        Snapshot {
            running: self.batcher.running().filter_map(state).collect(),
            waiting: self.batcher.waiting().take(Snapshot::WAITING_SHOWN_MAX).filter_map(state).collect(),
            waiting_requests: self.batcher.stats().waiting,
            blocks: Blocks {
                size: self.memory.cache.config().block_size.get(),
                total: stats.blocks.get(),
                used: stats.used.get(),
                free: stats.free.get(),
                cached: u32::try_from(cached).unwrap_or(u32::MAX),
                bytes: self.sizes.bytes,
            },
            prefix: PrefixUse { queries: stats.first.tokens, hits: stats.first.hit_tokens },
            totals: self.totals,
            last_step: self.last_step,
            occupancy,
        }
    }

    fn request_state(&self, id: batching::RequestId) -> Option<RequestState> {
        let active = self.active.get(&RequestId(id.0))?;
        let (computed_tokens, waits_for) = match self.batcher.standing(id)? {
            Standing::Running { computed_tokens, reason, .. } => (computed_tokens, reason),
            Standing::Waiting { reason, .. } => (0, reason),
        };
        let table = self.memory.cache.table(sequence(id)).ok()?;
        Some(RequestState {
            id: active.id,
            arrival: active.arrival,
            started: active.started,
            prompt_tokens: active.prompt_tokens,
            cached_tokens: active.cached_tokens,
            computed_tokens,
            output_tokens: active.output_tokens(),
            output_tokens_max: active.output_tokens_max,
            preemptions: active.preemptions,
            blocks: u32::try_from(table.blocks().len()).unwrap_or(u32::MAX),
            waits_for,
        })
    }

    fn occupancy(&self) -> Vec<BlockUse> {
        let cache = &self.memory.cache;
        let of = |block| match cache.references(block) {
            0 if cache.hash_of(block).is_some() => BlockUse::Cached,
            0 => BlockUse::Free,
            1 => BlockUse::Held,
            _ => BlockUse::Shared,
        };
        // Block 0 is the null block.
        (1..=self.sizes.blocks).map(|block| of(BlockId(block))).collect()
    }

    /// Audits every invariant of the engine, its cache and its batcher.
    ///
    /// # Errors
    /// A sentence about the first one that does not hold: a bug of ours.
    pub fn check(&self) -> Result<(), String> {
        self.batcher.check().map_err(|violation| format!("batcher: {violation}"))?;
        self.memory.cache.check().map_err(|violation| format!("cache: {violation}"))?;
        let stats = self.batcher.stats();
        let (planned, active) = ((stats.running + stats.waiting) as usize, self.active.len());
        if planned != active {
            return Err(format!("the batcher has {planned} requests, the engine {active}"));
        }
        let open = self.memory.cache.stats().sequences as usize;
        if open != active {
            return Err(format!("the cache has {open} sequences, the engine {active} requests"));
        }
        for (id, request) in &self.active {
            let known =
                self.memory.cache.known(kv_cache::SequenceId(id.0)).map_err(|error| error.to_string())?;
            if known.get() as usize != request.tokens.len() {
                let (cache, engine) = (known.get(), request.tokens.len());
                return Err(format!("request {}: the cache knows {cache} tokens, the engine {engine}", id.0));
            }
        }
        Ok(())
    }
}

impl StepMemory {
    fn new(block_size: usize) -> Self {
        Self { arrays: StepArrays::new(block_size), ..Self::default() }
    }
}

impl Default for StepMemory {
    fn default() -> Self {
        Self {
            plan: Plan::new(),
            arrays: StepArrays::default(),
            wanted: Vec::new(),
            sampled: Vec::new(),
            finished: Vec::new(),
            row: Vec::new(),
            scratch: Scratch::default(),
        }
    }
}

/// The tokenizer's end-of-sequence, then those of `generation_config.json`; with neither, those of
/// `config.json`.
fn eos_tokens(generation: &[u32], text: &Text, config: &[u32]) -> Vec<u32> {
    let mut eos: Vec<u32> = text.eos_token().into_iter().chain(generation.iter().copied()).collect();
    if eos.is_empty() {
        eos = config.to_vec();
    }
    let mut seen = Vec::new();
    eos.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    eos
}

fn queue_refusal(refusal: &batching::Refusal) -> Refusal {
    match refusal.reason {
        RefusalReason::QueueFull { queued, queued_requests_max } => Refusal::QueueFull {
            waiting: u64::from(queued),
            limit: u64::from(queued_requests_max),
            unit: "requests",
        },
        RefusalReason::QueueTokensFull { queued_tokens, queued_tokens_max, .. } => {
            Refusal::QueueFull { waiting: queued_tokens, limit: queued_tokens_max, unit: "tokens" }
        }
        reason => unreachable!("checked before: {reason}"),
    }
}

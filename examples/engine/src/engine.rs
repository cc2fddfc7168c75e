//! The engine: add requests, step, take what came out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use quayline_batching::{self as batching, Batcher, RefusalReason};
use quayline_gpu_kernels as kernels;
use quayline_gpu_kernels::cpu::Workers;
use quayline_kv_cache::{self as kv_cache, Residency, Reuse, SequenceKey, TokenCount};

use crate::active::Active;
use crate::adapt::PagedMemory;
use crate::ahead::Ahead;
use crate::beam::{Searches, is_beam};
use crate::drafts::Speculation;
use crate::error::Refusal;
use crate::grammar::{Grammar, Grammars};
use crate::handover::Load;
use crate::machine::Machine;
use crate::options::Device;
use crate::reasons::Reasons;
use crate::request::{Request, RequestId};
use crate::sizing::Sizes;
use crate::snapshot::{HostUse, StepShape, Totals};
use crate::step::StepMemory;
use crate::text::Text;

/// A model that answers many requests at once, one step at a time. It has no thread of its own but those of
/// the arithmetic, and no clock: the caller calls [`step`](Engine::step) as long as there
/// [is work](Engine::has_work).
///
/// The tokens and log-probabilities of a request depend on the request and the model alone, to the last bit:
/// not on what else runs, on chunks, blocks, threads, cache hits or preemptions.
pub struct Engine {
    pub(crate) text: Arc<Text>,
    pub(crate) grammars: Arc<Grammars>,
    pub(crate) eos: Vec<u32>,
    pub(crate) seed: u64,
    pub(crate) speculation: Option<Speculation>,
    pub(crate) sizes: Sizes,
    pub(crate) machine: Box<dyn Machine>,
    /// Why [`Device::Auto`] is not a GPU.
    pub(crate) no_gpu: Option<kernels::Error>,
    /// The host's threads, for what it does between two forward passes.
    pub(crate) workers: Arc<Workers>,
    pub(crate) memory: PagedMemory,
    pub(crate) batcher: Batcher,
    pub(crate) active: BTreeMap<RequestId, Active>,
    /// Who waits for its grammar.
    pub(crate) grammarless: BTreeSet<RequestId>,
    pub(crate) step: StepMemory,
    /// If the next step is planned while one computes.
    pub(crate) ahead: Option<Ahead>,
    pub(crate) totals: Totals,
    pub(crate) last_step: StepShape,
    pub(crate) reasons: Reasons,
    pub(crate) host_hits: HostUse,
    pub(crate) searches: Searches,
    pub(crate) loads: Vec<Load>,
    /// Why the last step came to nothing, if it did.
    pub(crate) failure: Option<kernels::Error>,
    /// Who was here when a step could do nothing because of the disk.
    pub(crate) stuck: Option<[usize; 3]>,
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

impl Engine {
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

    /// Where the arithmetic runs: the CPU or CUDA.
    #[must_use]
    pub fn device(&self) -> Device {
        self.machine.device()
    }

    /// Why it does not run on a GPU, where [`Device::Auto`] asked for one.
    #[must_use]
    pub fn no_gpu(&self) -> Option<&kernels::Error> {
        self.no_gpu.as_ref()
    }

    /// Bytes of all weights in the files.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.machine.weight_bytes()
    }

    /// Longest sequence, prompt and output together.
    #[must_use]
    pub fn model_tokens_max(&self) -> u32 {
        self.sizes.model_tokens_max
    }

    /// Rows of the embedding table: every token id is below.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        u32::try_from(self.machine.config().vocab).unwrap_or(u32::MAX)
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
        let has_grammar = request.grammar.is_some();
        self.queue(request, if has_grammar { batching::Grammar::Ready } else { batching::Grammar::None })
    }

    /// Queues a request whose grammar is being compiled. It takes its place in the line, and waits there until
    /// [`set_grammar`](Engine::set_grammar) or [`cancel`](Engine::cancel).
    ///
    /// # Errors
    /// As for [`add`](Engine::add).
    ///
    /// # Panics
    /// As for [`add`](Engine::add).
    pub fn add_before_grammar(&mut self, request: Request) -> Result<(), Refusal> {
        let id = request.id;
        self.queue(request, batching::Grammar::Compiling)?;
        self.grammarless.insert(id);
        Ok(())
    }

    /// The grammar that a request waits for is there. False, and nothing changes, when no request by this id waits
    /// for one.
    ///
    /// # Errors
    /// [`Refusal::Sampling`] for a grammar of another vocabulary.
    pub fn set_grammar(&mut self, id: RequestId, grammar: &Grammar) -> Result<bool, Refusal> {
        self.examine_grammar(grammar)?;
        let waits = self.grammarless.remove(&id);
        if waits && let Some(active) = self.active.get_mut(&id) {
            active.set_guide(grammar);
            self.batcher.grammar_ready(batching::RequestId(id.0));
        }
        Ok(waits)
    }

    fn queue(&mut self, request: Request, grammar: batching::Grammar) -> Result<(), Refusal> {
        let (id, now) = (request.id, request.arrival);
        let queued = self.try_queue(request, grammar);
        queued.inspect_err(|refusal| self.reasons.note_refusal(id, now, refusal))
    }

    fn try_queue(&mut self, mut request: Request, grammar: batching::Grammar) -> Result<(), Refusal> {
        self.examine(&request)?;
        if let Some(beams) = request.beams.take() {
            if grammar != batching::Grammar::None {
                let problem = "is not done in a beam search".into();
                return Err(Refusal::Sampling { parameter: "structured_outputs", problem });
            }
            self.add_search(request, beams)?;
            self.totals.accepted += 1;
            return Ok(());
        }
        let active = Active::new(&request, self)?;
        let (id, stop) = (batching::RequestId(request.id.0), active.stop_rules());
        let planned = batching::Request {
            grammar,
            sample_of: self.leader_of(&request),
            hands_over: request.hands_over,
            ..request.planned(id, active.prompt_tokens, stop)
        };
        self.admit(&request, active, planned)?;
        self.totals.accepted += 1;
        Ok(())
    }

    /// Makes a request known to batcher and cache.
    pub(crate) fn admit(
        &mut self,
        request: &Request,
        active: Active,
        planned: batching::Request,
    ) -> Result<(), Refusal> {
        self.batcher.add(planned).map_err(|refusal| queue_refusal(&refusal))?;
        // A request that wants to know about every prompt token must compute them all.
        let reuse = match request.sampling.prompt_logprobs {
            Some(_) => Reuse::WriteOnly,
            None => Reuse::ReadWrite,
        };
        let key = SequenceKey { salt: request.cache_salt.as_deref(), ..SequenceKey::default() };
        let opened = self.memory.cache.open(kv_cache::SequenceId(request.id.0), key, &request.prompt, reuse);
        opened.expect("the id is new and the prompt is within the longest sequence");
        // The last token is computed here.
        let known = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let size = self.memory.cache.config().block_size;
        let remote = size.tokens_in(size.full_blocks(TokenCount(request.remote_tokens.min(known - 1))));
        if remote > TokenCount(0) && request.sampling.prompt_logprobs.is_none() {
            self.memory.elsewhere.wanted.insert(kv_cache::SequenceId(request.id.0), remote.get());
        }
        if let (Some(host), Some(targets)) = (&mut self.memory.host, request.targets) {
            let due = request.arrival.0.saturating_add(targets.first_token_ticks);
            host.set_due(kv_cache::SequenceId(request.id.0), kv_cache::Tick(due));
        }
        self.active.insert(request.id, active);
        Ok(())
    }

    /// The request whose prompt this one can take over.
    fn leader_of(&self, request: &Request) -> Option<batching::RequestId> {
        let leader = self.active.get(&request.sample_of?)?;
        let same = leader.prompt() == &*request.prompt && leader.cache_salt == request.cache_salt;
        let reads = request.sampling.prompt_logprobs.is_some();
        (same && !reads).then_some(batching::RequestId(leader.id.0))
    }

    fn examine(&self, request: &Request) -> Result<(), Refusal> {
        let others = request.beams.as_ref().map_or(&[][..], |beams| &beams.others);
        for &id in std::iter::once(&request.id).chain(others) {
            let handed = self.memory.elsewhere.handing_over.contains_key(&kv_cache::SequenceId(id.0));
            if handed || self.active.contains_key(&id) || self.searches.of_answer(id).is_some() {
                return Err(Refusal::Duplicate(id.0));
            }
            if is_beam(id) {
                return Err(Refusal::ReservedId(id.0));
            }
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
        request.grammar.as_ref().map_or(Ok(()), |grammar| self.examine_grammar(grammar))?;
        if let Some(beams) = &request.beams {
            beams.check(request, vocab_size)?;
        }
        request.sampling.check(vocab_size)
    }

    fn examine_grammar(&self, grammar: &Grammar) -> Result<(), Refusal> {
        if grammar.vocab_size() == self.text.vocab_size() {
            return Ok(());
        }
        let problem = "was compiled for another vocabulary".into();
        Err(Refusal::Sampling { parameter: "structured_outputs", problem })
    }

    /// Lets go of a request that the batcher has already let go of.
    pub(crate) fn forget(&mut self, id: RequestId) -> Option<Active> {
        let active = self.active.remove(&id)?;
        self.grammarless.remove(&id);
        self.memory.close(kv_cache::SequenceId(id.0));
        Some(active)
    }

    /// Forgets a request and frees its blocks; a search, by the id of any of its answers. False when there is none by
    /// this id.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(search) = self.searches.of_answer(id) {
            self.close_search(search);
            self.totals.cancelled += 1;
            return true;
        }
        let found = self.batcher.cancel(batching::RequestId(id.0), &mut self.memory);
        if found {
            // What is on its way is not waited for: whoever brings it is refused.
            self.batcher.loaded(batching::RequestId(id.0), &mut self.memory);
            self.forget(id);
            self.totals.cancelled += 1;
        }
        found
    }

    /// Whether any request is queued or running.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.batcher.has_work() || !self.searches.is_empty() || self.is_planned_ahead()
    }

    /// Whether a step could bring anything: false also while all requests wait for their grammars, for another engine
    /// or for the disk.
    #[must_use]
    pub fn can_step(&self) -> bool {
        let waiting = self.grammarless.len() + self.memory.elsewhere.arriving.len();
        let has_any = self.active.len() > waiting || !self.searches.is_empty() || self.is_planned_ahead();
        has_any && !(self.waits_for_disk() && self.stuck == Some(self.census()))
    }

    /// How long blocks kept contents that were lost since this was last asked, in ticks of [`Engine::step`]: of every
    /// [`residency_every`](crate::Options::residency_every)-th block, and at most 4096 of them.
    pub fn drain_residency(&mut self) -> impl Iterator<Item = Residency> + '_ {
        self.memory.cache.drain_residency()
    }

    /// Drops all cached prefixes. False when requests still hold blocks.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.memory.reset()
    }
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
        // An output, or the room, of a request by this id that has ended is not back yet.
        RefusalReason::OutputPending | RefusalReason::RoomInUse => Refusal::Duplicate(refusal.request.id.0),
        reason => unreachable!("checked before: {reason}"),
    }
}

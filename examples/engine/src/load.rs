//! How an engine is made: a checkpoint and options become a machine, a cache, a batcher and what lies behind the cache.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use quayline_batching::Batcher;
use quayline_gpu_kernels::cuda;
use quayline_kv_cache::{self as kv_cache, BlockCount, BlockSize, Lru, TokenCount};

use crate::adapt::{Cache, PagedMemory};
use crate::ahead::Ahead;
use crate::beam::Searches;
use crate::block_file;
use crate::engine::Engine;
use crate::error::LoadError;
use crate::files::ModelFiles;
use crate::grammar::Grammars;
use crate::handover::Elsewhere;
use crate::host_tier::HostTier;
use crate::kv_events::EVENTS_MAX;
use crate::machine::Place;
use crate::options::{OffloadingWrite, Options};
use crate::reasons::Reasons;
use crate::sizing::{GpuRoom, Sizes};
use crate::snapshot::{HostUse, StepShape, Totals};
use crate::step::StepMemory;
use crate::text::Text;

impl Engine {
    /// Loads a model and makes its cache.
    ///
    /// # Errors
    /// A checkpoint that is incomplete, damaged or not supported, or options that do not fit it: in one line,
    /// by name.
    pub fn load(files: &ModelFiles, options: &Options) -> Result<Self, LoadError> {
        Self::make(files, options, None).map_err(|error| error.of(files))
    }

    /// The same on a device of the caller's, with CUDA's operators, in the place of the one that the options name.
    ///
    /// # Errors
    /// As for [`load`](Engine::load).
    pub fn load_on(
        device: Arc<dyn cuda::Device>,
        files: &ModelFiles,
        options: &Options,
    ) -> Result<Self, LoadError> {
        Self::make(files, options, Some(device)).map_err(|error| error.of(files))
    }

    fn make(
        files: &ModelFiles,
        options: &Options,
        device: Option<Arc<dyn cuda::Device>>,
    ) -> Result<Self, LoadError> {
        let config = files.config()?;
        let text = Arc::new(Text::load(files)?);
        if text.vocab_size() as usize > config.vocab {
            let vocab_size = u32::try_from(config.vocab).unwrap_or(u32::MAX);
            return Err(LoadError::Vocabulary { token: text.vocab_size() - 1, vocab_size });
        }
        let eos = eos_tokens(&files.generation_config()?.eos_token_ids, &text, &config.eos_token_ids);
        let embedding = [config.vocab, config.hidden];
        let mut stored = files.weights()?;
        let bytes = stored.bytes();
        let weights = stored.take("model.embed_tokens.weight", &embedding)?.dtype;
        let (place, no_gpu) = Place::find(options, weights, device)?;
        let workers = place.workers(options)?;
        let memory = place.memory_use()?;
        let room = memory.map(|memory| GpuRoom::new(options, &config, memory, bytes));
        let sizes = Sizes::new(options, &config, place.kv_dtype(options, weights)?, room)?;
        let limits = sizes.step_limits(options, config.vocab, place.device());
        let mut machine = place.load(files, options, &sizes, limits)?;
        let block_size = options.block_size.get();
        let refused =
            |option, error: &dyn std::fmt::Display| LoadError::Options { option, problem: error.to_string() };
        let cache_config = kv_cache::Config {
            prefix_caching: options.prefix_caching,
            sequence_tokens_max: TokenCount(sizes.model_tokens_max),
            residency_every: options.residency_every.map_or(0, std::num::NonZeroU32::get),
            events_max: if options.kv_events { EVENTS_MAX } else { 0 },
            report_lost: options.offloading.is_some_and(|one| one.write == OffloadingWrite::Back),
            ..kv_cache::Config::new(
                BlockSize::new(block_size).map_err(|error| refused("block_size", &error))?,
                BlockCount(sizes.blocks + 1),
            )
        };
        let cache =
            Cache::with(cache_config, options.hasher(), Lru::new).map_err(|error| refused("kv", &error))?;
        let block_bytes = machine.block_bytes();
        let host = sizes.host_blocks(options, block_bytes)?;
        let disk = match (&options.offloading_disk, &host) {
            (Some(disk), Some(_)) => Some(block_file::open(files, options, disk, &mut *machine)?),
            (Some(_), None) => {
                return Err(refused("kv_offloading_disk_size", &"needs host memory in front of it"));
            }
            (None, _) => None,
        };
        let host = host.map(|(offloading, blocks)| HostTier::new(offloading, blocks, block_bytes, disk));
        let config = sizes.batching(options, block_bytes as u64);
        let batcher = Batcher::with_order(config, options.order.clone())
            .map_err(|error| refused("max_num_batched_tokens", &error))?;
        Ok(Self {
            grammars: Arc::new(Grammars::new(Arc::clone(&text), &eos)),
            text,
            eos,
            seed: options.seed,
            speculation: options.speculation,
            sizes,
            machine,
            no_gpu,
            workers,
            memory: PagedMemory { cache, host, elsewhere: Elsewhere::default(), closing: BTreeSet::new() },
            batcher,
            active: BTreeMap::new(),
            grammarless: BTreeSet::new(),
            step: StepMemory::new(block_size as usize),
            ahead: options.async_scheduling.then(|| Ahead::new(block_size as usize)),
            totals: Totals::default(),
            last_step: StepShape::default(),
            reasons: Reasons::default(),
            host_hits: HostUse::default(),
            searches: Searches::default(),
            loads: Vec::new(),
            failure: None,
            stuck: None,
        })
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

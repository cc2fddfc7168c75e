//! How large an engine is: from options and a model's configuration to numbers that fit together.

use quayline_batching as batching;
use quayline_gpu_kernels::Dtype;
use quayline_gpu_kernels::cuda::MemoryUse;
use std::num::NonZeroU32;

use crate::config::ModelConfig;
use crate::drafts::Speculation;
use crate::error::LoadError;
use crate::model::StepLimits;
use crate::options::{Device, FailedLoads, KvSize, Offloading, Options, Preemption};

/// What `KvSize::Auto` takes at most of a host's memory. It is only used as blocks are written.
const AUTO_BYTES: u64 = 1 << 30;
/// Rows of steps that are recorded on a GPU, at most.
pub(crate) const RECORDED_ROWS_MAX: usize = 256;

/// Logits of one step are made in parts of at most so many bytes.
const LOGITS_BYTES: usize = 20 << 20;

/// A longer step is computed in parts of so many tokens, with the same bits: by then the weights are read for so many
/// rows that reading them again costs little, and activations stay small. A GPU is filled by more.
const PART_TOKENS_MAX: u32 = 512;
const PART_TOKENS_MAX_CUDA: u32 = 8192;

/// Numbers that fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) dtype: Dtype,
    /// Blocks that can hold tokens; the null block comes on top.
    pub(crate) blocks: u32,
    pub(crate) bytes: u64,
    /// Longest sequence.
    pub(crate) model_tokens_max: u32,
    /// Most tokens in a step.
    pub(crate) step_tokens_max: u32,
}

impl Sizes {
    /// `dtype` is that of cached keys and values. `room` is the memory that a GPU has for them.
    pub(crate) fn new(
        options: &Options,
        config: &ModelConfig,
        dtype: Dtype,
        room: Option<GpuRoom>,
    ) -> Result<Self, LoadError> {
        let utilization = options.gpu_memory_utilization;
        if !(utilization > 0.0 && utilization <= 1.0) {
            let problem = format!("{utilization} is no share of a GPU's memory: above 0, at most 1");
            return Err(LoadError::Options { option: "gpu_memory_utilization", problem });
        }
        let block_size = options.block_size.get();
        let positions = u32::try_from(config.positions_max).unwrap_or(u32::MAX);
        let wanted = options.max_model_len.unwrap_or(positions);
        if wanted > positions {
            let problem = format!("{wanted} is more than the model's {positions} positions");
            return Err(LoadError::Options { option: "max_model_len", problem });
        }
        let bytes_per_block = config.kv_bytes_per_token(dtype.bytes()) as u64 * u64::from(block_size);
        let blocks = blocks(options, wanted, bytes_per_block, room)?;
        let room = u32::try_from(u64::from(blocks) * u64::from(block_size)).unwrap_or(u32::MAX);
        if options.max_model_len.is_some() && room < wanted {
            let problem = format!("{blocks} blocks hold {room} tokens, fewer than max_model_len {wanted}");
            return Err(LoadError::Options { option: kv_option(options.kv), problem });
        }
        let model_tokens_max = wanted.min(room);
        if model_tokens_max < 2 {
            let problem = format!("{model_tokens_max} tokens are too few for a prompt and an answer");
            return Err(LoadError::Options { option: "max_model_len", problem });
        }
        // Whole prompts must fit into a step.
        let step = options.max_num_batched_tokens;
        let step_tokens_max = if options.chunked_prefill { step } else { step.max(model_tokens_max) };
        if options.max_num_seqs == 0 {
            let problem = "at least one request must run".to_owned();
            return Err(LoadError::Options { option: "max_num_seqs", problem });
        }
        if step_tokens_max < options.max_num_seqs {
            let problem =
                format!("{step} tokens are too few for {} requests (max_num_seqs)", options.max_num_seqs);
            return Err(LoadError::Options { option: "max_num_batched_tokens", problem });
        }
        if let Some(Speculation { prompt_lookup_min: min, prompt_lookup_max: max, .. }) = options.speculation
            && min > max
        {
            let problem = format!("prompt_lookup_min {min} is more than prompt_lookup_max {max}");
            return Err(LoadError::Options { option: "speculative_config", problem });
        }
        let bytes = bytes_per_block * (u64::from(blocks) + 1);
        Ok(Self { dtype, blocks, bytes, model_tokens_max, step_tokens_max })
    }

    /// How many blocks host memory holds, if there is some.
    pub(crate) fn host_blocks<'a>(
        &self,
        options: &'a Options,
        block_bytes: usize,
    ) -> Result<Option<(&'a Offloading, u32)>, LoadError> {
        let refuse = |option, problem| Err(LoadError::Options { option, problem });
        let Some(offloading) = &options.offloading else {
            return match options.preemption {
                Preemption::Swap => refuse("preemption_mode", "swap needs host memory to swap to".to_owned()),
                _ => Ok(None),
            };
        };
        const OPTION: &str = "kv_offloading_size";
        if !options.prefix_caching {
            return refuse(
                OPTION,
                "needs prefix caching: blocks lie there under the hash of their tokens".into(),
            );
        }
        match u32::try_from(offloading.bytes / block_bytes.max(1) as u64).unwrap_or(u32::MAX / 4) {
            0 => refuse(OPTION, format!("there must be room for one block of {block_bytes} bytes")),
            blocks => Ok(Some((offloading, blocks))),
        }
    }

    fn preemption(options: &Options, bytes_per_token: u64) -> batching::Preemption {
        match (options.preemption, options.offloading) {
            (_, None) | (Preemption::Recompute, _) => batching::Preemption::Recompute,
            (Preemption::Swap, _) => batching::Preemption::Swap,
            (Preemption::Cheaper(speeds), _) => batching::Preemption::Cheaper(batching::Costs {
                bytes_per_token,
                bytes_per_second: speeds.bytes_per_second,
                transfer_nanoseconds: 0,
                prefill_tokens_per_second: speeds.prefill_tokens_per_second,
            }),
        }
    }

    pub(crate) fn batching(&self, options: &Options, block_bytes: u64) -> batching::Config {
        let capped = NonZeroU32::new(options.long_prefill_token_threshold);
        batching::Config {
            step_tokens_max: self.step_tokens_max,
            running_max: options.max_num_seqs,
            prefill: match (options.chunked_prefill, capped) {
                (false, _) => batching::Prefill::Whole,
                (true, None) => batching::Prefill::Chunked,
                (true, Some(tokens_max)) => batching::Prefill::Capped { tokens_max, adaptive: false },
            },
            mixed_prefill_tokens_max: NonZeroU32::new(options.mixed_prefill_tokens),
            outputs_ahead: u32::from(options.async_scheduling),
            fenced_frees: options.async_scheduling,
            drafts: options.speculation.map_or(batching::Drafts::NONE, drafts),
            preemption: Self::preemption(options, block_bytes / u64::from(options.block_size.get())),
            failed_loads: match options.failed_loads {
                FailedLoads::Recompute => batching::FailedLoads::Recompute,
                FailedLoads::End => batching::FailedLoads::End,
            },
            handover_ticks_max: options.handover_ticks_max,
            patience_ticks: options.patience_ticks,
            queued_requests_max: options.max_queued_requests,
            queued_tokens_max: options.max_queued_tokens,
            ..batching::Config::new(self.model_tokens_max)
        }
    }

    pub(crate) fn step_limits(&self, options: &Options, vocab: usize, device: Device) -> StepLimits {
        let part = if device == Device::Cuda { PART_TOKENS_MAX_CUDA } else { PART_TOKENS_MAX };
        let drafts = options.speculation.map_or(0, |speculation| speculation.num_speculative_tokens.get());
        let rows_max = options.max_num_seqs.saturating_mul(1 + drafts) as usize;
        let rows = (LOGITS_BYTES / (4 * vocab.max(1))).clamp(1, rows_max);
        StepLimits {
            tokens: self.step_tokens_max.min(part) as usize,
            logits_rows: rows.min(self.step_tokens_max as usize),
            positions: self.model_tokens_max as usize,
        }
    }
}

/// How many drafts each gets is for its drafter to say.
fn drafts(speculation: Speculation) -> batching::Drafts {
    let none = |above_running| batching::DraftLimit { above_running, tokens_max: 0 };
    batching::Drafts {
        limits: speculation.disable_by_batch_size.map(none).into_iter().collect(),
        ..batching::Drafts::up_to(speculation.num_speculative_tokens.get())
    }
}

/// A GPU's memory before a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GpuRoom {
    memory: MemoryUse,
    /// What the engine may have of it.
    usable: u64,
    weights: u64,
    activations: u64,
}

impl GpuRoom {
    /// Of this memory, as much will be left beside weights of so many bytes in the files.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a share of some bytes need not be exact"
    )]
    pub(crate) fn new(options: &Options, config: &ModelConfig, memory: MemoryUse, weights: u64) -> Self {
        let &ModelConfig { hidden, heads, kv_heads, head_dim, intermediate, vocab, .. } = config;
        let step = options.max_num_batched_tokens;
        let longest = u32::try_from(config.positions_max).unwrap_or(u32::MAX);
        let step = if options.chunked_prefill { step } else { step.max(longest) };
        let rows = step.min(PART_TOKENS_MAX_CUDA) as usize + RECORDED_ROWS_MAX;
        let row = 5 * hidden + 2 * (heads + kv_heads) * head_dim + 3 * intermediate;
        // Logits, and their copies in f32 while tokens are drawn.
        let logits = 2 * RECORDED_ROWS_MAX * vocab * 6;
        let share = (memory.total as f64 * options.gpu_memory_utilization) as u64;
        let usable = share.min(memory.free);
        Self { memory, usable, weights, activations: (2 * rows * row + logits) as u64 }
    }

    /// What is there for keys and values.
    fn bytes(self) -> u64 {
        self.usable.saturating_sub(self.weights).saturating_sub(self.activations)
    }
}

impl std::fmt::Display for GpuRoom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { memory: MemoryUse { free, total }, usable, weights, activations } = self;
        let left = self.bytes();
        write!(
            f,
            "of the GPU's {total} bytes {free} are free and {usable} may be used, weights take {weights} and activations {activations}: {left} are left"
        )
    }
}

fn blocks(
    options: &Options,
    wanted: u32,
    bytes_per_block: u64,
    room: Option<GpuRoom>,
) -> Result<u32, LoadError> {
    let one = wanted.div_ceil(options.block_size.get());
    let fitting = |bytes: u64| u32::try_from(bytes / bytes_per_block.max(1)).unwrap_or(u32::MAX);
    let blocks = match options.kv {
        KvSize::Blocks(blocks) => blocks,
        KvSize::Bytes(bytes) => fitting(bytes),
        KvSize::Auto => {
            let least = if options.max_model_len.is_some() { one } else { 1 };
            match room {
                None => {
                    let most = one.saturating_mul(options.max_num_seqs.div_ceil(4));
                    most.min(fitting(AUTO_BYTES)).max(least)
                }
                // The null block comes on top.
                Some(room) => match fitting(room.bytes()).saturating_sub(1) {
                    fits if fits >= least => fits,
                    _ => {
                        let problem = format!("{least} blocks of {bytes_per_block} bytes do not fit: {room}");
                        return Err(LoadError::Options { option: kv_option(options.kv), problem });
                    }
                },
            }
        }
    };
    if blocks == 0 {
        let problem = format!("there must be room for one block of {bytes_per_block} bytes");
        return Err(LoadError::Options { option: kv_option(options.kv), problem });
    }
    Ok(blocks)
}

/// The command line's name, which is vLLM's.
fn kv_option(kv: KvSize) -> &'static str {
    match kv {
        KvSize::Auto => "max_model_len",
        KvSize::Bytes(_) => "kv_cache_memory_bytes",
        KvSize::Blocks(_) => "num_gpu_blocks_override",
    }
}

//! The knobs of an engine, under vLLM's names where it has them.

use std::num::NonZeroUsize;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;

use quayline_batching::Policy;
use quayline_gpu_kernels::{Dtype, Rounding};
use quayline_kv_cache::hash::{Algorithm, AnyHasher, Encoding, Vllm};

use crate::config::QuantizationMethod;
use crate::drafts::Speculation;

/// How an engine is set up. The defaults serve a laptop.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Tokens per cache block.
    pub block_size: NonZeroU32,
    /// How much memory keys and values may take.
    pub kv: KvSize,
    /// Number format of cached keys and values.
    pub kv_dtype: KvDtype,
    /// What matrices of floats are rounded to when they are loaded; `None` keeps them. [`Rounding::Fp8`] leaves a
    /// checkpoint that comes in it as it is, and refuses those that come in four bits.
    pub quantization: Option<Rounding>,
    /// How the checkpoint must be quantised: another is not loaded.
    pub quantization_method: Option<QuantizationMethod>,
    /// The number format that the weights or the arithmetic must have: else loading fails. On the CPU the arithmetic is
    /// f32, but for activations that meet bf16 weights where the machine multiplies bf16 by bf16. Who asks for f32 gets
    /// it everywhere, and a cache of f32 where [`KvDtype::Auto`] leaves it open.
    pub dtype: Option<Dtype>,
    /// Longest sequence, prompt and output together; `None` is the model's own limit.
    pub max_model_len: Option<u32>,
    /// Most requests in one step.
    pub max_num_seqs: u32,
    /// Most tokens in one step.
    pub max_num_batched_tokens: u32,
    /// Most prompt tokens in a step in which somebody generates; 0 is no limit. More keep those who generate
    /// waiting and bring no higher rate, fewer read the weights too often.
    pub mixed_prefill_tokens: u32,
    /// Whether a prompt may be spread over several steps.
    pub chunked_prefill: bool,
    /// Most prompt tokens of one request in one step while others run; 0 is no limit.
    pub long_prefill_token_threshold: u32,
    /// Whether blocks of earlier requests are reused.
    pub prefix_caching: bool,
    /// How blocks are named: by whose hash of their tokens and all that came before. Who listens to events sees the
    /// names, and may compute the same ones.
    pub hash: Algorithm,
    /// What vLLM's hashes begin with, as its `PYTHONHASHSEED`. Without it `sha256` begins as vLLM's own does, and
    /// `xxhash` with [`Self::seed`] where vLLM would draw a number.
    pub hash_seed: Option<String>,
    /// Host memory behind the cache; needs `prefix_caching`, since content lies there under the hash of its tokens.
    pub offloading: Option<Offloading>,
    /// A file behind the host memory, which it needs: what lies there is found after a restart.
    pub offloading_disk: Option<OffloadingDisk>,
    /// What becomes of the keys and values of a request that yields its room.
    pub preemption: Preemption,
    /// What becomes of a request whose tokens another engine should have delivered.
    pub failed_loads: FailedLoads,
    /// How long what a request hands over is kept, in ticks; `None` is until somebody says so.
    pub handover_ticks_max: Option<u64>,
    /// Who runs first.
    pub order: Policy,
    /// Whoever has waited for longer than so many ticks goes first, whatever the order; `None` is nobody.
    pub patience_ticks: Option<u64>,
    /// Whether likely next tokens are drafted and several are verified in one step; `None` is one at a time.
    pub speculation: Option<Speculation>,
    /// Whether the next step is planned while one computes. Put off while a beam search runs: it needs the outcome of
    /// one step to know who is in the next.
    pub async_scheduling: bool,
    /// Every how manyth block is watched for how long it keeps its contents
    /// ([`Engine::drain_residency`](crate::Engine::drain_residency)); `None` is none.
    pub residency_every: Option<NonZeroU32>,
    /// Whether it can be [told](crate::Engine::tell) what the cache has and loses.
    pub kv_events: bool,
    /// Most requests that may wait.
    pub max_queued_requests: Option<u32>,
    /// Most prompt tokens that may wait.
    pub max_queued_tokens: Option<u64>,
    /// Where the arithmetic runs.
    pub device: Device,
    /// A library that multiplies on a GPU, in the place of our own kernels: prompts may be read faster. **The bits of a
    /// token then depend on the batch**: on how many others are in its step. `None` is our own kernels.
    pub cublaslt: Option<CublasLtPlace>,
    /// The share of a GPU's memory that the engine may have, with weights and activations; above 0, at most 1.
    pub gpu_memory_utilization: f64,
    /// Threads for the arithmetic; `None` is one per core.
    pub threads: Option<NonZeroUsize>,
    /// Seeds requests that bring no seed of their own.
    pub seed: u64,
}

impl Options {
    /// What names blocks.
    pub(crate) fn hasher(&self) -> AnyHasher {
        let Some(seed) = &self.hash_seed else { return AnyHasher::new(self.hash, self.seed) };
        match self.hash {
            Algorithm::VllmSha256 => AnyHasher::Vllm(Vllm::sha256_with_seed(Encoding::Pickle, seed)),
            Algorithm::VllmSha256Cbor => AnyHasher::Vllm(Vllm::sha256_with_seed(Encoding::Cbor, seed)),
            Algorithm::VllmXxhash => AnyHasher::VllmXxhash(Vllm::xxhash(Encoding::Pickle, seed)),
            Algorithm::VllmXxhashCbor => AnyHasher::VllmXxhash(Vllm::xxhash(Encoding::Cbor, seed)),
            ours => AnyHasher::new(ours, self.seed),
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            block_size: const { NonZeroU32::new(16).expect("16 is not 0") },
            kv: KvSize::Auto,
            kv_dtype: KvDtype::Auto,
            quantization: None,
            quantization_method: None,
            dtype: None,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 256,
            mixed_prefill_tokens: 48,
            chunked_prefill: true,
            long_prefill_token_threshold: 0,
            prefix_caching: true,
            hash: Algorithm::Xxh3,
            hash_seed: None,
            offloading: None,
            offloading_disk: None,
            preemption: Preemption::default(),
            failed_loads: FailedLoads::default(),
            handover_ticks_max: None,
            order: Policy::FirstCome,
            patience_ticks: None,
            speculation: None,
            async_scheduling: false,
            residency_every: None,
            kv_events: false,
            max_queued_requests: None,
            max_queued_tokens: None,
            device: Device::Cpu,
            cublaslt: None,
            gpu_memory_utilization: 0.9,
            threads: None,
            seed: 0,
        }
    }
}

/// Host memory that keeps blocks which the cache has no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloading {
    /// How much. It is taken as it is written.
    pub bytes: u64,
    /// Which blocks are written to it.
    pub write: OffloadingWrite,
    /// Give up blocks by adaptive replacement: one long document does not drive out what is used daily. Otherwise what
    /// was used longest ago.
    pub arc: bool,
}

impl Offloading {
    /// Written through, least recently used given up.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self { bytes, write: OffloadingWrite::Through, arc: false }
    }
}

/// A file of blocks behind host memory. What comes to host memory is written to it in time; what host memory has
/// given up is read from it, checked, before anybody counts on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffloadingDisk {
    /// The directory that it lies in. It is made if there is none. Engines do not share one at a time.
    pub directory: PathBuf,
    /// How large the file gets.
    pub bytes: u64,
}

/// Which blocks are written to host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffloadingWrite {
    /// Every full block, when it has been computed.
    Through,
    /// A block that was computed or found in the cache so many times.
    AfterUses(NonZeroU32),
    /// What the cache is about to overwrite.
    Back,
}

/// What becomes of the keys and values of a request that yields its room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preemption {
    /// They are moved to host memory if that is quicker, there and back, than computing them again, by these
    /// [`Speeds`]; computed again without host memory.
    Cheaper(Speeds),
    /// They are computed again, as far as the cache does not find them.
    #[default]
    Recompute,
    /// They are moved to host memory, if it has room.
    Swap,
}

/// How fast this machine is. [`Engine::set_speeds`](crate::Engine::set_speeds) tells what was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speeds {
    /// Copies between the cache and host memory, one way.
    pub bytes_per_second: NonZeroU64,
    /// Prompts.
    pub prefill_tokens_per_second: NonZeroU64,
}

impl Default for Speeds {
    /// A guess for a laptop and a small model: 4 GB and 500 tokens a second.
    fn default() -> Self {
        const {
            Self {
                bytes_per_second: NonZeroU64::new(4_000_000_000).expect("not 0"),
                prefill_tokens_per_second: NonZeroU64::new(500).expect("not 0"),
            }
        }
    }
}

/// Where the arithmetic runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// The first NVIDIA GPU, with nothing but its driver. Activations, weights and the cache are bf16 or f16 there, as
    /// the checkpoint is (f16 for one of 32 bits).
    Cuda,
    /// That GPU, or where it cannot be had the CPU: [`Engine::no_gpu`](crate::Engine::no_gpu) says why.
    Auto,
}

/// Where NVIDIA's cuBLASLt is, version 12.0 or later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CublasLtPlace {
    /// Where the machine's loader or NVIDIA's toolkit has it.
    Installed,
    /// In this file.
    File(PathBuf),
}

/// How much memory keys and values may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvSize {
    /// Room for a quarter of `max_num_seqs` at the longest length, for few are that long, or 1 GiB,
    /// whichever is less; but room for one sequence of `max_model_len` if that is given. Where it is not,
    /// the longest sequence is what fits. Memory is only used as blocks are written. On a GPU, all that weights and
    /// activations leave of [its share](Options::gpu_memory_utilization); loading fails where that is too little.
    Auto,
    /// This many blocks that can hold tokens.
    Blocks(u32),
    /// As many blocks as fit in this many bytes.
    Bytes(u64),
}

/// Number format of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// That of the weights.
    Auto,
    /// 32-bit floats.
    F32,
    /// Brain floats.
    Bf16,
    /// Half floats.
    F16,
}

/// What becomes of a request whose tokens another engine should have delivered, and did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FailedLoads {
    /// It computes them itself.
    #[default]
    Recompute,
    /// It ends with an error.
    End,
}

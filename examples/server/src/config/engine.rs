//! How large the engine is, and how it works.

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use quayline_engine::{
    CublasLtPlace, Device, HashAlgorithm, KvDtype, KvSize, Options, QuantizationMethod, Rounding,
};

use super::parse::{count_u32, count_u64, json, positive_u32, positive_usize};
use crate::speculative::SpeculativeConfig;

/// How large the engine is, and how it works.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch on the command line")]
pub(crate) struct EngineFlags {
    /// Longest sequence, prompt and answer together; the default is the model's own limit
    #[arg(long, value_parser = context)]
    max_model_len: Option<Context>,
    /// Most requests in one step
    #[arg(long, value_parser = count_u32)]
    max_num_seqs: Option<u32>,
    /// Most tokens in one step
    #[arg(long, value_parser = count_u32)]
    max_num_batched_tokens: Option<u32>,
    /// Most prompt tokens in a step in which somebody generates; 0 is no limit
    #[arg(long, value_parser = count_u32)]
    mixed_prefill_tokens: Option<u32>,
    /// Spread a long prompt over several steps (the default)
    #[arg(long, overrides_with = "no_enable_chunked_prefill")]
    enable_chunked_prefill: bool,
    /// Run each prompt in one step
    #[arg(long)]
    no_enable_chunked_prefill: bool,
    /// Most prompt tokens of one request in one step; 0 is no limit
    #[arg(long, value_parser = count_u32)]
    long_prefill_token_threshold: Option<u32>,
    /// Reuse the cache of equal beginnings (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,
    /// Compute every prompt anew
    #[arg(long)]
    no_enable_prefix_caching: bool,
    /// Whose hash names blocks, in events and on disk
    #[arg(long, value_enum, default_value_t = HashName::Xxh3)]
    prefix_caching_hash_algo: HashName,
    /// What vLLM's hashes begin with
    #[arg(long, env = "PYTHONHASHSEED", hide = true)]
    python_hash_seed: Option<String>,
    /// Tokens per cache block
    #[arg(long, value_parser = positive_u32)]
    block_size: Option<NonZeroU32>,
    /// What the matrices are rounded to when they are loaded, or how the checkpoint is quantised: another is refused
    #[arg(long, short = 'q', value_enum)]
    quantization: Option<Quantization>,
    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = CacheDtype::Auto)]
    kv_cache_dtype: CacheDtype,
    /// Bytes for cached keys and values: 512M, 2G
    #[arg(long, value_parser = count_u64, conflicts_with = "num_gpu_blocks_override")]
    kv_cache_memory_bytes: Option<u64>,
    /// Number of cache blocks
    #[arg(long, value_parser = count_u32)]
    num_gpu_blocks_override: Option<u32>,
    /// Draft likely tokens from the text so far, and verify several in one step:
    /// {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    #[arg(long, value_parser = json::<SpeculativeConfig>, value_name = "JSON")]
    speculative_config: Option<SpeculativeConfig>,
    /// Plan the next step while one computes
    #[arg(long)]
    async_scheduling: bool,
    /// Plan a step when the one before it is done (the default)
    #[arg(long, overrides_with = "async_scheduling")]
    no_async_scheduling: bool,
    /// Most requests that may wait; more get 429
    #[arg(long, default_value_t = 4096, value_parser = count_u32)]
    max_num_queued_reqs: u32,
    /// Most prompt tokens that may wait; more get 429
    #[arg(long, default_value_t = 8 << 20, value_parser = count_u64)]
    max_num_queued_tokens: u64,
    /// Threads for the arithmetic; the default is one per core
    #[arg(long, value_parser = positive_usize)]
    threads: Option<NonZeroUsize>,
    /// Where the arithmetic runs: the CPU, an NVIDIA GPU, or the GPU if there is one that works
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// Let NVIDIA's cuBLASLt multiply on the GPU, where the machine has it or in this file; the bits of a token then
    /// depend on what else is in its step
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "FILE")]
    #[expect(clippy::option_option, reason = "as clap has it: absent, without a value, with one")]
    cublaslt: Option<Option<PathBuf>>,
    /// The share of the GPU's memory that weights, activations and cache may have
    #[arg(long, default_value_t = Options::default().gpu_memory_utilization)]
    gpu_memory_utilization: f64,
    /// Number format of the weights: another than theirs is refused, but for float32 on the CPU, which then computes in
    /// it throughout
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    dtype: Dtype,
    /// Devices to spread the model over: one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1))]
    tensor_parallel_size: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Quantization {
    /// Half of the bytes to read for each token, at next to no cost in quality.
    Int8,
    /// A quarter of the bytes, at some.
    Int4,
    /// E4M3: as many bytes as int8. A checkpoint that comes in it stays as it is.
    Fp8,
    /// The checkpoint is of AWQ.
    #[value(alias = "awq_marlin")]
    Awq,
    /// The checkpoint is of GPTQ.
    #[value(alias = "gptq_marlin")]
    Gptq,
    /// The checkpoint is of compressed-tensors.
    CompressedTensors,
}

impl Quantization {
    /// What matrices are rounded to.
    fn rounding(self) -> Option<Rounding> {
        match self {
            Self::Int8 => Some(Rounding::Int8),
            Self::Int4 => Some(Rounding::Int4),
            Self::Fp8 => Some(Rounding::Fp8),
            Self::Awq | Self::Gptq | Self::CompressedTensors => None,
        }
    }

    /// What the checkpoint must be.
    fn method(self) -> Option<QuantizationMethod> {
        match self {
            Self::Int8 | Self::Int4 | Self::Fp8 => None,
            Self::Awq => Some(QuantizationMethod::Awq),
            Self::Gptq => Some(QuantizationMethod::Gptq),
            Self::CompressedTensors => Some(QuantizationMethod::CompressedTensors),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheDtype {
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(name = "bfloat16", alias = "bf16")]
    Bf16,
    #[value(name = "float16", alias = "f16", alias = "half")]
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
    Auto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Auto,
    #[value(name = "bfloat16", alias = "bf16")]
    Bf16,
    #[value(name = "float16", aliases = ["half", "f16"])]
    F16,
    #[value(name = "float32", aliases = ["float", "f32"])]
    F32,
}

impl EngineFlags {
    /// What the engine is told by these flags.
    pub(super) fn options(&self) -> Options {
        let base = Options::default();
        let max_num_seqs = self.max_num_seqs.unwrap_or(base.max_num_seqs);
        let kv = match (self.num_gpu_blocks_override, self.kv_cache_memory_bytes) {
            (Some(blocks), _) => KvSize::Blocks(blocks),
            (None, Some(bytes)) => KvSize::Bytes(bytes),
            (None, None) => KvSize::Auto,
        };
        Options {
            block_size: self.block_size.unwrap_or(base.block_size),
            quantization: self.quantization.and_then(Quantization::rounding),
            quantization_method: self.quantization.and_then(Quantization::method),
            dtype: match self.dtype {
                Dtype::Auto => None,
                Dtype::Bf16 => Some(quayline_engine::Dtype::Bf16),
                Dtype::F16 => Some(quayline_engine::Dtype::F16),
                Dtype::F32 => Some(quayline_engine::Dtype::F32),
            },
            kv,
            kv_dtype: match self.kv_cache_dtype {
                CacheDtype::Auto => KvDtype::Auto,
                CacheDtype::F32 => KvDtype::F32,
                CacheDtype::Bf16 => KvDtype::Bf16,
                CacheDtype::F16 => KvDtype::F16,
            },
            max_model_len: self.max_model_len.and_then(|context| context.0),
            max_num_seqs,
            // A step has room for a token of everybody.
            max_num_batched_tokens: self
                .max_num_batched_tokens
                .unwrap_or(base.max_num_batched_tokens.max(max_num_seqs)),
            mixed_prefill_tokens: self.mixed_prefill_tokens.unwrap_or(base.mixed_prefill_tokens),
            chunked_prefill: !self.no_enable_chunked_prefill,
            long_prefill_token_threshold: self
                .long_prefill_token_threshold
                .unwrap_or(base.long_prefill_token_threshold),
            prefix_caching: !self.no_enable_prefix_caching,
            hash: self.prefix_caching_hash_algo.algorithm(),
            hash_seed: self.python_hash_seed.clone(),
            async_scheduling: self.async_scheduling,
            speculation: self.speculative_config.map(SpeculativeConfig::speculation),
            gpu_memory_utilization: self.gpu_memory_utilization,
            max_queued_requests: Some(self.max_num_queued_reqs),
            max_queued_tokens: Some(self.max_num_queued_tokens),
            device: match self.device {
                DeviceName::Cpu => Device::Cpu,
                DeviceName::Cuda => Device::Cuda,
                DeviceName::Auto => Device::Auto,
            },
            cublaslt: self
                .cublaslt
                .clone()
                .map(|file| file.map_or(CublasLtPlace::Installed, CublasLtPlace::File)),
            threads: self.threads,
            ..base
        }
    }
}

/// The algorithms of vLLM and Dynamo under their names there, and our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum HashName {
    /// Ours, of 128 bits: the fastest
    Xxh3,
    /// vLLM's default: SHA-256 of a pickle
    Sha256,
    /// vLLM's, which other languages can compute: SHA-256 of CBOR
    #[value(name = "sha256_cbor")]
    Sha256Cbor,
    /// vLLM's: XXH3 of a pickle
    Xxhash,
    /// vLLM's: XXH3 of CBOR
    #[value(name = "xxhash_cbor")]
    XxhashCbor,
    /// Dynamo's
    Dynamo,
}

impl HashName {
    fn algorithm(self) -> HashAlgorithm {
        match self {
            HashName::Xxh3 => HashAlgorithm::Xxh3,
            HashName::Sha256 => HashAlgorithm::VllmSha256,
            HashName::Sha256Cbor => HashAlgorithm::VllmSha256Cbor,
            HashName::Xxhash => HashAlgorithm::VllmXxhash,
            HashName::XxhashCbor => HashAlgorithm::VllmXxhashCbor,
            HashName::Dynamo => HashAlgorithm::Dynamo,
        }
    }
}

/// `--max-model-len auto` and `-1` mean the model's own limit.
#[derive(Debug, Clone, Copy)]
struct Context(Option<u32>);

fn context(text: &str) -> Result<Context, String> {
    match text {
        "auto" | "-1" => Ok(Context(None)),
        text => count_u32(text).map(|tokens| Context(Some(tokens))),
    }
}

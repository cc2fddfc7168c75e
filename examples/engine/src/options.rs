//! The knobs of an engine, under vLLM's names where it has them.

use std::num::NonZeroU32;
use std::num::NonZeroUsize;

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
    /// Who runs first.
    pub order: Order,
    /// Whether likely next tokens are drafted and several are verified in one step; `None` is one at a time.
    pub speculation: Option<Speculation>,
    /// Most requests that may wait.
    pub max_queued_requests: Option<u32>,
    /// Most prompt tokens that may wait.
    pub max_queued_tokens: Option<u64>,
    /// Threads for the arithmetic; `None` is one per core.
    pub threads: Option<NonZeroUsize>,
    /// Seeds requests that bring no seed of their own.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            block_size: const { NonZeroU32::new(16).expect("16 is not 0") },
            kv: KvSize::Auto,
            kv_dtype: KvDtype::Auto,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 256,
            mixed_prefill_tokens: 48,
            chunked_prefill: true,
            long_prefill_token_threshold: 0,
            prefix_caching: true,
            order: Order::FirstCome,
            speculation: None,
            max_queued_requests: None,
            max_queued_tokens: None,
            threads: None,
            seed: 0,
        }
    }
}

/// How much memory keys and values may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvSize {
    /// Room for a quarter of `max_num_seqs` at the longest length, for few are that long, or 1 GiB,
    /// whichever is less; but room for one sequence of `max_model_len` if that is given. Where it is not,
    /// the longest sequence is what fits. Memory is only used as blocks are written.
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

/// Who runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// First come, first served.
    FirstCome,
    /// Lowest priority number first, then first come.
    Priority,
}

//! How long a step takes: a model with physical parts, so that it says something about runs it was not fitted to.
//!
//! A step reads all weights once and multiplies them with every token (`matmul`), lets every token attend to
//! those before it (`decode` when each request has one token, `mixed` when a chunk of a prompt is among them),
//! multiplies the last hidden states with the output matrix, and costs the host some time besides:
//!
//! ```text
//! step      = matmul + head + layers * attention + all-reduces + host
//! matmul    = hypot(weight bytes / bandwidth, 2 * weights * tokens / flops)            a soft roofline
//! attention = decode: call + requests * per request + key and value bytes / bandwidth
//!             mixed:  the same with its own, lower bandwidth, + 4 * query width * pairs / flops + longest * per key
//! ```
//!
//! The knee of the roofline is round because where reading and computing take equally long, neither hides the
//! other whole. In a mixed step the kernel for chunks also serves the requests that generate; it reads keys
//! once for each query head, not once for each group of them, hence the lower bandwidth.

use crate::gpu::{Gpu, Host};
use crate::model::{Model, bytes};

/// What a step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepShape {
    /// Requests that compute one token: they generate.
    pub decodes: u32,
    /// Tokens that these attend to, over all of them.
    pub decode_context: u64,
    /// Chunks of prompts, of more than one token each.
    pub chunks: u32,
    /// Tokens of the chunks.
    pub chunk_tokens: u32,
    /// Pairs of a token of a chunk with a token that it attends to.
    pub chunk_pairs: f64,
    /// The most tokens that a token of a chunk attends to.
    pub chunk_reach: u32,
    /// Requests that a token is sampled for.
    pub sampled: u32,
}

impl StepShape {
    /// Adds a request that computes its tokens from `start` to `start + tokens`.
    pub fn add(&mut self, start: u32, tokens: u32, samples: bool) {
        if tokens == 1 {
            self.decodes += 1;
            self.decode_context += u64::from(start) + 1;
        } else {
            let (start_f, tokens_f) = (f64::from(start), f64::from(tokens));
            self.chunks += 1;
            self.chunk_tokens += tokens;
            self.chunk_pairs += tokens_f * (start_f + tokens_f / 2.0);
            self.chunk_reach = self.chunk_reach.max(start + tokens);
        }
        self.sampled += u32::from(samples);
    }

    fn requests(&self) -> u32 {
        self.decodes + self.chunks
    }

    fn tokens(&self) -> f64 {
        f64::from(self.decodes) + f64::from(self.chunk_tokens)
    }
}

/// A model on as many equal GPUs as it is split over (tensor parallelism).
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    /// What is computed.
    pub model: Model,
    /// By what.
    pub gpu: Gpu,
    /// By how many of them.
    pub ranks: u32,
    /// Under whose direction.
    pub host: Host,
}

impl Cost {
    /// Seconds from the beginning of a step to that of the next, when steps follow one another.
    pub fn seconds(&self, step: &StepShape) -> f64 {
        let host = self.host.step_seconds + self.host.request_seconds * f64::from(step.requests());
        let layers = f64::from(self.model.layers);
        let matmul = self.matmul(self.model.layer_weights(), step.tokens());
        let head = self.matmul(self.model.head_weights(), f64::from(step.sampled));
        matmul + head + layers * (self.attention(step) + self.all_reduces(step.tokens())) + host
    }

    /// Seconds that a GPU takes to multiply its part of `weights` with `tokens` tokens.
    fn matmul(&self, weights: f64, tokens: f64) -> f64 {
        if tokens == 0.0 {
            return 0.0;
        }
        let weights = weights / f64::from(self.ranks);
        let read = bytes(weights) / self.gpu.matmul.bytes_per_second;
        let compute = 2.0 * weights * tokens / self.gpu.matmul.flops_per_second;
        read.hypot(compute)
    }

    /// Seconds of attention in one layer.
    fn attention(&self, step: &StepShape) -> f64 {
        let ranks = f64::from(self.ranks);
        let read = step.decode_context as f64 * self.model.layer_kv_bytes() / ranks;
        let decodes = f64::from(step.decodes);
        if step.chunks == 0 {
            let decode = &self.gpu.decode;
            return decode.call_seconds + decodes * decode.request_seconds + read / decode.bytes_per_second;
        }
        let mixed = &self.gpu.mixed;
        let compute = 4.0 * self.model.query_width() / ranks * step.chunk_pairs;
        mixed.call_seconds
            + decodes * mixed.request_seconds
            + read / mixed.bytes_per_second
            + compute / mixed.flops_per_second
            + f64::from(step.chunk_reach) * mixed.key_seconds
    }

    /// Seconds of the two all-reduces of a layer: each GPU sends and receives every element once, in a ring.
    fn all_reduces(&self, tokens: f64) -> f64 {
        if self.ranks == 1 {
            return 0.0;
        }
        let share = 2.0 * f64::from(self.ranks - 1) / f64::from(self.ranks);
        let moved = share * bytes(f64::from(self.model.hidden)) * tokens;
        2.0 * (self.gpu.link.seconds + moved / self.gpu.link.bytes_per_second)
    }

    /// Blocks of `block_tokens` tokens that fit beside the weights when `utilization` of the memory may be used.
    pub fn blocks(&self, block_tokens: u32, utilization: f64) -> f64 {
        let ranks = f64::from(self.ranks);
        let room = self.gpu.memory_bytes * utilization
            - self.model.weight_bytes() / ranks
            - self.host.reserved_bytes;
        room * ranks / (self.model.kv_bytes() * f64::from(block_tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost() -> Cost {
        Cost { model: Model::LLAMA_3_1_8B, gpu: Gpu::RTX_4090, ranks: 1, host: Host::VLLM }
    }

    fn seconds(parts: &[(u32, u32)]) -> f64 {
        let mut step = StepShape::default();
        parts.iter().for_each(|&(start, tokens)| step.add(start, tokens, true));
        cost().seconds(&step)
    }

    #[test]
    fn more_work_takes_longer() {
        assert!(seconds(&[(100, 1)]) < seconds(&[(1000, 1)]));
        assert!(seconds(&[(100, 1)]) < seconds(&[(100, 1), (100, 1)]));
        assert!(seconds(&[(0, 100)]) < seconds(&[(0, 2000)]));
        assert!(seconds(&[(0, 2000)]) < seconds(&[(8000, 2000)]));
    }

    #[test]
    fn one_token_costs_the_reading_of_all_weights_and_a_full_step_the_arithmetic() {
        let weights = Model::LLAMA_3_1_8B.weight_bytes();
        let read = weights / Gpu::RTX_4090.matmul.bytes_per_second;
        assert!((0.85..1.15).contains(&(seconds(&[(10, 1)]) / read)), "{} s", seconds(&[(10, 1)]));
        let compute = weights * 2048.0 / Gpu::RTX_4090.matmul.flops_per_second;
        assert!((0.8..1.2).contains(&(seconds(&[(0, 2048)]) / compute)), "{} s", seconds(&[(0, 2048)]));
    }

    #[test]
    fn the_blocks_beside_the_weights_are_those_that_vllm_found() {
        let blocks = cost().blocks(16, 0.9);
        assert!((blocks - 2588.0).abs() < 26.0, "{blocks} blocks");
    }
}

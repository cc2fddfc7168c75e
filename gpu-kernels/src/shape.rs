//! Named dimensions that several operators share.

use crate::Dtype;

/// The largest head size that attention takes.
pub(crate) const HEAD_DIM_MAX: usize = 256;

/// The heads of an attention layer. `query` is a multiple of `kv`: query head `h` reads kv head
/// `h / (query / kv)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads.
    pub query: usize,
    /// Number of key/value heads.
    pub kv: usize,
    /// Elements per head, at most 256.
    pub dim: usize,
}

/// The paged memory for keys and values of a whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model; each has its own K and V.
    pub layers: usize,
    /// Physical blocks, counting block 0 even if nobody hands it out.
    pub blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head, at most 256.
    pub head_dim: usize,
    /// Storage type of the cached values.
    pub dtype: Dtype,
}

/// How the heads and tokens of a block lie in K and in V, by FlashInfer's names. No result depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvOrder {
    /// Heads, then tokens: `[blocks, kv heads, tokens, dim]`. A head's tokens are neighbours, as attention reads them.
    #[default]
    Hnd,
    /// Tokens, then heads: `[blocks, tokens, kv heads, dim]`. A token is one piece.
    Nhd,
}

/// How a pool stores a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvStorage {
    /// In the pool's type.
    Same,
    /// In E4M3 (one byte), divided by one scale for all of K and one for all of V.
    Fp8 {
        /// What stored keys are multiplied by.
        key_scale: f32,
        /// What stored values are multiplied by.
        value_scale: f32,
    },
    /// In E4M3, with a scale for each head of each token, made when it is appended: its largest element over 448.
    Fp8PerHead,
    /// In whole numbers of one byte, with a scale for each head of each token: its largest element over 127.
    Int8PerHead,
}

impl KvStorage {
    /// Bytes of a number in a pool of numbers of a type.
    pub(crate) fn bytes(self, dtype: Dtype) -> usize {
        if self == Self::Same { dtype.bytes() } else { 1 }
    }

    /// Whether each head of each token has a scale of its own.
    pub(crate) fn per_head(self) -> bool {
        matches!(self, Self::Fp8PerHead | Self::Int8PerHead)
    }
}

/// Which elements of a head are rotated together (RoPE, arXiv 2104.09864).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RopeStyle {
    /// Element `i` pairs with `i + rotary_dim / 2`: GPT-NeoX, and every Hugging Face Llama, Qwen and Mistral.
    #[default]
    Halves,
    /// Element `2 i` pairs with `2 i + 1`: GPT-J and the original Llama files.
    Interleaved,
}

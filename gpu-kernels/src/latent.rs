//! Multi-head latent attention (arXiv 2405.04434) in its absorbed form.
//!
//! The cache holds one latent and one rotated key per token, for all heads. In the form computed here, the
//! up-projections of keys and values are taken into the queries and the output: a query head has as many elements
//! as a cached row, and a head's output is a latent.

use std::fmt;

use crate::{Dtype, Error, KvStorage, Ops, Scores};

/// Attention over a cache of latents.
pub trait Latent: Ops {
    /// Memory for latents, stored as asked; [`KvStorage::Fp8`] stores them by its `key_scale`.
    ///
    /// # Errors
    /// When a dimension is not what [`LatentShape`] says, they are to be whole numbers, or the memory cannot be had.
    fn latent_pool(&self, shape: LatentShape, storage: KvStorage) -> Result<Self::KvPool, Error>;

    /// Bytes that [`Latent::latent_pool`] takes for one block over all layers, scales included.
    ///
    /// # Errors
    /// As [`Latent::latent_pool`].
    fn latent_block_bytes(&self, shape: LatentShape, storage: KvStorage) -> Result<usize, Error>;

    /// Writes each token's latent `[tokens, latent_dim]` and shared key `[tokens, rope_dim]` into its slot: the
    /// latent after an RMSNorm if there are a weight and an eps, the key after its rotation if there is a table. Both
    /// tensors stay as they are. Negative slots are skipped.
    ///
    /// # Errors
    /// When shapes disagree, or a layer, slot or position is not there, or the pool holds no latents.
    #[expect(clippy::too_many_arguments, reason = "three operators in one")]
    fn append_latent(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        batch: &Self::Batch,
        latent: &Self::Tensor,
        rope: &Self::Tensor,
        norm: Option<(&Self::Weight, f32)>,
        table: Option<&Self::RopeTable>,
    ) -> Result<(), Error>;

    /// Attention over a pool of latents: `out` `[tokens, heads · latent_dim]`, still to be multiplied by the
    /// up-projection of the values ([`Latent::head_linear`]); and the natural logarithm of each row's sum of
    /// exponentials, as [`Ops::attend`].
    ///
    /// # Errors
    /// When shapes disagree, or a layer or block is not there, or the pool holds no latents; and as [`Ops::attend`].
    #[expect(clippy::too_many_arguments, reason = "what is read, how, and what is written")]
    fn attend_latent(
        &self,
        pool: &Self::KvPool,
        layer: usize,
        batch: &Self::Batch,
        q: LatentQuery<'_, Self>,
        attention: LatentAttention,
        scores: Scores<'_, Self>,
        out: &mut Self::Tensor,
        lse: Option<&mut Self::Floats>,
    ) -> Result<(), Error>;

    /// Each head's part of `x` `[tokens, heads · in]` times a matrix of that head's own: `out` `[tokens, heads · out]`.
    /// The matrices are one, `[heads · out, in]`. Before attention it takes the up-projection of the keys into the
    /// queries, with each head's `[latent_dim, key_dim]` (of `k = W c` the transposed `W`); after it that of the
    /// values, `[value_dim, latent_dim]`, makes values of latents. A part has the bits that [`Ops::linear`] gives it
    /// alone.
    ///
    /// # Errors
    /// When shapes disagree, `in` or `out` is no multiple of 8, or the weights are integers.
    fn head_linear(
        &self,
        x: &Self::Tensor,
        weights: &Self::Weight,
        heads: usize,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;
}

/// Dimensions of a pool of latents: one row per token and layer, the latent and then the rotated key that all heads
/// share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Layers of the model.
    pub layers: usize,
    /// Physical blocks, counting block 0 even if nobody hands it out.
    pub blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Elements of the latent: a multiple of 8, at most 512.
    pub latent_dim: usize,
    /// Elements of the rotated key: a multiple of 8, at most 64.
    pub rope_dim: usize,
    /// How an element is stored, or what it's widened to.
    pub dtype: Dtype,
}

/// The two parts of a step's queries.
pub struct LatentQuery<'a, O: Ops + ?Sized> {
    /// `[tokens, heads · latent_dim]`: queries times the up-projection of the keys.
    pub latent: &'a O::Tensor,
    /// `[tokens, heads · rope_dim]`, rotated.
    pub rope: &'a O::Tensor,
}

impl<O: Ops + ?Sized> Clone for LatentQuery<'_, O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O: Ops + ?Sized> Copy for LatentQuery<'_, O> {}

impl<O: Ops + ?Sized> fmt::Debug for LatentQuery<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatentQuery").finish_non_exhaustive()
    }
}

/// What of a model's attention the operator needs.
#[derive(Clone, Copy, Debug)]
pub struct LatentAttention {
    /// Query heads, which all share the cached row.
    pub heads: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// Positions that a query sees, its own included; `None`: all before it.
    pub window: Option<u32>,
}

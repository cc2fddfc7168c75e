//! Multi-head latent attention (arXiv 2405.04434): `kernels/latent_append.cu`, and `kernels/attention.cuh` on
//! latents.
//!
//! The cache holds one latent and one rotated key per token, for all heads. In the form computed here, the
//! up-projections of keys and values are taken into the queries and the output: a query head has as many elements
//! as a cached row, and a head's output is a latent.

use super::attention::{Call, Floats};
use super::batch::Batch;
use super::device::Address;
use super::pool::KvPool;
use super::rope::RopeTable;
use super::tensor::{Tensor, Weight};
use super::{Cuda, count, divide};
use crate::error::{below, multiple, same};
use crate::{Attention, Error, Heads, RopeStyle, Scores};

/// The two parts of a step's queries.
#[derive(Clone, Copy, Debug)]
pub struct LatentQuery<'a> {
    /// `[tokens, heads · latent_dim]`: queries times the up-projection of the keys.
    pub latent: &'a Tensor,
    /// `[tokens, heads · rope_dim]`, rotated.
    pub rope: &'a Tensor,
}

/// What of a model's attention the kernel needs.
#[derive(Clone, Copy, Debug)]
pub struct LatentAttention {
    /// Query heads, which all share the cached row.
    pub heads: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// Positions that a query sees, its own included; `None`: all before it.
    pub window: Option<u32>,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct LatentAppendArgument {
    latent: Address,
    rope: Address,
    weight: Address,
    cos: Address,
    sin: Address,
    positions: Address,
    slots: Address,
    rows: Address,
    scale: Address,
    scale_stride: u64,
    latent_stride: u64,
    rope_stride: u64,
    page_stride: u64,
    token_stride: u64,
    tokens: u32,
    latent_dim: u32,
    rope_dim: u32,
    interleaved: u32,
    block_size: u32,
    scale_each: u32,
    eps: f32,
    unused: u32,
}

/// Latent and rope dimensions of a pool of latents.
fn dims(operator: &'static str, pool: &KvPool) -> Result<(usize, usize), Error> {
    let latent = pool.latent_dim.ok_or(Error::Shape {
        operator,
        dimension: "planes of a layer",
        found: pool.layout.planes,
        expected: 1,
    })?;
    Ok((latent, pool.shape.head_dim - latent))
}

impl Cuda {
    /// Writes each token's latent `[tokens, latent_dim]` and shared key `[tokens, rope_dim]` into its slot, in one
    /// launch: the latent after an RMSNorm if there are a weight and an eps, the key after its rotation if there
    /// is a table. Both tensors stay as they are. A slot of -1 is skipped.
    ///
    /// # Errors
    /// When shapes disagree, or a layer, slot or position is not there, or the pool holds no latents, or the
    /// device fails.
    #[expect(clippy::too_many_arguments, reason = "three operators in one")]
    pub fn append_latent(
        &self,
        pool: &mut KvPool,
        layer: usize,
        batch: &Batch,
        latent: &Tensor,
        rope: &Tensor,
        norm: Option<(&Weight, f32)>,
        table: Option<&RopeTable>,
    ) -> Result<(), Error> {
        let operator = "append_latent";
        let (latent_dim, rope_dim) = dims(operator, pool)?;
        below(operator, "layer", layer, pool.shape.layers)?;
        same(operator, "block_size of the batch", batch.host.block_size, pool.shape.block_size)?;
        same(operator, "width of the latent", latent.cols(), latent_dim)?;
        same(operator, "width of the key", rope.cols(), rope_dim)?;
        same(operator, "rows of the latent", latent.rows(), batch.tokens())?;
        same(operator, "rows of the key", rope.rows(), batch.tokens())?;
        if let Some(top) = batch.host.slot_top {
            let slot = usize::try_from(top).unwrap_or(usize::MAX);
            below(operator, "slot", slot, pool.shape.blocks * pool.shape.block_size)?;
        }
        if let Some(table) = table {
            same(operator, "rotary_dim", table.rotary_dim, rope_dim)?;
            if let Some(top) = batch.host.position_top {
                below(operator, "position", top as usize, table.positions)?;
            }
        }
        let positions = table.map_or(usize::MAX, |table| table.positions);
        batch.limit(usize::MAX, pool.shape.blocks * pool.shape.block_size, positions);
        let scales = pool.scales(layer);
        let argument = LatentAppendArgument {
            latent: latent.address(),
            rope: rope.address(),
            weight: norm.map_or(Ok(0), |(weight, _)| weight.vector(operator, latent_dim))?,
            cos: table.map_or(0, RopeTable::cos),
            sin: table.map_or(0, RopeTable::sin),
            positions: batch.positions(),
            slots: batch.slots(),
            rows: pool.plane(layer, 0),
            scale: scales.keys,
            scale_stride: scales.token,
            latent_stride: latent.stride() as u64,
            rope_stride: rope.stride() as u64,
            page_stride: pool.layout.page as u64,
            token_stride: pool.layout.token as u64,
            tokens: count(operator, "tokens", batch.tokens())?,
            latent_dim: count(operator, "latent_dim", latent_dim)?,
            rope_dim: count(operator, "rope_dim", rope_dim)?,
            interleaved: u32::from(table.is_some_and(|table| table.style == RopeStyle::Interleaved)),
            block_size: count(operator, "block_size", pool.shape.block_size)?,
            scale_each: u32::from(scales.each),
            eps: norm.map_or(0.0, |(_, eps)| eps),
            unused: 0,
        };
        let blocks = divide(operator, batch.tokens(), 4)?;
        self.start("latent_append", &format!("latent_append_{}", pool.suffix()), blocks, 128, 0, &argument)
    }

    /// Attention over a pool of latents: `out` `[tokens, heads · latent_dim]`, still to be multiplied by the
    /// up-projection of the values; and the natural logarithm of each row's sum of exponentials, as
    /// [`crate::Ops::attend`].
    ///
    /// # Errors
    /// When shapes disagree, or a layer or block is not there, or the pool holds no latents, or the device fails.
    #[expect(clippy::too_many_arguments, reason = "a kernel's: what is read, how, and what is written")]
    pub fn attend_latent(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        q: LatentQuery<'_>,
        attention: LatentAttention,
        scores: Scores<'_, Self>,
        out: &mut Tensor,
        lse: Option<&mut Floats>,
    ) -> Result<(), Error> {
        let operator = "attend_latent";
        let (latent_dim, rope_dim) = dims(operator, pool)?;
        let LatentAttention { heads, scale, window } = attention;
        multiple(operator, "heads", heads, 1)?;
        below(operator, "layer", layer, pool.shape.layers)?;
        same(operator, "block_size of the batch", batch.host.block_size, pool.shape.block_size)?;
        same(operator, "width of q", q.latent.cols(), heads * latent_dim)?;
        same(operator, "width of the rotated q", q.rope.cols(), heads * rope_dim)?;
        same(operator, "rows of q", q.latent.rows(), batch.tokens())?;
        same(operator, "rows of the rotated q", q.rope.rows(), batch.tokens())?;
        same(operator, "width of the output", out.cols(), heads * latent_dim)?;
        out.check_rows(operator, q.latent.rows())?;
        let heads = Heads { query: heads, kv: 1, dim: latent_dim + rope_dim };
        let attention = Attention { heads, scale, window };
        let call =
            Call { cuda: self, pool, batch, attention, scores, value_dim: latent_dim, q_rope: Some(q.rope) };
        call.run(layer, q.latent, out, lse)
    }
}

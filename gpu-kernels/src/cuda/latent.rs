//! Multi-head latent attention (arXiv 2405.04434): `kernels/latent_append.cu`, and `kernels/attention.cuh` on
//! latents.
//!
//! The cache holds one latent and one rotated key per token, for all heads. In the form computed here, the
//! up-projections of keys and values are taken into the queries and the output: a query head has as many elements
//! as a cached row, and a head's output is a latent.

use super::attention::{Call, Floats};
use super::batch::Batch;
use super::device::Address;
use super::gemm::GemmArgument;
use super::moe::{TILE_BYTES, TILE_COLUMNS, TILE_ROWS};
use super::pool::KvPool;
use super::rope::RopeTable;
use super::tensor::{Tensor, Weight};
use super::{Cuda, count, divide};
use crate::{
    Attention, Error, Heads, KvStorage, Latent, LatentAttention, LatentQuery, LatentShape, RopeStyle, Scores,
    door,
};

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

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct HeadLinearArgument {
    gemm: GemmArgument,
    weight_size: u64,
    heads: u32,
    unused: u32,
}

impl Latent for Cuda {
    fn latent_pool(&self, shape: LatentShape, storage: KvStorage) -> Result<KvPool, Error> {
        KvPool::latents(&self.device, self.dtype, shape, storage)
    }

    fn latent_block_bytes(&self, shape: LatentShape, storage: KvStorage) -> Result<usize, Error> {
        KvPool::bytes_of_latents(shape, storage)
    }

    fn append_latent(
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
        let (parts, turned) = ((latent.shape(), rope.shape()), table.map(|t| (t.positions, t.rotary_dim)));
        let (latent_dim, rope_dim) = door::append_latent(pool.dims(), layer, &batch.host, parts, turned)?;
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
            page_stride: pool.layout.strides.page as u64,
            token_stride: pool.layout.strides.token as u64,
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

    fn attend_latent(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        q: LatentQuery<'_, Self>,
        attention: LatentAttention,
        scores: Scores<'_, Self>,
        out: &mut Tensor,
        lse: Option<&mut Floats>,
    ) -> Result<(), Error> {
        let LatentAttention { heads, scale, window } = attention;
        let parts = (q.latent.shape(), q.rope.shape());
        let (latent_dim, rope_dim) =
            door::attend_latent(pool.dims(), layer, &batch.host, parts, heads, out.shape())?;
        let heads = Heads { query: heads, kv: 1, dim: latent_dim + rope_dim };
        let attention = Attention { heads, scale, window };
        let call =
            Call { cuda: self, pool, batch, attention, scores, value_dim: latent_dim, q_rope: Some(q.rope) };
        call.run(layer, q.latent, out, lse)
    }

    fn head_linear(&self, x: &Tensor, weights: &Weight, heads: usize, out: &mut Tensor) -> Result<(), Error> {
        let operator = "head_linear";
        let weights = weights.floats(operator)?;
        let (each, into) = door::head_linear(x.shape(), (weights.rows, weights.cols), heads, out.shape())?;
        out.set_rows(x.rows());
        let argument = HeadLinearArgument {
            gemm: GemmArgument {
                x: x.address(),
                weight: weights.address(),
                out: out.address(),
                x_stride: into as u64,
                weight_stride: weights.stride() as u64,
                out_stride: each as u64,
                rows: count(operator, "tokens", x.rows())?,
                in_cols: count(operator, "in of a head", into)?,
                out_cols: count(operator, "out of a head", each)?,
                ..bytemuck::Zeroable::zeroed()
            },
            weight_size: (each * weights.stride()) as u64,
            heads: count(operator, "heads", heads)?,
            unused: 0,
        };
        // A part is a row by its number.
        count(operator, "heads of all tokens", x.rows().saturating_mul(heads))?;
        let tiles = x.rows().div_ceil(TILE_ROWS) * each.div_ceil(TILE_COLUMNS);
        let blocks = divide(operator, tiles * heads, 1)?;
        self.launch("grouped", operator, blocks, 128, TILE_BYTES, &argument)
    }
}

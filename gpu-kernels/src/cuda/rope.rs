//! What happens to q, k and v on their way to attention: `kernels/rope_append.cu`.

use std::sync::Arc;

use super::batch::Batch;
use super::device::Address;
use super::memory::{Keeper, Memory};
use super::pool::KvPool;
use super::tensor::{Tensor, Weight};
use super::{Cuda, count, divide};
use crate::door;
use crate::error::same;
use crate::{Error, HeadNorms, Heads, RopeStyle};

/// Cosines and sines `[positions, rotary_dim / 2]` in f32.
#[derive(Debug)]
pub struct RopeTable {
    memory: Memory,
    pub(super) positions: usize,
    pub(super) rotary_dim: usize,
    pub(super) style: RopeStyle,
}

impl RopeTable {
    pub(super) fn new(
        device: &Arc<Keeper>,
        cos: &[f32],
        sin: &[f32],
        rotary_dim: usize,
        style: RopeStyle,
    ) -> Result<Self, Error> {
        door::rope_table(cos, sin, rotary_dim)?;
        let memory = Memory::of(device, bytemuck::cast_slice(&[cos, sin].concat()))?;
        Ok(Self { memory, positions: cos.len() / (rotary_dim / 2), rotary_dim, style })
    }

    pub(super) fn cos(&self) -> Address {
        self.memory.address()
    }

    pub(super) fn sin(&self) -> Address {
        self.memory.address() + (self.memory.bytes() / 2) as u64
    }
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct RopeAppendArgument {
    x: [Address; 3],
    stride: [u64; 3],
    weight: [Address; 2],
    cos: Address,
    sin: Address,
    positions: Address,
    slots: Address,
    keys: Address,
    values: Address,
    key_scale: Address,
    value_scale: Address,
    scale_token_stride: u64,
    scale_head_stride: u64,
    page_stride: u64,
    token_stride: u64,
    head_stride: u64,
    tokens: u32,
    query_heads: u32,
    kv_heads: u32,
    dim: u32,
    rotary: u32,
    interleaved: u32,
    block_size: u32,
    eps: f32,
    scale_each: u32,
    unused: u32,
}

impl RopeAppendArgument {
    /// Nothing to do yet, for the tokens of a batch.
    fn new(batch: &Batch, heads: Heads) -> Result<Self, Error> {
        Ok(Self {
            positions: batch.positions(),
            tokens: count("rope", "tokens", batch.tokens())?,
            query_heads: count("rope", "query heads", heads.query)?,
            kv_heads: count("rope", "kv heads", heads.kv)?,
            dim: count("rope", "head size", heads.dim)?,
            block_size: count("rope", "block_size", batch.host.block_size)?,
            ..bytemuck::Zeroable::zeroed()
        })
    }

    fn with(mut self, which: usize, x: &Tensor) -> Self {
        self.x[which] = x.address();
        self.stride[which] = x.stride() as u64;
        self
    }

    fn with_table(self, table: &RopeTable) -> Result<Self, Error> {
        let rotary = count("rope", "rotary_dim", table.rotary_dim)?;
        let interleaved = u32::from(table.style == RopeStyle::Interleaved);
        Ok(Self { cos: table.cos(), sin: table.sin(), rotary, interleaved, ..self })
    }

    fn with_pool(self, pool: &KvPool, layer: usize, batch: &Batch) -> Self {
        let scales = pool.scales(layer);
        Self {
            slots: batch.slots(),
            keys: pool.plane(layer, 0),
            values: pool.plane(layer, 1),
            key_scale: scales.keys,
            value_scale: scales.values,
            scale_token_stride: scales.token,
            scale_head_stride: scales.head,
            scale_each: u32::from(scales.each),
            page_stride: pool.layout.strides.page as u64,
            token_stride: pool.layout.strides.token as u64,
            head_stride: pool.layout.strides.head as u64,
            ..self
        }
    }
}

impl Cuda {
    /// [`crate::Ops::rope_append`] in one launch.
    #[expect(clippy::too_many_arguments, reason = "three operators in one")]
    pub(super) fn norm_rotate_store(
        &self,
        pool: &mut KvPool,
        layer: usize,
        batch: &Batch,
        table: &RopeTable,
        norms: Option<HeadNorms<'_, Self>>,
        q: &mut Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
    ) -> Result<(), Error> {
        self.check_rope(batch, table, q, k, heads)?;
        self.check_append(pool, layer, batch, k, v)?;
        same("rope_append", "kv heads", heads.kv, pool.shape.kv_heads)?;
        let mut argument = RopeAppendArgument::new(batch, heads)?
            .with(0, q)
            .with(1, k)
            .with(2, v)
            .with_table(table)?
            .with_pool(pool, layer, batch);
        if let Some(norms) = norms {
            let of = |weight: &Weight| weight.vector("rope_append", heads.dim);
            argument.weight = [of(norms.q)?, of(norms.k)?];
            argument.eps = norms.eps;
        }
        self.start_rope_append(pool.suffix(), &argument)
    }

    pub(super) fn check_rope(
        &self,
        batch: &Batch,
        table: &RopeTable,
        q: &Tensor,
        k: &Tensor,
        heads: Heads,
    ) -> Result<(), Error> {
        door::rope(&batch.host, (table.positions, table.rotary_dim), q.shape(), k.shape(), heads)?;
        batch.limit(usize::MAX, usize::MAX, table.positions);
        Ok(())
    }

    /// Rotates q and k in place.
    pub(super) fn rotate(
        &self,
        batch: &Batch,
        table: &RopeTable,
        q: &mut Tensor,
        k: &mut Tensor,
        heads: Heads,
    ) -> Result<(), Error> {
        let argument = RopeAppendArgument::new(batch, heads)?.with(0, q).with(1, k).with_table(table)?;
        self.start_rope_append(if self.dtype == crate::Dtype::F16 { "f16" } else { "bf16" }, &argument)
    }

    pub(super) fn check_append(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(), Error> {
        let shape = pool.shape;
        door::keys_and_values("append", pool.latent_dim)?;
        door::append(shape, layer, &batch.host, k.shape(), v.shape())?;
        batch.limit(usize::MAX, shape.blocks * shape.block_size, usize::MAX);
        Ok(())
    }

    /// Writes k and v into the cache.
    pub(super) fn store(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(), Error> {
        let heads = Heads { query: 0, kv: pool.shape.kv_heads, dim: pool.shape.head_dim };
        let argument =
            RopeAppendArgument::new(batch, heads)?.with(1, k).with(2, v).with_pool(pool, layer, batch);
        self.start_rope_append(pool.suffix(), &argument)
    }

    fn start_rope_append(&self, suffix: &str, argument: &RopeAppendArgument) -> Result<(), Error> {
        let heads = argument.query_heads as usize + 2 * argument.kv_heads as usize;
        let blocks = divide("rope_append", argument.tokens as usize * heads, 4)?;
        self.start("rope_append", &format!("rope_append_{suffix}"), blocks, 128, 0, argument)
    }
}

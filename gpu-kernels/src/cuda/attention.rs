//! Attention over paged memory: `kernels/attention.cuh`.

use super::batch::{Batch, DeviceWork};
use super::device::Address;
use super::memory::Memory;
use super::merge::Partials;
use super::plan::{CHUNK, Cut, ROWS_FEW, ROWS_MANY};
use super::pool::KvPool;
use super::tensor::Tensor;
use super::{Cuda, count, divide};
use crate::door;
use crate::error::below;
use crate::{Attention, Dtype, Error, KvStorage, Scores};

/// Numbers in a device's memory ([`crate::Ops::Floats`]).
#[derive(Debug)]
pub struct Floats {
    pub(crate) memory: Memory,
    pub(crate) len: usize,
}

/// Bits in a device's memory ([`crate::Ops::tree_mask`]).
#[derive(Debug)]
pub struct TreeMask {
    pub(crate) memory: Memory,
    pub(crate) tokens: usize,
    pub(crate) words: usize,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct AttentionArgument {
    pub(super) q: Address,
    pub(super) q_rope: Address,
    pub(super) out: Address,
    pub(super) lse: Address,
    pub(super) keys: Address,
    pub(super) values: Address,
    pub(super) block_tables: Address,
    pub(super) spans: Address,
    pub(super) items: Address,
    pub(super) partial_values: Address,
    pub(super) partial_states: Address,
    pub(super) slopes: Address,
    pub(super) sinks: Address,
    pub(super) mask: Address,
    pub(super) key_scale: Address,
    pub(super) value_scale: Address,
    pub(super) scale_token_stride: u64,
    pub(super) scale_head_stride: u64,
    pub(super) page_stride: u64,
    pub(super) token_stride: u64,
    pub(super) head_stride: u64,
    pub(super) q_stride: u64,
    pub(super) q_rope_stride: u64,
    pub(super) out_stride: u64,
    pub(super) blocks_max: u32,
    pub(super) block_size: u32,
    pub(super) mask_words: u32,
    pub(super) kv_heads: u32,
    pub(super) group: u32,
    pub(super) dim: u32,
    pub(super) value_dim: u32,
    pub(super) window: u32,
    pub(super) causal: u32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    pub(super) unused: u32,
}

/// A block shape of the kernel: see `Attend` of `kernels/attention.cuh`.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    along: usize,
    across: usize,
    /// The sizes of keys and of values that the kernel is made for. Of latents, values are a part of the keys.
    padded: usize,
    padded_value: usize,
}

impl Shape {
    fn new(rows: usize, dim: usize) -> Self {
        let padded = [64, 128].into_iter().find(|&padded| dim <= padded).unwrap_or(256);
        let (along, across) = match (rows, padded) {
            (16, _) => (1, 4),
            (_, 64) => (4, 1),
            _ => (4, 2),
        };
        Self { rows, along, across, padded, padded_value: padded }
    }

    fn latent(rows: usize) -> Self {
        Self { rows, along: rows / 16, across: 4, padded: 576, padded_value: 512 }
    }

    fn is_latent(self) -> bool {
        self.padded_value != self.padded
    }

    fn threads(self) -> usize {
        32 * self.along * self.across
    }

    /// As `SHARED_BYTES` of the kernel.
    fn shared_bytes(self, storage: KvStorage) -> usize {
        let tile = if self.padded > 128 { 32 } else { 64 };
        let tiles = if self.is_latent() { 1 } else { 2 };
        let stages = 2 * tiles * tile * self.padded * if storage == KvStorage::Same { 2 } else { 1 };
        let converted =
            if storage == KvStorage::Same { 0 } else { tiles * tile * self.padded * 2 + 5 * tile * 4 };
        let shared = if self.across > 1 { self.across * self.rows * 4 } else { 0 };
        let weights = if self.is_latent() { self.rows * (tile + 8) * 2 + self.along * 4 * 32 * 8 } else { 0 };
        self.rows * self.padded * 2 + stages + converted + 2 * tile * 8 + shared + weights
    }
}

impl Cuda {
    pub(super) fn check_attention(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        q: &Tensor,
        attention: Attention,
        out: &Tensor,
    ) -> Result<(), Error> {
        door::keys_and_values("attention", pool.latent_dim)?;
        door::attention(pool.shape, layer, &batch.host, q.shape(), attention.heads, out.shape())
    }
}

/// One attention, of which pool, layer, queries and output are checked.
pub(super) struct Call<'a> {
    pub(super) cuda: &'a Cuda,
    pub(super) pool: &'a KvPool,
    pub(super) batch: &'a Batch,
    pub(super) attention: Attention,
    pub(super) scores: Scores<'a, Cuda>,
    pub(super) value_dim: usize,
    /// Of latents: the rotated elements of the queries.
    pub(super) q_rope: Option<&'a Tensor>,
}

impl Call<'_> {
    pub(super) fn run(
        &self,
        layer: usize,
        q: &Tensor,
        out: &mut Tensor,
        lse: Option<&mut Floats>,
    ) -> Result<(), Error> {
        let (scores, batch) = (self.scores, self.batch);
        let device = &self.cuda.device;
        let shaping = door::Shaping {
            softcap: scores.softcap,
            slopes: scores.slopes.map(|slopes| slopes.len),
            sinks: scores.sinks.map(|sinks| sinks.len),
            mask: scores.mask.map(|mask| (mask.tokens, mask.words)),
            lse: lse.as_ref().map(|lse| lse.len),
        };
        door::scores(&batch.host, self.attention, &shaping)?;
        if let Some(top) = batch.host.block_top {
            below("attention", "block", top as usize, self.pool.shape.blocks)?;
        }
        batch.limit(self.pool.shape.blocks, usize::MAX, usize::MAX);
        out.set_rows(q.rows());
        if batch.has_uncovered_rows() {
            device.fill(out.address(), 0, out.rows() * out.stride() * 2)?;
            if let Some(lse) = &lse {
                // Minus infinity has no bytes that repeat.
                let nothing = vec![f32::NEG_INFINITY; lse.len];
                device.upload(lse.memory.address(), bytemuck::cast_slice(&nothing))?;
            }
        }
        let argument = self.argument(layer, q, out, lse.map_or(0, |lse| lse.memory.address()))?;
        let cut = self.cut()?;
        let plan = batch.plan(device, cut)?;
        self.launch(argument, self.shape(ROWS_FEW), plan.few())?;
        if self.takes_hopper() {
            return self.launch_hopper(layer, argument, cut);
        }
        self.launch(argument, self.shape(cut.rows_many), plan.many())
    }

    fn shape(&self, rows: u32) -> Shape {
        let rows = rows as usize;
        if self.q_rope.is_some() { Shape::latent(rows) } else { Shape::new(rows, self.attention.heads.dim) }
    }

    /// Rows of a tile of many rows. Of latents, 32 where the machine has shared memory for them.
    fn rows_many(&self) -> u32 {
        if self.q_rope.is_none() {
            return ROWS_MANY;
        }
        let wide = Shape::latent(32).shared_bytes(self.pool.storage);
        if wide <= self.cuda.device.shared_bytes_max() as usize { 32 } else { ROWS_FEW }
    }

    fn cut(&self) -> Result<Cut, Error> {
        let heads = self.attention.heads;
        Ok(Cut {
            group: count("attention", "group", heads.query / heads.kv)?,
            kv_heads: count("attention", "kv heads", heads.kv)?,
            window: self.attention.window.unwrap_or(0),
            causal: self.scores.causal && self.scores.mask.is_none(),
            rows_many: self.rows_many(),
            chunk: CHUNK,
            slots: 2 * self.cuda.device.multiprocessors(),
        })
    }

    fn argument(
        &self,
        layer: usize,
        q: &Tensor,
        out: &Tensor,
        lse: Address,
    ) -> Result<AttentionArgument, Error> {
        let (pool, batch, scores, cut) = (self.pool, self.batch, self.scores, self.cut()?);
        let scales = pool.scales(layer);
        let address = |floats: Option<&Floats>| floats.map_or(0, |floats| floats.memory.address());
        Ok(AttentionArgument {
            q: q.address(),
            q_rope: self.q_rope.map_or(0, Tensor::address),
            out: out.address(),
            lse,
            keys: pool.plane(layer, 0),
            values: pool.plane(layer, pool.layout.planes - 1),
            block_tables: batch.block_tables(),
            spans: batch.spans(),
            items: 0,
            partial_values: 0,
            partial_states: 0,
            slopes: address(scores.slopes),
            sinks: address(scores.sinks),
            mask: scores.mask.map_or(0, |mask| mask.memory.address()),
            key_scale: scales.keys,
            value_scale: scales.values,
            scale_token_stride: scales.token,
            scale_head_stride: scales.head,
            page_stride: pool.layout.strides.page as u64,
            token_stride: pool.layout.strides.token as u64,
            head_stride: pool.layout.strides.head as u64,
            q_stride: q.stride() as u64,
            q_rope_stride: self.q_rope.map_or(0, Tensor::stride) as u64,
            out_stride: out.stride() as u64,
            blocks_max: count("attention", "blocks of a table", batch.host.blocks_max)?,
            block_size: count("attention", "block_size", batch.host.block_size)?,
            mask_words: count("attention", "words of the mask", scores.mask.map_or(0, |mask| mask.words))?,
            kv_heads: cut.kv_heads,
            group: cut.group,
            dim: count("attention", "head size", self.attention.heads.dim)?,
            value_dim: count("attention", "size of a value", self.value_dim)?,
            window: cut.window,
            causal: u32::from(cut.causal),
            scale: self.attention.scale,
            softcap: scores.softcap.unwrap_or(0.0),
            unused: 0,
        })
    }

    /// The items of one block shape, and then the merge of what was cut.
    fn launch(&self, argument: AttentionArgument, shape: Shape, work: DeviceWork) -> Result<(), Error> {
        if work.items_len == 0 {
            return Ok(());
        }
        let suffix = self.pool.suffix();
        let (file, size) = if shape.is_latent() {
            (
                if self.cuda.dtype == Dtype::F16 { "attention_latent_f16" } else { "attention_latent_bf16" },
                "latent",
            )
        } else {
            let file = match suffix {
                "bf16" => "attention_bf16",
                "f16" => "attention_f16",
                "bf16_e4m3" => "attention_bf16_e4m3",
                "f16_e4m3" => "attention_f16_e4m3",
                "bf16_i8" => "attention_bf16_i8",
                _ => "attention_f16_i8",
            };
            (
                file,
                match shape.padded {
                    64 => "64",
                    128 => "128",
                    _ => "256",
                },
            )
        };
        let kernel = format!("attention_{}_rows_{size}_{suffix}", shape.rows);
        let blocks = divide("attention", work.items_len * self.attention.heads.kv, 1)?;
        let shared = shape.shared_bytes(self.pool.storage);
        let partials = Partials { rows: shape.rows, dim: shape.padded_value, value_scale: 0 };
        self.cuda.with_partials(argument, (work, partials), 0, |argument, _| {
            self.cuda.start(file, &kernel, blocks, shape.threads(), shared, argument)
        })
    }
}

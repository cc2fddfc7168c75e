//! The paged memory of keys and values on a device.

use std::sync::Arc;

use super::Cuda;
use super::device::Address;
use super::layout::{KvStrides, Layout};
use super::memory::{Keeper, Memory};
use crate::door::{self, Pool};
use crate::{Dtype, Error, KvOrder, KvShape, KvStorage, LatentShape};

/// K and V of all layers: for each layer K then V, each `[block][kv head][token][dim]` or, in [`KvOrder::Nhd`],
/// `[block][token][kv head][dim]`, `dim` padded to whole 16s. Or as [`KvStrides`] say, in its own memory or somebody
/// else's. Or latents of all layers, `[block][token][latent, rotated key]`.
#[derive(Debug)]
pub struct KvPool {
    pub(crate) shape: KvShape,
    pub(crate) storage: KvStorage,
    pub(crate) layout: Layout,
    /// Elements of a row that are the latent; `None`: keys and values.
    pub(crate) latent_dim: Option<usize>,
    start: Address,
    /// What is there, unless it is somebody else's.
    _memory: Option<Memory>,
    /// Scales: two numbers, or for each layer and of K then V, `[slot][kv head]`.
    scales: Memory,
}

/// Memory of the device that somebody else has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Where it starts: a multiple of 16.
    pub address: Address,
    /// How much of it there is.
    pub bytes: usize,
}

/// Where a layer's scales are, and the distances between them in elements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scales {
    pub(crate) keys: Address,
    pub(crate) values: Address,
    pub(crate) token: u64,
    pub(crate) head: u64,
    pub(crate) each: bool,
}

impl Cuda {
    /// A pool whose K and V lie as strides say, in memory of its own. Blocks come to the host and from there without
    /// the gaps, as those of a pool in [`KvOrder::Hnd`].
    ///
    /// # Errors
    /// When a stride is no multiple of 16 bytes, reaches less far than what lies below it, or further than 64 bits
    /// address; when `head_dim` is no multiple of 16 bytes; and as [`Ops::kv_pool_stored`](crate::Ops::kv_pool_stored).
    pub fn kv_pool_strided(
        &self,
        shape: KvShape,
        storage: KvStorage,
        strides: KvStrides,
    ) -> Result<KvPool, Error> {
        self.strided((shape, None), storage, strides, None)
    }

    /// The same over memory that somebody else has, an engine's cache for example. What is in it stays. Where each head
    /// of a token has a scale ([`KvStorage::Fp8PerHead`], [`KvStorage::Int8PerHead`]), scales are kept apart, in memory
    /// of the pool's own.
    ///
    /// # Errors
    /// As [`Cuda::kv_pool_strided`], and when the memory does not start at a multiple of 16 bytes or ends before the
    /// last element.
    ///
    /// # Safety
    /// It is memory of this device, and stays so while the pool or a [`Graph`](super::Graph) that was recorded with it
    /// lives. Nobody else reads or writes the elements between a call that uses the pool and the end of the work that
    /// the call began; [`Ops::read`](crate::Ops::read) waits for that.
    pub unsafe fn kv_pool_over(
        &self,
        shape: KvShape,
        storage: KvStorage,
        strides: KvStrides,
        memory: DeviceMemory,
    ) -> Result<KvPool, Error> {
        self.strided((shape, None), storage, strides, Some(memory))
    }

    /// [`Cuda::kv_pool_over`] for latents ([`Latent`](crate::Latent)), of which a layer has no K and V and no heads.
    /// vLLM's and FlashMLA's `(blocks, block_size, latent and rotated key)` are pages and tokens without gaps.
    ///
    /// # Errors
    /// As [`Cuda::kv_pool_over`] and [`Latent::latent_pool`](crate::Latent::latent_pool).
    ///
    /// # Safety
    /// As [`Cuda::kv_pool_over`].
    pub unsafe fn latent_pool_over(
        &self,
        shape: LatentShape,
        storage: KvStorage,
        strides: KvStrides,
        memory: DeviceMemory,
    ) -> Result<KvPool, Error> {
        let latent_dim = shape.latent_dim;
        let shape = door::latent_pool(shape, storage)?;
        self.strided((shape, Some(latent_dim)), storage, strides, Some(memory))
    }

    fn strided(
        &self,
        (shape, latent_dim): (KvShape, Option<usize>),
        storage: KvStorage,
        strides: KvStrides,
        memory: Option<DeviceMemory>,
    ) -> Result<KvPool, Error> {
        door::storage(storage)?;
        same_dtype(&shape, self.dtype)?;
        let planes = if latent_dim.is_some() { 1 } else { 2 };
        let layout = Layout::strided(&shape, storage, strides, planes)?;
        KvPool::with(&self.device, shape, storage, layout, latent_dim, memory)
    }
}

impl KvPool {
    pub(crate) fn new(
        device: &Arc<Keeper>,
        dtype: Dtype,
        shape: KvShape,
        storage: KvStorage,
        order: KvOrder,
    ) -> Result<Self, Error> {
        same_dtype(&shape, dtype)?;
        let layout = Layout::dense(&shape, storage, order, 2)?;
        Self::with(device, shape, storage, layout, None, None)
    }

    pub(crate) fn latents(
        device: &Arc<Keeper>,
        dtype: Dtype,
        shape: LatentShape,
        storage: KvStorage,
    ) -> Result<Self, Error> {
        let latent_dim = shape.latent_dim;
        let shape = door::latent_pool(shape, storage)?;
        same_dtype(&shape, dtype)?;
        let layout = Layout::dense(&shape, storage, KvOrder::default(), 1)?;
        Self::with(device, shape, storage, layout, Some(latent_dim), None)
    }

    fn with(
        device: &Arc<Keeper>,
        shape: KvShape,
        storage: KvStorage,
        layout: Layout,
        latent_dim: Option<usize>,
        memory: Option<DeviceMemory>,
    ) -> Result<Self, Error> {
        if let Some(DeviceMemory { address, bytes }) = memory {
            door::memory(address, bytes, layout.bytes)?;
        }
        let scales = match storage {
            KvStorage::Same => Memory::new(device, 0)?,
            KvStorage::Fp8 { key_scale, value_scale } => {
                Memory::of(device, bytemuck::cast_slice(&[key_scale, value_scale]))?
            }
            KvStorage::Fp8PerHead | KvStorage::Int8PerHead => {
                Memory::zeroed(device, shape.layers * layout.planes * scales_bytes(&shape))?
            }
        };
        let own = if memory.is_none() { Some(Memory::zeroed(device, layout.bytes)?) } else { None };
        let start = memory.map_or_else(|| own.as_ref().map_or(0, Memory::address), |memory| memory.address);
        Ok(Self { shape, storage, layout, latent_dim, start, _memory: own, scales })
    }

    /// Bytes of one block of K and V over all layers.
    pub(crate) fn bytes_of_block(shape: &KvShape, storage: KvStorage) -> Result<usize, Error> {
        let layout = Layout::dense(shape, storage, KvOrder::default(), 2)?;
        Ok(block_bytes(&layout, shape, storage))
    }

    /// Bytes of one block of latents over all layers.
    pub(crate) fn bytes_of_latents(shape: LatentShape, storage: KvStorage) -> Result<usize, Error> {
        let shape = door::latent_pool(shape, storage)?;
        let layout = Layout::dense(&shape, storage, KvOrder::default(), 1)?;
        Ok(block_bytes(&layout, &shape, storage))
    }

    /// Its shape, for the door.
    pub(crate) fn dims(&self) -> Pool {
        Pool { shape: self.shape, latent_dim: self.latent_dim }
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        block_bytes(&self.layout, &self.shape, self.storage)
    }

    /// The dimensions that the pool was made with; one of latents has one kv head, of latent and rotated key.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// K (0) or V (1) of a layer.
    pub(crate) fn plane(&self, layer: usize, which: usize) -> Address {
        self.start + self.layout.plane(layer, which)
    }

    pub(crate) fn scales(&self, layer: usize) -> Scales {
        let start = self.scales.address();
        match self.storage {
            KvStorage::Same => Scales::default(),
            KvStorage::Fp8 { .. } => {
                Scales { keys: start, values: start + 4, token: 0, head: 0, each: false }
            }
            KvStorage::Fp8PerHead | KvStorage::Int8PerHead => {
                let bytes = scales_bytes(&self.shape) as u64;
                let planes = self.layout.planes as u64;
                let keys = start + planes * layer as u64 * bytes;
                Scales {
                    keys,
                    values: keys + (planes - 1) * bytes,
                    token: self.shape.kv_heads as u64,
                    head: 1,
                    each: true,
                }
            }
        }
    }

    /// What else belongs to a block: the scales, of all layers.
    pub(crate) fn scale_planes(&self) -> Option<(Address, usize, usize)> {
        let block = self.shape.block_size * self.shape.kv_heads * 4;
        self.storage.per_head().then(|| (self.scales.address(), scales_bytes(&self.shape), block))
    }

    /// The suffix of the kernels that read and write this pool.
    pub(crate) fn suffix(&self) -> &'static str {
        match (self.shape.dtype, self.storage) {
            (Dtype::F16, KvStorage::Same) => "f16",
            (Dtype::F16, KvStorage::Int8PerHead) => "f16_i8",
            (Dtype::F16, _) => "f16_e4m3",
            (_, KvStorage::Same) => "bf16",
            (_, KvStorage::Int8PerHead) => "bf16_i8",
            (_, _) => "bf16_e4m3",
        }
    }
}

/// A refusal of numbers that kernels for these activations do not read.
fn same_dtype(shape: &KvShape, dtype: Dtype) -> Result<(), Error> {
    if shape.dtype == dtype {
        return Ok(());
    }
    Err(Error::Unsupported {
        operator: "kv_pool",
        what: "a cache of",
        found: shape.dtype.to_string(),
        supported: "the activations' type, or one byte",
    })
}

fn block_bytes(layout: &Layout, shape: &KvShape, storage: KvStorage) -> usize {
    let scales = if storage.per_head() { shape.block_size * shape.kv_heads * 4 } else { 0 };
    (layout.page_bytes + scales) * shape.layers * layout.planes
}

/// Bytes of the scales of K (or of V) of one layer: `[slot][kv head]`.
fn scales_bytes(shape: &KvShape) -> usize {
    shape.blocks * shape.block_size * shape.kv_heads * 4
}

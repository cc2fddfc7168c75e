//! The paged memory of keys and values on a device.

use std::sync::Arc;

use super::device::Address;
use super::memory::{Keeper, Memory};
use crate::door::{self, Pool};
use crate::error::{at_most, multiple};
use crate::shape::HEAD_DIM_MAX;
use crate::{Dtype, Error, KvOrder, KvShape, KvStorage, LatentShape};

/// K and V of all layers: for each layer K then V, each `[block][kv head][token][dim]` or, in [`KvOrder::Nhd`],
/// `[block][token][kv head][dim]`, `dim` padded to whole 16s.
/// Or latents of all layers, `[block][token][latent, rotated key]`.
#[derive(Debug)]
pub struct KvPool {
    pub(crate) shape: KvShape,
    pub(crate) storage: KvStorage,
    pub(crate) layout: Layout,
    /// Elements of a row that are the latent; `None`: keys and values.
    pub(crate) latent_dim: Option<usize>,
    memory: Memory,
    /// Scales: two numbers, or for each layer and of K then V, `[slot][kv head]`.
    scales: Memory,
}

/// Distances in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) page: usize,
    pub(crate) head: usize,
    pub(crate) token: usize,
    /// A head's length in memory.
    pub(crate) wide: usize,
    /// Of a layer: 2 for K and V, 1 for latents.
    pub(crate) planes: usize,
    /// Bytes of K (or of V) of one layer.
    pub(crate) plane_bytes: usize,
    pub(crate) page_bytes: usize,
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

impl Layout {
    fn block_bytes(&self, shape: &KvShape, storage: KvStorage) -> usize {
        let scales = if storage.per_head() { shape.block_size * shape.kv_heads * 4 } else { 0 };
        (self.page_bytes + scales) * shape.layers * self.planes
    }

    fn new(shape: &KvShape, storage: KvStorage, order: KvOrder, planes: usize) -> Result<Self, Error> {
        for (dimension, found) in [
            ("layers", shape.layers),
            ("blocks", shape.blocks),
            ("block_size", shape.block_size),
            ("kv_heads", shape.kv_heads),
            ("head_dim", shape.head_dim),
        ] {
            multiple("kv_pool", dimension, found, 1)?;
        }
        if planes == 2 {
            at_most("kv_pool", "head_dim", shape.head_dim, HEAD_DIM_MAX)?;
        }
        let wide = shape.head_dim.next_multiple_of(16);
        let layout = || {
            let of_head = wide.checked_mul(shape.block_size)?;
            let page = of_head.checked_mul(shape.kv_heads)?;
            let page_bytes = page.checked_mul(storage.bytes(shape.dtype))?;
            let plane_bytes = page_bytes.checked_mul(shape.blocks)?;
            plane_bytes.checked_mul(shape.layers)?.checked_mul(planes)?;
            let (head, token) = match order {
                KvOrder::Hnd => (of_head, wide),
                KvOrder::Nhd => (wide, shape.kv_heads * wide),
            };
            Some(Self { page, head, token, wide, planes, plane_bytes, page_bytes })
        };
        layout().ok_or(Error::Memory { operator: "kv_pool", bytes: usize::MAX })
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
        Self::with_planes(device, dtype, shape, (storage, order), None)
    }

    pub(crate) fn latents(
        device: &Arc<Keeper>,
        dtype: Dtype,
        shape: LatentShape,
        storage: KvStorage,
    ) -> Result<Self, Error> {
        let latent_dim = shape.latent_dim;
        let shape = door::latent_pool(shape, storage)?;
        Self::with_planes(device, dtype, shape, (storage, KvOrder::default()), Some(latent_dim))
    }

    fn with_planes(
        device: &Arc<Keeper>,
        dtype: Dtype,
        shape: KvShape,
        (storage, order): (KvStorage, KvOrder),
        latent_dim: Option<usize>,
    ) -> Result<Self, Error> {
        if shape.dtype != dtype {
            return Err(Error::Unsupported {
                operator: "kv_pool",
                what: "a cache of",
                found: shape.dtype.to_string(),
                supported: "the activations' type, or one byte",
            });
        }
        let layout = Layout::new(&shape, storage, order, if latent_dim.is_some() { 1 } else { 2 })?;
        let scales = match storage {
            KvStorage::Same => Memory::new(device, 0)?,
            KvStorage::Fp8 { key_scale, value_scale } => {
                Memory::of(device, bytemuck::cast_slice(&[key_scale, value_scale]))?
            }
            KvStorage::Fp8PerHead | KvStorage::Int8PerHead => {
                Memory::zeroed(device, shape.layers * layout.planes * scales_bytes(&shape))?
            }
        };
        let memory = Memory::zeroed(device, layout.plane_bytes * shape.layers * layout.planes)?;
        Ok(Self { shape, storage, layout, latent_dim, memory, scales })
    }

    /// Bytes of one block of K and V over all layers.
    pub(crate) fn bytes_of_block(shape: &KvShape, storage: KvStorage) -> Result<usize, Error> {
        Ok(Layout::new(shape, storage, KvOrder::default(), 2)?.block_bytes(shape, storage))
    }

    /// Bytes of one block of latents over all layers.
    pub(crate) fn bytes_of_latents(shape: LatentShape, storage: KvStorage) -> Result<usize, Error> {
        let shape = door::latent_pool(shape, storage)?;
        Ok(Layout::new(&shape, storage, KvOrder::default(), 1)?.block_bytes(&shape, storage))
    }

    /// Its shape, for the door.
    pub(crate) fn dims(&self) -> Pool {
        Pool { shape: self.shape, latent_dim: self.latent_dim }
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.layout.block_bytes(&self.shape, self.storage)
    }

    /// The dimensions that the pool was made with; one of latents has one kv head, of latent and rotated key.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// K (0) or V (1) of a layer.
    pub(crate) fn plane(&self, layer: usize, which: usize) -> Address {
        self.memory.address() + ((layer * self.layout.planes + which) * self.layout.plane_bytes) as u64
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

/// Bytes of the scales of K (or of V) of one layer: `[slot][kv head]`.
fn scales_bytes(shape: &KvShape) -> usize {
    shape.blocks * shape.block_size * shape.kv_heads * 4
}

//! The paged memory of keys and values on a device.

use std::sync::Arc;

use super::device::{Address, Device, Memory};
use crate::error::{at_most, multiple};
use crate::shape::HEAD_DIM_MAX;
use crate::{Dtype, Error, KvShape};

/// How a pool stores a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvStorage {
    /// As the activations: two bytes.
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
}

/// K and V of all layers: for each layer K then V, each `[block][kv head][token][dim]`, `dim` padded to whole 16s.
#[derive(Debug)]
pub struct KvPool {
    pub(crate) shape: KvShape,
    pub(crate) storage: KvStorage,
    pub(crate) layout: Layout,
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

impl KvStorage {
    fn bytes(self) -> usize {
        if self == Self::Same { 2 } else { 1 }
    }
}

impl Layout {
    fn new(shape: &KvShape, storage: KvStorage) -> Result<Self, Error> {
        for (dimension, found) in [
            ("layers", shape.layers),
            ("blocks", shape.blocks),
            ("block_size", shape.block_size),
            ("kv_heads", shape.kv_heads),
            ("head_dim", shape.head_dim),
        ] {
            multiple("kv_pool", dimension, found, 1)?;
        }
        at_most("kv_pool", "head_dim", shape.head_dim, HEAD_DIM_MAX)?;
        let token = shape.head_dim.next_multiple_of(16);
        let layout = || {
            let head = token.checked_mul(shape.block_size)?;
            let page = head.checked_mul(shape.kv_heads)?;
            let page_bytes = page.checked_mul(storage.bytes())?;
            let plane_bytes = page_bytes.checked_mul(shape.blocks)?;
            plane_bytes.checked_mul(shape.layers)?.checked_mul(2)?;
            Some(Self { page, head, token, plane_bytes, page_bytes })
        };
        layout().ok_or(Error::Memory { operator: "kv_pool", bytes: usize::MAX })
    }
}

impl KvPool {
    pub(crate) fn new(
        device: &Arc<dyn Device>,
        dtype: Dtype,
        shape: KvShape,
        storage: KvStorage,
    ) -> Result<Self, Error> {
        if shape.dtype != dtype {
            return Err(Error::Unsupported {
                operator: "kv_pool",
                what: "a cache of",
                found: shape.dtype.to_string(),
                supported: "the activations' type, or E4M3",
            });
        }
        let layout = Layout::new(&shape, storage)?;
        let scales = match storage {
            KvStorage::Same => Memory::new(device, 0)?,
            KvStorage::Fp8 { key_scale, value_scale } => {
                Memory::of(device, bytemuck::cast_slice(&[key_scale, value_scale]))?
            }
            KvStorage::Fp8PerHead => Memory::zeroed(device, shape.layers * 2 * scales_bytes(&shape))?,
        };
        let memory = Memory::zeroed(device, layout.plane_bytes * shape.layers * 2)?;
        Ok(Self { shape, storage, layout, memory, scales })
    }

    pub(crate) fn block_bytes(shape: &KvShape, storage: KvStorage) -> Result<usize, Error> {
        let layout = Layout::new(shape, storage)?;
        let scales = if storage == KvStorage::Fp8PerHead { shape.block_size * shape.kv_heads * 4 } else { 0 };
        Ok((layout.page_bytes + scales) * shape.layers * 2)
    }

    /// The dimensions that the pool was made with.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// K (0) or V (1) of a layer.
    pub(crate) fn plane(&self, layer: usize, which: usize) -> Address {
        self.memory.address() + ((layer * 2 + which) * self.layout.plane_bytes) as u64
    }

    pub(crate) fn scales(&self, layer: usize) -> Scales {
        let start = self.scales.address();
        match self.storage {
            KvStorage::Same => Scales::default(),
            KvStorage::Fp8 { .. } => {
                Scales { keys: start, values: start + 4, token: 0, head: 0, each: false }
            }
            KvStorage::Fp8PerHead => {
                let bytes = scales_bytes(&self.shape) as u64;
                let keys = start + 2 * layer as u64 * bytes;
                Scales { keys, values: keys + bytes, token: self.shape.kv_heads as u64, head: 1, each: true }
            }
        }
    }

    /// What else belongs to a block: the scales, of all layers.
    pub(crate) fn scale_planes(&self) -> Option<(Address, usize, usize)> {
        let block = self.shape.block_size * self.shape.kv_heads * 4;
        (self.storage == KvStorage::Fp8PerHead)
            .then(|| (self.scales.address(), scales_bytes(&self.shape), block))
    }

    /// The suffix of the kernels that read and write this pool.
    pub(crate) fn suffix(&self) -> &'static str {
        match (self.shape.dtype, self.storage) {
            (Dtype::F16, KvStorage::Same) => "f16",
            (Dtype::F16, _) => "f16_e4m3",
            (_, KvStorage::Same) => "bf16",
            (_, _) => "bf16_e4m3",
        }
    }
}

/// Bytes of the scales of K (or of V) of one layer: `[slot][kv head]`.
fn scales_bytes(shape: &KvShape) -> usize {
    shape.blocks * shape.block_size * shape.kv_heads * 4
}

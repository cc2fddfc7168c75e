//! The paged memory of keys and values.

use std::ops::Range;

use super::lanes::WIDTH;
use super::out::SharedOut;
use super::tensor::{LINE, first_line, wish_huge_pages, zeroed};
use crate::door::Pool;
use crate::error::{at_most, multiple};
use crate::shape::HEAD_DIM_MAX;
use crate::{Dtype, Error, KvOrder, KvShape, KvStorage};

/// K and V of all layers: for each layer K then V, each `[block][kv head]`, with `dim` padded with zeros to a
/// multiple of 16 so that kernels never meet a tail.
///
/// V of a head is `[token][dim]`. K of a head lies in panels of sixteen tokens, as weights do (`panels.rs`): of
/// each pair of elements there is a line for the sixteen, so that scores are summed with lanes along tokens and
/// nothing has to be turned. Where sixteen do not divide a block, its tokens are one panel, with shorter or longer
/// lines. That is [`KvOrder::Hnd`]; in [`KvOrder::Nhd`] the heads of a panel, or of a token of V, lie side by side.
///
/// Of latents there is one plane, of rows like those of V, which are keys too: heads are many there, so that turning a
/// chunk for all of them costs little.
#[derive(Debug)]
pub struct KvPool {
    pub(crate) shape: KvShape,
    /// Elements of a row that are the latent; `None`: keys and values.
    pub(crate) latent_dim: Option<usize>,
    pub(crate) layout: Layout,
    pub(crate) form: Form,
    /// What keys and values of one byte are multiplied by: a number each, or for each layer and of K then V,
    /// `[slot][kv head]`.
    scales: Scales,
    memory: Vec<f32>,
    /// Where the first plane lies: the first cache line of the memory.
    first: usize,
}

/// How an element lies in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    F32,
    Bf16,
    F16,
    E4m3,
    Int8,
}

impl Form {
    fn new(dtype: Dtype, storage: KvStorage) -> Self {
        match (storage, dtype) {
            (KvStorage::Same, Dtype::F32) => Self::F32,
            (KvStorage::Same, Dtype::Bf16) => Self::Bf16,
            (KvStorage::Same, Dtype::F16) => Self::F16,
            (KvStorage::Fp8 { .. } | KvStorage::Fp8PerHead, _) => Self::E4m3,
            (KvStorage::Int8PerHead, _) => Self::Int8,
        }
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::E4m3 | Self::Int8 => 1,
        }
    }
}

/// What numbers of one byte are multiplied by.
#[derive(Debug)]
enum Scales {
    None,
    /// Of K and of V.
    Each([f32; 2]),
    /// For each layer and of K then V, `[slot][kv head]`.
    PerHead(Vec<f32>),
}

/// The scales of K or of V of a layer.
#[derive(Clone, Copy)]
pub(crate) enum OfPlane<'a> {
    One(f32),
    /// `[slot][kv head]`.
    PerHead(&'a [f32]),
}

/// Distances in elements from one page, head and token to the next. `dim` is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) page_stride: usize,
    /// In K, between the panels of two heads, and in V.
    pub(crate) head_strides: [usize; 2],
    /// A panel of K has that of all its tokens.
    pub(crate) token_stride: usize,
    /// A head's length in memory.
    pub(crate) wide: usize,
    /// Elements of K (or of V) of one layer.
    pub(crate) plane: usize,
    /// Of a layer: 2 for K and V, 1 for latents.
    pub(crate) planes: usize,
}

impl Layout {
    fn new(shape: &KvShape, order: KvOrder, latent_dim: Option<usize>) -> Result<Self, Error> {
        let planes = if latent_dim.is_some() { 1 } else { 2 };
        for (dimension, found) in [
            ("layers", shape.layers),
            ("blocks", shape.blocks),
            ("block_size", shape.block_size),
            ("kv_heads", shape.kv_heads),
            ("head_dim", shape.head_dim),
        ] {
            multiple("kv_pool", dimension, found, 1)?;
        }
        if latent_dim.is_none() {
            at_most("kv_pool", "head_dim", shape.head_dim, HEAD_DIM_MAX)?;
        }
        let wide = padded(shape.head_dim);
        let strides = || {
            let of_head = wide.checked_mul(shape.block_size)?;
            let page_stride = of_head.checked_mul(shape.kv_heads)?;
            let plane = page_stride.checked_mul(shape.blocks)?;
            plane.checked_mul(shape.layers)?.checked_mul(2 * 4)?;
            let (head_strides, token_stride) = match order {
                KvOrder::Hnd => ([of_head; 2], wide),
                KvOrder::Nhd => ([lanes(shape) * wide, wide], shape.kv_heads * wide),
            };
            Some(Self { page_stride, head_strides, token_stride, wide, plane, planes })
        };
        strides().ok_or(Error::Memory { operator: "kv_pool", bytes: usize::MAX })
    }
}

/// A head's length in memory.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WIDTH)
}

/// Tokens of a panel of K.
#[inline(always)]
fn lanes(shape: &KvShape) -> usize {
    if shape.block_size.is_multiple_of(WIDTH) { WIDTH } else { shape.block_size }
}

impl KvPool {
    /// A pool of keys and values, or of latents of so many elements.
    pub(crate) fn new(
        shape: KvShape,
        storage: KvStorage,
        order: KvOrder,
        latent_dim: Option<usize>,
    ) -> Result<Self, Error> {
        let (layout, form) = (Layout::new(&shape, order, latent_dim)?, Form::new(shape.dtype, storage));
        let planes = shape.layers * layout.planes;
        let elements = layout.plane * planes;
        let mut memory = zeroed("kv_pool", Some((elements * form.bytes()).div_ceil(4) + LINE))?;
        wish_huge_pages(memory.as_mut_ptr().cast(), memory.len() * 4);
        let first = first_line(&memory);
        let scales = match storage {
            KvStorage::Same => Scales::None,
            KvStorage::Fp8 { key_scale, value_scale } => Scales::Each([key_scale, value_scale]),
            KvStorage::Fp8PerHead | KvStorage::Int8PerHead => {
                let slots = planes * shape.blocks * shape.block_size;
                Scales::PerHead(zeroed("kv_pool", Some(slots * shape.kv_heads))?)
            }
        };
        Ok(Self { shape, latent_dim, layout, form, scales, memory, first })
    }

    /// The dimensions that the pool was made with.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Whether attention may multiply pairs of bf16: the type is bf16, and so are, before their scales, all numbers of
    /// one byte.
    pub(crate) fn of_bf16(&self) -> bool {
        self.shape.dtype == Dtype::Bf16
    }

    /// Its shape, for the door.
    pub(crate) fn dims(&self) -> Pool {
        Pool { shape: self.shape, latent_dim: self.latent_dim }
    }

    /// Tokens of a panel of K.
    #[inline(always)]
    pub(crate) fn lanes(&self) -> usize {
        lanes(&self.shape)
    }

    /// Bytes that one block takes over all layers.
    pub(crate) fn block_bytes(
        shape: KvShape,
        storage: KvStorage,
        latent_dim: Option<usize>,
    ) -> Result<usize, Error> {
        let layout = Layout::new(&shape, KvOrder::default(), latent_dim)?;
        let page = layout.page_stride * storage.bytes(shape.dtype);
        let scales = if storage.per_head() { shape.block_size * shape.kv_heads * 4 } else { 0 };
        Ok((page + scales) * layout.planes * shape.layers)
    }

    /// Bytes of one block of this pool over all layers.
    pub(crate) fn bytes_of_block(&self) -> usize {
        let scales = if let Scales::PerHead(_) = self.scales { self.scales_of_block() * 4 } else { 0 };
        (self.page_bytes() + scales) * self.planes().len()
    }

    /// All planes, by their numbers.
    fn planes(&self) -> Range<usize> {
        0..self.shape.layers * self.layout.planes
    }

    /// The number of K (`which` 0) or V (`which` 1) of a layer; of latents, they are one.
    fn index(&self, layer: usize, which: usize) -> usize {
        layer * self.layout.planes + which.min(self.layout.planes - 1)
    }

    fn page_bytes(&self) -> usize {
        self.layout.page_stride * self.form.bytes()
    }

    /// How many scales a block has in a plane.
    fn scales_of_block(&self) -> usize {
        self.shape.block_size * self.shape.kv_heads
    }

    /// What stored elements are multiplied by: nothing, one number for all of K (`which` 0) or V (`which` 1), or
    /// those of each slot and kv head of a layer.
    #[inline(always)]
    pub(crate) fn scales(&self, layer: usize, which: usize) -> Option<OfPlane<'_>> {
        match &self.scales {
            Scales::None => None,
            Scales::Each(scales) => Some(OfPlane::One(scales[which.min(self.layout.planes - 1)])),
            Scales::PerHead(scales) => {
                let len = self.shape.blocks * self.scales_of_block();
                Some(OfPlane::PerHead(&scales[self.index(layer, which) * len..][..len]))
            }
        }
    }

    /// Where those of each slot and kv head of a layer are written, if there are any.
    pub(crate) fn scales_mut(&mut self, layer: usize, which: usize) -> Option<SharedOut> {
        let (index, len) = (self.index(layer, which), self.shape.blocks * self.scales_of_block());
        let Scales::PerHead(scales) = &mut self.scales else { return None };
        Some(SharedOut::new(&mut scales[index * len..][..len]))
    }

    /// The bytes of K (`which` 0) or V (`which` 1) of a layer.
    pub(crate) fn plane(&self, layer: usize, which: usize) -> &[u8] {
        self.plane_at(self.index(layer, which))
    }

    /// The same, for writing.
    pub(crate) fn plane_mut(&mut self, layer: usize, which: usize) -> &mut [u8] {
        self.plane_at_mut(self.index(layer, which))
    }

    fn plane_at(&self, index: usize) -> &[u8] {
        let len = self.layout.plane * self.form.bytes();
        &bytemuck::cast_slice::<f32, u8>(&self.memory[self.first..])[index * len..][..len]
    }

    fn plane_at_mut(&mut self, index: usize) -> &mut [u8] {
        let len = self.layout.plane * self.form.bytes();
        &mut bytemuck::cast_slice_mut::<f32, u8>(&mut self.memory[self.first..])[index * len..][..len]
    }

    /// Copies a block out, plane by plane.
    pub(crate) fn save_block(&self, block: u32, bytes: &mut [u8]) {
        let page = self.page_bytes();
        for (plane, bytes) in self.planes().zip(bytes.chunks_exact_mut(page)) {
            bytes.copy_from_slice(&self.plane_at(plane)[block as usize * page..][..page]);
        }
        let of_block = self.scales_of_block();
        if let Scales::PerHead(scales) = &self.scales {
            let rest = bytes[self.planes().len() * page..].chunks_exact_mut(of_block * 4);
            for (bytes, plane) in rest.zip(scales.chunks_exact(self.shape.blocks * of_block)) {
                let scales = &plane[block as usize * of_block..][..of_block];
                bytes.copy_from_slice(bytemuck::cast_slice(scales));
            }
        }
    }

    /// Copies a block in that was saved.
    pub(crate) fn load_block(&mut self, block: u32, bytes: &[u8]) {
        let page = self.page_bytes();
        for (plane, bytes) in self.planes().zip(bytes.chunks_exact(page)) {
            self.plane_at_mut(plane)[block as usize * page..][..page].copy_from_slice(bytes);
        }
        let (of_block, blocks, planes) = (self.scales_of_block(), self.shape.blocks, self.planes().len());
        if let Scales::PerHead(scales) = &mut self.scales {
            let rest = bytes[planes * page..].chunks_exact(of_block * 4);
            for (bytes, plane) in rest.zip(scales.chunks_exact_mut(blocks * of_block)) {
                let scales = &mut plane[block as usize * of_block..][..of_block];
                bytemuck::cast_slice_mut::<f32, u8>(scales).copy_from_slice(bytes);
            }
        }
    }

    /// Copies K and V of a token, a lane of a panel and a row, in every layer.
    pub(crate) fn copy_slot(&mut self, from: usize, to: usize) {
        let KvShape { layers, blocks, block_size, kv_heads, .. } = self.shape;
        let (layout, lanes, size) = (self.layout, self.lanes(), self.form.bytes());
        // Pairs of bf16 lie beside each other.
        let unit = if self.form == Form::Bf16 { 2 * size } else { size };
        let (row, token_bytes) = (layout.wide * size, layout.token_stride * size);
        let place = |slot: usize, head: usize| {
            let (block, token) = (slot / block_size, slot % block_size);
            let [keys, values] =
                layout.head_strides.map(|stride| (block * layout.page_stride + head * stride) * size);
            let lane = token % lanes;
            (keys + (token - lane) * token_bytes + lane * unit, values + token * token_bytes)
        };
        for (layer, head) in (0..layers).flat_map(|layer| (0..kv_heads).map(move |head| (layer, head))) {
            let ((lane_from, row_from), (lane_to, row_to)) = (place(from, head), place(to, head));
            if self.latent_dim.is_none() {
                let keys = self.plane_mut(layer, 0);
                for line in (0..lanes * row).step_by(lanes * unit) {
                    keys.copy_within(lane_from + line..lane_from + line + unit, lane_to + line);
                }
            }
            self.plane_mut(layer, 1).copy_within(row_from..row_from + row, row_to);
        }
        if let Scales::PerHead(scales) = &mut self.scales {
            for plane in scales.chunks_exact_mut(blocks * block_size * kv_heads) {
                plane.copy_within(from * kv_heads..(from + 1) * kv_heads, to * kv_heads);
            }
        }
    }

    /// Copies block `from` over block `to` in every layer.
    pub(crate) fn copy_block(&mut self, from: u32, to: u32) {
        let page = self.page_bytes();
        let planes = self.planes();
        let plane = self.layout.plane * self.form.bytes();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.memory[self.first..]);
        for start in planes.map(|index| index * plane) {
            let source = start + from as usize * page;
            bytes.copy_within(source..source + page, start + to as usize * page);
        }
        let (of_block, blocks) = (self.scales_of_block(), self.shape.blocks);
        if let Scales::PerHead(scales) = &mut self.scales {
            for plane in scales.chunks_exact_mut(blocks * of_block) {
                let source = from as usize * of_block;
                plane.copy_within(source..source + of_block, to as usize * of_block);
            }
        }
    }
}

//! The paged memory of keys and values.

use super::lanes::WIDTH;
use super::tensor::{LINE, first_line, wish_huge_pages, zeroed};
use crate::error::{at_most, multiple};
use crate::shape::HEAD_DIM_MAX;
use crate::{Error, KvShape};

/// K and V of all layers: for each layer K then V, each `[block][kv head]`, with `dim` padded with zeros to a
/// multiple of 16 so that kernels never meet a tail.
///
/// V of a head is `[token][dim]`. K of a head lies in panels of sixteen tokens, as weights do (`panels.rs`): of
/// each pair of elements there is a line for the sixteen, so that scores are summed with lanes along tokens and
/// nothing has to be turned. Where sixteen do not divide a block, its tokens are one panel, with shorter or longer
/// lines.
#[derive(Debug)]
pub struct KvPool {
    pub(crate) shape: KvShape,
    pub(crate) layout: Layout,
    storage: Vec<f32>,
    /// Where the first plane lies: the first cache line of the storage.
    first: usize,
}

/// Distances in elements from one page, head and token to the next. `dim` is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) page_stride: usize,
    pub(crate) head_stride: usize,
    pub(crate) token_stride: usize,
    /// Elements of K (or of V) of one layer.
    pub(crate) plane: usize,
}

impl Layout {
    fn new(shape: &KvShape) -> Result<Self, Error> {
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
        let token_stride = padded(shape.head_dim);
        let strides = || {
            let head_stride = token_stride.checked_mul(shape.block_size)?;
            let page_stride = head_stride.checked_mul(shape.kv_heads)?;
            let plane = page_stride.checked_mul(shape.blocks)?;
            plane.checked_mul(shape.layers)?.checked_mul(2 * 4)?;
            Some(Self { page_stride, head_stride, token_stride, plane })
        };
        strides().ok_or(Error::Memory { operator: "kv_pool", bytes: usize::MAX })
    }
}

/// A head's length in memory.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WIDTH)
}

impl KvPool {
    pub(crate) fn new(shape: KvShape) -> Result<Self, Error> {
        let layout = Layout::new(&shape)?;
        let elements = layout.plane * shape.layers * 2;
        let mut storage = zeroed("kv_pool", Some((elements * shape.dtype.bytes()).div_ceil(4) + LINE))?;
        wish_huge_pages(storage.as_mut_ptr().cast(), storage.len() * 4);
        let first = first_line(&storage);
        Ok(Self { shape, layout, storage, first })
    }

    /// The dimensions that the pool was made with.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Tokens of a panel of K.
    #[inline(always)]
    pub(crate) fn lanes(&self) -> usize {
        if self.shape.block_size.is_multiple_of(WIDTH) { WIDTH } else { self.shape.block_size }
    }

    /// Bytes that one block takes over all layers.
    pub(crate) fn block_bytes(shape: KvShape) -> Result<usize, Error> {
        let layout = Layout::new(&shape)?;
        Ok(layout.page_stride * 2 * shape.layers * shape.dtype.bytes())
    }

    /// Elements before K (`which` 0) or V (`which` 1) of a layer.
    pub(crate) fn plane_start(&self, layer: usize, which: usize) -> usize {
        (layer * 2 + which) * self.layout.plane
    }

    /// The bytes of K (`which` 0) or V (`which` 1) of a layer.
    pub(crate) fn plane(&self, layer: usize, which: usize) -> &[u8] {
        let size = self.shape.dtype.bytes();
        let bytes = bytemuck::cast_slice::<f32, u8>(&self.storage[self.first..]);
        &bytes[self.plane_start(layer, which) * size..][..self.layout.plane * size]
    }

    /// The same, for writing.
    pub(crate) fn plane_mut(&mut self, layer: usize, which: usize) -> &mut [u8] {
        let size = self.shape.dtype.bytes();
        let (start, len) = (self.plane_start(layer, which) * size, self.layout.plane * size);
        &mut bytemuck::cast_slice_mut::<f32, u8>(&mut self.storage[self.first..])[start..][..len]
    }

    /// Copies a block out, plane by plane.
    pub(crate) fn save_block(&self, block: u32, bytes: &mut [u8]) {
        let page = self.layout.page_stride * self.shape.dtype.bytes();
        let planes = (0..self.shape.layers).flat_map(|layer| [(layer, 0), (layer, 1)]);
        for ((layer, which), bytes) in planes.zip(bytes.chunks_exact_mut(page)) {
            bytes.copy_from_slice(&self.plane(layer, which)[block as usize * page..][..page]);
        }
    }

    /// Copies a block in that was saved.
    pub(crate) fn load_block(&mut self, block: u32, bytes: &[u8]) {
        let page = self.layout.page_stride * self.shape.dtype.bytes();
        let planes = (0..self.shape.layers).flat_map(|layer| [(layer, 0), (layer, 1)]);
        for ((layer, which), bytes) in planes.zip(bytes.chunks_exact(page)) {
            self.plane_mut(layer, which)[block as usize * page..][..page].copy_from_slice(bytes);
        }
    }

    /// Copies block `from` over block `to` in every layer.
    pub(crate) fn copy_block(&mut self, from: u32, to: u32) {
        let page = self.layout.page_stride * self.shape.dtype.bytes();
        let planes = 2 * self.shape.layers;
        let plane = self.layout.plane * self.shape.dtype.bytes();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.storage[self.first..]);
        for start in (0..planes).map(|index| index * plane) {
            let source = start + from as usize * page;
            bytes.copy_within(source..source + page, start + to as usize * page);
        }
    }
}

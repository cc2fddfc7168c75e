//! Where the numbers of a pool lie.

use crate::door;
use crate::error::{at_most, multiple};
use crate::shape::HEAD_DIM_MAX;
use crate::{Error, KvOrder, KvShape, KvStorage};

/// Where K and V lie: the distance from one to the next along each dimension, in elements as stored. The elements of a
/// head are neighbours; between heads may be anything, which nobody reads or writes.
///
/// Each is a multiple of 16 bytes, and no two elements lie in one place: a stride reaches over all that those below it
/// reach. Where a dimension has one element, its stride says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStrides {
    /// Layers. An engine that keeps each in a tensor of its own has a pool of one layer for each.
    pub layer: usize,
    /// From K to V.
    pub value: usize,
    /// Blocks.
    pub page: usize,
    /// Kv heads.
    pub head: usize,
    /// Tokens of a block.
    pub token: usize,
}

impl KvStrides {
    /// All K of a layer, then all V, without gaps: `[layers, 2, blocks, ..]`. With [`KvOrder::Nhd`] and one layer that
    /// is vLLM's `(2, blocks, block_size, kv_heads, head_dim)`.
    #[must_use]
    pub fn apart(shape: &KvShape, order: KvOrder) -> Self {
        let (page, head, token) = Self::of_page(shape, order);
        let value = page.saturating_mul(shape.blocks);
        Self { layer: value.saturating_mul(2), value, page, head, token }
    }

    /// K of a block, then its V, without gaps: `[layers, blocks, 2, ..]`. With one layer that is FlashInfer's paged
    /// cache in five dimensions, in either of its orders.
    #[must_use]
    pub fn together(shape: &KvShape, order: KvOrder) -> Self {
        let (value, head, token) = Self::of_page(shape, order);
        let page = value.saturating_mul(2);
        Self { layer: page.saturating_mul(shape.blocks), value, page, head, token }
    }

    /// Elements of K of a block, from head to head, and from token to token.
    fn of_page(shape: &KvShape, order: KvOrder) -> (usize, usize, usize) {
        let KvShape { block_size, kv_heads, head_dim, .. } = *shape;
        let (of_head, of_token) = (head_dim.saturating_mul(block_size), head_dim.saturating_mul(kv_heads));
        let page = of_token.saturating_mul(block_size);
        match order {
            KvOrder::Hnd => (page, of_head, head_dim),
            KvOrder::Nhd => (page, head_dim, of_token),
        }
    }
}

/// A pool's strides, with what follows from them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) strides: KvStrides,
    /// Of a layer: 2 for K and V, 1 for latents.
    pub(crate) planes: usize,
    /// Bytes of an element.
    pub(crate) element: usize,
    /// Bytes of a head that copies take: in a pool of ours whole 16s of elements, in another those that are there.
    pub(crate) row_bytes: usize,
    /// Bytes of K (or of V) of a block of one layer, as copied.
    pub(crate) page_bytes: usize,
    /// They lie in one piece.
    pub(crate) whole: bool,
    /// Bytes from the first element to the end of the last.
    pub(crate) bytes: usize,
}

impl Layout {
    /// Without gaps, but for heads that are padded to whole 16s of elements.
    pub(crate) fn dense(
        shape: &KvShape,
        storage: KvStorage,
        order: KvOrder,
        planes: usize,
    ) -> Result<Self, Error> {
        check_shape(shape, planes)?;
        let element = storage.bytes(shape.dtype);
        let row_bytes = shape.head_dim.next_multiple_of(16) * element;
        let sizes = || {
            let page_bytes = row_bytes.checked_mul(shape.block_size)?.checked_mul(shape.kv_heads)?;
            let plane_bytes = page_bytes.checked_mul(shape.blocks)?;
            Some((page_bytes, plane_bytes.checked_mul(shape.layers)?.checked_mul(planes)?))
        };
        let (page_bytes, bytes) = sizes().ok_or(Error::Memory { operator: "kv_pool", bytes: usize::MAX })?;
        let padded = KvShape { head_dim: row_bytes / element, ..*shape };
        let mut strides = KvStrides::apart(&padded, order);
        strides.layer = strides.value * planes;
        Ok(Self { strides, planes, element, row_bytes, page_bytes, whole: true, bytes })
    }

    /// As strides say.
    pub(crate) fn strided(
        shape: &KvShape,
        storage: KvStorage,
        strides: KvStrides,
        planes: usize,
    ) -> Result<Self, Error> {
        check_shape(shape, planes)?;
        let element = storage.bytes(shape.dtype);
        let dimensions = [
            ("layer stride", shape.layers, strides.layer),
            ("distance from K to V", planes, strides.value),
            ("page stride", shape.blocks, strides.page),
            ("head stride", shape.kv_heads, strides.head),
            ("token stride", shape.block_size, strides.token),
        ];
        let reach = door::strides(dimensions, shape.head_dim, element)?;
        // What says nothing is what comes after all others.
        let [layer, value, page, head, token] =
            dimensions.map(|(_, count, stride)| if count > 1 { stride } else { reach });
        let strides = KvStrides { layer, value, page, head, token };
        let row_bytes = shape.head_dim * element;
        let page_bytes = row_bytes * shape.block_size * shape.kv_heads;
        Ok(Self { strides, planes, element, row_bytes, page_bytes, whole: false, bytes: reach * element })
    }

    /// Bytes from the start to K (0) or V (1) of a layer.
    pub(crate) fn plane(&self, layer: usize, which: usize) -> u64 {
        ((layer * self.strides.layer + which * self.strides.value) * self.element) as u64
    }

    /// Whether Hopper's memory unit takes its strides: they are below 2^40 bytes (`cuTensorMapEncodeTiled`).
    pub(crate) fn fits_maps(&self) -> bool {
        let KvStrides { page, head, token, .. } = self.strides;
        [page, head, token].iter().all(|&stride| stride * self.element < 1 << 40)
    }
}

fn check_shape(shape: &KvShape, planes: usize) -> Result<(), Error> {
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
    Ok(())
}

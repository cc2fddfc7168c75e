//! The arithmetic of the memory behind the blocks: shapes, strides and bytes. The memory itself is yours.
//!
//! ```text
//!  Parts::Apart      [2, blocks, ...]      all of K, then all of V
//!  Parts::Together   [blocks, 2, ...]      K and V of a block beside each other: one copy moves both
//!
//!  Order::Nhd        [..., block_size, heads, head_dim]      a token's heads lie together
//!  Order::Hnd        [..., heads, block_size, head_dim]      a head's tokens lie together
//!
//!  latent (MLA)      [blocks, block_size, latent]            one vector a token, no heads, no V
//! ```

use crate::{BlockCount, BlockSize, Error};

/// How many bytes; never negative, up to 16 EiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// The type of one number in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DataType {
    /// 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// The upper half of an f32, 2 bytes.
    Bf16,
    /// 8 bits with 4 of exponent and 3 of mantissa.
    Fp8E4m3,
    /// 8 bits with 5 of exponent and 2 of mantissa.
    Fp8E5m2,
    /// 8 bits, to be multiplied by a scale.
    Int8,
}

impl DataType {
    /// The size of one number.
    pub const fn bytes(self) -> u64 {
        match self {
            DataType::F32 => 4,
            DataType::F16 | DataType::Bf16 => 2,
            DataType::Fp8E4m3 | DataType::Fp8E5m2 | DataType::Int8 => 1,
        }
    }
}

/// What a layer keeps of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenShape {
    /// K and V of each head.
    Heads {
        /// Heads of K and V (not of queries).
        heads: u32,
        /// Numbers per head.
        head_dim: u32,
        /// Which of tokens and heads lies outside.
        order: Order,
        /// Whether K and V of a block lie beside each other.
        parts: Parts,
    },
    /// One compressed vector for all heads (multi-head latent attention): its rank and the part that carries the
    /// position, together 576 in DeepSeek V2 and V3.
    Latent {
        /// Numbers per token.
        width: u32,
    },
}

/// How tokens and heads of a block lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// Tokens outside, heads inside.
    #[default]
    Nhd,
    /// Heads outside, tokens inside.
    Hnd,
}

/// Where V lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Parts {
    /// Behind the K of all blocks.
    #[default]
    Apart,
    /// Behind the K of its own block.
    Together,
}

/// The memory of one layer, or of a group of equal layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Tokens per block.
    pub block_size: BlockSize,
    /// Layers, each with an array of its own.
    pub layers: u32,
    /// What each keeps of a token.
    pub token: TokenShape,
    /// The type of each number.
    pub data_type: DataType,
    /// Bytes of scales per token and head (per token of a latent), K and V each; 0 where one scale serves a whole
    /// tensor. They lie elsewhere and only count for room.
    pub scale_bytes: u32,
}

/// Extents or strides of a layer's array, outermost first. As many as the array has dimensions: five, or three for a
/// latent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dimensions {
    all: [u64; 5],
    used: usize,
}

impl Dimensions {
    fn of(dimensions: &[u64]) -> Self {
        let mut all = [0; 5];
        all[..dimensions.len()].copy_from_slice(dimensions);
        Dimensions { all, used: dimensions.len() }
    }

    /// One number per dimension.
    pub fn as_slice(&self) -> &[u64] {
        &self.all[..self.used]
    }
}

impl Layout {
    /// The extents of one layer's array for `blocks` blocks, the null block included.
    pub fn shape(&self, blocks: BlockCount) -> Dimensions {
        let (blocks, size) = (u64::from(blocks.0), u64::from(self.block_size.get()));
        match self.token {
            TokenShape::Latent { width } => Dimensions::of(&[blocks, size, width.into()]),
            TokenShape::Heads { heads, head_dim, order, parts } => {
                let (outer, inner) = match order {
                    Order::Nhd => (size, heads.into()),
                    Order::Hnd => (heads.into(), size),
                };
                let (first, second) = match parts {
                    Parts::Apart => (2, blocks),
                    Parts::Together => (blocks, 2),
                };
                Dimensions::of(&[first, second, outer, inner, head_dim.into()])
            }
        }
    }

    /// How many numbers lie between two neighbours in each dimension of [`shape`](Layout::shape).
    ///
    /// # Errors
    /// [`Error::LayoutTooLarge`] when the array has 2^64 bytes or more.
    pub fn strides(&self, blocks: BlockCount) -> Result<Dimensions, Error> {
        self.bytes(blocks)?;
        let shape = self.shape(blocks);
        let mut strides = shape;
        let mut stride = 1;
        for dimension in (0..shape.used).rev() {
            strides.all[dimension] = stride;
            stride *= shape.all[dimension];
        }
        Ok(strides)
    }

    /// Where, counted in numbers from the beginning of a layer's array, the `part` (0 for K, 1 for V) of a token's
    /// `head` begins. A latent has one part and one head.
    ///
    /// # Errors
    /// [`Error::NoSuchPlace`] when the array has no such block, token, part or head; [`Error::LayoutTooLarge`].
    pub fn offset(&self, blocks: BlockCount, place: Place) -> Result<u64, Error> {
        let Place { block, token, part, head } = place;
        let (parts, heads) = match self.token {
            TokenShape::Latent { .. } => (1, 1),
            TokenShape::Heads { heads, .. } => (2, heads),
        };
        if block >= blocks.0 || token >= self.block_size.get() || part >= parts || head >= heads {
            return Err(Error::NoSuchPlace { block, token, part, head });
        }
        let [block, token, part, head] = [block, token, part, head].map(u64::from);
        let at = match self.token {
            TokenShape::Latent { .. } => [block, token, 0, 0, 0],
            TokenShape::Heads { order, parts, .. } => {
                let (first, second) = match parts {
                    Parts::Apart => (part, block),
                    Parts::Together => (block, part),
                };
                match order {
                    Order::Nhd => [first, second, token, head, 0],
                    Order::Hnd => [first, second, head, token, 0],
                }
            }
        };
        Ok(at.iter().zip(self.strides(blocks)?.all).map(|(at, stride)| at * stride).sum())
    }

    /// What one token takes in all layers, its scales included.
    ///
    /// # Errors
    /// [`Error::LayoutTooLarge`] from 2^64 bytes on.
    pub fn bytes_per_token(&self) -> Result<Bytes, Error> {
        let (vectors, width) = match self.token {
            TokenShape::Latent { width } => (1, width),
            TokenShape::Heads { heads, head_dim, .. } => (2 * u64::from(heads), head_dim),
        };
        let vector = u64::from(width) * self.data_type.bytes() + u64::from(self.scale_bytes);
        vectors
            .checked_mul(vector)
            .and_then(|bytes| bytes.checked_mul(self.layers.into()))
            .map(Bytes)
            .ok_or(Error::LayoutTooLarge)
    }

    /// What one block takes in all layers: the unit in which memory is handed out.
    ///
    /// # Errors
    /// [`Error::LayoutTooLarge`] from 2^64 bytes on.
    pub fn bytes_per_block(&self) -> Result<Bytes, Error> {
        let bytes = self.bytes_per_token()?.0.checked_mul(self.block_size.get().into());
        bytes.map(Bytes).ok_or(Error::LayoutTooLarge)
    }

    /// What `blocks` blocks take in all layers.
    ///
    /// # Errors
    /// [`Error::LayoutTooLarge`] from 2^64 bytes on.
    pub fn bytes(&self, blocks: BlockCount) -> Result<Bytes, Error> {
        let bytes = self.bytes_per_block()?.0.checked_mul(blocks.0.into());
        bytes.map(Bytes).ok_or(Error::LayoutTooLarge)
    }

    /// How many blocks fit into `memory`, the null block included: what [`Config::block_count`] wants. At most as many
    /// as there are numbers for.
    ///
    /// [`Config::block_count`]: crate::Config::block_count
    ///
    /// # Errors
    /// [`Error::EmptyLayout`] when a block takes no room at all; [`Error::LayoutTooLarge`].
    pub fn blocks_in(&self, memory: Bytes) -> Result<BlockCount, Error> {
        let block = self.bytes_per_block()?.0;
        let blocks = memory.0.checked_div(block).ok_or(Error::EmptyLayout)?;
        Ok(BlockCount(u32::try_from(blocks).unwrap_or(u32::MAX)))
    }
}

/// A vector in a layer's array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Place {
    /// The block.
    pub block: u32,
    /// The token in it.
    pub token: u32,
    /// 0 for K, 1 for V.
    pub part: u32,
    /// The head.
    pub head: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(order: Order, parts: Parts) -> Layout {
        Layout {
            block_size: BlockSize::new(16).unwrap(),
            layers: 2,
            token: TokenShape::Heads { heads: 8, head_dim: 128, order, parts },
            data_type: DataType::Bf16,
            scale_bytes: 0,
        }
    }

    #[test]
    fn shapes_and_strides_of_both_orders() {
        let cases = [
            (Order::Nhd, Parts::Apart, [2, 100, 16, 8, 128], [1_638_400, 16_384, 1024, 128, 1]),
            (Order::Hnd, Parts::Apart, [2, 100, 8, 16, 128], [1_638_400, 16_384, 2048, 128, 1]),
            (Order::Nhd, Parts::Together, [100, 2, 16, 8, 128], [32_768, 16_384, 1024, 128, 1]),
            (Order::Hnd, Parts::Together, [100, 2, 8, 16, 128], [32_768, 16_384, 2048, 128, 1]),
        ];
        for (order, parts, shape, strides) in cases {
            let layout = heads(order, parts);
            assert_eq!(layout.shape(BlockCount(100)).as_slice(), shape);
            assert_eq!(layout.strides(BlockCount(100)).unwrap().as_slice(), strides);
        }
    }

    #[test]
    fn every_vector_has_a_place_of_its_own() {
        let layouts =
            [(Order::Nhd, Parts::Apart), (Order::Hnd, Parts::Together)].map(|(order, parts)| Layout {
                block_size: BlockSize::new(3).unwrap(),
                token: TokenShape::Heads { heads: 2, head_dim: 5, order, parts },
                ..heads(order, parts)
            });
        let latent = Layout { token: TokenShape::Latent { width: 5 }, ..layouts[0] };
        for (layout, parts, of_heads) in [(layouts[0], 2, 2), (layouts[1], 2, 2), (latent, 1, 1)] {
            let mut offsets = Vec::new();
            for (block, token) in (0..4).flat_map(|block| (0..3).map(move |token| (block, token))) {
                for (part, head) in (0..parts).flat_map(|part| (0..of_heads).map(move |head| (part, head))) {
                    let place = Place { block, token, part, head };
                    offsets.push(layout.offset(BlockCount(4), place).unwrap());
                }
            }
            offsets.sort_unstable();
            let numbers = layout.shape(BlockCount(4)).as_slice().iter().product();
            assert_eq!(offsets, (0..numbers).step_by(5).collect::<Vec<_>>());
        }
        let beyond = Place { head: 1, ..Place::default() };
        assert_eq!(
            latent.offset(BlockCount(4), beyond),
            Err(Error::NoSuchPlace { block: 0, token: 0, part: 0, head: 1 })
        );
    }

    #[test]
    fn bytes_of_models_that_people_run() {
        // Llama 3.1 8B: 32 layers, 8 heads of 128, bf16: 128 KiB a token, 2 MiB a block of 16.
        let llama = Layout { layers: 32, ..heads(Order::Nhd, Parts::Apart) };
        assert_eq!(llama.bytes_per_token(), Ok(Bytes(131_072)));
        assert_eq!(llama.blocks_in(Bytes(16 << 30)), Ok(BlockCount(8192)));
        // The same in fp8, and in int8 with a scale of four bytes per token and head.
        let fp8 = Layout { data_type: DataType::Fp8E4m3, ..llama };
        assert_eq!(fp8.bytes_per_block(), Ok(Bytes(1 << 20)));
        let int8 = Layout { data_type: DataType::Int8, scale_bytes: 4, ..llama };
        assert_eq!(int8.bytes_per_token(), Ok(Bytes(65_536 + 32 * 2 * 8 * 4)));
        // DeepSeek V3: 61 layers, 512 + 64 numbers, bf16: 70,272 bytes a token; blocks of 64.
        let deepseek = Layout {
            block_size: BlockSize::new(64).unwrap(),
            layers: 61,
            token: TokenShape::Latent { width: 576 },
            ..llama
        };
        assert_eq!(deepseek.bytes_per_token(), Ok(Bytes(70_272)));
        assert_eq!(deepseek.shape(BlockCount(10)).as_slice(), [10, 64, 576]);
        assert_eq!(deepseek.strides(BlockCount(10)).unwrap().as_slice(), [36_864, 576, 1]);
    }

    #[test]
    fn room_rounds_down_and_what_does_not_fit_a_number_is_refused() {
        let layout = heads(Order::Nhd, Parts::Apart);
        let block = layout.bytes_per_block().unwrap().0;
        for (memory, blocks) in [(0, 0), (block - 1, 0), (block, 1), (3 * block - 1, 2), (u64::MAX, u32::MAX)]
        {
            assert_eq!(layout.blocks_in(Bytes(memory)), Ok(BlockCount(blocks)), "{memory} bytes");
        }
        let empty = Layout { layers: 0, ..layout };
        assert_eq!(empty.blocks_in(Bytes(1)), Err(Error::EmptyLayout));
        let huge =
            TokenShape::Heads { heads: u32::MAX, head_dim: u32::MAX, order: Order::Nhd, parts: Parts::Apart };
        let huge = Layout { token: huge, data_type: DataType::F32, ..layout };
        assert_eq!(huge.bytes_per_token(), Err(Error::LayoutTooLarge));
        assert_eq!(huge.strides(BlockCount(2)), Err(Error::LayoutTooLarge));
    }
}

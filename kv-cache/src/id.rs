//! The numbers of this crate, each with a type of its own: an id is not a count, a count of tokens is not a
//! count of blocks, and rounding between the two happens here and nowhere else.

use std::fmt;
use std::num::NonZeroU32;

use crate::Error;

/// A token of the model's vocabulary. The cache only ever compares tokens (through their hash).
pub type TokenId = u32;

/// A sequence, named by the caller. Any number not in use by another open sequence will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A physical block: the place of [`BlockSize`] tokens in every layer's K and V.
///
/// Block 0 is [`BlockId::NULL`]; it is never handed out, freed, hashed or counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// A group of layers that share one block table, by its place in the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u8);

/// A pin, named by the caller. Any number not in use by another pin will do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinId(pub u64);

/// A tenant, named by the caller, who may have a quota of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u32);

/// Where one token's K and V live: `block * block_size + offset in the block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

/// The position of a token in its sequence, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenIndex(pub u32);

/// A number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenCount(pub u32);

/// A number of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(pub u32);

/// A point in time, in a unit of the caller's choice: the caller has the clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tick(pub u64);

/// How many tokens a block holds; at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(NonZeroU32);

impl BlockId {
    /// Block 0, which stands for "no block here" wherever a device wants a full table.
    pub const NULL: BlockId = BlockId(0);

    /// The plain number, as kernels take it.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    #[inline]
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

impl GroupId {
    pub(crate) fn of(index: usize) -> GroupId {
        GroupId(u8::try_from(index).expect("groups are numbered in a byte"))
    }

    #[inline]
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

impl Slot {
    /// The plain number.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl TokenCount {
    /// The plain number.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Both together, at most `u32::MAX`.
    #[inline]
    pub const fn plus(self, other: TokenCount) -> TokenCount {
        TokenCount(self.0.saturating_add(other.0))
    }
}

impl BlockCount {
    /// The plain number.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl BlockSize {
    /// A block of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::EmptyBlock`] when `tokens` is zero.
    pub const fn new(tokens: u32) -> Result<BlockSize, Error> {
        match NonZeroU32::new(tokens) {
            Some(tokens) => Ok(BlockSize(tokens)),
            None => Err(Error::EmptyBlock),
        }
    }

    /// Tokens per block.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Blocks needed to hold `tokens`: the last one may be partly filled.
    #[inline]
    pub const fn blocks_for(self, tokens: TokenCount) -> BlockCount {
        let full = self.full_blocks(tokens);
        BlockCount(full.0 + (self.tokens_in(full).0 < tokens.0) as u32)
    }

    /// Blocks that `tokens` fill to the last place.
    #[inline]
    pub const fn full_blocks(self, tokens: TokenCount) -> BlockCount {
        // Sizes are powers of two, most of them, and a shift takes a fifth of the time.
        BlockCount(if self.0.is_power_of_two() {
            tokens.0 >> self.0.trailing_zeros()
        } else {
            tokens.0 / self.get()
        })
    }

    /// Tokens that `blocks` full blocks hold, at most `u32::MAX`.
    #[inline]
    pub const fn tokens_in(self, blocks: BlockCount) -> TokenCount {
        TokenCount(blocks.0.saturating_mul(self.get()))
    }

    /// The largest size that both are multiples of.
    #[must_use]
    pub const fn common_divisor(self, other: BlockSize) -> BlockSize {
        let (mut a, mut b) = (self.0, other.0);
        while let Some(rest) = NonZeroU32::new(a.get() % b.get()) {
            (a, b) = (b, rest);
        }
        BlockSize(b)
    }

    /// The smallest size that is a multiple of both, at most `u32::MAX`.
    #[must_use]
    pub const fn common_multiple(self, other: BlockSize) -> BlockSize {
        let other = other.get() / self.common_divisor(other).get();
        BlockSize(self.0.saturating_mul(NonZeroU32::MIN.saturating_add(other - 1)))
    }

    /// Blocks that `tokens` need beyond the `held` ones. Most steps need none, and then nothing is divided.
    #[inline]
    pub(crate) const fn blocks_beyond(self, held: BlockCount, tokens: TokenCount) -> BlockCount {
        if tokens.0 <= self.tokens_in(held).0 {
            return BlockCount(0);
        }
        BlockCount(self.blocks_for(tokens).0 - held.0)
    }

    pub(crate) const fn len(self) -> usize {
        self.get() as usize
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for PinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for TokenCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for TokenIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BlockCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The length of a list of ids. Lists are bounded by the number of blocks or of tokens, both `u32`.
#[inline]
pub(crate) fn count(length: usize) -> u32 {
    u32::try_from(length).expect("a list of blocks or tokens is counted in u32")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_round_up_for_room_and_down_for_full() {
        let size = BlockSize::new(16).unwrap();
        for (tokens, room, full) in [(0, 0, 0), (1, 1, 0), (15, 1, 0), (16, 1, 1), (17, 2, 1), (48, 3, 3)] {
            assert_eq!(size.blocks_for(TokenCount(tokens)), BlockCount(room), "{tokens} tokens need room");
            assert_eq!(size.full_blocks(TokenCount(tokens)), BlockCount(full), "{tokens} tokens fill");
        }
        assert_eq!(size.blocks_for(TokenCount(u32::MAX)), BlockCount(1 << 28), "no overflow at the top");
        assert_eq!(size.tokens_in(BlockCount(u32::MAX)), TokenCount(u32::MAX), "saturates at the top");
    }

    #[test]
    fn the_ways_to_round_agree() {
        let size = BlockSize::new(16).unwrap();
        for tokens in (0..100).chain(u32::MAX - 40..=u32::MAX).map(TokenCount) {
            for held in [0, 1, 2, 5, 1 << 28].map(BlockCount) {
                let beyond = size.blocks_for(tokens).0.saturating_sub(held.0);
                assert_eq!(
                    size.blocks_beyond(held, tokens),
                    BlockCount(beyond),
                    "{tokens} tokens, {held} held"
                );
            }
            let full = size.full_blocks(tokens).0;
            assert_eq!(full, tokens.get() / size.get(), "{tokens} tokens");
        }
    }

    #[test]
    fn sizes_have_common_divisors_and_multiples() {
        let size = |tokens| BlockSize::new(tokens).unwrap();
        for (a, b, divisor, multiple) in [(16, 16, 16, 16), (12, 18, 6, 36), (1, 7, 1, 7), (64, 16, 16, 64)] {
            assert_eq!(size(a).common_divisor(size(b)), size(divisor));
            assert_eq!(size(a).common_multiple(size(b)), size(multiple));
        }
        assert_eq!(size(u32::MAX).common_multiple(size(2)), size(u32::MAX), "saturates at the top");
    }

    #[test]
    fn a_block_of_no_tokens_is_refused() {
        assert_eq!(BlockSize::new(0), Err(Error::EmptyBlock));
    }
}

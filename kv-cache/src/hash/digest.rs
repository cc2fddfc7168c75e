//! What a block hasher computes: a hash of fixed width.

use std::fmt::{self, Debug, Display};
use std::hash::Hash;

/// The name of a block's content, wide enough that two different contents do not share one.
pub trait Digest: Copy + Ord + Hash + Default + Debug + Display {
    /// 32 bits that an index sorts by. A good hash is uniform, so any 32 of its bits will do.
    fn tag(&self) -> u32;

    /// The 64-bit form in which some routers want it: the last eight bytes, read from the most significant on.
    fn low64(&self) -> u64;

    /// All of it, the most significant byte first: as it goes on a wire or into a file name.
    fn bytes(&self) -> &[u8];
}

/// A hash of so many bytes, the most significant first. Sixteen are the default's, thirty-two those of SHA-256
/// and BLAKE3, eight those of Dynamo.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash<const BYTES: usize = 16>(pub [u8; BYTES]);

impl<const BYTES: usize> BlockHash<BYTES> {
    /// The bytes, as [`Digest::bytes`], and how many they are.
    pub const fn bytes(&self) -> &[u8; BYTES] {
        &self.0
    }
}

#[cfg(test)]
impl BlockHash {
    pub(crate) const fn from_parts(tag: u32, rest: u32) -> BlockHash {
        BlockHash(((tag as u128) << 96 | rest as u128).to_be_bytes())
    }
}

impl<const BYTES: usize> Digest for BlockHash<BYTES> {
    #[inline]
    fn tag(&self) -> u32 {
        const { assert!(BYTES >= 8, "eight bytes are the least that tell blocks apart") };
        u32::from_be_bytes(*self.0.first_chunk().expect("at least eight bytes"))
    }

    fn low64(&self) -> u64 {
        u64::from_be_bytes(*self.0.last_chunk().expect("at least eight bytes"))
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<const BYTES: usize> Default for BlockHash<BYTES> {
    fn default() -> Self {
        BlockHash([0; BYTES])
    }
}

impl<const BYTES: usize> Display for BlockHash<BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<const BYTES: usize> Debug for BlockHash<BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_shown_from_its_first_byte_and_shortened_to_its_last_eight() {
        let digest = BlockHash([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(digest.to_string(), "0102030405060708090a");
        assert_eq!((digest.tag(), digest.low64()), (0x0102_0304, 0x0304_0506_0708_090a));
    }
}

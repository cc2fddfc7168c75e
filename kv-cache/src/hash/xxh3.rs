//! XXH3-128, keyed: the default, because it is fast.

use std::fmt;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::{BlockHasher, Digest};
use crate::{BlockSize, SequenceKey, TokenId};

/// The chained 128-bit hash of a full block (XXH3-128, keyed by the seed of the configuration).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(u128);

impl BlockHash {
    /// The plain number.
    pub const fn get(self) -> u128 {
        self.0
    }

    #[cfg(test)]
    pub(crate) const fn from_parts(tag: u32, rest: u32) -> BlockHash {
        BlockHash((tag as u128) << 96 | rest as u128)
    }
}

impl Digest for BlockHash {
    #[inline]
    fn tag(&self) -> u32 {
        (self.0 >> 96) as u32
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

const PARENT_BYTES: usize = size_of::<u128>();
const TOKEN_BYTES: usize = size_of::<TokenId>();

/// XXH3-128 under a seed. Keeps the message of one block as scratch, so that hashing allocates nothing.
#[derive(Clone, Debug)]
pub struct Xxh3 {
    seed: u64,
    message: Vec<u8>,
}

impl Xxh3 {
    /// Hashes blocks of `block_size` tokens under the key `seed`.
    pub fn new(seed: u64, block_size: BlockSize) -> Self {
        Xxh3 { seed, message: vec![0; PARENT_BYTES + TOKEN_BYTES * block_size.len()] }
    }
}

impl BlockHasher for Xxh3 {
    type Digest = BlockHash;

    fn root(&self, key: &SequenceKey<'_>) -> BlockHash {
        // Each part is led by whether it is there and how long it is, so no two keys spell the same message.
        let mut message = Vec::new();
        for part in [key.adapter, key.salt] {
            message.push(u8::from(part.is_some()));
            let text = part.unwrap_or_default();
            message.extend_from_slice(&(text.len() as u64).to_le_bytes());
            message.extend_from_slice(text.as_bytes());
        }
        BlockHash(xxh3_128_with_seed(&message, self.seed))
    }

    fn block(&mut self, parent: BlockHash, tokens: &[TokenId]) -> BlockHash {
        debug_assert_eq!(self.message.len(), PARENT_BYTES + TOKEN_BYTES * tokens.len(), "only full blocks");
        let (head, body) = self.message.split_at_mut(PARENT_BYTES);
        head.copy_from_slice(&parent.0.to_le_bytes());
        for (bytes, token) in body.as_chunks_mut::<TOKEN_BYTES>().0.iter_mut().zip(tokens) {
            *bytes = token.to_le_bytes();
        }
        BlockHash(xxh3_128_with_seed(&self.message, self.seed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hasher(seed: u64) -> Xxh3 {
        Xxh3::new(seed, BlockSize::new(4).unwrap())
    }

    #[test]
    fn every_part_of_the_key_changes_the_hash() {
        let plain = SequenceKey::default();
        let salted = SequenceKey { salt: Some("a"), ..plain };
        let adapted = SequenceKey { adapter: Some("a"), ..plain };
        let empty_salt = SequenceKey { salt: Some(""), ..plain };
        let shifted = SequenceKey { adapter: Some(""), salt: Some("a") };
        let mut hashes: Vec<BlockHash> = [plain, salted, adapted, empty_salt, shifted]
            .iter()
            .flat_map(|key| {
                let mut hasher = hasher(1);
                let root = hasher.root(key);
                let first = hasher.block(root, &[1, 2, 3, 4]);
                [root, first, hasher.block(root, &[1, 2, 3, 5]), hasher.block(first, &[1, 2, 3, 4])]
            })
            .chain([hasher(2).root(&plain)])
            .collect();
        let all = hashes.len();
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), all);
    }

    #[test]
    fn the_same_input_names_the_same_block_on_every_machine() {
        let mut hasher = hasher(42);
        let root = hasher.root(&SequenceKey::default());
        let message: Vec<u8> = root
            .get()
            .to_le_bytes()
            .into_iter()
            .chain([7u32, 8, 9, 10].iter().flat_map(|t| t.to_le_bytes()))
            .collect();
        assert_eq!(hasher.block(root, &[7, 8, 9, 10]).get(), xxh3_128_with_seed(&message, 42));
        assert_eq!(root.get(), xxh3_128_with_seed(&[0; 18], 42));
    }
}

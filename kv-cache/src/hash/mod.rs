//! The name of a block's content: a chained hash of everything up to and including the block.
//!
//! ```text
//!  root   = H(adapter, salt)            hash 0 = H(root,   tokens  0..16)
//!                                       hash 1 = H(hash 0, tokens 16..32)   and so on
//! ```
//!
//! Two blocks of equal hash hold equal K and V, because hash `n` covers all tokens before it as well. The
//! adapter and the salt enter once, ahead of the first block, and reach every later one through the chain.

mod xxh3;

use std::fmt::Debug;

use crate::{SequenceKey, TokenId};

pub use xxh3::{BlockHash, Xxh3};

/// Computes the hashes that name blocks.
pub trait BlockHasher {
    /// What it computes.
    type Digest: Digest;

    /// What the first block of a sequence has for a parent.
    fn root(&self, key: &SequenceKey<'_>) -> Self::Digest;

    /// The hash of a full block behind `parent`.
    fn block(&mut self, parent: Self::Digest, tokens: &[TokenId]) -> Self::Digest;
}

/// A hash of fixed width.
pub trait Digest: Copy + Eq + Ord + Debug + Default {
    /// 32 bits that an index sorts by. A good hash is uniform, so any 32 of its bits are.
    fn tag(&self) -> u32;
}

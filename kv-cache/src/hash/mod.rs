//! The name of a block's content: a chained hash of everything up to and including the block.
//!
//! ```text
//!  hash 0 = H(adapter, salt, tokens 0..16, ...)      hash 1 = H(hash 0, tokens 16..32, ...)   and so on
//! ```
//!
//! Two blocks of equal hash hold equal K and V, because hash `n` covers all tokens before it as well. What is not
//! in the tokens (adapter, salt, images, embeddings) enters where it first matters and reaches every later
//! block through the chain.
//!
//! | hasher | bytes | for |
//! |---|---|---|
//! | [`Xxh3`] | 16 | speed; keyed, not cryptographic. The default |
//! | [`Blake3`] | 32 | tenants that attack each other; keyed |
//! | [`Sha256`] | 32 | the same where SHA-256 is prescribed; keyed |
//! | [`Vllm`] | 32 or 16 | the hashes that vLLM would give these blocks |
//! | [`Dynamo`] | 8 | the hashes that NVIDIA Dynamo would give them |
//! | [`AnyHasher`] | | one of these, by its name |

mod any;
#[cfg(feature = "blake3")]
mod blake3;
mod cbor;
mod content;
mod digest;
mod dynamo;
mod message;
mod pickle;
#[cfg(feature = "sha2")]
mod sha256;
mod vllm;
mod xxh3;

use std::fmt::Debug;

use crate::TokenId;

pub use any::{Algorithm, AnyHash, AnyHasher, UnknownAlgorithm};
#[cfg(feature = "blake3")]
pub use blake3::Blake3;
pub use content::{Adapter, Content, EmbedsDigest, Extra, Media, NO_EMBEDS};
pub use digest::{BlockHash, Digest};
pub use dynamo::Dynamo;
#[cfg(feature = "sha2")]
pub use sha256::Sha256;
pub use vllm::{Encoding, Vllm};
pub use xxh3::Xxh3;

/// Names blocks by what is in them. The same content gets the same name, other content another one.
pub trait BlockHasher: Clone + Debug {
    /// What it computes.
    type Digest: Digest;

    /// The hash of a full block behind `parent`, or of the first block of a sequence.
    ///
    /// Everything in `content` that is not covered already by the parent's hash must be covered by this one.
    fn block(&mut self, parent: Option<Self::Digest>, content: &Content<'_>) -> Self::Digest;

    /// The hashes of all blocks of `unit` tokens that `tokens` fill, with nothing but tokens in them, behind the last
    /// of `hashes`, to which they are appended.
    fn run(&mut self, tokens: &[TokenId], unit: usize, hashes: &mut Vec<Self::Digest>) {
        for tokens in tokens.chunks_exact(unit) {
            let hash = self.block(hashes.last().copied(), &Content::plain(tokens));
            hashes.push(hash);
        }
    }
}

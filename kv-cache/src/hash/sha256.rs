//! SHA-256 over our own encoding.

use sha2::Digest as _;

use super::message::Chained;
use super::{BlockHash, BlockHasher, Content};

/// SHA-256, about 140 ns a block. The key begins the root's message and so reaches every block through the chain.
///
/// For the very hashes that vLLM computes with SHA-256 see [`Vllm`](super::Vllm).
#[derive(Clone, Debug)]
pub struct Sha256 {
    key: [u8; 32],
    chained: Chained<32>,
}

impl Sha256 {
    /// A hasher under `key`. Processes that are to agree on hashes share it.
    pub fn new(key: [u8; 32]) -> Self {
        Sha256 { key, chained: Chained::new(|message| digest(&key, message)) }
    }
}

impl BlockHasher for Sha256 {
    type Digest = BlockHash<32>;

    fn block(&mut self, parent: Option<BlockHash<32>>, content: &Content<'_>) -> BlockHash<32> {
        let Sha256 { key, chained } = self;
        chained.block(parent, content, |message| digest(key, message))
    }
}

fn digest(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    sha2::Sha256::new_with_prefix(key).chain_update(message).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_and_the_parent_change_the_hash() {
        let mut hashes = Vec::new();
        for key in [[0; 32], [1; 32]] {
            let mut hasher = Sha256::new(key);
            let first = hasher.block(None, &Content::plain(&[1, 2]));
            hashes.extend([first, hasher.block(Some(first), &Content::plain(&[1, 2]))]);
        }
        let root = digest(&[0; 32], &[0; 27]);
        let message = [root.as_slice(), &[1, 0, 0, 0, 2, 0, 0, 0]].concat();
        assert_eq!(hashes[0].bytes(), &digest(&[0; 32], &message));
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), 4);
    }
}

//! The bytes that our own hashes are over.
//!
//! ```text
//!  root    adapter name, adapter path, salt: each a flag, a length and its text
//!  block   parent | tokens, 4 bytes each           plain text ends here: its length is the same for every block
//!                 | lookahead | media | embeddings  each led by how much of it there is
//! ```
//!
//! No two contents spell the same message: what follows the tokens says its own length, and is there or not.

use super::{BlockHash, Content, Extra};

const TOKEN_BYTES: usize = 4;

/// Chains blocks by a plain hash function. Keeps one block's message as scratch, so that hashing plain text
/// allocates nothing.
#[derive(Clone, Debug)]
pub(super) struct Chained<const BYTES: usize> {
    message: Vec<u8>,
    /// The parent of a first block of plain text.
    plain_root: BlockHash<BYTES>,
}

impl<const BYTES: usize> Chained<BYTES> {
    pub(super) fn new(digest: impl Fn(&[u8]) -> [u8; BYTES]) -> Self {
        let mut message = Vec::new();
        write_root(&Extra::default(), &mut message);
        Chained { plain_root: BlockHash(digest(&message)), message }
    }

    #[inline]
    pub(super) fn block(
        &mut self,
        parent: Option<BlockHash<BYTES>>,
        content: &Content<'_>,
        digest: impl Fn(&[u8]) -> [u8; BYTES],
    ) -> BlockHash<BYTES> {
        let parent = match (parent, content.extra) {
            (Some(parent), _) => parent,
            (None, None) => self.plain_root,
            (None, Some(extra)) => {
                write_root(extra, &mut self.message);
                BlockHash(digest(&self.message))
            }
        };
        let length = BYTES + TOKEN_BYTES * content.tokens.len();
        if self.message.len() != length {
            self.message.resize(length, 0);
        }
        let (head, body) = self.message.split_at_mut(BYTES);
        head.copy_from_slice(parent.bytes());
        for (bytes, token) in body.as_chunks_mut::<TOKEN_BYTES>().0.iter_mut().zip(content.tokens) {
            *bytes = token.to_le_bytes();
        }
        if !content.is_plain() {
            write_rest(content, &mut self.message);
        }
        BlockHash(digest(&self.message))
    }
}

fn write_root(extra: &Extra<'_>, message: &mut Vec<u8>) {
    message.clear();
    let adapter = extra.adapter;
    for part in [adapter.map(|adapter| adapter.name), adapter.map(|adapter| adapter.path), extra.salt] {
        message.push(u8::from(part.is_some()));
        write_text(part.unwrap_or_default(), message);
    }
}

fn write_rest(content: &Content<'_>, message: &mut Vec<u8>) {
    message.extend_from_slice(&(content.lookahead.len() as u64).to_le_bytes());
    for token in content.lookahead {
        message.extend_from_slice(&token.to_le_bytes());
    }
    let extra = content.extra.copied().unwrap_or_default();
    message.extend_from_slice(&(extra.media.len() as u64).to_le_bytes());
    for item in extra.media {
        write_text(&item.id, message);
        message.extend_from_slice(&item.offset_from(extra.first).to_le_bytes());
    }
    message.push(u8::from(extra.embeds.is_some()));
    message.extend_from_slice(extra.embeds.map_or(&[][..], |digest| digest));
}

fn write_text(text: &str, message: &mut Vec<u8>) {
    message.extend_from_slice(&(text.len() as u64).to_le_bytes());
    message.extend_from_slice(text.as_bytes());
}

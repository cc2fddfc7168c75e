//! What a hash covers: the tokens of a block, and whatever else makes its K and V what they are.

use crate::{TokenCount, TokenId, TokenIndex};

/// One full block, as a hasher sees it.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// The block's tokens, all of them.
    pub tokens: &'a [TokenId],
    /// The tokens behind it that its hash covers too, because a draft head's K and V depend on them
    /// ([`Config::hash_lookahead`](crate::Config::hash_lookahead)).
    pub lookahead: &'a [TokenId],
    /// What is not in the tokens. None for plain text without adapter and salt, the usual case.
    pub extra: Option<&'a Extra<'a>>,
}

impl<'a> Content<'a> {
    /// A block of plain text.
    pub const fn plain(tokens: &'a [TokenId]) -> Self {
        Content { tokens, lookahead: &[], extra: None }
    }

    /// Whether the block itself holds nothing but its tokens. What only the first block of a chain tells of, adapter
    /// and salt, does not count: an image further on in a sequence makes no other block of the text before it.
    pub fn is_plain(&self) -> bool {
        self.lookahead.is_empty()
            && self.extra.is_none_or(|extra| extra.media.is_empty() && extra.embeds.is_none())
    }
}

/// What makes a block's content besides its tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// The adapter that computes the sequence.
    pub adapter: Option<Adapter<'a>>,
    /// The tenant's salt. It is the sequence's; a hasher uses it for the first block, and the chain carries it on.
    pub salt: Option<&'a str>,
    /// The items that overlap the block or its lookahead tokens, by position.
    pub media: &'a [Media],
    /// Where the block begins in its sequence.
    pub first: TokenIndex,
    /// Digest of the block's embeddings, in a sequence that is given as embeddings.
    pub embeds: Option<&'a EmbedsDigest>,
}

/// An adapter (LoRA) by its name, and by where it was loaded from: a name that is given to another adapter later
/// must not find what the first one computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adapter<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its source; may be empty.
    pub path: &'a str,
}

/// An image, a sound or the like, which stands in a sequence as a run of placeholder tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Media {
    /// Names its content: a hash of the pixels, not of the address.
    pub id: String,
    /// The first placeholder token.
    pub first: TokenIndex,
    /// How many there are.
    pub tokens: TokenCount,
}

impl Media {
    /// One past the last placeholder token.
    pub const fn end(&self) -> u64 {
        self.first.0 as u64 + self.tokens.0 as u64
    }

    /// Where the item begins, counted from the beginning of a block: negative if it began in an earlier one.
    pub const fn offset_from(&self, first: TokenIndex) -> i64 {
        self.first.0 as i64 - first.0 as i64
    }
}

/// SHA-256 of a block's embeddings.
pub type EmbedsDigest = [u8; 32];

/// Of a sequence given as embeddings, a block that none of them reaches: SHA-256 of nothing.
pub const NO_EMBEDS: EmbedsDigest = [
    0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27,
    0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
];

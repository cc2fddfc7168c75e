//! What a sequence is besides its tokens, as the caller says it and as the cache keeps it.

use crate::hash::{Adapter, EmbedsDigest, Extra, Media, NO_EMBEDS};
use crate::{Error, SequenceId, TenantId, TokenCount, TokenIndex};

/// What else, besides its tokens, makes a block's content: sequences share blocks only if all of it is equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SequenceKey<'a> {
    /// The adapter (LoRA) that computes the sequence.
    pub adapter: Option<Adapter<'a>>,
    /// The tenant's salt: sequences of different salts never share.
    pub salt: Option<&'a str>,
    /// Images and the like, in the order in which they stand; they do not overlap. Blocks are shared only if the
    /// same items stand at the same places in them.
    pub media: &'a [Media],
    /// Of a sequence that is given as embeddings: the digest of each block's.
    pub embeds: Option<&'a [EmbedsDigest]>,
    /// Who pays for the blocks, where there are [quotas](crate::evict::Fair). Unlike all of the above it makes no
    /// difference to what is shared.
    pub tenant: TenantId,
}

impl<'a> SequenceKey<'a> {
    /// Whether there is nothing but tokens.
    pub(crate) fn is_plain(&self) -> bool {
        self.adapter.is_none() && self.salt.is_none() && self.media.is_empty() && self.embeds.is_none()
    }

    /// What the hash of the block at `index` covers, which begins at `first` and whose lookahead ends before `end`.
    pub(crate) fn extra(&self, index: usize, first: TokenIndex, end: u64) -> Extra<'a> {
        let begin = self.media.partition_point(|item| item.end() <= first.0.into());
        let overlapping = self.media[begin..].partition_point(|item| u64::from(item.first.0) < end);
        Extra {
            adapter: self.adapter,
            salt: self.salt,
            media: &self.media[begin..begin + overlapping],
            first,
            embeds: self.embeds.map(|digests| digests.get(index).unwrap_or(&NO_EMBEDS)),
        }
    }
}

/// A [`SequenceKey`] that belongs to the cache. Its buffers serve one sequence after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Keys {
    adapter: Option<(String, String)>,
    salt: Option<String>,
    media: Vec<Media>,
    embeds: Option<Vec<EmbedsDigest>>,
    pub(crate) tenant: TenantId,
}

impl Keys {
    pub(crate) fn new(key: &SequenceKey<'_>) -> Keys {
        let mut keys = Keys::default();
        keys.set(key);
        keys
    }

    pub(crate) fn set(&mut self, key: &SequenceKey<'_>) {
        self.adapter = key.adapter.map(|adapter| (adapter.name.to_owned(), adapter.path.to_owned()));
        self.salt = key.salt.map(str::to_owned);
        self.media.clear();
        self.media.extend_from_slice(key.media);
        self.embeds = key.embeds.map(<[_]>::to_vec);
        self.tenant = key.tenant;
    }

    pub(crate) fn add(&mut self, media: &[Media]) {
        self.media.extend_from_slice(media);
    }

    /// Forgets what begins behind the first `tokens` tokens.
    pub(crate) fn truncate(&mut self, tokens: TokenCount) {
        self.media.retain(|item| item.first.0 < tokens.get());
    }

    pub(crate) fn media_end(&self) -> u64 {
        self.media.last().map_or(0, Media::end)
    }

    /// Whether there is nothing but tokens.
    pub(crate) fn is_plain(&self) -> bool {
        self.as_key().is_plain()
    }

    /// As [`SequenceKey::extra`].
    pub(crate) fn extra(&self, index: usize, first: TokenIndex, end: u64) -> Extra<'_> {
        self.as_key().extra(index, first, end)
    }

    pub(crate) fn as_key(&self) -> SequenceKey<'_> {
        let Keys { adapter, salt, media, embeds, tenant } = self;
        SequenceKey {
            adapter: adapter.as_ref().map(|(name, path)| Adapter { name, path }),
            salt: salt.as_deref(),
            media,
            embeds: embeds.as_deref(),
            tenant: *tenant,
        }
    }
}

/// Whether `media` stand in order, apart, and at or behind `from`.
pub(crate) fn in_order(sequence: SequenceId, from: u64, media: &[Media]) -> Result<(), Error> {
    let mut free_from = from;
    for item in media {
        if item.tokens == TokenCount(0) || u64::from(item.first.0) < free_from {
            return Err(Error::Media { sequence, first: item.first, tokens: item.tokens, free_from });
        }
        free_from = item.end();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(id: &str, first: u32, tokens: u32) -> Media {
        Media { id: id.into(), first: TokenIndex(first), tokens: TokenCount(tokens) }
    }

    #[test]
    fn a_block_is_keyed_by_the_items_that_overlap_it() {
        // The case of vLLM's test_mm_prefix_caching: 16 tokens a block.
        let media = [item("aaa", 11, 10), item("bbb", 30, 18), item("ccc", 48, 7)];
        let keys = Keys::new(&SequenceKey { media: &media, ..SequenceKey::default() });
        let found = [0, 1, 2, 3, 4].map(|block| {
            let first = TokenIndex(16 * block);
            let extra = keys.extra(block as usize, first, u64::from(first.0) + 16);
            let offsets: Vec<_> =
                extra.media.iter().map(|item| (item.id.as_str(), item.offset_from(first))).collect();
            format!("{offsets:?}")
        });
        let expected = [
            r#"[("aaa", 11)]"#,
            r#"[("aaa", -5), ("bbb", 14)]"#,
            r#"[("bbb", -2)]"#,
            r#"[("ccc", 0)]"#,
            "[]",
        ];
        assert_eq!(found, expected);
        assert_eq!(keys.extra(2, TokenIndex(32), 49).media.len(), 2, "lookahead reaches the next item");
    }

    #[test]
    fn blocks_past_the_embeddings_are_keyed_by_none() {
        let keys = Keys::new(&SequenceKey { embeds: Some(&[[7; 32]]), ..SequenceKey::default() });
        assert_eq!(keys.extra(0, TokenIndex(0), 16).embeds, Some(&[7; 32]));
        assert_eq!(keys.extra(1, TokenIndex(16), 32).embeds, Some(&NO_EMBEDS));
        assert!(!keys.is_plain());
    }

    #[test]
    fn items_out_of_order_are_refused() {
        let order = |from, media: &[Media]| in_order(SequenceId(1), from, media);
        assert_eq!(order(4, &[item("a", 4, 2), item("b", 6, 1)]), Ok(()));
        let refused = |first, tokens, free_from| {
            Err(Error::Media {
                sequence: SequenceId(1),
                first: TokenIndex(first),
                tokens: TokenCount(tokens),
                free_from,
            })
        };
        assert_eq!(order(5, &[item("a", 4, 2)]), refused(4, 2, 5));
        assert_eq!(order(0, &[item("a", 4, 2), item("b", 5, 1)]), refused(5, 1, 6));
        assert_eq!(order(0, &[item("a", 4, 0)]), refused(4, 0, 0));
    }
}

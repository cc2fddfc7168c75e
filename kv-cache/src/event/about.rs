//! What is remembered of a block besides its tokens, as long as somebody may have to be told of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Location, Stored};
use crate::keys::Keys;
use crate::{GroupId, SequenceId, SequenceKey, TenantId, TokenId, TokenIndex};

/// Where a block stands in which sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct About<D> {
    pub(super) parent: Option<D>,
    pub(super) first: TokenIndex,
    pub(super) sequence: Option<SequenceId>,
    /// None where there is nothing but tokens.
    pub(super) keys: Option<Arc<Keys>>,
}

impl<D: Copy> About<D> {
    pub(super) const NOTHING: About<D> =
        About { parent: None, first: TokenIndex(0), sequence: None, keys: None };

    pub(super) fn new(stored: &Stored<'_, D>, keys: Option<Arc<Keys>>) -> Self {
        let Stored { parent, first, sequence, .. } = *stored;
        About { parent, first, sequence, keys }
    }

    pub(super) fn tell<'a>(
        &'a self,
        blocks: &'a [D],
        Tokens { own: tokens, ahead: lookahead }: Tokens<'a>,
        group: GroupId,
        location: Location,
    ) -> Stored<'a, D> {
        let About { parent, first, sequence, ref keys } = *self;
        let key = keys.as_ref().map_or_else(SequenceKey::default, |keys| keys.as_key());
        Stored { blocks, parent, tokens, lookahead, first, group, location, sequence, key }
    }
}

/// The tokens of blocks, and those behind them that the last name covers as well.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tokens<'a> {
    pub(super) own: &'a [TokenId],
    pub(super) ahead: &'a [TokenId],
}

/// The keys of sequences that have any, each kept once for all blocks that they are about.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedKeys {
    of: BTreeMap<SequenceId, Arc<Keys>>,
    /// How many there may be before those of no block are looked for.
    many: usize,
}

impl SharedKeys {
    /// A key as it is now; it may have changed since a block of the same sequence was stored.
    pub(super) fn share(&mut self, sequence: Option<SequenceId>, key: &SequenceKey<'_>) -> Option<Arc<Keys>> {
        let key = SequenceKey { tenant: TenantId::default(), ..*key };
        if key.is_plain() {
            return None;
        }
        let known = sequence.and_then(|sequence| self.of.get(&sequence));
        if let Some(keys) = known.filter(|keys| keys.as_key() == key) {
            return Some(Arc::clone(keys));
        }
        let keys = Arc::new(Keys::new(&key));
        if let Some(sequence) = sequence {
            self.make_room();
            self.of.insert(sequence, Arc::clone(&keys));
        }
        Some(keys)
    }

    fn make_room(&mut self) {
        if self.of.len() >= self.many {
            self.of.retain(|_, keys| Arc::strong_count(keys) > 1);
            self.many = 64.max(2 * self.of.len());
        }
    }
}

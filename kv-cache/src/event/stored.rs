//! What an event tells of the blocks that can be found now.

use crate::hash::{BlockHasher, Content};
use crate::id::count;
use crate::{BlockSize, GroupId, Location, SequenceId, SequenceKey, TokenId, TokenIndex};

/// Blocks that can be found now, one behind the other, in the device or in a tier, with all that their names cover:
/// whoever names blocks otherwise names these from what is here.
///
/// [`EventBatch`](crate::EventBatch) makes vLLM's `BlockStored` of it, and `tests/indexers.rs` shows how the stored
/// blocks of Dynamo's router are made of it.
///
/// Of what a tier has and no sequence here ever had (a shared store said so, or a list was taken up after a restart
/// without [`Offload::describe`](crate::tier::Offload::describe)) the name alone is known: no parent and no tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored<'a, D> {
    /// Their names.
    pub blocks: &'a [D],
    /// The name of the block before the first of them, if there is one.
    pub parent: Option<D>,
    /// Their tokens, equally many in each.
    pub tokens: &'a [TokenId],
    /// The tokens behind them that the last name covers as well, [`Config::hash_lookahead`](crate::Config) many. Those
    /// of the other names are among the tokens, as far as they reach.
    pub lookahead: &'a [TokenId],
    /// The place of the first token.
    pub first: TokenIndex,
    /// In which group they are found.
    pub group: GroupId,
    /// Where they lie.
    pub location: Location,
    /// Whose blocks they were when the device stored them.
    pub sequence: Option<SequenceId>,
    /// What that sequence was besides its tokens: adapter, salt, images wherever they stand in it, embeddings. Its
    /// tenant is not told.
    pub key: SequenceKey<'a>,
}

impl<D> Stored<'_, D> {
    /// Shows what each name in the chain covers, one `unit` of the tokens after the other:
    /// [`Config::hash_unit`](crate::Config::hash_unit) many, which is a block where blocks are hashed whole.
    pub fn contents(&self, unit: BlockSize, mut see: impl FnMut(&Content<'_>)) {
        let (size, ahead) = (unit.len(), self.lookahead.len());
        let all = [self.tokens, self.lookahead].concat();
        for (index, span) in all.windows(size + ahead).step_by(size).enumerate() {
            let (tokens, lookahead) = span.split_at(size);
            let first = TokenIndex(self.first.0 + count(index * size));
            let end = u64::from(first.0) + span.len() as u64;
            let extra = self.key.extra(first.0 as usize / size, first, end);
            see(&Content { tokens, lookahead, extra: Some(&extra) });
        }
    }

    /// The names of all units of the tokens, as `hasher` gives them; of each block the last one is its name. For
    /// whoever keeps an index under names of another kind, or will not take a stranger's word. `parent` is what such
    /// a hasher has called the unit before the first.
    pub fn names<H: BlockHasher>(
        &self,
        hasher: &mut H,
        mut parent: Option<H::Digest>,
        unit: BlockSize,
    ) -> Vec<H::Digest> {
        let mut names = Vec::new();
        self.contents(unit, |content| {
            parent = Some(hasher.block(parent, content));
            names.extend(parent);
        });
        names
    }
}

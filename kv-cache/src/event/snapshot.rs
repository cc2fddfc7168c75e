//! Everything that can be found at one moment.

use super::about::{About, Tokens};
use super::{Events, Location, Stored};
use crate::tier::BlockKey;
use crate::{Digest, GroupId, TokenId};

/// Everything that can be found at one moment, parents before their children, nearest tiers first. The same for the
/// same calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot<D> {
    next: u64,
    blocks: Vec<Kept<D>>,
    tokens: Vec<TokenId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept<D> {
    block: D,
    group: GroupId,
    location: Location,
    about: About<D>,
    /// How many of the tokens are its own, and how many behind those its name covers as well.
    tokens: usize,
    lookahead: usize,
}

impl<D: Digest> Snapshot<D> {
    /// What can be found, given as `(entry, group, name)`: everything that the events so far come to.
    pub(crate) fn new(events: &Events<D>, index: impl Iterator<Item = (usize, GroupId, D)>) -> Self {
        let mut entries: Vec<_> = index.collect();
        // A block's parent ends where it begins, so it begins earlier.
        entries.sort_unstable_by_key(|&(entry, group, block)| (events.of_entry(entry).0.first, group, block));
        let mut snapshot = Snapshot { next: events.next(), blocks: Vec::new(), tokens: Vec::new() };
        for (entry, group, block) in entries {
            let (about, content) = events.of_entry(entry);
            snapshot.add(block, group, Location::Device, about.clone(), content);
        }
        snapshot
    }

    /// Adds what a tier has, as far as the events know it.
    pub(crate) fn add_tier(
        &mut self,
        location: Location,
        keys: impl Iterator<Item = BlockKey<D>>,
        events: &Events<D>,
    ) {
        for key in keys {
            match events.of_tier(&key) {
                Some((about, content)) => self.add(key.digest, key.group, location, about.clone(), content),
                None => self.add(key.digest, key.group, location, About::NOTHING, Tokens::default()),
            }
        }
    }

    fn add(&mut self, block: D, group: GroupId, location: Location, about: About<D>, told: Tokens<'_>) {
        let (tokens, lookahead) = (told.own.len(), told.ahead.len());
        self.blocks.push(Kept { block, group, location, about, tokens, lookahead });
        self.tokens.extend_from_slice(told.own);
        self.tokens.extend_from_slice(told.ahead);
    }

    /// The number that the next event will have.
    pub fn next_event(&self) -> u64 {
        self.next
    }

    /// What can be found, as if it had just been stored: one event for each block.
    pub fn stored(&self) -> impl Iterator<Item = Stored<'_, D>> + '_ {
        let mut rest = self.tokens.as_slice();
        self.blocks.iter().map(move |kept| {
            let (own, behind) = rest.split_at(kept.tokens);
            let (ahead, others) = behind.split_at(kept.lookahead);
            rest = others;
            let blocks = std::slice::from_ref(&kept.block);
            kept.about.tell(blocks, Tokens { own, ahead }, kept.group, kept.location)
        })
    }
}

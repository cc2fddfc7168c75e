//! The events that nobody has heard yet.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::about::{About, SharedKeys, Tokens};
use super::{Event, Location, Stored};
use crate::id::count;
use crate::tier::{BlockKey, Medium, TierEvent, TierId};
use crate::{Digest, GroupId, TokenId};

/// The events that nobody has heard yet, and what a snapshot needs to know of each entry of the index.
#[derive(Clone, Debug)]
pub(crate) struct Events<D> {
    records: VecDeque<Record<D>>,
    digests: Vec<D>,
    /// Of each run of blocks the tokens, and behind them those that its last name covers as well.
    tokens: Vec<TokenId>,
    /// Number of the first record.
    first: u64,
    records_max: u32,
    keys: SharedKeys,
    entries: Entries<D>,
    /// Of what is in the tiers, or on its way there.
    afar: BTreeMap<BlockKey<D>, Arc<Told<D>>>,
}

/// What each entry of the index is about.
#[derive(Clone, Debug)]
struct Entries<D> {
    about: Vec<About<D>>,
    /// Tokens of each.
    lengths: Vec<u32>,
    /// So many places for each: its tokens, and those ahead.
    content: Vec<TokenId>,
    width: usize,
    lookahead: usize,
}

/// What a block is about, wherever it lies.
#[derive(Clone, Debug)]
struct Told<D> {
    about: About<D>,
    tokens: Box<[TokenId]>,
    lookahead: Box<[TokenId]>,
}

#[derive(Clone, Debug)]
enum Record<D> {
    Stored { blocks: Range<usize>, tokens: Range<usize>, group: GroupId, about: About<D> },
    InTier { block: D, group: GroupId, location: Location, told: Option<Arc<Told<D>>> },
    Removed { block: D, group: GroupId, location: Location },
    Moved { block: D, group: GroupId, from: Location, to: Location },
    Cleared { location: Location },
}

impl<D: Digest> Entries<D> {
    fn set(&mut self, entry: usize, stored: &Stored<'_, D>, about: About<D>) {
        let content = &mut self.content[entry * self.width..][..self.width];
        let (tokens, behind) = content.split_at_mut(stored.tokens.len());
        tokens.copy_from_slice(stored.tokens);
        behind[..self.lookahead].copy_from_slice(stored.lookahead);
        (self.about[entry], self.lengths[entry]) = (about, count(stored.tokens.len()));
    }

    fn tokens(&self, entry: usize) -> Tokens<'_> {
        let content = &self.content[entry * self.width..][..self.width];
        let (own, behind) = content.split_at(self.lengths[entry] as usize);
        Tokens { own, ahead: &behind[..self.lookahead] }
    }
}

impl<D> Told<D> {
    fn tokens(&self) -> Tokens<'_> {
        Tokens { own: &self.tokens, ahead: &self.lookahead }
    }
}

impl<D: Digest> Events<D> {
    /// For an index of `entries`, none of more than `entry_tokens` tokens, whose names cover `lookahead` more. Keeps at
    /// most `records_max` events for a caller who does not listen.
    pub(crate) fn new(entries: usize, entry_tokens: usize, lookahead: usize, records_max: u32) -> Self {
        let width = entry_tokens + lookahead;
        Events {
            records: VecDeque::new(),
            digests: Vec::new(),
            tokens: Vec::new(),
            first: 0,
            records_max,
            keys: SharedKeys::default(),
            entries: Entries {
                about: vec![About::NOTHING; entries],
                lengths: vec![0; entries],
                content: vec![0; entries * width],
                width,
                lookahead,
            },
            afar: BTreeMap::new(),
        }
    }

    /// What the `parts` entries from `entry` on tell of a block is remembered: it goes to a tier.
    pub(crate) fn remember(&mut self, key: BlockKey<D>, entry: usize, parts: u32) {
        let Entries { about, .. } = &self.entries;
        let last = entry + parts as usize - 1;
        // A sequence may have got images while it filled the block.
        let about = About { keys: about[last].keys.clone(), ..about[entry].clone() };
        let tokens = (entry..=last).flat_map(|entry| self.entries.tokens(entry).own).copied().collect();
        let lookahead = self.entries.tokens(last).ahead.into();
        self.afar.insert(key, Arc::new(Told { about, tokens, lookahead }));
    }

    /// The same of a block that nobody here has stored.
    pub(crate) fn describe(&mut self, key: BlockKey<D>, stored: &Stored<'_, D>) {
        let about = About::new(stored, self.keys.share(stored.sequence, &stored.key));
        let (tokens, lookahead) = (stored.tokens.into(), stored.lookahead.into());
        self.afar.insert(key, Arc::new(Told { about, tokens, lookahead }));
    }

    /// Forgets what neither is in a tier nor on its way there, if more than `most` are remembered.
    pub(crate) fn forget_afar(&mut self, most: usize, is_there: impl Fn(&BlockKey<D>) -> bool) {
        if self.afar.len() > most {
            self.afar.retain(|key, _| is_there(key));
        }
    }

    /// A copy of a block entered the index as `entry`. It is news if it is the first one.
    #[cold]
    pub(crate) fn stored(&mut self, entry: usize, stored: Stored<'_, D>, is_first_copy: bool) {
        let about = About::new(&stored, self.keys.share(stored.sequence, &stored.key));
        self.entries.set(entry, &stored, about.clone());
        if is_first_copy {
            self.append(&stored, about);
        }
    }

    /// A block behind the last one that was stored is part of the same event.
    fn append(&mut self, stored: &Stored<'_, D>, about: About<D>) {
        if !self.continues(stored, &about) {
            let (at, from) = (self.digests.len(), self.tokens.len());
            self.record(Record::Stored { blocks: at..at, tokens: from..from, group: stored.group, about });
        }
        let Some(Record::Stored { blocks, tokens, .. }) = self.records.back_mut() else { return };
        self.digests.extend_from_slice(stored.blocks);
        // What the last name covers ahead begins what follows.
        self.tokens.truncate(tokens.end);
        self.tokens.extend_from_slice(stored.tokens);
        (blocks.end, tokens.end) = (self.digests.len(), self.tokens.len());
        self.tokens.extend_from_slice(stored.lookahead);
    }

    fn continues(&self, stored: &Stored<'_, D>, about: &About<D>) -> bool {
        let Some(Record::Stored { blocks, group, about: before, .. }) = self.records.back() else {
            return false;
        };
        let keys = |about: &About<D>| about.keys.as_ref().map(Arc::as_ptr);
        before.sequence == stored.sequence
            && *group == stored.group
            && stored.parent == self.digests[blocks.clone()].last().copied()
            && keys(before) == keys(about)
    }

    /// The last copy of a block left the index.
    #[cold]
    pub(crate) fn removed(&mut self, block: D, group: GroupId) {
        self.record(Record::Removed { block, group, location: Location::Device });
    }

    /// Everything left the index.
    pub(crate) fn cleared(&mut self) {
        self.record(Record::Cleared { location: Location::Device });
    }

    /// Something happened in a tier; `media` are those of all tiers.
    pub(crate) fn happened(&mut self, event: TierEvent<BlockKey<D>>, media: &[Medium]) {
        let place = |tier: TierId| Location::Tier { tier, medium: media[usize::from(tier.0)] };
        match event {
            TierEvent::Stored { key, tier, .. } => {
                let (BlockKey { digest: block, group }, told) = (key, self.afar.get(&key).cloned());
                self.record(Record::InTier { block, group, location: place(tier), told });
            }
            TierEvent::Removed { key: BlockKey { digest: block, group }, tier, still_in } => {
                self.record(match still_in {
                    Some(other) => Record::Moved { block, group, from: place(tier), to: place(other) },
                    None => Record::Removed { block, group, location: place(tier) },
                });
            }
            TierEvent::Cleared { .. } => {
                for tier in (0..).map(TierId).take(media.len()) {
                    self.record(Record::Cleared { location: place(tier) });
                }
            }
        }
    }

    /// A caller who does not listen loses what he did not hear; the numbers show it.
    fn record(&mut self, record: Record<D>) {
        if self.records.len() >= self.records_max as usize {
            self.forget();
        }
        let empty = self.records.is_empty();
        self.records.push_back(match record {
            Record::Stored { group, about, .. } if empty => {
                self.digests.clear();
                self.tokens.clear();
                Record::Stored { blocks: 0..0, tokens: 0..0, group, about }
            }
            other => other,
        });
    }

    fn forget(&mut self) {
        self.first += self.records.len() as u64;
        self.records.clear();
        self.digests.clear();
        self.tokens.clear();
    }

    /// Shows each event with its number, and forgets it.
    pub(crate) fn drain(&mut self, mut hear: impl FnMut(u64, Event<'_, D>)) {
        for (number, record) in (self.first..).zip(&self.records) {
            hear(number, self.event(record));
        }
        self.forget();
    }

    fn event<'a>(&'a self, record: &'a Record<D>) -> Event<'a, D> {
        match *record {
            Record::Stored { ref blocks, ref tokens, group, ref about } => {
                let ahead = &self.tokens[tokens.end..][..self.entries.lookahead];
                let tokens = Tokens { own: &self.tokens[tokens.clone()], ahead };
                Event::Stored(about.tell(&self.digests[blocks.clone()], tokens, group, Location::Device))
            }
            Record::InTier { ref block, group, location, ref told } => {
                let block = std::slice::from_ref(block);
                Event::Stored(match told {
                    Some(told) => told.about.tell(block, told.tokens(), group, location),
                    None => About::NOTHING.tell(block, Tokens::default(), group, location),
                })
            }
            Record::Removed { block, group, location } => Event::Removed { block, group, location },
            Record::Moved { block, group, from, to } => Event::Moved { block, group, from, to },
            Record::Cleared { location } => Event::Cleared { location },
        }
    }

    /// The number that the next event will have.
    pub(super) fn next(&self) -> u64 {
        self.first + self.records.len() as u64
    }

    /// What an entry of the index is about.
    pub(super) fn of_entry(&self, entry: usize) -> (&About<D>, Tokens<'_>) {
        (&self.entries.about[entry], self.entries.tokens(entry))
    }

    /// What a block in a tier is about, if that is known.
    pub(super) fn of_tier(&self, key: &BlockKey<D>) -> Option<(&About<D>, Tokens<'_>)> {
        self.afar.get(key).map(|told| (&told.about, told.tokens()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockHash, SequenceId, SequenceKey, TokenIndex};

    const GROUP: GroupId = GroupId(0);

    fn name(rest: u32) -> BlockHash {
        BlockHash::from_parts(7, rest)
    }

    fn stored<'a>(
        blocks: &'a [BlockHash],
        parent: Option<BlockHash>,
        tokens: &'a [TokenId],
        first: u32,
    ) -> Stored<'a, BlockHash> {
        let (location, sequence, key) = (Location::Device, Some(SequenceId(1)), SequenceKey::default());
        let (lookahead, first) = (&[][..], TokenIndex(first));
        Stored { blocks, parent, tokens, lookahead, first, group: GROUP, location, sequence, key }
    }

    fn heard(events: &mut Events<BlockHash>) -> Vec<String> {
        let mut heard = Vec::new();
        events.drain(|number, event| {
            heard.push(match event {
                Event::Stored(Stored { blocks, parent, tokens, .. }) => {
                    let names: Vec<u64> = blocks.iter().map(Digest::low64).collect();
                    format!(
                        "{number} stored {names:?} behind {:?}: {tokens:?}",
                        parent.map(|name| name.low64())
                    )
                }
                Event::Removed { block, .. } => format!("{number} removed {}", block.low64()),
                other => format!("{number} {other:?}"),
            });
        });
        heard
    }

    #[test]
    fn consecutive_blocks_are_one_event_and_second_copies_are_none() {
        let mut events = Events::new(10, 2, 0, 100);
        events.stored(1, stored(&[name(1)], None, &[10, 11], 0), true);
        events.stored(2, stored(&[name(2)], Some(name(1)), &[12, 13], 2), true);
        events.stored(3, stored(&[name(3)], Some(name(2)), &[14, 15], 4), false);
        events.stored(4, stored(&[name(4)], Some(name(3)), &[16, 17], 6), true);
        events.removed(name(4), GROUP);
        assert_eq!(
            heard(&mut events),
            [
                "0 stored [1, 2] behind None: [10, 11, 12, 13]",
                "1 stored [4] behind Some(3): [16, 17]",
                "2 removed 4",
            ]
        );
        events.cleared();
        assert_eq!(heard(&mut events), ["3 Cleared { location: Device }"]);
    }
}

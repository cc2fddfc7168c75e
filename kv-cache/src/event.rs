//! What others must hear to know what can be found here: routers that send a prompt to where its beginning is cached,
//! and indexers that they ask.
//!
//! One event is one change of what can be found, in the device or in a tier behind it, numbered without holes from 0.
//! In each of these places content is stored when its first copy can be found and removed when its last one cannot: who
//! applies the events in order has the index. [`Replica`](crate::Replica) does that and refuses a hole; after one,
//! [`Snapshot`] begins it anew.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::id::count;
use crate::tier::{BlockKey, Medium, TierEvent, TierId};
use crate::{Digest, GroupId, SequenceId, TokenId, TokenIndex};

/// Where content lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// The pool of this cache; vLLM's `GPU`.
    #[default]
    Device,
    /// A tier; vLLM's `CPU` and `STORAGE`.
    Tier {
        /// Which, counted from the device.
        tier: TierId,
        /// What it is.
        medium: Medium,
    },
}

/// One change of what can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a, D> {
    /// Consecutive blocks of a sequence, or a block of a tier, can be found now where they could not.
    Stored(Stored<'a, D>),
    /// A block can be found there no longer: its last copy there is gone. Of a tier: no other tier has it.
    Removed {
        /// Its name.
        block: D,
        /// In which group it was found.
        group: GroupId,
        /// Where it lay.
        location: Location,
    },
    /// A tier has given up a block because of room, or failed to deliver it, and another one has it still.
    Moved {
        /// Its name.
        block: D,
        /// In which group it is found.
        group: GroupId,
        /// Where it lay.
        from: Location,
        /// Where it still lies.
        to: Location,
    },
    /// Nothing can be found there any more.
    Cleared {
        /// Where.
        location: Location,
    },
}

/// Blocks that can be found now, one behind the other, in the device or in a tier. Of what a tier has and no
/// sequence here ever had (a shared store said so, or a list was taken up after a restart without
/// [`Offload::describe`](crate::tier::Offload::describe)) the name alone is known: no parent and no tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored<'a, D> {
    /// Their names.
    pub blocks: &'a [D],
    /// The name of the block before the first of them, if there is one.
    pub parent: Option<D>,
    /// Their tokens, equally many in each.
    pub tokens: &'a [TokenId],
    /// The place of the first token.
    pub first: TokenIndex,
    /// In which group they are found.
    pub group: GroupId,
    /// Where they lie.
    pub location: Location,
    /// Whose blocks they were when the device stored them. It tells the adapter, the salt and the images.
    pub sequence: Option<SequenceId>,
}

impl<'a, D: Copy> Stored<'a, D> {
    /// A block in a tier.
    fn in_tier(block: &'a D, group: GroupId, location: Location, told: Option<&'a Told<D>>) -> Self {
        let blocks = std::slice::from_ref(block);
        let Some(Told { parent, tokens, first, sequence }) = told else {
            let first = TokenIndex(0);
            return Stored { blocks, parent: None, tokens: &[], first, group, location, sequence: None };
        };
        let (parent, first, sequence) = (*parent, *first, *sequence);
        Stored { blocks, parent, tokens, first, group, location, sequence }
    }
}

/// What a block is about, wherever it lies.
#[derive(Clone, Debug)]
struct Told<D> {
    parent: Option<D>,
    tokens: Box<[TokenId]>,
    first: TokenIndex,
    sequence: Option<SequenceId>,
}

/// The events that nobody has heard yet, and what a snapshot needs to know of each entry of the index.
#[derive(Clone, Debug)]
pub(crate) struct Events<D> {
    records: VecDeque<Record<D>>,
    digests: Vec<D>,
    tokens: Vec<TokenId>,
    /// Number of the first record.
    first: u64,
    records_max: u32,
    /// By entry of the index.
    known: Vec<Known<D>>,
    /// By entry of the index, so many places for each.
    content: Vec<TokenId>,
    entry_tokens: usize,
    /// Of what is in the tiers, or on its way there.
    afar: BTreeMap<BlockKey<D>, Arc<Told<D>>>,
}

#[derive(Clone, Debug)]
enum Record<D> {
    Stored {
        blocks: Range<usize>,
        tokens: Range<usize>,
        parent: Option<D>,
        first: TokenIndex,
        group: GroupId,
        sequence: Option<SequenceId>,
    },
    InTier {
        block: D,
        group: GroupId,
        location: Location,
        told: Option<Arc<Told<D>>>,
    },
    Removed {
        block: D,
        group: GroupId,
        location: Location,
    },
    Moved {
        block: D,
        group: GroupId,
        from: Location,
        to: Location,
    },
    Cleared {
        location: Location,
    },
}

#[derive(Clone, Copy, Debug)]
struct Known<D> {
    parent: Option<D>,
    first: TokenIndex,
    tokens: u32,
    sequence: Option<SequenceId>,
}

impl<D: Digest> Events<D> {
    /// For an index of `entries`, none of more than `entry_tokens` tokens. Keeps at most `records_max` events for a
    /// caller who does not listen.
    pub(crate) fn new(entries: usize, entry_tokens: usize, records_max: u32) -> Self {
        let nobody = Known { parent: None, first: TokenIndex(0), tokens: 0, sequence: None };
        Events {
            records: VecDeque::new(),
            digests: Vec::new(),
            tokens: Vec::new(),
            first: 0,
            records_max,
            known: vec![nobody; entries],
            content: vec![0; entries * entry_tokens],
            entry_tokens,
            afar: BTreeMap::new(),
        }
    }

    /// What the `parts` entries from `entry` on tell of a block is remembered: it goes to a tier.
    pub(crate) fn remember(&mut self, key: BlockKey<D>, entry: usize, parts: u32) {
        let entries = entry..entry + parts as usize;
        let Known { parent, first, sequence, .. } = self.known[entry];
        let of =
            |entry: usize| &self.content[entry * self.entry_tokens..][..self.known[entry].tokens as usize];
        let tokens = entries.flat_map(of).copied().collect();
        self.afar.insert(key, Arc::new(Told { parent, tokens, first, sequence }));
    }

    /// The same of a block that nobody here has stored.
    pub(crate) fn describe(&mut self, key: BlockKey<D>, stored: &Stored<'_, D>) {
        let Stored { parent, tokens, first, sequence, .. } = *stored;
        self.afar.insert(key, Arc::new(Told { parent, tokens: tokens.into(), first, sequence }));
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
        let Stored { blocks, parent, tokens, first, group, sequence, .. } = stored;
        self.known[entry] = Known { parent, first, tokens: count(tokens.len()), sequence };
        self.content[entry * self.entry_tokens..][..tokens.len()].copy_from_slice(tokens);
        if !is_first_copy {
            return;
        }
        let follows = match self.records.back() {
            Some(Record::Stored { blocks: before, sequence: of, group: within, .. }) => {
                *of == sequence && *within == group && parent == self.digests[before.clone()].last().copied()
            }
            _ => false,
        };
        if !follows {
            let (at, from) = (self.digests.len(), self.tokens.len());
            self.record(Record::Stored {
                blocks: at..at,
                tokens: from..from,
                parent,
                first,
                group,
                sequence,
            });
        }
        self.digests.extend_from_slice(blocks);
        self.tokens.extend_from_slice(tokens);
        if let Some(Record::Stored { blocks, tokens, .. }) = self.records.back_mut() {
            (blocks.end, tokens.end) = (self.digests.len(), self.tokens.len());
        }
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
    pub(crate) fn in_tier(&mut self, event: TierEvent<BlockKey<D>>, media: &[Medium]) {
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
            Record::Stored { parent, first, group, sequence, .. } if empty => {
                self.digests.clear();
                self.tokens.clear();
                Record::Stored { blocks: 0..0, tokens: 0..0, parent, first, group, sequence }
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
            Record::InTier { ref block, group, location, ref told } => {
                Event::Stored(Stored::in_tier(block, group, location, told.as_deref()))
            }
            Record::Removed { block, group, location } => Event::Removed { block, group, location },
            Record::Moved { block, group, from, to } => Event::Moved { block, group, from, to },
            Record::Cleared { location } => Event::Cleared { location },
            Record::Stored { ref blocks, ref tokens, parent, first, group, sequence } => {
                Event::Stored(Stored {
                    blocks: &self.digests[blocks.clone()],
                    tokens: &self.tokens[tokens.clone()],
                    parent,
                    first,
                    group,
                    location: Location::Device,
                    sequence,
                })
            }
        }
    }

    /// What can be found, given as `(entry, group, name)`: everything that the events so far come to.
    pub(crate) fn snapshot(&self, index: impl Iterator<Item = (usize, GroupId, D)>) -> Snapshot<D> {
        let mut entries: Vec<_> = index.collect();
        // A block's parent ends where it begins, so it begins earlier.
        entries.sort_unstable_by_key(|&(entry, group, block)| (self.known[entry].first, group, block));
        let mut snapshot =
            Snapshot { next: self.first + self.records.len() as u64, blocks: Vec::new(), tokens: Vec::new() };
        for (entry, group, block) in entries {
            let Known { parent, first, tokens, sequence } = self.known[entry];
            let location = Location::Device;
            snapshot.blocks.push(Kept { block, group, parent, first, sequence, tokens, location });
            snapshot.tokens.extend_from_slice(&self.content[entry * self.entry_tokens..][..tokens as usize]);
        }
        snapshot
    }
}

/// Everything that can be found at one moment, parents before their children, nearest tiers first. The same for the
/// same calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot<D> {
    next: u64,
    blocks: Vec<Kept<D>>,
    tokens: Vec<TokenId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept<D> {
    block: D,
    group: GroupId,
    parent: Option<D>,
    first: TokenIndex,
    sequence: Option<SequenceId>,
    tokens: u32,
    location: Location,
}

impl<D: Digest> Snapshot<D> {
    /// The number that the next event will have.
    pub fn next_event(&self) -> u64 {
        self.next
    }

    /// What can be found, as if it had just been stored: one event for each block.
    pub fn stored(&self) -> impl Iterator<Item = Stored<'_, D>> + '_ {
        let mut begin = 0;
        self.blocks.iter().map(move |kept| {
            let tokens = &self.tokens[begin..begin + kept.tokens as usize];
            begin += tokens.len();
            Stored {
                blocks: std::slice::from_ref(&kept.block),
                parent: kept.parent,
                tokens,
                first: kept.first,
                group: kept.group,
                location: kept.location,
                sequence: kept.sequence,
            }
        })
    }

    /// Adds what a tier has, as far as the events know it.
    pub(crate) fn add_tier(
        &mut self,
        location: Location,
        keys: impl Iterator<Item = BlockKey<D>>,
        events: &Events<D>,
    ) {
        for key in keys {
            let told = events.afar.get(&key).map(|told| &**told);
            let Stored { parent, tokens, first, group, sequence, .. } =
                Stored::in_tier(&key.digest, key.group, location, told);
            let (block, length) = (key.digest, count(tokens.len()));
            self.blocks.push(Kept { block, group, parent, first, sequence, tokens: length, location });
            self.tokens.extend_from_slice(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockHash;

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
        let (location, sequence) = (Location::Device, Some(SequenceId(1)));
        Stored { blocks, parent, tokens, first: TokenIndex(first), group: GROUP, location, sequence }
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
        let mut events = Events::new(10, 2, 100);
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

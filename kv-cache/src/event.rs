//! What others must hear to know what can be found here: routers that send a prompt to where its beginning is cached,
//! and indexers that they ask.
//!
//! One event is one change of the index, numbered without holes from 0. Content is stored when its first copy can be
//! found and removed when its last one cannot: who applies the events in order has the index. [`Replica`] does that and
//! refuses a hole; after one, [`Snapshot`] begins it anew.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::id::count;
use crate::tier::Medium;
use crate::{Digest, GroupId, SequenceId, TokenId, TokenIndex};

/// Where content lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// The pool of this cache; vLLM's `GPU`.
    #[default]
    Device,
    /// A tier; vLLM's `CPU` and `STORAGE`.
    Tier(Medium),
}

/// One change of what can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a, D> {
    /// Consecutive blocks of a sequence can be found now.
    Stored(Stored<'a, D>),
    /// A block can be found there no longer: its last copy is gone.
    Removed {
        /// Its name.
        block: D,
        /// In which group it was found.
        group: GroupId,
        /// Where it lay.
        location: Location,
    },
    /// A block lies elsewhere now.
    Moved {
        /// Its name.
        block: D,
        /// In which group it is found.
        group: GroupId,
        /// Where it lay.
        from: Location,
        /// Where it lies.
        to: Location,
    },
    /// Nothing can be found any more.
    Cleared,
}

/// Blocks that can be found now, one behind the other.
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
    /// Whose blocks they were when they were stored. It tells the adapter, the salt and the images.
    pub sequence: SequenceId,
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
}

#[derive(Clone, Debug)]
enum Record<D> {
    Stored {
        blocks: Range<usize>,
        tokens: Range<usize>,
        parent: Option<D>,
        first: TokenIndex,
        group: GroupId,
        sequence: SequenceId,
    },
    Removed {
        block: D,
        group: GroupId,
    },
    Cleared,
}

#[derive(Clone, Copy, Debug)]
struct Known<D> {
    parent: Option<D>,
    first: TokenIndex,
    tokens: u32,
    sequence: SequenceId,
}

impl<D: Digest> Events<D> {
    /// For an index of `entries`, none of more than `entry_tokens` tokens. Keeps at most `records_max` events for a
    /// caller who does not listen.
    pub(crate) fn new(entries: usize, entry_tokens: usize, records_max: u32) -> Self {
        let nobody = Known { parent: None, first: TokenIndex(0), tokens: 0, sequence: SequenceId(0) };
        Events {
            records: VecDeque::new(),
            digests: Vec::new(),
            tokens: Vec::new(),
            first: 0,
            records_max,
            known: vec![nobody; entries],
            content: vec![0; entries * entry_tokens],
            entry_tokens,
        }
    }

    /// A copy of a block entered the index as `entry`. It is news if it is the first one.
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
    pub(crate) fn removed(&mut self, block: D, group: GroupId) {
        self.record(Record::Removed { block, group });
    }

    /// Everything left the index.
    pub(crate) fn cleared(&mut self) {
        self.record(Record::Cleared);
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

    fn event<'a>(&'a self, record: &Record<D>) -> Event<'a, D> {
        let location = Location::Device;
        match *record {
            Record::Removed { block, group } => Event::Removed { block, group, location },
            Record::Cleared => Event::Cleared,
            Record::Stored { ref blocks, ref tokens, parent, first, group, sequence } => {
                Event::Stored(Stored {
                    blocks: &self.digests[blocks.clone()],
                    tokens: &self.tokens[tokens.clone()],
                    parent,
                    first,
                    group,
                    location,
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
            snapshot.blocks.push(Kept { block, group, parent, first, sequence, tokens });
            snapshot.tokens.extend_from_slice(&self.content[entry * self.entry_tokens..][..tokens as usize]);
        }
        snapshot
    }
}

/// Everything that can be found at one moment, parents before their children. The same for the same calls.
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
    sequence: SequenceId,
    tokens: u32,
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
                location: Location::Device,
                sequence: kept.sequence,
            }
        })
    }
}

/// The index as somebody else knows it, from nothing but events. It shows how events are to be applied, and what is
/// wrong with those that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica<D> {
    next: u64,
    blocks: BTreeMap<(GroupId, D), Vec<Location>>,
}

/// Events that do not fit together. The replica has not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplicaError<D: Digest> {
    /// Events are missing. Only a snapshot helps.
    #[error("event {got} comes where {expected} should: {} are missing", .got - .expected)]
    Hole {
        /// The number that should have come.
        expected: u64,
        /// The one that came.
        got: u64,
    },
    /// An event that was applied already. It may be passed over.
    #[error("event {got} was applied already, {expected} comes next")]
    Repeated {
        /// The number that should have come.
        expected: u64,
        /// The one that came.
        got: u64,
    },
    /// There already, and stored once more.
    #[error("block {block} of group {group} is stored a second time")]
    StoredTwice {
        /// Its name.
        block: D,
        /// The group.
        group: GroupId,
    },
    /// Not there, and removed or moved from there.
    #[error("block {block} of group {group} leaves where it was not")]
    Unknown {
        /// Its name.
        block: D,
        /// The group.
        group: GroupId,
    },
}

impl<D: Digest> Default for Replica<D> {
    fn default() -> Self {
        Replica { next: 0, blocks: BTreeMap::new() }
    }
}

impl<D: Digest> Replica<D> {
    /// A replica of a new cache.
    pub fn new() -> Self {
        Replica::default()
    }

    /// A replica of the cache that the snapshot is of.
    pub fn of(snapshot: &Snapshot<D>) -> Self {
        let blocks = snapshot.blocks.iter().map(|kept| ((kept.group, kept.block), vec![Location::Device]));
        Replica { next: snapshot.next, blocks: blocks.collect() }
    }

    /// The number of the event that is to come next.
    pub fn next_event(&self) -> u64 {
        self.next
    }

    /// Applies one event.
    ///
    /// # Errors
    /// [`ReplicaError`], and nothing has changed.
    pub fn apply(&mut self, number: u64, event: &Event<'_, D>) -> Result<(), ReplicaError<D>> {
        let expected = self.next;
        match number.cmp(&expected) {
            std::cmp::Ordering::Less => return Err(ReplicaError::Repeated { expected, got: number }),
            std::cmp::Ordering::Greater => return Err(ReplicaError::Hole { expected, got: number }),
            std::cmp::Ordering::Equal => {}
        }
        match *event {
            Event::Stored(stored) => self.store(&stored)?,
            Event::Removed { block, group, location } => self.remove(group, block, location)?,
            Event::Moved { block, group, from, to } => {
                if self.is_in(group, block, to) {
                    return Err(ReplicaError::StoredTwice { block, group });
                }
                self.remove(group, block, from)?;
                self.blocks.entry((group, block)).or_default().push(to);
            }
            Event::Cleared => self.blocks.clear(),
        }
        self.next += 1;
        Ok(())
    }

    /// Whether a block can be found, wherever.
    pub fn contains(&self, group: GroupId, block: D) -> bool {
        self.blocks.contains_key(&(group, block))
    }

    /// Every block that can be found, by group and name.
    pub fn blocks(&self) -> impl Iterator<Item = (GroupId, D)> + '_ {
        self.blocks.keys().copied()
    }

    /// How many leading `names` can be found: what a request would have to compute less.
    pub fn longest(&self, group: GroupId, names: &[D]) -> usize {
        names.iter().take_while(|&&name| self.contains(group, name)).count()
    }

    fn is_in(&self, group: GroupId, block: D, location: Location) -> bool {
        self.blocks.get(&(group, block)).is_some_and(|locations| locations.contains(&location))
    }

    fn store(&mut self, stored: &Stored<'_, D>) -> Result<(), ReplicaError<D>> {
        let Stored { blocks, group, location, .. } = *stored;
        if let Some(&block) = blocks.iter().find(|&&block| self.is_in(group, block, location)) {
            return Err(ReplicaError::StoredTwice { block, group });
        }
        for &block in blocks {
            self.blocks.entry((group, block)).or_default().push(location);
        }
        Ok(())
    }

    fn remove(&mut self, group: GroupId, block: D, location: Location) -> Result<(), ReplicaError<D>> {
        let unknown = ReplicaError::Unknown { block, group };
        let locations = self.blocks.get_mut(&(group, block)).ok_or(unknown)?;
        let place = locations.iter().position(|&known| known == location).ok_or(unknown)?;
        locations.swap_remove(place);
        if locations.is_empty() {
            self.blocks.remove(&(group, block));
        }
        Ok(())
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
        let (location, sequence) = (Location::Device, SequenceId(1));
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
        assert_eq!(heard(&mut events), ["3 Cleared"]);
    }

    #[test]
    fn who_does_not_listen_in_time_finds_a_hole_and_begins_anew() {
        let mut events = Events::new(10, 1, 2);
        let mut replica = Replica::new();
        for (entry, rest) in (1..).zip([1, 2, 3]) {
            events.stored(entry, stored(&[name(rest)], Some(name(rest + 50)), &[rest], 1), true);
        }
        let mut refused = Vec::new();
        events.drain(|number, event| refused.extend(replica.apply(number, &event).err()));
        assert_eq!(refused, [ReplicaError::Hole { expected: 0, got: 2 }]);
        assert_eq!(replica, Replica::new());

        let index = [(3, GROUP, name(3)), (1, GROUP, name(1)), (2, GROUP, name(2))];
        let snapshot = events.snapshot(index.into_iter());
        let mut replica = Replica::of(&snapshot);
        assert_eq!((replica.next_event(), replica.longest(GROUP, &[name(1), name(9)])), (3, 1));
        let tokens: Vec<_> = snapshot.stored().flat_map(|stored| stored.tokens.to_vec()).collect();
        assert_eq!(tokens, [1, 2, 3]);
        let removed = Event::Removed { block: name(1), group: GROUP, location: Location::Device };
        assert_eq!(replica.apply(2, &removed), Err(ReplicaError::Repeated { expected: 3, got: 2 }));
        assert_eq!(replica.apply(3, &removed), Ok(()));
        assert!(!replica.contains(GROUP, name(1)));
    }

    #[test]
    fn a_replica_refuses_what_cannot_be_and_stays_as_it_was() {
        let mut replica = Replica::new();
        let first = [name(1), name(2)];
        replica.apply(0, &Event::Stored(stored(&first, None, &[], 0))).unwrap();
        let before = replica.clone();
        let again = [name(3), name(2)];
        let (block, group) = (name(2), GROUP);
        assert_eq!(
            replica.apply(1, &Event::Stored(stored(&again, None, &[], 0))),
            Err(ReplicaError::StoredTwice { block, group })
        );
        let moved = Event::Moved {
            block,
            group,
            from: Location::Tier(Medium::Host),
            to: Location::Tier(Medium::Disk),
        };
        assert_eq!(replica.apply(1, &moved), Err(ReplicaError::Unknown { block, group }));
        assert_eq!(replica, before);
        let moved = Event::Moved { block, group, from: Location::Device, to: Location::Tier(Medium::Host) };
        replica.apply(1, &moved).unwrap();
        let removed = Event::Removed { block, group, location: Location::Tier(Medium::Host) };
        replica.apply(2, &removed).unwrap();
        assert_eq!(replica.blocks().collect::<Vec<_>>(), [(group, name(1))]);
    }
}

//! The index as somebody else knows it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use crate::event::{Event, Location, Snapshot, Stored};
use crate::{Digest, GroupId};

/// What can be found, and where, known from nothing but events. It shows how events are to be applied, and what is
/// wrong with those that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica<D> {
    next: u64,
    blocks: BTreeMap<(GroupId, D), BTreeSet<Location>>,
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
    /// Not there, and removed or moved from there, or said to be there still.
    #[error("block {block} of group {group} leaves where it was not, or stays there")]
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

    /// A replica of the cache that the snapshot is of, and of its tiers if it covers them.
    pub fn of(snapshot: &Snapshot<D>) -> Self {
        let mut replica = Replica { next: snapshot.next_event(), blocks: BTreeMap::new() };
        for stored in snapshot.stored() {
            for &block in stored.blocks {
                replica.blocks.entry((stored.group, block)).or_default().insert(stored.location);
            }
        }
        replica
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
            Ordering::Less => return Err(ReplicaError::Repeated { expected, got: number }),
            Ordering::Greater => return Err(ReplicaError::Hole { expected, got: number }),
            Ordering::Equal => {}
        }
        match *event {
            Event::Stored(stored) => self.store(&stored)?,
            Event::Removed { block, group, location } => self.remove(group, block, location)?,
            Event::Moved { block, group, from, to } => {
                if from == to || !self.is_in(group, block, to) {
                    return Err(ReplicaError::Unknown { block, group });
                }
                self.remove(group, block, from)?;
            }
            Event::Cleared { location } => self.blocks.retain(|_, locations| {
                locations.remove(&location);
                !locations.is_empty()
            }),
        }
        self.next += 1;
        Ok(())
    }

    /// Whether a block can be found, wherever.
    pub fn contains(&self, group: GroupId, block: D) -> bool {
        self.blocks.contains_key(&(group, block))
    }

    /// Where a block can be found, nearest first.
    pub fn locations(&self, group: GroupId, block: D) -> impl Iterator<Item = Location> + '_ {
        self.blocks.get(&(group, block)).into_iter().flatten().copied()
    }

    /// Every block that can be found, by group and name.
    pub fn blocks(&self) -> impl Iterator<Item = (GroupId, D)> + '_ {
        self.blocks.keys().copied()
    }

    /// How many leading `names` can be found, wherever: what a request would have to compute less.
    pub fn longest(&self, group: GroupId, names: &[D]) -> usize {
        names.iter().take_while(|&&name| self.contains(group, name)).count()
    }

    fn is_in(&self, group: GroupId, block: D, location: Location) -> bool {
        self.blocks.get(&(group, block)).is_some_and(|locations| locations.contains(&location))
    }

    fn store(&mut self, stored: &Stored<'_, D>) -> Result<(), ReplicaError<D>> {
        let Stored { blocks, group, location, .. } = *stored;
        for (place, &block) in blocks.iter().enumerate() {
            if !self.blocks.entry((group, block)).or_default().insert(location) {
                // Those before it in the event were not there.
                blocks[..place].iter().for_each(|&stored| _ = self.remove(group, stored, location));
                return Err(ReplicaError::StoredTwice { block, group });
            }
        }
        Ok(())
    }

    fn remove(&mut self, group: GroupId, block: D, location: Location) -> Result<(), ReplicaError<D>> {
        let unknown = ReplicaError::Unknown { block, group };
        let locations = self.blocks.get_mut(&(group, block)).ok_or(unknown)?;
        if !locations.remove(&location) {
            return Err(unknown);
        }
        if locations.is_empty() {
            self.blocks.remove(&(group, block));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Events;
    use crate::tier::{Medium, TierId};
    use crate::{BlockHash, SequenceId, SequenceKey, TokenId, TokenIndex};

    const GROUP: GroupId = GroupId(0);
    const HOST: Location = Location::Tier { tier: TierId(0), medium: Medium::Host };
    const DISK: Location = Location::Tier { tier: TierId(1), medium: Medium::Disk };

    fn name(rest: u32) -> BlockHash {
        BlockHash::from_parts(7, rest)
    }

    fn stored_in<'a>(
        location: Location,
        blocks: &'a [BlockHash],
        tokens: &'a [TokenId],
    ) -> Stored<'a, BlockHash> {
        let (sequence, first, key) = (Some(SequenceId(1)), TokenIndex(0), SequenceKey::default());
        let (parent, lookahead) = (None, &[][..]);
        Stored { blocks, parent, tokens, lookahead, first, group: GROUP, location, sequence, key }
    }

    fn stored<'a>(blocks: &'a [BlockHash], tokens: &'a [TokenId]) -> Stored<'a, BlockHash> {
        stored_in(Location::Device, blocks, tokens)
    }

    #[test]
    fn who_does_not_listen_in_time_finds_a_hole_and_begins_anew() {
        let mut events = Events::new(10, 1, 0, 2);
        let mut replica = Replica::new();
        for (entry, rest) in (1..).zip([1, 2, 3]) {
            let (blocks, tokens) = ([name(rest)], [rest]);
            let parent = Some(name(rest + 50));
            let stored = Stored { parent, first: TokenIndex(1), ..stored(&blocks, &tokens) };
            events.stored(entry, stored, true);
        }
        let mut refused = Vec::new();
        events.drain(|number, event| refused.extend(replica.apply(number, &event).err()));
        assert_eq!(refused, [ReplicaError::Hole { expected: 0, got: 2 }]);
        assert_eq!(replica, Replica::new());

        let index = [(3, GROUP, name(3)), (1, GROUP, name(1)), (2, GROUP, name(2))];
        let snapshot = Snapshot::new(&events, index.into_iter());
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
    fn a_block_is_found_until_its_last_place_has_lost_it() {
        let mut replica = Replica::new();
        let (block, group) = (name(1), GROUP);
        let blocks = [block];
        let events = [
            Event::Stored(stored(&blocks, &[1])),
            Event::Stored(stored_in(HOST, &blocks, &[])),
            Event::Removed { block, group, location: Location::Device },
            Event::Stored(stored_in(DISK, &blocks, &[])),
            Event::Moved { block, group, from: HOST, to: DISK },
        ];
        for (number, event) in (0..).zip(&events) {
            replica.apply(number, event).unwrap();
            assert!(replica.contains(group, block), "after {event:?}");
        }
        assert_eq!(replica.locations(group, block).collect::<Vec<_>>(), [DISK]);
        replica.apply(5, &Event::Cleared { location: Location::Device }).unwrap();
        assert!(replica.contains(group, block), "the disk has not been cleared");
        replica.apply(6, &Event::Removed { block, group, location: DISK }).unwrap();
        assert!(!replica.contains(group, block));
    }

    #[test]
    fn a_replica_refuses_what_cannot_be_and_stays_as_it_was() {
        let mut replica = Replica::new();
        let first = [name(1), name(2)];
        replica.apply(0, &Event::Stored(stored(&first, &[]))).unwrap();
        let before = replica.clone();
        let (block, group) = (name(2), GROUP);
        let mut refused = |number, event: Event<'_, BlockHash>, error| {
            assert_eq!(replica.apply(number, &event), Err(error), "{event:?}");
            assert_eq!(replica, before, "{event:?}");
        };
        let twice = ReplicaError::StoredTwice { block, group };
        refused(1, Event::Stored(stored(&[name(3), name(2)], &[])), twice);
        let twice = ReplicaError::StoredTwice { block: name(3), group };
        refused(1, Event::Stored(stored(&[name(3), name(3)], &[])), twice);
        let unknown = ReplicaError::Unknown { block, group };
        refused(1, Event::Removed { block, group, location: HOST }, unknown);
        refused(1, Event::Moved { block, group, from: HOST, to: DISK }, unknown);
        refused(1, Event::Moved { block, group, from: Location::Device, to: HOST }, unknown);
        refused(1, Event::Moved { block, group, from: Location::Device, to: Location::Device }, unknown);
        let absent = Event::Removed { block: name(9), group, location: Location::Device };
        refused(1, absent, ReplicaError::Unknown { block: name(9), group });
        refused(3, absent, ReplicaError::Hole { expected: 1, got: 3 });
        refused(0, absent, ReplicaError::Repeated { expected: 1, got: 0 });
    }
}

//! All sequences, each in a slot.

use std::collections::BTreeMap;

use crate::id::RequestId;
use crate::sequence::Sequence;

/// Where a sequence is kept. Lists of sequences are lists of slots; a slot on a list is occupied. A slot of
/// a sequence that has left is told from the slot of the one that took its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Slot {
    index: u32,
    generation: u32,
}

/// All sequences, by slot and by id.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sequences {
    slots: Vec<(u32, Option<Sequence>)>,
    vacant: Vec<u32>,
    by_id: BTreeMap<RequestId, Slot>,
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn find(&self, id: RequestId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }

    /// The sequence of a slot, if it has not left meanwhile.
    #[inline]
    pub(crate) fn get(&self, slot: Slot) -> Option<&Sequence> {
        let (generation, sequence) = &self.slots[slot.index as usize];
        sequence.as_ref().filter(|_| *generation == slot.generation)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Sequence> {
        let (generation, sequence) = &mut self.slots[slot.index as usize];
        sequence.as_mut().filter(|_| *generation == slot.generation)
    }

    #[inline]
    pub(crate) fn at(&self, slot: Slot) -> &Sequence {
        self.get(slot).expect("a slot on a list is occupied")
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, slot: Slot) -> &mut Sequence {
        self.get_mut(slot).expect("a slot on a list is occupied")
    }

    /// Takes in a sequence whose id is not here yet.
    pub(crate) fn insert(&mut self, sequence: Sequence) -> Slot {
        let id = sequence.id;
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 requests")
        });
        let (generation, place) = &mut self.slots[index as usize];
        *place = Some(sequence);
        let slot = Slot { index, generation: *generation };
        let former = self.by_id.insert(id, slot);
        assert!(former.is_none(), "request {id} was added twice");
        slot
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Sequence {
        let (generation, place) = &mut self.slots[slot.index as usize];
        let sequence = place.take().expect("a slot on a list is occupied");
        *generation = generation.wrapping_add(1);
        self.by_id.remove(&sequence.id);
        self.vacant.push(slot.index);
        sequence
    }

    /// Every sequence with its slot, in the order of ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Sequence)> {
        self.by_id.values().map(|&slot| (slot, self.at(slot)))
    }

    /// Those behind `id`, in the order of ids.
    pub(crate) fn behind(&self, id: Option<RequestId>) -> impl Iterator<Item = (Slot, &Sequence)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = id.map_or(Unbounded, Excluded);
        self.by_id.range((from, Unbounded)).map(|(_, &slot)| (slot, self.at(slot)))
    }

    /// Generations of all slots, the vacant ones in the order in which they will be taken, last first, and
    /// every sequence with its slot.
    pub(crate) fn parts(&self) -> (Vec<u32>, Vec<u32>, Vec<(Slot, Sequence)>) {
        let generations = self.slots.iter().map(|&(generation, _)| generation).collect();
        let sequences = self.iter().map(|(slot, sequence)| (slot, sequence.clone())).collect();
        (generations, self.vacant.clone(), sequences)
    }

    /// The table with these [`parts`](Sequences::parts); `None` if they do not belong together.
    pub(crate) fn from_parts(
        generations: Vec<u32>,
        vacant: Vec<u32>,
        sequences: Vec<(Slot, Sequence)>,
    ) -> Option<Sequences> {
        let slots = generations.into_iter().map(|generation| (generation, None)).collect();
        let mut table = Sequences { slots, vacant, by_id: BTreeMap::new() };
        if table.vacant.iter().any(|&index| index as usize >= table.slots.len()) {
            return None;
        }
        for (slot, sequence) in sequences {
            let (generation, place) = table.slots.get_mut(slot.index as usize)?;
            if *generation != slot.generation || place.is_some() {
                return None;
            }
            table.by_id.insert(sequence.id, slot);
            *place = Some(sequence);
        }
        table.is_consistent().then_some(table)
    }

    /// True if a slot is one of the table, vacant or not.
    pub(crate) fn contains(&self, slot: Slot) -> bool {
        (slot.index as usize) < self.slots.len()
    }

    /// True if the occupied and the vacant slots are all slots, once each.
    pub(crate) fn is_consistent(&self) -> bool {
        let occupied = self.slots.iter().filter(|(_, sequence)| sequence.is_some()).count();
        occupied == self.by_id.len()
            && occupied + self.vacant.len() == self.slots.len()
            && self.vacant.iter().all(|&index| self.slots[index as usize].1.is_none())
            && self.by_id.iter().all(|(&id, &slot)| self.get(slot).is_some_and(|sequence| sequence.id == id))
    }
}

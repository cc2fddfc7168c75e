//! Blocks by rank, the lowest first, with the way back from a block to its place, so that any block can leave.

/// What blocks are ordered by: the first number, then the second, which no two blocks share.
pub(crate) type Rank = (u64, u64);

/// A binary heap over block numbers below a bound. Every operation is O(log n); nothing is allocated after `new`.
#[derive(Clone, Debug)]
pub(crate) struct Heap {
    items: Vec<u32>,
    rank: Vec<Rank>,
    /// By block: its place in `items`, [`NOWHERE`] if it has none.
    place: Vec<u32>,
}

const NOWHERE: u32 = u32::MAX;

impl Heap {
    pub(crate) fn new(items: u32) -> Self {
        let length = items as usize;
        Heap {
            items: Vec::with_capacity(length),
            rank: vec![Rank::default(); length],
            place: vec![NOWHERE; length],
        }
    }

    /// Room for one more number.
    pub(crate) fn add_item(&mut self) {
        self.rank.push(Rank::default());
        self.place.push(NOWHERE);
    }

    pub(crate) fn first(&self) -> Option<u32> {
        self.items.first().copied()
    }

    pub(crate) fn contains(&self, item: u32) -> bool {
        self.place[item as usize] != NOWHERE
    }

    /// The rank that `item` has, or had when it left.
    pub(crate) fn rank(&self, item: u32) -> Rank {
        self.rank[item as usize]
    }

    /// Gives an item that is not in the heap the rank it will have there.
    pub(crate) fn set_rank(&mut self, item: u32, rank: Rank) {
        debug_assert!(!self.contains(item), "an item in the heap keeps its rank");
        self.rank[item as usize] = rank;
    }

    /// Enters an item that is not there, under the rank it was given.
    pub(crate) fn push(&mut self, item: u32) {
        debug_assert!(!self.contains(item), "an item is in the heap once");
        let place = self.items.len();
        self.items.push(item);
        self.rise(place, item);
    }

    /// Takes an item out. Does nothing when it is not there.
    pub(crate) fn remove(&mut self, item: u32) {
        let place = std::mem::replace(&mut self.place[item as usize], NOWHERE) as usize;
        if place == NOWHERE as usize {
            return;
        }
        let last = self.items.pop().expect("an item that has a place is in the heap");
        if last != item {
            self.sink(place, last);
            let place = self.place[last as usize] as usize;
            self.rise(place, last);
        }
    }

    /// An item whose place is wrong, or that ranks before the one above it.
    pub(crate) fn broken(&self) -> Option<u32> {
        self.items.iter().enumerate().find_map(|(place, &item)| {
            let above = self.items[place.saturating_sub(1) / 2];
            let sound =
                self.place[item as usize] as usize == place && (place == 0 || self.before(above, item));
            (!sound).then_some(item)
        })
    }

    fn before(&self, a: u32, b: u32) -> bool {
        self.rank[a as usize] < self.rank[b as usize]
    }

    fn rise(&mut self, mut place: usize, item: u32) {
        while place > 0 {
            let above = (place - 1) / 2;
            if !self.before(item, self.items[above]) {
                break;
            }
            self.put(place, self.items[above]);
            place = above;
        }
        self.put(place, item);
    }

    fn sink(&mut self, mut place: usize, item: u32) {
        loop {
            let mut below = 2 * place + 1;
            if below + 1 < self.items.len() && self.before(self.items[below + 1], self.items[below]) {
                below += 1;
            }
            if below >= self.items.len() || !self.before(self.items[below], item) {
                break;
            }
            self.put(place, self.items[below]);
            place = below;
        }
        self.put(place, item);
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are no more places than blocks, which are u32"
    )]
    fn put(&mut self, place: usize, item: u32) {
        self.items[place] = item;
        self.place[item as usize] = place as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn behaves_as_a_sorted_set() {
        for seed in 0..20u64 {
            let (mut heap, mut model, mut random) = (Heap::new(40), BTreeSet::new(), seed);
            for step in 0..2_000 {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let item = u32::try_from(random >> 40).unwrap() % 40;
                if heap.contains(item) {
                    model.remove(&(heap.rank(item), item));
                    heap.remove(item);
                } else {
                    let rank = (random >> 60, step);
                    heap.set_rank(item, rank);
                    heap.push(item);
                    model.insert((rank, item));
                }
                assert_eq!(heap.first(), model.first().map(|&(_, item)| item), "seed {seed}, step {step}");
                assert_eq!(
                    (heap.items.len(), heap.broken()),
                    (model.len(), None),
                    "seed {seed}, step {step}"
                );
            }
        }
    }
}

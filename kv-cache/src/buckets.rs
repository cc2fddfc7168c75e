//! A table from 32-bit tags to numbers: open addressing in one flat array, eight bytes a bucket.
//!
//! The place of a bucket follows from its tag alone (`tag * length / 2^32`), so removing and growing never
//! ask for the keys. What the key is, and whether a tag that matches is the right one, is for the caller to
//! say. Nothing here is ever listed in table order: which bucket lies where does not show.

/// Open addressing with linear probing; removal closes the gap, so there are no tombstones.
#[derive(Clone, Debug)]
pub(crate) struct Buckets {
    buckets: Vec<Bucket>,
    used: usize,
}

/// A number under a tag. Number 0 marks the empty bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bucket {
    pub(crate) tag: u32,
    pub(crate) number: u32,
}

impl Bucket {
    fn is_empty(self) -> bool {
        self.number == 0
    }
}

impl Buckets {
    /// A table that holds `entries` without growing, half full: a probe that finds nothing looks at 2.5 buckets.
    pub(crate) fn with_room_for(entries: usize) -> Self {
        Buckets { buckets: vec![Bucket::default(); 2 * entries + 2], used: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    /// The place of the bucket under `tag` whose number the caller recognises.
    #[inline]
    pub(crate) fn find(&self, tag: u32, is: impl Fn(u32) -> bool) -> Option<usize> {
        self.probe(tag, is).ok()
    }

    /// The same, or the place where it would be.
    #[inline]
    fn probe(&self, tag: u32, is: impl Fn(u32) -> bool) -> Result<usize, usize> {
        let mut place = self.home(tag);
        loop {
            let bucket = self.buckets[place];
            if bucket.is_empty() {
                return Err(place);
            }
            if bucket.tag == tag && is(bucket.number) {
                return Ok(place);
            }
            place = self.after(place);
        }
    }

    /// The number in the first bucket that `tag` could be in. It may be another's: whoever asks wants the bucket to be
    /// at hand soon, and asks for many before he needs one.
    #[inline]
    pub(crate) fn touch(&self, tag: u32) -> u32 {
        self.number(self.home(tag))
    }

    /// The first number under `tag`, nearly always the only one; 0 if there is none.
    #[inline]
    pub(crate) fn first_under(&self, tag: u32) -> u32 {
        let mut place = self.home(tag);
        loop {
            let bucket = self.buckets[place];
            if bucket.tag == tag || bucket.is_empty() {
                return bucket.number;
            }
            place = self.after(place);
        }
    }

    #[inline]
    pub(crate) fn number(&self, place: usize) -> u32 {
        self.buckets[place].number
    }

    /// Puts another number under the same key.
    pub(crate) fn replace(&mut self, place: usize, number: u32) {
        self.buckets[place].number = number;
    }

    /// The place of the bucket under `tag` whose number the caller recognises. If there is none, `number`, which is not
    /// 0, is added.
    #[inline]
    pub(crate) fn find_or_insert(
        &mut self,
        tag: u32,
        number: u32,
        is: impl Fn(u32) -> bool,
    ) -> Option<usize> {
        debug_assert_ne!(number, 0, "0 marks an empty bucket");
        if 2 * self.used + 2 > self.buckets.len() {
            self.grow();
        }
        match self.probe(tag, is) {
            Ok(place) => Some(place),
            Err(empty) => {
                self.buckets[empty] = Bucket { tag, number };
                self.used += 1;
                None
            }
        }
    }

    /// Adds a key that is not there yet.
    pub(crate) fn insert(&mut self, tag: u32, number: u32) {
        self.find_or_insert(tag, number, |_| false);
    }

    /// Takes the bucket out and moves later ones up, each no further than its home.
    pub(crate) fn remove(&mut self, place: usize) {
        let mut gap = place;
        let mut next = self.after(gap);
        while !self.buckets[next].is_empty() {
            let home = self.home(self.buckets[next].tag);
            if self.distance(home, next) >= self.distance(gap, next) {
                self.buckets[gap] = self.buckets[next];
                gap = next;
            }
            next = self.after(next);
        }
        self.buckets[gap] = Bucket::default();
        self.used -= 1;
    }

    pub(crate) fn clear(&mut self) {
        self.buckets.fill(Bucket::default());
        self.used = 0;
    }

    /// Every bucket in use, for audits, which ask about all and not about order.
    pub(crate) fn all(&self) -> impl Iterator<Item = Bucket> + '_ {
        self.buckets.iter().copied().filter(|bucket| !bucket.is_empty())
    }

    fn grow(&mut self) {
        let doubled = vec![Bucket::default(); self.buckets.len() * 2];
        for bucket in std::mem::replace(&mut self.buckets, doubled) {
            if !bucket.is_empty() {
                let empty = self.probe(bucket.tag, |_| false).unwrap_or_else(|empty| empty);
                self.buckets[empty] = bucket;
            }
        }
    }

    #[inline]
    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.buckets.len() as u64) >> 32) as usize
    }

    #[inline]
    fn after(&self, place: usize) -> usize {
        if place + 1 == self.buckets.len() { 0 } else { place + 1 }
    }

    /// Steps from `from` forward to `to`.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.buckets.len() - from }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// A small stream of numbers below `limit` that looks random.
    fn below(limit: u32, state: &mut u64) -> u32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((*state >> 32) * u64::from(limit)) >> 32) as u32
    }

    #[test]
    fn behaves_as_a_map_when_tags_crowd_both_ends() {
        for seed in 0..20 {
            let mut random = seed;
            let mut buckets = Buckets::with_room_for(4);
            let mut model = BTreeMap::new();
            for step in 1..=2000u32 {
                // Tags at the very end of the range wrap around the end of the table.
                let tag = [0, 1, u32::MAX, u32::MAX - 1, 1 << 31, 3 << 30][below(6, &mut random) as usize];
                let key = (tag, below(8, &mut random));
                let number = |bucket_number: u32| bucket_number % 8 == key.1;
                let found = buckets.find(tag, number).map(|place| buckets.number(place));
                assert_eq!(found, model.get(&key).copied(), "seed {seed}, step {step}");
                if let Some(place) = buckets.find(tag, number) {
                    buckets.remove(place);
                    model.remove(&key);
                } else {
                    buckets.insert(tag, step * 8 + key.1);
                    model.insert(key, step * 8 + key.1);
                }
                assert_eq!(buckets.len(), model.len());
            }
            let mut all: Vec<u32> = buckets.all().map(|bucket| bucket.number).collect();
            all.sort_unstable();
            let mut expected: Vec<u32> = model.values().copied().collect();
            expected.sort_unstable();
            assert_eq!(all, expected, "seed {seed}");
        }
    }
}

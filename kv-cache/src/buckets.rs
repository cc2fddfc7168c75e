//! A table from 32-bit tags to numbers: open addressing in one flat array, eight bytes a bucket, eight buckets a line
//! of the processor's cache.
//!
//! The line that a bucket wants follows from its tag alone (`tag * lines / 2^32`), so removing and growing never ask
//! for the keys. What the key is, and whether a tag that matches is the right one, is for the caller to say. Nothing
//! here is ever listed in table order: which bucket lies where does not show.

/// Open addressing by lines: a bucket lies in the line that it wants or, while that one is full, in the next that is
/// not. Half of all buckets are in use at most, so one line in twenty is full and nearly every question reads a single
/// line. Removal fills the room in a full line from the lines behind it, so there are no tombstones.
#[derive(Clone, Debug)]
pub(crate) struct Buckets {
    lines: Vec<Line>,
    used: usize,
}

/// Buckets that are read at once. Those in use come first.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
struct Line {
    tags: [u32; WIDTH],
    numbers: [u32; WIDTH],
}

const WIDTH: usize = 8;

/// A number under a tag. Number 0 marks the empty bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    pub(crate) tag: u32,
    pub(crate) number: u32,
}

impl Line {
    /// The buckets under `tag`, and perhaps empty ones.
    #[inline]
    fn under(&self, tag: u32) -> Marks {
        Marks::of(&self.tags, tag)
    }

    #[inline]
    fn used(&self) -> usize {
        Marks::of(&self.numbers, 0).first()
    }

    #[inline]
    fn is_full(&self) -> bool {
        self.numbers[WIDTH - 1] != 0
    }

    #[inline]
    fn bucket(&self, at: usize) -> Bucket {
        Bucket { tag: self.tags[at], number: self.numbers[at] }
    }

    #[inline]
    fn set(&mut self, at: usize, bucket: Bucket) {
        (self.tags[at], self.numbers[at]) = (bucket.tag, bucket.number);
    }

    /// Adds a bucket to a line that is not full. The first empty one is found by halving.
    #[inline]
    fn push(&mut self, bucket: Bucket) {
        let mut at = 0;
        for half in [4, 2, 1] {
            at += half * usize::from(self.numbers[at + half - 1] != 0);
        }
        self.set(at, bucket);
    }

    /// Takes a bucket out; the last one moves there.
    #[inline]
    fn take(&mut self, at: usize) -> Bucket {
        let (taken, last) = (self.bucket(at), self.used() - 1);
        self.set(at, self.bucket(last));
        self.numbers[last] = 0;
        taken
    }
}

/// Some buckets of a line, a bit for each from the second bit on: a first that is 1 makes compilers treat it apart.
#[derive(Clone, Copy)]
struct Marks(u32);

impl Marks {
    /// Where `words` are `word`. Written so that a processor compares a line at once, without a branch.
    #[inline]
    fn of(words: &[u32; WIDTH], word: u32) -> Marks {
        let same: [u32; WIDTH] = std::array::from_fn(|at| u32::from(words[at] == word));
        let bits = (0..).zip(same).map(|(at, same)| same.wrapping_neg() & (2 << at));
        Marks(bits.fold(0, |marks, bit| marks | bit))
    }

    /// The first of them, or the width of a line.
    #[inline]
    fn first(self) -> usize {
        (self.0 | 2 << WIDTH).trailing_zeros() as usize - 1
    }
}

impl Iterator for Marks {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let first = (self.0 != 0).then(|| self.first());
        self.0 &= self.0.wrapping_sub(1);
        first
    }
}

impl Buckets {
    /// A table that holds `entries` without growing, half full.
    pub(crate) fn with_room_for(entries: usize) -> Self {
        Buckets { lines: vec![Line::default(); (2 * entries + 2).div_ceil(WIDTH)], used: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    /// The place of the bucket under `tag` whose number the caller recognises.
    #[inline]
    pub(crate) fn find(&self, tag: u32, is: impl Fn(u32) -> bool) -> Option<usize> {
        self.probe(tag, is).ok()
    }

    /// The same, or the line where it would be.
    #[inline]
    fn probe(&self, tag: u32, is: impl Fn(u32) -> bool) -> Result<usize, usize> {
        let mut line = self.home(tag);
        loop {
            let here = &self.lines[line];
            for at in here.under(tag) {
                let number = here.numbers[at];
                if number != 0 && is(number) {
                    return Ok(line * WIDTH + at);
                }
            }
            if !here.is_full() {
                return Err(line);
            }
            line = self.after(line);
        }
    }

    /// A number in the line that `tag` wants, whoever's it is: whoever asks wants the line to be at hand soon, and asks
    /// for many before he needs one.
    #[inline]
    pub(crate) fn touch(&self, tag: u32) -> u32 {
        self.lines[self.home(tag)].numbers[0]
    }

    /// The first number under `tag`, nearly always the only one; 0 if there is none.
    #[inline]
    pub(crate) fn first_under(&self, tag: u32) -> u32 {
        self.find(tag, |_| true).map_or(0, |place| self.number(place))
    }

    #[inline]
    pub(crate) fn number(&self, place: usize) -> u32 {
        self.lines[place / WIDTH].numbers[place % WIDTH]
    }

    /// Puts another number under the same key.
    pub(crate) fn replace(&mut self, place: usize, number: u32) {
        self.lines[place / WIDTH].numbers[place % WIDTH] = number;
    }

    /// Makes room for so many entries more.
    #[inline]
    pub(crate) fn reserve(&mut self, entries: usize) {
        while 2 * (self.used + entries) > self.lines.len() * WIDTH {
            self.grow();
        }
    }

    /// The place of the bucket under `tag` whose number the caller recognises. If there is none, `number`, which is not
    /// 0, is added; there is [room](Buckets::reserve) for it.
    #[inline]
    pub(crate) fn find_or_insert(
        &mut self,
        tag: u32,
        number: u32,
        is: impl Fn(u32) -> bool,
    ) -> Option<usize> {
        debug_assert_ne!(number, 0, "0 marks an empty bucket");
        match self.probe(tag, is) {
            Ok(place) => Some(place),
            Err(line) => {
                self.lines[line].push(Bucket { tag, number });
                self.used += 1;
                None
            }
        }
    }

    /// Adds a key that is not there yet.
    pub(crate) fn insert(&mut self, tag: u32, number: u32) {
        self.reserve(1);
        self.find_or_insert(tag, number, |_| false);
    }

    /// Takes the bucket out.
    #[inline]
    pub(crate) fn remove(&mut self, place: usize) {
        let line = place / WIDTH;
        let was_full = self.lines[line].is_full();
        self.lines[line].take(place % WIDTH);
        self.used -= 1;
        if was_full {
            self.fill(line);
        }
    }

    /// Moves a bucket into a line that was full, if one behind it would rather be here; then one into the room that it
    /// left, and so on to the first line that was not full: behind that, every bucket is where it wants to be.
    #[cold]
    fn fill(&mut self, mut room: usize) {
        let (mut line, mut was_full) = (room, true);
        while was_full {
            line = self.after(line);
            let here = self.lines[line];
            was_full = here.is_full();
            let wants =
                |&at: &usize| self.distance(self.home(here.tags[at]), line) >= self.distance(room, line);
            if let Some(at) = (0..here.used()).find(wants) {
                let moved = self.lines[line].take(at);
                self.lines[room].push(moved);
                room = line;
            }
        }
    }

    pub(crate) fn clear(&mut self) {
        self.lines.fill(Line::default());
        self.used = 0;
    }

    /// Every bucket in use, for audits, which ask about all and not about order.
    pub(crate) fn all(&self) -> impl Iterator<Item = Bucket> + '_ {
        self.lines.iter().flat_map(|line| (0..line.used()).map(|at| line.bucket(at)))
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = Buckets { lines: vec![Line::default(); self.lines.len() * 2], used: 0 };
        for Bucket { tag, number } in std::mem::replace(self, doubled).all() {
            self.insert(tag, number);
        }
    }

    /// The line that a tag wants.
    #[inline]
    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.lines.len() as u64) >> 32) as usize
    }

    #[inline]
    fn after(&self, line: usize) -> usize {
        if line + 1 == self.lines.len() { 0 } else { line + 1 }
    }

    /// Steps from the line `from` forward to the line `to`.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { to + self.lines.len() - from }
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

//! What was evicted lately: names without blocks. A content that comes back while its name is still here was evicted
//! too early, and a policy learns from it.

use super::links::Links;
use crate::buckets::Buckets;

/// Lists of names of evicted contents, the oldest first, each with a note. At most `capacity` names in all; a
/// name is in one list at most. Every operation is O(1), and nothing is allocated after `new`.
#[derive(Clone, Debug)]
pub(crate) struct Ghosts {
    name: Vec<u32>,
    note: Vec<u32>,
    list: Vec<u8>,
    /// The lists, and behind them the one of unused entries.
    links: Links,
    unused: usize,
    index: Buckets,
}

impl Ghosts {
    pub(crate) fn new(capacity: u32, lists: u8) -> Self {
        let length = capacity as usize;
        let unused = usize::from(lists);
        let mut links = Links::new(capacity, u32::from(lists) + 1);
        for entry in 0..capacity {
            links.push_last(unused, entry);
        }
        Ghosts {
            name: vec![0; length],
            note: vec![0; length],
            list: vec![0; length],
            links,
            unused,
            index: Buckets::with_room_for(length),
        }
    }

    pub(crate) fn len(&self, list: u8) -> u32 {
        self.links.len(list.into())
    }

    pub(crate) fn is_full(&self) -> bool {
        self.links.len(self.unused) == 0
    }

    /// The list that has `name`, and the note it came with.
    #[cfg(test)]
    pub(crate) fn find(&self, name: u32) -> Option<(u8, u32)> {
        self.entry(name).map(|entry| (self.list[entry as usize], self.note[entry as usize]))
    }

    /// Appends a name to a list. A name that is there already moves; a full house loses the oldest of this list,
    /// or of another if this one is empty.
    pub(crate) fn remember(&mut self, list: u8, name: u32, note: u32) {
        self.take(name);
        if self.is_full() {
            self.forget_oldest(list);
        }
        for other in 0..self.list_count() {
            if self.is_full() {
                self.forget_oldest(other);
            }
        }
        let Some(entry) = self.links.pop_first(self.unused) else { return };
        (self.name[entry as usize], self.note[entry as usize], self.list[entry as usize]) =
            (name, note, list);
        self.links.push_last(list.into(), entry);
        self.index.insert(name, entry + 1);
    }

    /// What `find` says, for the last time.
    pub(crate) fn take(&mut self, name: u32) -> Option<(u8, u32)> {
        let entry = self.entry(name)?;
        self.drop_entry(entry);
        Some((self.list[entry as usize], self.note[entry as usize]))
    }

    pub(crate) fn forget_oldest(&mut self, list: u8) {
        if let Some(entry) = self.links.first(list.into()) {
            self.drop_entry(entry);
        }
    }

    fn drop_entry(&mut self, entry: u32) {
        let place = self.place(self.name[entry as usize]).expect("a remembered name is indexed");
        self.index.remove(place);
        self.links.remove(self.list[entry as usize].into(), entry);
        self.links.push_last(self.unused, entry);
    }

    fn entry(&self, name: u32) -> Option<u32> {
        self.place(name).map(|place| self.index.number(place) - 1)
    }

    fn place(&self, name: u32) -> Option<usize> {
        self.index.find(name, |number| self.name[number as usize - 1] == name)
    }

    #[expect(clippy::cast_possible_truncation, reason = "made from a u8")]
    fn list_count(&self) -> u8 {
        self.unused as u8
    }

    /// Whether every entry is in one list, and found under its name if it has one.
    pub(crate) fn is_sound(&self) -> bool {
        let listed: u32 = (0..=self.unused).map(|list| self.links.len(list)).sum();
        let linked = (0..=self.unused).all(|list| self.links.broken(list).is_none());
        let found = (0..self.unused)
            .flat_map(|list| self.links.iter(list).map(move |entry| (list, entry)))
            .all(|(list, entry)| {
                usize::from(self.list[entry as usize]) == list
                    && self.entry(self.name[entry as usize]) == Some(entry)
            });
        linked && found && listed as usize == self.name.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: u32) -> u32 {
        n.wrapping_mul(0x9E37_79B9)
    }

    #[test]
    fn the_oldest_names_go_when_there_is_no_room() {
        let mut ghosts = Ghosts::new(3, 2);
        for n in 1..=3 {
            ghosts.remember(0, name(n), n);
        }
        assert!(ghosts.is_full());
        ghosts.remember(1, name(4), 40);
        assert_eq!(ghosts.find(name(1)), None, "list 1 was empty, so list 0 lost its oldest");
        ghosts.remember(1, name(5), 50);
        assert_eq!(ghosts.find(name(4)), None, "list 1 lost its own oldest");
        ghosts.remember(1, name(2), 20);
        assert_eq!(ghosts.find(name(2)), Some((1, 20)), "a name that comes again moves");
        assert_eq!((ghosts.len(0), ghosts.len(1)), (1, 2));
        assert_eq!(ghosts.take(name(5)), Some((1, 50)));
        ghosts.forget_oldest(0);
        ghosts.forget_oldest(0);
        assert_eq!((ghosts.len(0), ghosts.len(1), ghosts.is_sound()), (0, 1, true));
    }

    #[test]
    fn a_house_of_no_rooms_remembers_nothing() {
        let mut ghosts = Ghosts::new(0, 2);
        ghosts.remember(0, name(1), 0);
        assert_eq!((ghosts.find(name(1)), ghosts.is_sound()), (None, true));
    }
}

//! Lists threaded through what they list: a block in the middle of one leaves it in O(1), and nothing is allocated.
//!
//! Behind the links of the items each list has a pair of its own, which close it to a ring.
//!
//! ```text
//!  next[items + list] = first  ->  ...  ->  last = prev[items + list]
//! ```

/// Lists of numbers below a bound; each number is in one list at most.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    next: Vec<u32>,
    prev: Vec<u32>,
    length: Vec<u32>,
    items: u32,
}

impl Links {
    /// Empty lists over the numbers below `items`.
    pub(crate) fn new(items: u32, lists: u32) -> Self {
        let mut links =
            Links { next: vec![0; items as usize], prev: vec![0; items as usize], length: Vec::new(), items };
        for _ in 0..lists {
            links.add_list();
        }
        links
    }

    /// One more list.
    pub(crate) fn add_list(&mut self) {
        let end = self.end(self.length.len());
        self.next.push(end);
        self.prev.push(end);
        self.length.push(0);
    }

    pub(crate) fn len(&self, list: usize) -> u32 {
        self.length[list]
    }

    pub(crate) fn first(&self, list: usize) -> Option<u32> {
        (self.length[list] > 0).then(|| self.next[self.end(list) as usize])
    }

    pub(crate) fn push_last(&mut self, list: usize, item: u32) {
        let end = self.end(list);
        self.place(list, self.prev[end as usize], item);
    }

    /// Puts `item` behind `before`, or in front of all.
    pub(crate) fn push_behind(&mut self, list: usize, before: Option<u32>, item: u32) {
        self.place(list, before.unwrap_or(self.end(list)), item);
    }

    pub(crate) fn remove(&mut self, list: usize, item: u32) {
        let (before, after) = (self.prev[item as usize], self.next[item as usize]);
        self.join(before, after);
        self.length[list] -= 1;
    }

    pub(crate) fn pop_first(&mut self, list: usize) -> Option<u32> {
        let first = self.first(list)?;
        self.remove(list, first);
        Some(first)
    }

    pub(crate) fn iter(&self, list: usize) -> impl Iterator<Item = u32> + '_ {
        let end = self.end(list);
        std::iter::successors(Some(self.next[end as usize]), |&item| Some(self.next[item as usize]))
            .take_while(move |&item| item != end)
    }

    /// The first item of `list` whose links disagree, if there is one.
    pub(crate) fn broken(&self, list: usize) -> Option<u32> {
        let end = self.end(list);
        let mut before = end;
        for item in self.iter(list).take(self.length[list] as usize).chain([end]) {
            if self.prev[item as usize] != before || (item == end) != (self.next[before as usize] == end) {
                return Some(before);
            }
            before = item;
        }
        None
    }

    #[expect(clippy::cast_possible_truncation, reason = "lists are few")]
    fn end(&self, list: usize) -> u32 {
        self.items + list as u32
    }

    fn place(&mut self, list: usize, before: u32, item: u32) {
        let after = self.next[before as usize];
        self.join(before, item);
        self.join(item, after);
        self.length[list] += 1;
    }

    fn join(&mut self, before: u32, after: u32) {
        self.next[before as usize] = after;
        self.prev[after as usize] = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_move_between_lists_and_keep_their_order() {
        let mut links = Links::new(6, 2);
        for item in [3, 1, 5] {
            links.push_last(0, item);
        }
        links.push_behind(0, None, 4);
        links.push_behind(0, Some(4), 2);
        assert_eq!(links.iter(0).collect::<Vec<_>>(), [4, 2, 3, 1, 5]);
        links.remove(0, 3);
        links.push_last(1, 3);
        assert_eq!((links.pop_first(0), links.first(1), links.first(0)), (Some(4), Some(3), Some(2)));
        assert_eq!((links.len(0), links.len(1)), (3, 1));
        assert_eq!((links.broken(0), links.broken(1)), (None, None));
        links.prev[1] = 5;
        assert_eq!(links.broken(0), Some(2));
    }

    #[test]
    fn a_list_can_be_emptied_and_added() {
        let mut links = Links::new(3, 0);
        links.add_list();
        assert_eq!((links.first(0), links.pop_first(0)), (None, None));
        links.push_last(0, 2);
        assert_eq!((links.pop_first(0), links.iter(0).count()), (Some(2), 0));
    }
}

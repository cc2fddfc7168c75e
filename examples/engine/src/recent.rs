//! What was asked for lately, kept to be asked for again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Values by text, the most recently used of them. Shared by threads: each value is made by the first who asks for it,
/// while others who want the same one wait, and nobody else does.
#[derive(Debug)]
pub(crate) struct Recent<V> {
    most: usize,
    entries: Mutex<Entries<V>>,
}

/// By text, each with when it was last asked for.
#[derive(Debug)]
struct Entries<V> {
    asked: u64,
    by_text: BTreeMap<String, (u64, Arc<OnceLock<V>>)>,
}

impl<V: Clone> Recent<V> {
    /// Keeps `most` values.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, entries: Mutex::new(Entries { asked: 0, by_text: BTreeMap::new() }) }
    }

    /// The value of a text, if it is kept and made.
    pub(crate) fn get(&self, text: &str) -> Option<V> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).touch(text)?.get().cloned()
    }

    /// The value of a text, made if it is not kept. Cost, besides making it: O(most) to find the one that goes.
    pub(crate) fn get_or_make(&self, text: String, make: impl FnOnce() -> V) -> V {
        let place = self.entries.lock().unwrap_or_else(PoisonError::into_inner).place(text, self.most);
        place.get_or_init(make).clone()
    }
}

impl<V> Entries<V> {
    fn touch(&mut self, text: &str) -> Option<Arc<OnceLock<V>>> {
        let (last, place) = self.by_text.get_mut(text)?;
        self.asked += 1;
        *last = self.asked;
        Some(Arc::clone(place))
    }

    fn place(&mut self, text: String, most: usize) -> Arc<OnceLock<V>> {
        if let Some(place) = self.touch(&text) {
            return place;
        }
        while self.by_text.len() >= most.max(1) {
            let oldest = self.by_text.iter().min_by_key(|(_, (last, _))| *last).map(|(text, _)| text.clone());
            oldest.and_then(|text| self.by_text.remove(&text));
        }
        let place = Arc::new(OnceLock::new());
        self.asked += 1;
        self.by_text.insert(text, (self.asked, Arc::clone(&place)));
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_was_not_asked_for_the_longest_goes() {
        let recent = Recent::new(2);
        let make = |text: &str, value| recent.get_or_make(text.into(), || value);
        assert_eq!((make("a", 1), make("b", 2), make("a", 9)), (1, 2, 1));
        assert_eq!(make("c", 3), 3);
        assert_eq!((recent.get("a"), recent.get("b"), recent.get("c")), (Some(1), None, Some(3)));
    }

    #[test]
    fn who_wants_the_same_waits_for_it_and_makes_none() {
        let (recent, made) = (Recent::new(2), Mutex::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| recent.get_or_make("a".into(), || *made.lock().unwrap() += 1));
            }
        });
        assert_eq!(*made.lock().unwrap(), 1);
    }
}

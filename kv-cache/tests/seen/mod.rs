//! What the random calls have brought about, counted: an oracle that never comes across something says nothing of it.

use std::cell::RefCell;
use std::collections::BTreeMap;

thread_local! {
    static SEEN: RefCell<BTreeMap<&'static str, u64>> = const { RefCell::new(BTreeMap::new()) };
}

/// Counts something that has happened.
pub(crate) fn saw(what: &'static str) {
    SEEN.with_borrow_mut(|seen| *seen.entry(what).or_default() += 1);
}

/// Counts something if it has happened.
pub(crate) fn saw_if(happened: bool, what: &'static str) {
    if happened {
        saw(what);
    }
}

/// Each of what happens often has happened, each of the rest as well in a long run, and nothing else has.
#[expect(clippy::print_stderr, reason = "a test says what it has come across")]
pub(crate) fn must_have_seen(often: &[&'static str], seldom: &[&'static str], long: bool) {
    SEEN.with_borrow(|seen| {
        for (what, times) in seen {
            eprintln!("{times:>9} {what}");
        }
        let listed = |what: &&&str| often.contains(what) || seldom.contains(what);
        let unlisted: Vec<_> = seen.keys().filter(|what| !listed(what)).collect();
        assert!(unlisted.is_empty(), "not in the lists: {unlisted:?}");
        let wanted = often.iter().chain(seldom.iter().filter(|_| long));
        let missing: Vec<_> = wanted.filter(|what| !seen.contains_key(*what)).collect();
        assert!(missing.is_empty(), "never happened: {missing:?}");
    });
}

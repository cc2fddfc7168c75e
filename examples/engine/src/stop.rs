//! Stop strings over text that comes in pieces. What could still become a stop string is held back, so
//! that none of it is ever shown.

/// Watches a stream of text for stop strings.
#[derive(Debug)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    include: bool,
    held: String,
}

impl StopStrings {
    /// `include` keeps the stop string in the text.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Takes the next piece and appends to `out` what is certain. Returns the stop string that ends the
    /// text, if one does; nothing may be pushed after that. While `may_stop` is false the piece is text
    /// like any other, but its end may still begin a stop string.
    ///
    /// Of several stop strings the one that begins first wins, then the one named first. Cost: the length
    /// of the piece times the number of stop strings, plus their lengths.
    pub(crate) fn push(&mut self, piece: &str, may_stop: bool, out: &mut String) -> Option<&str> {
        if self.stops.is_empty() {
            out.push_str(piece);
            return None;
        }
        self.held.push_str(piece);
        if may_stop && let Some((at, which)) = self.first_stop() {
            let stop = &self.stops[which];
            let end = if self.include { at + stop.len() } else { at };
            out.push_str(&self.held[..end]);
            self.held.clear();
            return Some(stop);
        }
        let certain = self.held.len() - self.open_end();
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// The text ended for another reason: appends what was held back.
    pub(crate) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    fn first_stop(&self) -> Option<(usize, usize)> {
        let found = |(which, stop): (usize, &String)| Some((self.held.find(stop.as_str())?, which));
        self.stops.iter().enumerate().filter_map(found).min()
    }

    /// Length of the longest end of the held text that begins a stop string without being one.
    fn open_end(&self) -> usize {
        let open = |stop: &String| {
            let most = (stop.len() - 1).min(self.held.len());
            (1..=most).rev().find(|&n| self.held.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        self.stops.iter().map(open).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut watcher = StopStrings::new(stops.iter().map(ToString::to_string).collect(), include);
        let mut shown = Vec::new();
        for piece in pieces {
            let mut out = String::new();
            let stop = watcher.push(piece, true, &mut out).map(str::to_owned);
            shown.push(out);
            if stop.is_some() {
                return (shown, stop);
            }
        }
        let mut out = String::new();
        watcher.finish(&mut out);
        shown.push(out);
        (shown, None)
    }

    #[test]
    fn what_could_become_a_stop_string_is_held_back() {
        let (shown, stop) = run(&["\n\nUser"], false, &["hi\n", "\nUs", "er: no"]);
        assert_eq!((shown, stop), (vec!["hi".into(), String::new(), String::new()], Some("\n\nUser".into())));
    }

    #[test]
    fn and_comes_when_it_does_not() {
        let (shown, stop) = run(&["abc"], false, &["xab", "d", "ab"]);
        assert_eq!((shown.concat(), stop), ("xabdab".into(), None));
        assert_eq!(shown[0], "x");
    }

    #[test]
    fn an_overlapping_start_is_not_lost() {
        let (shown, stop) = run(&["aab"], false, &["a", "a", "a", "b"]);
        assert_eq!((shown.concat(), stop), ("a".into(), Some("aab".into())));
    }

    #[test]
    fn the_first_in_the_text_wins_then_the_first_named() {
        assert_eq!(run(&["c", "bc"], false, &["abcd"]), (vec!["a".into()], Some("bc".into())));
        assert_eq!(run(&["bc", "b"], false, &["abcd"]), (vec!["a".into()], Some("bc".into())));
    }

    #[test]
    fn the_stop_string_is_kept_when_asked() {
        assert_eq!(run(&["b"], true, &["abc"]), (vec!["ab".into()], Some("b".into())));
    }

    #[test]
    fn characters_of_several_bytes_are_not_split() {
        // U+00E9 and U+00E8 share their first byte: the end of the text looks like the start of the stop.
        let (shown, stop) = run(&["\u{e9}!"], false, &["\u{e8}", "\u{e9}", "?"]);
        assert_eq!((shown.concat(), stop), ("\u{e8}\u{e9}?".into(), None));
    }

    #[test]
    fn before_the_minimum_a_stop_string_is_text() {
        let mut watcher = StopStrings::new(vec!["ab".into()], false);
        let mut out = String::new();
        assert_eq!(watcher.push("ab", false, &mut out), None);
        assert_eq!(watcher.push("a", false, &mut out), None);
        assert_eq!(out, "ab");
        assert_eq!(watcher.push("b", true, &mut out), Some("ab"));
        assert_eq!(out, "ab");
    }
}

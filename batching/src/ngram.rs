//! Drafts from the text itself: what followed the last time the same words came (prompt lookup decoding).
//! It pays off where answers repeat their question: code edits, summaries, structured data.

use std::collections::BTreeMap;

/// Proposes the continuation of the latest earlier occurrence of the last tokens of a text.
///
/// It looks for the longest match of `tokens_min` to `tokens_max` tokens. Each token that is pushed costs one
/// entry for each of these lengths, in O(log n); a proposal costs one look-up for each.
#[derive(Debug, Clone)]
pub struct NgramProposer {
    tokens_min: usize,
    tokens_max: usize,
    text: Vec<u32>,
    /// For each length, from the shortest: by the digest of an n-gram, where the token behind its latest
    /// occurrence is. A match is compared token by token.
    latest: Vec<BTreeMap<u64, usize>>,
}

impl NgramProposer {
    /// Matches of `tokens_min` to `tokens_max` tokens, both at least one; the usual choice is 2 to 4.
    pub fn new(tokens_min: usize, tokens_max: usize) -> NgramProposer {
        let (tokens_min, tokens_max) = (tokens_min.max(1), tokens_max.max(tokens_min).max(1));
        let latest = vec![BTreeMap::new(); tokens_max - tokens_min + 1];
        NgramProposer { tokens_min, tokens_max, text: Vec::new(), latest }
    }

    /// The text has grown by these tokens: the prompt, then what was generated.
    pub fn push(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.remember();
            self.text.push(token);
        }
    }

    /// The tokens of the text.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// Writes up to `drafts_max` drafts into `drafts`, which is cleared first.
    pub fn propose(&self, drafts_max: usize, drafts: &mut Vec<u32>) {
        drafts.clear();
        let Some(from) = self.follows() else { return };
        // What follows may reach into what is proposed: a text that repeats a short piece goes on like that.
        for place in 0..drafts_max {
            let token = self.text.get(from + place).copied();
            let token = token.unwrap_or_else(|| drafts[from + place - self.text.len()]);
            drafts.push(token);
        }
    }

    /// Where the token is that came behind the longest match.
    fn follows(&self) -> Option<usize> {
        (self.tokens_min..=self.tokens_max.min(self.text.len())).rev().find_map(|length| {
            let tail = &self.text[self.text.len() - length..];
            let &from = self.latest[length - self.tokens_min].get(&digest(tail))?;
            (self.text[from - length..from] == *tail).then_some(from)
        })
    }

    /// A token is about to come: notes where, for all n-grams that end before it.
    fn remember(&mut self) {
        let place = self.text.len();
        for length in self.tokens_min..=self.tokens_max.min(place) {
            let digest = digest(&self.text[place - length..]);
            self.latest[length - self.tokens_min].insert(digest, place);
        }
    }
}

fn digest(tokens: &[u32]) -> u64 {
    tokens.iter().fold(tokens.len() as u64, |digest, &token| {
        (digest ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposed(text: &[u32], drafts_max: usize) -> Vec<u32> {
        let mut proposer = NgramProposer::new(2, 3);
        proposer.push(text);
        let mut drafts = vec![9, 9];
        proposer.propose(drafts_max, &mut drafts);
        drafts
    }

    /// What follows the longest match, of several the latest, found by looking.
    fn looked_for(text: &[u32], drafts_max: usize) -> Vec<u32> {
        for length in (2..=3.min(text.len())).rev() {
            let tail = &text[text.len() - length..];
            let ends = (length..text.len()).rev();
            if let Some(from) = ends.into_iter().find(|&end| text[end - length..end] == *tail) {
                let mut longer = text.to_vec();
                (0..drafts_max).for_each(|place| longer.push(longer[from + place]));
                return longer[text.len()..].to_vec();
            }
        }
        Vec::new()
    }

    #[test]
    fn the_longest_match_wins_then_the_latest() {
        assert_eq!(proposed(&[1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 2), [7, 2]);
        assert_eq!(proposed(&[5, 2, 3, 7, 6, 2, 3, 8, 1, 2, 3], 1), [8]);
        assert_eq!(proposed(&[1, 2, 3, 4], 4), []);
        assert_eq!(proposed(&[], 4), []);
    }

    #[test]
    fn a_repeated_piece_goes_on() {
        assert_eq!(proposed(&[1, 2, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
    }

    #[test]
    fn it_finds_what_looking_finds() {
        let mut state = 1u64;
        for length in 0..200 {
            let text: Vec<u32> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 60) as u32 % 3
                })
                .collect();
            assert_eq!(proposed(&text, 4), looked_for(&text, 4), "{text:?}");
        }
    }
}

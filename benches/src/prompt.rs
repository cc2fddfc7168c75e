//! Prompts of a wanted length whose shared parts really are equal, token by token.

use crate::random::{hash, scale};

/// A run of tokens that is the same wherever its name appears.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// What its tokens are drawn from.
    pub name: PartName,
    /// How many tokens (or words) it has.
    pub tokens: u32,
}

/// Where the tokens of a part come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PartName {
    /// The prefix that every request of a group begins with.
    Group(u64),
    /// A block of a recorded trace.
    Block(u64),
    /// Tokens of this request alone.
    Request(u64),
}

impl PartName {
    const fn stream(self) -> u64 {
        match self {
            Self::Group(group) => group.wrapping_mul(4),
            Self::Block(block) => block.wrapping_mul(4) + 1,
            Self::Request(request) => request.wrapping_mul(4) + 2,
        }
    }
}

/// How a prompt is written into the request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// As an array of token ids drawn from `first..end`: exact lengths, no tokenizer in the way.
    Ids {
        /// The lowest id used; the ones below are left to special tokens.
        first: u32,
        /// One past the highest id used.
        end: u32,
    },
    /// As English words, one per wanted token; the server's `usage` says how many tokens they became.
    Text,
}

/// Appends the JSON of a prompt made of `parts` to `out`.
pub fn write(out: &mut String, seed: u64, form: Form, parts: &[Part]) {
    match form {
        Form::Ids { first, end } => write_ids(out, seed, first, end, parts),
        Form::Text => write_text(out, seed, parts),
    }
}

fn write_ids(out: &mut String, seed: u64, first: u32, end: u32, parts: &[Part]) {
    out.push('[');
    let width = u64::from(end.saturating_sub(first)).max(1);
    let start = out.len();
    for part in parts {
        for index in 0..part.tokens {
            if out.len() > start {
                out.push(',');
            }
            let token = u64::from(first) + scale(hash(seed, part.name.stream(), u64::from(index)), width);
            out.push_str(&token.to_string());
        }
    }
    out.push(']');
}

fn write_text(out: &mut String, seed: u64, parts: &[Part]) {
    out.push('"');
    let start = out.len();
    for part in parts {
        for index in 0..part.tokens {
            if out.len() > start {
                out.push(' ');
            }
            let choice = scale(hash(seed, part.name.stream(), u64::from(index)), WORDS.len() as u64);
            out.push_str(WORDS[usize::try_from(choice).unwrap_or(0)]);
        }
    }
    out.push('"');
}

const WORDS: [&str; 64] = [
    "the", "and", "to", "of", "you", "my", "that", "in", "is", "not", "me", "it", "for", "be", "his", "your",
    "this", "but", "he", "have", "as", "thou", "him", "so", "what", "her", "will", "all", "by", "no", "do",
    "shall", "if", "are", "we", "our", "on", "good", "now", "lord", "sir", "from", "come", "at", "they",
    "or", "let", "would", "she", "more", "was", "then", "here", "love", "man", "like", "king", "night",
    "day", "hand", "heart", "time", "world", "house",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(parts: &[Part]) -> Vec<u32> {
        let mut out = String::new();
        write(&mut out, 11, Form::Ids { first: 300, end: 1000 }, parts);
        serde_json::from_str(&out).unwrap()
    }

    #[test]
    fn shared_parts_are_equal_and_own_parts_differ() {
        let group = Part { name: PartName::Group(3), tokens: 40 };
        let first = ids(&[group, Part { name: PartName::Request(1), tokens: 24 }]);
        let second = ids(&[group, Part { name: PartName::Request(2), tokens: 24 }]);
        assert_eq!((first.len(), second.len()), (64, 64));
        assert_eq!(first[..40], second[..40]);
        assert_ne!(first[40..], second[40..]);
        assert!(first.iter().all(|id| (300..1000).contains(id)));
    }

    #[test]
    fn a_shorter_cut_of_a_block_is_its_beginning() {
        let whole = ids(&[Part { name: PartName::Block(9), tokens: 32 }]);
        let cut = ids(&[Part { name: PartName::Block(9), tokens: 10 }]);
        assert_eq!(whole[..10], cut[..]);
    }

    #[test]
    fn text_has_one_word_per_token() {
        let mut out = String::new();
        write(&mut out, 1, Form::Text, &[Part { name: PartName::Request(0), tokens: 17 }]);
        let text: String = serde_json::from_str(&out).unwrap();
        assert_eq!(text.split(' ').count(), 17);
    }
}

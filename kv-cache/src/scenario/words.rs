//! Reading commands: words, options and numbers.

use std::collections::{BTreeMap, VecDeque};

use crate::TokenId;

/// Tokens that one command may spell out.
const TOKENS_MAX: usize = 1 << 24;

/// The words of a command: `name=value` options, in any place, and the rest in order.
#[derive(Debug)]
pub(super) struct Words<'a> {
    plain: VecDeque<&'a str>,
    options: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    pub(super) fn of(command: &'a str) -> Result<Self, String> {
        let mut words = Words { plain: VecDeque::new(), options: BTreeMap::new() };
        for word in command.split_whitespace() {
            match word.split_once('=') {
                None => words.plain.push_back(word),
                Some((name, value)) => {
                    if words.options.insert(name, value).is_some() {
                        return Err(format!("`{name}` is given twice"));
                    }
                }
            }
        }
        Ok(words)
    }

    pub(super) fn next(&mut self, what: &str) -> Result<&'a str, String> {
        self.plain.pop_front().ok_or_else(|| format!("{what} is missing"))
    }

    pub(super) fn plain_number(&mut self, what: &str) -> Result<u32, String> {
        number(self.next(what)?)
    }

    pub(super) fn option(&mut self, name: &str) -> Option<&'a str> {
        self.options.remove(name)
    }

    pub(super) fn number(&mut self, name: &str) -> Result<Option<u32>, String> {
        self.option(name).map(number).transpose()
    }

    pub(super) fn flag(&mut self, name: &str) -> bool {
        let place = self.plain.iter().position(|&word| word == name);
        place.is_some_and(|place| self.plain.remove(place).is_some())
    }

    /// All remaining words as tokens; nothing may be left over.
    pub(super) fn tokens(mut self) -> Result<Vec<TokenId>, String> {
        let mut tokens = Vec::new();
        for word in std::mem::take(&mut self.plain) {
            let (first, last, times) = spelled(word)?;
            let length = (u64::from(last) - u64::from(first) + 1) * u64::from(times);
            if tokens.len() as u64 + length > TOKENS_MAX as u64 {
                return Err(format!("more than {TOKENS_MAX} tokens in one command"));
            }
            for _ in 0..times {
                tokens.extend(first..=last);
            }
        }
        self.end().map(|()| tokens)
    }

    pub(super) fn end(self) -> Result<(), String> {
        let left = self.plain.front().copied().or(self.options.keys().next().copied());
        left.map_or(Ok(()), |word| Err(format!("`{word}` has no meaning here")))
    }
}

/// `7`, `7*16` or `0-15`: first token, last token, how often.
fn spelled(word: &str) -> Result<(TokenId, TokenId, u32), String> {
    if let Some((token, times)) = word.split_once('*') {
        let token = number(token)?;
        return Ok((token, token, number(times)?));
    }
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let (first, last) = (number(first)?, number(last)?);
    if first > last { Err(format!("`{word}` runs backwards")) } else { Ok((first, last, 1)) }
}

pub(super) fn number(word: &str) -> Result<u32, String> {
    word.parse().map_err(|_| format!("`{word}` is not a number"))
}

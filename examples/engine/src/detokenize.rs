//! Ids to text as they come: never half a character, each piece once, at a cost linear in the text.

use std::sync::Arc;

use crate::text::Text;
use crate::tokenizer::{Leading, Tokenizer};

/// Turns tokens into text one at a time. Whatever the order of calls, the pieces put together are what
/// [`Text::decode`] gives for all tokens at once.
#[derive(Debug)]
pub struct TextStream {
    text: Arc<Text>,
    decoder: Decoder,
}

impl TextStream {
    pub(crate) fn new(text: Arc<Text>, skip_special_tokens: bool, after: &[u32]) -> Self {
        let tokenizer = text.tokenizer();
        let fresh = after.iter().all(|&id| skip_special_tokens && tokenizer.is_special(id));
        let leading = if fresh { tokenizer.leading() } else { Leading::Nothing };
        Self { decoder: Decoder::new(skip_special_tokens, leading), text }
    }

    /// Appends the text that became certain with this token.
    pub fn push(&mut self, id: u32, out: &mut String) {
        self.decoder.push(self.text.tokenizer(), id, out);
    }

    /// Appends U+FFFD for a character that was begun and never completed.
    pub fn finish(&mut self, out: &mut String) {
        self.decoder.finish(out);
    }
}

/// All tokens at once.
pub(crate) fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) -> String {
    let mut decoder = Decoder::new(skip_special_tokens, tokenizer.leading());
    let mut text = String::new();
    for &id in ids {
        decoder.push(tokenizer, id, &mut text);
    }
    decoder.finish(&mut text);
    text
}

#[derive(Debug)]
struct Decoder {
    skip_special_tokens: bool,
    /// What may still go away at the front.
    leading: Leading,
    /// The begun character: at most three bytes between calls.
    begun: Vec<u8>,
}

impl Decoder {
    fn new(skip_special_tokens: bool, leading: Leading) -> Self {
        Self { skip_special_tokens, leading, begun: Vec::new() }
    }

    fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) {
        if self.skip_special_tokens && tokenizer.is_special(id) {
            return;
        }
        let start = self.begun.len();
        tokenizer.append(id, &mut self.begun);
        self.strip_leading(start);
        self.release(out);
    }

    /// Takes spaces off the bytes from `start` on, as long as the text has not begun.
    fn strip_leading(&mut self, start: usize) {
        match self.leading {
            Leading::Nothing => {}
            Leading::Spaces(most) => {
                let new = &self.begun[start..];
                let spaces = new.iter().take(most).take_while(|&&byte| byte == b' ').count();
                let only_spaces = spaces == new.len();
                self.begun.drain(start..start + spaces);
                self.leading = match most - spaces {
                    left @ 1.. if only_spaces => Leading::Spaces(left),
                    _ => Leading::Nothing,
                };
            }
            Leading::SpacesOfFirstToken => {
                let kept: Vec<u8> = self.begun.drain(start..).filter(|&byte| byte != b' ').collect();
                self.begun.extend_from_slice(&kept);
                self.leading = Leading::Nothing;
            }
        }
    }

    /// Moves every complete character from `begun` to `out`; what can never become one is U+FFFD.
    fn release(&mut self, out: &mut String) {
        let mut complete = 0;
        for chunk in self.begun.utf8_chunks() {
            out.push_str(chunk.valid());
            complete += chunk.valid().len();
            if chunk.invalid().is_empty() || self.may_become_a_character(complete, chunk.invalid()) {
                break;
            }
            out.push(char::REPLACEMENT_CHARACTER);
            complete += chunk.invalid().len();
        }
        self.begun.drain(..complete);
    }

    /// Whether the invalid bytes at `start` are the end of what came so far and could be continued.
    fn may_become_a_character(&self, start: usize, invalid: &[u8]) -> bool {
        start + invalid.len() == self.begun.len()
            && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
    }

    fn finish(&mut self, out: &mut String) {
        if !self.begun.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.begun.clear();
        }
    }
}

//! The tokenizer of a checkpoint: text to ids, and the bytes that each id stands for.
//!
//! Decoding is done here rather than by the tokenizer library, because a stream needs it one token at a
//! time and at a cost that does not grow. Every decoder that language models use comes to the same thing:
//! a token stands for some bytes, the bytes are put behind one another, and sometimes spaces at the very
//! front go away.

use std::collections::BTreeSet;

use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{LoadError, TextError};

const FILE: &str = "tokenizer.json";

/// Text to ids and ids to bytes.
pub(crate) struct Tokenizer {
    library: tokenizers::Tokenizer,
    spelling: Spelling,
    leading: Leading,
    special: BTreeSet<u32>,
    vocab_size: u32,
}

/// How the vocabulary writes the bytes of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spelling {
    /// One character of the byte-level alphabet for each byte.
    ByteLevel,
    /// As text, with a character for the space, and perhaps `<0xE2>` for single bytes.
    Plain { space: Option<char>, byte_fallback: bool },
    /// As text, tokens set apart by spaces (no decoder at all).
    Separated,
}

/// What goes away at the very front of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Leading {
    /// Nothing.
    Nothing,
    /// Up to so many spaces.
    Spaces(usize),
    /// All spaces of the first token.
    SpacesOfFirstToken,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { spelling, leading, vocab_size, .. } = self;
        write!(f, "Tokenizer {{ {vocab_size} ids, {spelling:?}, {leading:?} }}")
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and from `tokenizer_config.json` the added tokens that it lacks.
    pub(crate) fn new(json: &[u8], config: &Value) -> Result<Self, LoadError> {
        let mut library = tokenizers::Tokenizer::from_bytes(json).map_err(|error| {
            LoadError::invalid(FILE, format!("not a tokenizer that is understood: {error}"))
        })?;
        library.with_truncation(None).map_err(|error| LoadError::invalid(FILE, error))?;
        library.with_padding(None);
        add_missing_tokens(&mut library, config)?;
        let (spelling, leading) = decoder(&library)?;
        let added = library.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let vocab_size = id_count(&library);
        if vocab_size == 0 {
            return Err(LoadError::invalid(FILE, "the vocabulary is empty"));
        }
        Ok(Self { library, spelling, leading, special, vocab_size })
    }

    /// One more than the largest id.
    pub(crate) fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    pub(crate) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.library.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| TextError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    pub(crate) fn knows(&self, id: u32) -> bool {
        self.library.id_to_token(id).is_some()
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Appends the bytes of a token inside a text; an unknown id has none.
    pub(crate) fn append(&self, id: u32, out: &mut Vec<u8>) {
        let Some(token) = self.library.id_to_token(id) else { return };
        match self.spelling {
            Spelling::ByteLevel => append_byte_level(&token, out),
            Spelling::Plain { space, byte_fallback } => match fallback_byte(&token) {
                Some(byte) if byte_fallback => out.push(byte),
                _ => append_plain(&token, space, out),
            },
            Spelling::Separated => {
                out.push(b' ');
                out.extend_from_slice(token.as_bytes());
            }
        }
    }

    /// What goes away at the front of a text.
    pub(crate) fn leading(&self) -> Leading {
        self.leading
    }
}

/// Puts tokens into the vocabulary that only `tokenizer_config.json` names, under the ids it gives them.
fn add_missing_tokens(library: &mut tokenizers::Tokenizer, config: &Value) -> Result<(), LoadError> {
    let file = "tokenizer_config.json";
    let Some(named) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut missing: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in named {
        let id: u32 = id
            .parse()
            .map_err(|_| LoadError::invalid(file, format!("added token id {id:?} is no number")))?;
        let Some(content) = token.get("content").and_then(Value::as_str) else {
            return Err(LoadError::invalid(file, format!("added token {id} has no content")));
        };
        if library.token_to_id(content).is_none() {
            let flag = |name| token.get(name).and_then(Value::as_bool);
            let special = flag("special").unwrap_or(false);
            let token = AddedToken::from(content, special)
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(!special));
            missing.push((id, token));
        }
    }
    missing.sort_by_key(|&(id, _)| id);
    for (id, token) in missing {
        let content = token.content.clone();
        let added = library.add_tokens([token]).map_err(|error| LoadError::invalid(file, error))?;
        if added == 1 && library.token_to_id(&content) != Some(id) {
            let problem =
                format!("added token {content:?} should be {id}, but {FILE} has no room for it there");
            return Err(LoadError::invalid(file, problem));
        }
    }
    Ok(())
}

/// One more than the largest id. Cost: nothing when ids have no gaps, one pass over the vocabulary otherwise.
fn id_count(library: &tokenizers::Tokenizer) -> u32 {
    let added = library.get_added_tokens_decoder().keys().max().map_or(0, |id| id + 1);
    let model = u32::try_from(library.get_vocab_size(false)).unwrap_or(u32::MAX);
    let dense = model == 0 || library.id_to_token(model - 1).is_some();
    let model = if dense { model } else { library.get_vocab(false).values().max().map_or(0, |id| id + 1) };
    model.max(added)
}

/// Reads the decoder's description. What cannot be done byte by byte is refused by name.
fn decoder(library: &tokenizers::Tokenizer) -> Result<(Spelling, Leading), LoadError> {
    let Some(decoder) = library.get_decoder() else { return Ok((Spelling::Separated, Leading::Spaces(1))) };
    let decoder = serde_json::to_value(decoder).map_err(|error| LoadError::invalid(FILE, error))?;
    let steps = match decoder.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.clone(),
        None => vec![decoder],
    };
    let mut spelling = Spelling::Plain { space: None, byte_fallback: false };
    let mut leading = Leading::Nothing;
    for step in &steps {
        apply_step(step, &mut spelling, &mut leading)?;
    }
    Ok((spelling, leading))
}

fn apply_step(step: &Value, spelling: &mut Spelling, leading: &mut Leading) -> Result<(), LoadError> {
    let text = |name: &str| step.get(name).and_then(Value::as_str).unwrap_or_default();
    let one_char = |text: &str| text.chars().next().filter(|c| c.len_utf8() == text.len());
    let refused = |what: String| LoadError::Unsupported { file: FILE.into(), feature: what };
    match (text("type"), &mut *spelling) {
        ("ByteLevel", _) => *spelling = Spelling::ByteLevel,
        ("Fuse", _) => {}
        ("ByteFallback", Spelling::Plain { byte_fallback, .. }) => *byte_fallback = true,
        ("Metaspace", Spelling::Plain { space, .. }) => {
            *space = one_char(text("replacement"));
            if text("prepend_scheme") != "never" {
                *leading = Leading::SpacesOfFirstToken;
            }
        }
        ("Replace", Spelling::Plain { space, .. }) => {
            let from = step.pointer("/pattern/String").and_then(Value::as_str).and_then(one_char);
            match from {
                Some(from) if text("content") == " " => *space = Some(from),
                _ => return Err(refused(format!("the decoder step {step}"))),
            }
        }
        ("Strip", _) => {
            let count = |name| step.get(name).and_then(Value::as_u64).unwrap_or(0);
            if text("content") != " " || count("stop") != 0 {
                return Err(refused(format!("the decoder step {step}")));
            }
            *leading = Leading::Spaces(usize::try_from(count("start")).unwrap_or(usize::MAX));
        }
        (other, _) => return Err(refused(format!("the decoder step {other:?}"))),
    }
    Ok(())
}

/// The byte that `<0xE2>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

fn append_plain(token: &str, space: Option<char>, out: &mut Vec<u8>) {
    let mut utf8 = [0; 4];
    for character in token.chars() {
        let character = if Some(character) == space { ' ' } else { character };
        out.extend_from_slice(character.encode_utf8(&mut utf8).as_bytes());
    }
}

/// A token with a character outside the alphabet (an added token with a space, say) stands for itself.
fn append_byte_level(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for character in token.chars() {
        match byte_of(character) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte-level alphabet: printable Latin-1 stands for itself; the 68 other bytes follow, in order, from U+0100.
fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_alphabet_has_each_byte_once() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        bytes.dedup();
        assert_eq!(bytes.len(), 256);
        assert_eq!((byte_of('\u{120}'), byte_of('\u{10A}')), (Some(b' '), Some(b'\n')));
        assert_eq!(
            (byte_of('\u{142}'), byte_of('\u{143}'), byte_of('\u{144}')),
            (Some(0xA0), Some(0xAD), None)
        );
    }

    #[test]
    fn tokens_outside_the_alphabet_stand_for_themselves() {
        let mut out = Vec::new();
        append_byte_level("a b", &mut out);
        append_byte_level("\u{120}c", &mut out);
        assert_eq!(out, b"a b c");
    }

    #[test]
    fn only_two_hexadecimal_digits_are_a_byte() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xE2));
        assert_eq!(fallback_byte("<0xE>"), None);
        assert_eq!(fallback_byte("<0xE20>"), None);
        assert_eq!(fallback_byte("<s>"), None);
    }

    #[test]
    fn a_decoder_that_is_not_byte_by_byte_is_refused_by_name() {
        let json = br#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
            "post_processor":null,"truncation":null,"padding":null,
            "decoder":{"type":"WordPiece","prefix":"--","cleanup":true},
            "model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
        let error = Tokenizer::new(json, &Value::Null).unwrap_err().to_string();
        assert_eq!(error, "tokenizer.json: the decoder step \"WordPiece\" is not supported");
    }

    #[test]
    fn a_missing_added_token_must_fit_its_id() {
        let json = br#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
            "post_processor":null,"truncation":null,"padding":null,"decoder":null,
            "model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
        let config = |id: u32| serde_json::json!({"added_tokens_decoder": {id.to_string(): {"content": "<x>", "special": true}}});
        let tokenizer = Tokenizer::new(json, &config(1)).unwrap();
        assert!(tokenizer.is_special(1));
        assert_eq!(tokenizer.vocab_size(), 2);
        let error = Tokenizer::new(json, &config(7)).unwrap_err().to_string();
        assert!(error.contains("should be 7"), "{error}");
    }
}

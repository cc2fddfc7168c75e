//! Text in, text out: tokenizer and chat templates of a checkpoint, shared by all threads.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::chat::{self, Chat};
use crate::detokenize::{self, TextStream};
use crate::error::{LoadError, TextError};
use crate::files::ModelFiles;
use crate::template::Templates;
use crate::tokenizer::Tokenizer;

const CONFIG: &str = "tokenizer_config.json";

/// The tokenizer and the chat templates of a checkpoint. Never changes; share it in an [`Arc`].
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    templates: Templates,
    special: Map<String, Value>,
}

/// The text and the bytes of one token, for `logprobs` on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    /// As text; incomplete characters become U+FFFD.
    pub text: String,
    /// As bytes.
    pub bytes: Vec<u8>,
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`;
    /// all but the first may be missing.
    ///
    /// # Errors
    /// A file that is malformed, by name; a decoder that is not supported; a template that does not compile.
    pub fn load(files: &ModelFiles) -> Result<Self, LoadError> {
        let json = files.required("tokenizer.json")?;
        let config = files.json(CONFIG)?.unwrap_or_default();
        let mut special = files.json("special_tokens_map.json")?.unwrap_or_default();
        special.extend(config.clone());
        let templates = template_sources(files, &config)?;
        let config = Value::Object(config);
        Ok(Self {
            tokenizer: Tokenizer::new(&json, &config)?,
            templates: Templates::new(templates)?,
            special: special_tokens(&special),
        })
    }

    /// Tokens of a text. `add_special_tokens` adds what the tokenizer puts around a text, such as
    /// begin-of-sequence; a rendered chat already has it.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] when the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        self.tokenizer.encode(text, add_special_tokens)
    }

    /// The text of tokens, whole. Bytes that are no character become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        detokenize::decode(&self.tokenizer, ids, skip_special_tokens)
    }

    /// Turns tokens into text as they come, behind the tokens `after`: a text that continues another keeps
    /// the space at its front.
    #[must_use]
    pub fn stream(self: &Arc<Self>, skip_special_tokens: bool, after: &[u32]) -> TextStream {
        TextStream::new(Arc::clone(self), skip_special_tokens, after)
    }

    /// One token by itself; `None` when the vocabulary has no such id.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<TokenText> {
        let mut bytes = Vec::new();
        self.tokenizer.append(id, &mut bytes);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        self.tokenizer.knows(id).then_some(TokenText { text, bytes })
    }

    /// The id of a token by its name in the vocabulary, such as `<|im_end|>`.
    #[must_use]
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.tokenizer.id(name)
    }

    /// Whether the token only has a meaning to the model: begin-of-sequence, end of turn, …
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.tokenizer.is_special(id)
    }

    /// End-of-sequence by the tokenizer's configuration.
    #[must_use]
    pub fn eos_token(&self) -> Option<u32> {
        self.token_id(self.special.get("eos_token")?.as_str()?)
    }

    /// One more than the largest id the tokenizer knows.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.tokenizer.vocab_size()
    }

    /// Whether the model came with a chat template.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// A conversation as text, by the chat template.
    ///
    /// # Errors
    /// No template, an invalid one, or one that refuses this conversation.
    pub fn render_chat(&self, chat: &Chat) -> Result<String, TextError> {
        chat::render(&self.templates, &self.special, chat)
    }

    /// A conversation as tokens: [`render_chat`](Text::render_chat), then
    /// [`encode`](Text::encode) without adding special tokens.
    ///
    /// # Errors
    /// Those of the two.
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, TextError> {
        self.encode(&self.render_chat(chat)?, false)
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// `bos_token` and its like: a string each, in the file sometimes an object around it.
fn special_tokens(fields: &Map<String, Value>) -> Map<String, Value> {
    let named = fields.iter().filter(|(name, _)| name.ends_with("_token"));
    let content = |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).map(Value::from);
    named.filter_map(|(name, value)| Some((name.clone(), content(value)?))).collect()
}

/// Templates by name: `chat_template.jinja` goes before the one inside `tokenizer_config.json`.
fn template_sources(
    files: &ModelFiles,
    config: &Map<String, Value>,
) -> Result<BTreeMap<String, String>, LoadError> {
    let mut sources = match config.get("chat_template") {
        None | Some(Value::Null) => BTreeMap::new(),
        Some(Value::String(source)) => BTreeMap::from([("default".to_owned(), source.clone())]),
        Some(Value::Array(named)) => named.iter().map(named_template).collect::<Result<_, _>>()?,
        Some(_) => return Err(LoadError::invalid(CONFIG, "chat_template is neither a string nor a list")),
    };
    let file = "chat_template.jinja";
    if let Some(source) = files.read(file)? {
        let source = String::from_utf8(source).map_err(|error| LoadError::invalid(file, error))?;
        sources.insert("default".into(), source);
    }
    Ok(sources)
}

fn named_template(entry: &Value) -> Result<(String, String), LoadError> {
    let field = |name| entry.get(name).and_then(Value::as_str).map(str::to_owned);
    match (field("name"), field("template")) {
        (Some(name), Some(template)) => Ok((name, template)),
        _ => Err(LoadError::invalid(CONFIG, "an entry of chat_template lacks name or template")),
    }
}

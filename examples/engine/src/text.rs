//! Text in, text out: tokenizer, chat template and streams of text, shared by all threads.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::TextError;

/// The tokenizer and the chat template of a checkpoint. Cheap to share, never changes.
#[derive(Debug)]
pub struct Text {}

/// A conversation to be rendered by the chat template.
#[derive(Debug, Clone, Default)]
pub struct Chat {
    /// Messages as on the OpenAI wire: objects with `role`, `content` (a string or a list of parts), …
    pub messages: Vec<Value>,
    /// Tool definitions as on the OpenAI wire; also picks the template called `tool_use`, if there is one.
    pub tools: Option<Vec<Value>>,
    /// Documents for retrieval templates.
    pub documents: Option<Vec<Value>>,
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the final message open, to be continued.
    pub continue_final_message: bool,
    /// A template to use in place of the model's: its source, or the name of one of the model's own.
    pub template: Option<String>,
    /// Further variables for the template (`chat_template_kwargs`).
    pub variables: Map<String, Value>,
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
    /// Tokens of a text. `add_special_tokens` adds what the tokenizer puts around a text, such as
    /// begin-of-sequence; a rendered chat already has it.
    ///
    /// # Errors
    /// [`TextError::Tokenizer`] when the tokenizer cannot represent the text.
    pub fn encode(&self, _text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        Ok(Vec::new())
    }

    /// The text of tokens, whole.
    #[must_use]
    pub fn decode(&self, _ids: &[u32], _skip_special_tokens: bool) -> String {
        String::new()
    }

    /// One token by itself; `None` when the vocabulary has no such id.
    #[must_use]
    pub fn token(&self, _id: u32) -> Option<TokenText> {
        None
    }

    /// Whether the model came with a chat template.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        false
    }

    /// A conversation as text, by the chat template.
    ///
    /// # Errors
    /// No template, an invalid one, or one that refuses this conversation.
    pub fn render_chat(&self, _chat: &Chat) -> Result<String, TextError> {
        Err(TextError::NoTemplate)
    }

    /// A conversation as tokens: [`render_chat`](Text::render_chat), then
    /// [`encode`](Text::encode) without adding special tokens.
    ///
    /// # Errors
    /// Those of the two.
    pub fn encode_chat(&self, chat: &Chat) -> Result<Vec<u32>, TextError> {
        self.encode(&self.render_chat(chat)?, false)
    }

    /// Turns tokens into text as they come.
    #[must_use]
    pub fn stream(self: &Arc<Self>, _skip_special_tokens: bool) -> TextStream {
        TextStream {}
    }

    /// Number of ids the tokenizer can produce.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        0
    }
}

/// Text out of tokens as they come: never half a character, each piece once.
#[derive(Debug)]
pub struct TextStream {}

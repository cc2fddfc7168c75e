//! Log-probabilities in the shapes of the chat API, the completions API, and of vLLM's prompt.

use quayline_engine::{Logprobs, SampledToken, Text, TokenLogprob, TokenText};
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

/// JSON has no minus infinity; this is what vLLM writes.
const LEAST: f32 = -9999.0;

/// `logprobs` of a chat choice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    /// One entry per token.
    content: Vec<ChatToken>,
    /// Always null.
    refusal: Option<()>,
}

/// One token of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatToken {
    /// Its text.
    token: String,
    /// Natural logarithm of its probability.
    logprob: f64,
    /// Its text in bytes; several tokens may share a character.
    bytes: Vec<u8>,
    /// The most likely tokens at its place.
    top_logprobs: Vec<TopToken>,
}

/// A token that might have been.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(crate) struct TopToken {
    /// Its text.
    token: String,
    /// Natural logarithm of its probability.
    logprob: f64,
    /// Its text in bytes.
    bytes: Vec<u8>,
}

/// `logprobs` of a completion choice: four lists of equal length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    /// Where each token starts in the text, in characters.
    text_offset: Vec<usize>,
    /// Log-probabilities; null for the first token of an echoed prompt.
    token_logprobs: Vec<Option<f64>>,
    /// Texts.
    tokens: Vec<String>,
    /// The most likely tokens and the one that was chosen.
    #[schema(value_type = Vec<Option<Object>>)]
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl CompletionLogprobs {
    /// Appends the tokens that follow.
    pub(crate) fn join(&mut self, next: Self) {
        self.text_offset.extend(next.text_offset);
        self.token_logprobs.extend(next.token_logprobs);
        self.tokens.extend(next.tokens);
        self.top_logprobs.extend(next.top_logprobs);
    }
}

/// Writes log-probabilities with the texts of tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Writer<'a> {
    pub(crate) text: &'a Text,
    /// `return_tokens_as_token_ids`.
    pub(crate) as_ids: bool,
}

impl Writer<'_> {
    /// The chat shape.
    pub(crate) fn chat(self, tokens: &[SampledToken]) -> ChatLogprobs {
        let known = tokens.iter().filter_map(|token| token.logprobs.as_ref());
        ChatLogprobs { content: known.map(|logprobs| self.chat_token(logprobs)).collect(), refusal: None }
    }

    fn chat_token(self, logprobs: &Logprobs) -> ChatToken {
        let TopToken { token, logprob, bytes } = self.top(&logprobs.chosen);
        let top_logprobs = logprobs.top.iter().map(|top| self.top(top)).collect();
        ChatToken { token, logprob, bytes, top_logprobs }
    }

    fn top(self, token: &TokenLogprob) -> TopToken {
        let TokenText { text, bytes } = self.token(token.id);
        TopToken { token: text, logprob: finite(token.logprob), bytes }
    }

    /// Appends tokens in the completions shape; `offset` is where the next token starts in the text.
    pub(crate) fn append<'a>(
        self,
        to: &mut CompletionLogprobs,
        offset: &mut usize,
        tokens: impl IntoIterator<Item = (u32, Option<&'a Logprobs>)>,
    ) {
        for (id, logprobs) in tokens {
            let text = self.token(id).text;
            to.text_offset.push(*offset);
            *offset += text.chars().count();
            to.tokens.push(text);
            to.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.chosen.logprob)));
            to.top_logprobs.push(logprobs.map(|logprobs| self.map(logprobs)));
        }
    }

    fn map(self, logprobs: &Logprobs) -> Map<String, Value> {
        let all = logprobs.top.iter().chain([&logprobs.chosen]);
        all.map(|token| (self.token(token.id).text, json!(finite(token.logprob)))).collect()
    }

    /// vLLM's `prompt_logprobs`: per token null or an object by token id.
    pub(crate) fn prompt(self, logprobs: &[Option<Logprobs>]) -> Value {
        let entry = |token: &TokenLogprob| {
            let decoded = self.text.token(token.id).map(|token| token.text);
            let value = json!({
                "logprob": finite(token.logprob), "rank": token.rank, "decoded_token": decoded
            });
            (token.id.to_string(), value)
        };
        let position = |logprobs: &Logprobs| {
            Value::Object(logprobs.top.iter().chain([&logprobs.chosen]).map(entry).collect())
        };
        logprobs.iter().map(|logprobs| logprobs.as_ref().map_or(Value::Null, position)).collect()
    }

    fn token(self, id: u32) -> TokenText {
        let mut token =
            self.text.token(id).unwrap_or_else(|| TokenText { text: String::new(), bytes: Vec::new() });
        if self.as_ids {
            token.text = format!("token_id:{id}");
        }
        token
    }
}

fn finite(logprob: f32) -> f64 {
    f64::from(logprob.max(LEAST))
}

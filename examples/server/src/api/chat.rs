//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use quayline_engine::{Chat, Finish, Logprobs, SampledToken};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::access::Tag;
use crate::api::body::{self, Json, Parse};
use crate::api::error::{ApiError, ErrorBody};
use crate::api::fields::Shared;
use crate::api::generation::{self, Generation, Head, Plan, aside, finish_reason, stop_reason};
use crate::api::logprobs::{ChatLogprobs, Writer};
use crate::api::message;
use crate::api::stream::{self, ChunkUsage, Chunks, json_text};
use crate::api::usage::Usage;
use crate::app::{App, Model};
use crate::caller::{self, Caller};
use crate::engine::Part;

/// The fields that only a chat has.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The conversation so far: objects with `role` and `content`, text only.
    #[schema(min_items = 1, value_type = Vec<Object>)]
    messages: Option<Vec<Value>>,
    /// Most tokens to answer with; goes before `max_tokens`.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u32>,
    /// Report log-probabilities.
    logprobs: Option<bool>,
    /// How many of the most likely tokens to report at each place.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    /// Shown to the template, if it knows tools. Only with `tool_choice: "none"`: calls are not parsed yet.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// Only `none` together with tools.
    #[schema(value_type = Option<Object>)]
    tool_choice: Option<Value>,
    /// Begin the answer with the final message, if that is the assistant's.
    echo: Option<bool>,
    /// End the prompt with the opening of the assistant's turn (the default).
    add_generation_prompt: Option<bool>,
    /// Leave the final message open, to be continued.
    continue_final_message: Option<bool>,
    /// A template for this request, where the server allows it.
    chat_template: Option<String>,
    /// Further variables for the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Documents for templates that know them.
    #[schema(value_type = Option<Vec<Object>>)]
    documents: Option<Vec<Value>>,
}

/// Body of a chat request.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    own: ChatFields,
    shared: Shared,
}

impl Parse for ChatRequest {
    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let request = Self { own: body::known(bytes)?, shared: body::known(bytes)? };
        body::refuse_others::<ChatFields, Shared>(bytes)?;
        Ok(request)
    }
}

body::both_schemas!(ChatRequest, ChatFields, Shared);

/// The answer, whole.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
    system_fingerprint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    kv_transfer_params: Option<Value>,
}

/// One answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    index: u32,
    message: ChatMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    #[schema(value_type = Option<Object>)]
    stop_reason: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// What the model said.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatMessage {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

/// One event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<ChatDelta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    usage: ChunkUsage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// What is new in one answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatDelta {
    index: u32,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[schema(value_type = Option<Object>)]
    stop_reason: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// New text; the first of an answer also has its role.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: String,
}

/// Answer a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "OpenAI", params(caller::Headers), request_body = ChatRequest, responses(
    (status = 200, description = "The answer, or with `stream` server-sent events of chunks", content(
        (ChatCompletion = "application/json"), (ChatChunk = "text/event-stream"))),
    (status = "4XX", description = "The request is wrong, or too many wait", body = ErrorBody),
    (status = "5XX", description = "The engine failed, or the server starts or stops", body = ErrorBody),
))]
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(tag): Extension<Tag>,
    caller: Caller,
    Json(request, share): Json<ChatRequest>,
) -> Result<Response, ApiError> {
    let in_flight = app.enter()?;
    let model = app.model()?;
    let ChatRequest { own, shared } = request;
    let head = generation::head(&app, &model, &shared, "chatcmpl", &tag.id)?;
    let limits = app.limits(&model);
    let asked = own.max_completion_tokens.or(shared.max_tokens);
    let sampling = shared.sampling(asked, ("top_logprobs", own.logprobs()?), limits)?;
    let report = shared.usage_report(app.force_usage)?;
    let wanted = shared.wanted()?;
    let beams = shared.beams()?;
    let (n, turn, cache_salt) = (shared.n()?, shared.turn(&caller, limits)?, shared.cache_salt()?);

    let add_special_tokens = shared.add_special_tokens.unwrap_or(false);
    let (chat, echo) = own.chat(&app, &model)?;
    let text = Arc::clone(&model.text);
    let ids = aside(move || Ok(text.encode(&text.render_chat(&chat)?, add_special_tokens)?)).await?;
    let prompt: Arc<[u32]> = shared.fit(ids, asked, "messages", limits)?.into();
    drop(share);

    let writer = Answer {
        head,
        echo,
        logprobs: sampling.logprobs.is_some(),
        as_ids: shared.return_tokens_as_token_ids == Some(true),
        prompt_ids: (shared.return_token_ids == Some(true)).then(|| prompt.to_vec()),
        model: Arc::clone(&model),
    };
    let prompts = vec![prompt];
    let plan = Plan {
        prompts,
        n,
        beams,
        sampling,
        wanted,
        turn,
        cache_salt,
        arrived: tag.arrived,
        counts_answers: true,
        half: generation::half(&app, &shared)?,
    };
    let generation = plan.submit(&app, &model, in_flight, &writer.head).await?;
    if shared.stream == Some(true) {
        let begun = vec![false; generation.choices];
        return Ok(stream::respond(app, generation, report, Streamed { writer, begun }));
    }
    Ok(axum::Json(writer.collect(&app, generation).await?).into_response())
}

impl ChatFields {
    fn logprobs(&self) -> Result<Option<u32>, ApiError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(ApiError::field("top_logprobs", "needs logprobs: true")),
        }
    }

    /// The conversation for the template, and the text that the answer repeats.
    fn chat(self, app: &App, model: &Model) -> Result<(Chat, String), ApiError> {
        let tools = self.tools.filter(|tools| !tools.is_empty());
        check_tools(tools.is_some(), self.tool_choice.as_ref())?;
        if self.chat_template.is_some() && !app.trust_request_template {
            let problem = "needs a server started with --trust-request-chat-template";
            return Err(ApiError::field("chat_template", problem));
        }
        let messages = self.messages.ok_or_else(|| ApiError::field("messages", "is missing"))?;
        let messages = message::prepare(messages, app.content_format)?;
        let echo = match messages.last() {
            Some(last) if self.echo == Some(true) && last["role"] == "assistant" => text_of(&last["content"]),
            _ => String::new(),
        };
        let mut variables = app.template_variables.clone();
        variables.extend(self.chat_template_kwargs.unwrap_or_default());
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        let chat = Chat {
            messages,
            tools,
            documents: self.documents,
            // The default gives way to an explicit wish to continue; two explicit wishes contradict.
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            template: self.chat_template.or_else(|| model.template.clone()),
            variables,
        };
        Ok((chat, echo))
    }
}

fn check_tools(given: bool, choice: Option<&Value>) -> Result<(), ApiError> {
    let choice = choice.filter(|choice| !choice.is_null());
    match choice.and_then(Value::as_str) {
        Some("none") => Ok(()),
        _ if given => Err(ApiError::field("tools", "need tool_choice \"none\": calls are not parsed yet")),
        Some("auto") => Ok(()),
        _ if choice.is_none() => Ok(()),
        _ => Err(ApiError::field("tool_choice", "can only be none or auto: calls are not parsed yet")),
    }
}

fn text_of(content: &Value) -> String {
    content.as_str().or_else(|| content[0]["text"].as_str()).unwrap_or_default().to_owned()
}

/// Writes an answer.
struct Answer {
    head: Head,
    echo: String,
    logprobs: bool,
    as_ids: bool,
    /// Also says that the answers' ids are wanted.
    prompt_ids: Option<Vec<u32>>,
    model: Arc<Model>,
}

impl Answer {
    fn writer(&self) -> Writer<'_> {
        Writer { text: &self.model.text, as_ids: self.as_ids }
    }

    fn logprobs(&self, tokens: &[SampledToken]) -> Option<ChatLogprobs> {
        self.logprobs.then(|| self.writer().chat(tokens))
    }

    fn token_ids(&self, tokens: &[SampledToken]) -> Option<Vec<u32>> {
        self.prompt_ids.as_ref().map(|_| tokens.iter().map(|token| token.id).collect())
    }

    async fn collect(self, app: &App, mut generation: Generation) -> Result<ChatCompletion, ApiError> {
        let mut drafts: Vec<Draft> = Vec::new();
        drafts.resize_with(generation.choices, || Draft { content: self.echo.clone(), ..Draft::default() });
        let mut prompt_logprobs: Option<Vec<Option<Logprobs>>> = None;
        while let Some(parts) = generation.ticket.next().await {
            for part in parts.map_err(|_| generation::given_up(app))? {
                generation.tally.note(&part);
                let draft = &mut drafts[part.choice as usize];
                let output = part.output;
                draft.content.push_str(&output.text);
                draft.tokens.extend(output.tokens);
                draft.finish = output.finish.or(draft.finish.take());
                prompt_logprobs = prompt_logprobs.or(output.prompt_logprobs);
            }
        }
        let kv_transfer_params = generation.transfer_params(app).await;
        let choices = (0..).zip(drafts).map(|(index, draft)| self.choice(index, draft)).collect();
        let prompt_logprobs = prompt_logprobs.map(|logprobs| self.writer().prompt(&logprobs));
        let Head { id, created, model, system_fingerprint } = self.head;
        Ok(ChatCompletion {
            id,
            object: "chat.completion",
            created,
            model,
            choices,
            usage: generation.tally.usage(),
            system_fingerprint,
            prompt_logprobs,
            prompt_token_ids: self.prompt_ids,
            kv_transfer_params,
        })
    }

    fn choice(&self, index: u32, draft: Draft) -> ChatChoice {
        ChatChoice {
            index,
            logprobs: self.logprobs(&draft.tokens),
            token_ids: self.token_ids(&draft.tokens),
            message: ChatMessage { role: "assistant", content: draft.content, refusal: None },
            finish_reason: draft.finish.as_ref().map_or("length", finish_reason),
            stop_reason: stop_reason(draft.finish.as_ref()),
        }
    }
}

/// One answer as it grows.
#[derive(Default)]
struct Draft {
    content: String,
    tokens: Vec<SampledToken>,
    finish: Option<Finish>,
}

struct Streamed {
    writer: Answer,
    /// Which choices have had their first chunk.
    begun: Vec<bool>,
}

impl Streamed {
    fn write(&self, choices: Vec<ChatDelta>, usage: ChunkUsage, prompt_ids: Option<Vec<u32>>) -> String {
        let Head { id, created, model, system_fingerprint } = self.writer.head.clone();
        json_text(&ChatChunk {
            id,
            object: "chat.completion.chunk",
            created,
            model,
            system_fingerprint,
            choices,
            usage,
            prompt_token_ids: prompt_ids,
        })
    }
}

impl Chunks for Streamed {
    fn chunk(&mut self, part: Part, usage: ChunkUsage) -> String {
        let very_first = !self.begun.contains(&true);
        let first = !std::mem::replace(&mut self.begun[part.choice as usize], true);
        let output = part.output;
        let content = if first { self.writer.echo.clone() + &output.text } else { output.text };
        let delta = ChatDelta {
            index: part.choice,
            delta: Delta { role: first.then_some("assistant"), content },
            logprobs: self.writer.logprobs(&output.tokens),
            finish_reason: output.finish.as_ref().map(finish_reason),
            stop_reason: stop_reason(output.finish.as_ref()),
            token_ids: self.writer.token_ids(&output.tokens),
        };
        let prompt_ids = self.writer.prompt_ids.clone().filter(|_| very_first);
        self.write(vec![delta], usage, prompt_ids)
    }

    fn last(&mut self, usage: Usage) -> String {
        self.write(Vec::new(), Some(Some(usage)), None)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tools_are_refused_unless_they_are_not_to_be_called() {
        assert!(check_tools(false, None).is_ok());
        assert!(check_tools(true, Some(&json!("none"))).is_ok());
        assert!(check_tools(false, Some(&json!("auto"))).is_ok());
        for choice in [None, Some(json!("auto")), Some(json!("required")), Some(json!({}))] {
            assert!(check_tools(true, choice.as_ref()).is_err(), "{choice:?}");
        }
        for choice in [json!("required"), json!({"type": "function"}), json!(3)] {
            assert!(check_tools(false, Some(&choice)).is_err(), "{choice:?}");
        }
    }
}

//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use quayline_engine::{Logprobs, SampledToken};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::access::Tag;
use crate::api::body::{self, Json, Parse};
use crate::api::error::{ApiError, ErrorBody};
use crate::api::fields::{Limits, N_MAX, Shared};
use crate::api::generation::{self, Generation, Head, Plan, aside, finish_reason, scored, stop_reason};
use crate::api::logprobs::{CompletionLogprobs, Writer};
use crate::api::prompt::Prompt;
use crate::api::stream::{self, ChunkUsage, Chunks, json_text};
use crate::api::usage::Usage;
use crate::app::{App, Model};
use crate::caller::{self, Caller};
use crate::engine::Part;

/// OpenAI's default for `max_tokens`.
const MAX_TOKENS: u32 = 16;

/// Most prompts in one request.
const PROMPTS_MAX: usize = 1024;

/// The fields that only a completion has.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// Text, texts, tokens or lists of tokens.
    #[schema(value_type = Prompt)]
    prompt: Option<Prompt>,
    /// Begin the answer with the prompt. With `max_tokens: 0` the prompt is only scored.
    echo: Option<bool>,
    /// Report log-probabilities, and this many of the most likely tokens at each place.
    #[schema(maximum = 20)]
    logprobs: Option<u32>,
    /// Make so many answers to each prompt, and give the `n` whose tokens are the most likely on average. Not with
    /// `stream`, if it is more than `n`.
    #[schema(minimum = 1, maximum = 128)]
    best_of: Option<u32>,
}

/// Body of a completion request.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    own: CompletionFields,
    shared: Shared,
}

impl Parse for CompletionRequest {
    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        let request = Self { own: body::known(bytes)?, shared: body::known(bytes)? };
        body::refuse_others::<CompletionFields, Shared>(bytes)?;
        Ok(request)
    }
}

body::both_schemas!(CompletionRequest, CompletionFields, Shared);

/// The answer, whole or one event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    usage: ChunkUsage,
    system_fingerprint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    kv_transfer_params: Option<Value>,
}

/// One answer, or what is new in it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
    #[schema(value_type = Option<Object>)]
    stop_reason: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// Continue text.
#[utoipa::path(post, path = "/v1/completions", tag = "OpenAI", params(caller::Headers), request_body = CompletionRequest, responses(
    (status = 200, description = "The answer, or with `stream` server-sent events of the same shape", content(
        (Completion = "application/json"), (Completion = "text/event-stream"))),
    (status = "4XX", description = "The request is wrong, or too many wait", body = ErrorBody),
    (status = "5XX", description = "The engine failed, or the server starts or stops", body = ErrorBody),
))]
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(tag): Extension<Tag>,
    caller: Caller,
    Json(request, share): Json<CompletionRequest>,
) -> Result<Response, ApiError> {
    let in_flight = app.enter()?;
    let model = app.model()?;
    let CompletionRequest { own, shared } = request;
    let head = generation::head(&app, &model, &shared, "cmpl", &tag.id)?;
    let limits = app.limits(&model);
    let n = shared.n()?;
    let tried = own.best_of(n, shared.stream == Some(true))?;
    let echo = own.echo == Some(true);
    let asked = shared.max_tokens.unwrap_or(MAX_TOKENS);
    let scores_only = asked == 0 && echo;
    let max_tokens = if scores_only { 1 } else { asked };
    let mut sampling = shared.sampling(Some(max_tokens), ("logprobs", own.logprobs), limits)?;
    let reports_prompt = sampling.prompt_logprobs.is_some();
    if echo {
        sampling.prompt_logprobs = sampling.prompt_logprobs.max(sampling.logprobs);
    }
    let report = shared.usage_report(app.force_usage)?;
    let wanted = shared.wanted()?;
    let beams = shared.beams()?;
    if beams.is_some() && tried > n {
        return Err(ApiError::field("best_of", "is n in a beam search"));
    }
    let half = generation::half(&app, &shared)?;
    let (turn, cache_salt) = (shared.turn(&caller, limits)?, shared.cache_salt()?);

    let answer = Answer {
        head,
        model: Arc::clone(&model),
        echo,
        scores_only,
        reports_prompt,
        logprobs: sampling.logprobs.is_some(),
        as_ids: shared.return_tokens_as_token_ids == Some(true),
        returns_ids: shared.return_token_ids == Some(true),
        prompts: Vec::new(),
        n,
        tried,
    };
    if tried > n {
        sampling.logprobs = sampling.logprobs.or(Some(0));
    }
    let prompt = own.prompt.ok_or_else(|| ApiError::field("prompt", "is missing"))?;
    let prompts = tokens(prompt, &model, &shared, max_tokens, limits).await?;
    drop(share);
    let answer = Answer { prompts: prompts.clone(), ..answer };
    let plan = Plan {
        prompts,
        n: tried,
        beams,
        sampling,
        wanted,
        turn,
        cache_salt,
        arrived: tag.arrived,
        counts_answers: !scores_only,
        half,
    };
    let generation = plan.submit(&app, &model, in_flight, &answer.head).await?;
    if shared.stream == Some(true) {
        let drafts = (0..generation.choices).map(|_| Draft::default()).collect();
        return Ok(stream::respond(app, generation, report, Streamed { answer, drafts }));
    }
    answer.collect(&app, generation).await
}

/// The prompts as tokens, each fit to the context.
async fn tokens(
    prompt: Prompt,
    model: &Arc<Model>,
    shared: &Shared,
    max_tokens: u32,
    limits: Limits<'_>,
) -> Result<Vec<Arc<[u32]>>, ApiError> {
    let count = match &prompt {
        Prompt::Texts(texts) => texts.len(),
        Prompt::Tokens(lists) => lists.len(),
    };
    if count > PROMPTS_MAX {
        return Err(ApiError::field("prompt", format!("may be {PROMPTS_MAX} prompts, not {count}")));
    }
    let add_special_tokens = shared.add_special_tokens.unwrap_or(true);
    let lists = match prompt {
        Prompt::Tokens(lists) => lists,
        Prompt::Texts(texts) => {
            let model = Arc::clone(model);
            let encode = move |text: &String| model.text.encode(text, add_special_tokens);
            aside(move || Ok(texts.iter().map(encode).collect::<Result<Vec<_>, _>>()?)).await?
        }
    };
    let fit = |list| shared.fit(list, Some(max_tokens), "prompt", limits).map(Arc::from);
    lists.into_iter().map(fit).collect()
}

impl CompletionFields {
    /// How many answers are made of each prompt, for `n` to be given.
    fn best_of(&self, n: u32, streams: bool) -> Result<u32, ApiError> {
        let best_of = self.best_of.unwrap_or(n);
        if best_of < n || best_of > N_MAX {
            let problem = format!("must be from n, {n}, to {N_MAX}, not {best_of}");
            Err(ApiError::field("best_of", problem))
        } else if best_of > n && streams {
            Err(ApiError::field("best_of", "above n cannot be streamed: the best is known at the end"))
        } else {
            Ok(best_of)
        }
    }
}

/// Writes an answer.
struct Answer {
    head: Head,
    model: Arc<Model>,
    echo: bool,
    /// The one token that the engine makes after the prompt is not shown.
    scores_only: bool,
    /// `prompt_logprobs` was asked for.
    reports_prompt: bool,
    logprobs: bool,
    as_ids: bool,
    returns_ids: bool,
    prompts: Vec<Arc<[u32]>>,
    /// Answers given to each prompt, and answers made.
    n: u32,
    tried: u32,
}

/// What has been written of one answer.
#[derive(Debug, Default)]
struct Draft {
    begun: bool,
    /// Where the next token starts in the text, in characters.
    offset: usize,
    likelihood: Likelihood,
}

impl Answer {
    /// What one part adds to its answer.
    fn piece(&self, part: Part, draft: &mut Draft) -> CompletionChoice {
        let Part { choice: index, mut output } = part;
        let first = !std::mem::replace(&mut draft.begun, true);
        let prompt = &self.prompts[(index / self.tried) as usize];
        draft.likelihood.add(&output.tokens);
        if self.scores_only {
            output.tokens.clear();
            output.text.clear();
            output.finish = Some(scored());
        }
        let text = match self.echo && first {
            true => self.model.text.decode(prompt, true) + &output.text,
            false => output.text,
        };
        let scores = output.prompt_logprobs.as_deref();
        let logprobs = self.logprobs.then(|| self.score(prompt, scores, first, &output.tokens, draft));
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: output.finish.as_ref().map(finish_reason),
            stop_reason: stop_reason(output.finish.as_ref()),
            prompt_logprobs: scores
                .filter(|_| self.reports_prompt)
                .map(|scores| self.writer().prompt(scores)),
            prompt_token_ids: (self.returns_ids && first).then(|| prompt.to_vec()),
            token_ids: self.returns_ids.then(|| output.tokens.iter().map(|token| token.id).collect()),
        }
    }

    fn score(
        &self,
        prompt: &[u32],
        prompt_scores: Option<&[Option<Logprobs>]>,
        first: bool,
        tokens: &[SampledToken],
        draft: &mut Draft,
    ) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        if self.echo && first {
            let score = |at: usize| prompt_scores?.get(at)?.as_ref();
            let scored = prompt.iter().enumerate().map(|(at, id)| (*id, score(at)));
            self.writer().append(&mut logprobs, &mut draft.offset, scored);
        }
        let sampled = tokens.iter().map(|token| (token.id, token.logprobs.as_ref()));
        self.writer().append(&mut logprobs, &mut draft.offset, sampled);
        logprobs
    }

    fn writer(&self) -> Writer<'_> {
        Writer { text: &self.model.text, as_ids: self.as_ids }
    }

    fn write(&self, choices: Vec<CompletionChoice>, usage: ChunkUsage) -> Completion {
        let Head { id, created, model, system_fingerprint } = self.head.clone();
        let object = "text_completion";
        let kv_transfer_params = None;
        Completion { id, object, created, model, choices, usage, system_fingerprint, kv_transfer_params }
    }

    async fn collect(self, app: &App, mut generation: Generation) -> Result<Response, ApiError> {
        let mut choices: Vec<(Draft, Option<CompletionChoice>)> = Vec::new();
        choices.resize_with(generation.choices, Default::default);
        while let Some(parts) = generation.ticket.next().await {
            for part in parts.map_err(|_| generation::given_up(app))? {
                generation.tally.note(&part);
                let (draft, whole) = &mut choices[part.choice as usize];
                let piece = self.piece(part, draft);
                match whole {
                    Some(whole) => whole.join(piece),
                    None => *whole = Some(piece),
                }
            }
        }
        let answers =
            choices.into_iter().filter_map(|(draft, choice)| Some((draft.likelihood.mean(), choice?)));
        let choices = best(answers.collect(), self.n, self.tried);
        let usage = generation.tally.usage();
        let kv_transfer_params = generation.transfer_params(app).await;
        let answer = self.write(choices, Some(Some(usage)));
        Ok(axum::Json(Completion { kv_transfer_params, ..answer }).into_response())
    }
}

/// How likely the tokens of an answer are.
#[derive(Debug, Default)]
struct Likelihood {
    logprobs: f64,
    tokens: u32,
}

impl Likelihood {
    fn add(&mut self, tokens: &[SampledToken]) {
        for logprobs in tokens.iter().filter_map(|token| token.logprobs.as_ref()) {
            self.logprobs += f64::from(logprobs.chosen.logprob);
            self.tokens += 1;
        }
    }

    /// The mean log-probability of a token.
    fn mean(&self) -> f64 {
        self.logprobs / f64::from(self.tokens.max(1))
    }
}

/// The `n` likeliest of each `tried` answers, likeliest first. If all are given, they stay as they are.
fn best(answers: Vec<(f64, CompletionChoice)>, n: u32, tried: u32) -> Vec<CompletionChoice> {
    if n == tried {
        return answers.into_iter().map(|(_, choice)| choice).collect();
    }
    let mut answers = answers;
    let prompt = |choice: &CompletionChoice| choice.index / tried;
    answers.sort_by(|(one, a), (other, b)| prompt(a).cmp(&prompt(b)).then(other.total_cmp(one)));
    let mut given: Vec<CompletionChoice> = Vec::new();
    for (_, choice) in answers {
        let of = prompt(&choice);
        let place = u32::try_from(given.len()).unwrap_or(u32::MAX);
        if place < (of + 1) * n {
            given.push(CompletionChoice { index: place, ..choice });
        }
    }
    given
}

impl CompletionChoice {
    /// Adds the next piece of the same answer.
    fn join(&mut self, next: Self) {
        self.text.push_str(&next.text);
        if let (Some(all), Some(more)) = (&mut self.logprobs, next.logprobs) {
            all.join(more);
        }
        if let (Some(all), Some(more)) = (&mut self.token_ids, next.token_ids) {
            all.extend(more);
        }
        self.finish_reason = next.finish_reason;
        self.stop_reason = next.stop_reason;
    }
}

struct Streamed {
    answer: Answer,
    drafts: Vec<Draft>,
}

impl Chunks for Streamed {
    fn chunk(&mut self, part: Part, usage: ChunkUsage) -> String {
        let draft = &mut self.drafts[part.choice as usize];
        let piece = self.answer.piece(part, draft);
        json_text(&self.answer.write(vec![piece], usage))
    }

    fn last(&mut self, usage: Usage) -> String {
        json_text(&self.answer.write(Vec::new(), Some(Some(usage))))
    }
}

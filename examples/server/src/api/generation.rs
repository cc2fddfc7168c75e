//! From a checked request to a job in the engine: what chat and completions do alike.

use std::sync::Arc;
use std::time::Instant;

use quayline_engine::{Finish, FinishReason, Sampling, StopReason};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::api::error::ApiError;
use crate::api::fields::Shared;
use crate::api::structured::Wanted;
use crate::api::usage::Tally;
use crate::app::{App, InFlight, Model};
use crate::engine::{GivenUp, Job, Ticket, Wait};
use crate::order::Turn;
use crate::transfer::{self, Half};

/// Most answers to one request: prompts times `n`.
const CHOICES_MAX: usize = 1024;

/// What every answer to one request begins with.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
}

/// A request whose prompts are tokens.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) prompts: Vec<Arc<[u32]>>,
    pub(crate) n: u32,
    /// The length penalty of a beam search.
    pub(crate) beams: Option<f32>,
    pub(crate) sampling: Sampling,
    /// What each answer must be.
    pub(crate) wanted: Option<Wanted>,
    pub(crate) turn: Turn,
    pub(crate) cache_salt: Option<String>,
    pub(crate) arrived: Instant,
    /// False when answers only exist to score the prompt.
    pub(crate) counts_answers: bool,
    /// What is left to another server.
    pub(crate) half: Option<Half>,
}

/// A request in the engine, and the proof that it counts as running.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) ticket: Ticket,
    pub(crate) tally: Tally,
    pub(crate) choices: usize,
    /// The key under which its blocks are kept for another server.
    kept: Option<String>,
    /// Held until the last byte is written: a server that drains waits for it.
    #[expect(dead_code, reason = "it counts by being there")]
    pub(crate) in_flight: InFlight,
}

impl Plan {
    /// Queues the request. One whose grammar is not known yet waits in the line while it is compiled, on a thread that
    /// may take its time.
    ///
    /// # Errors
    /// The engine's refusal; what is wrong with the grammar.
    pub(crate) async fn submit(
        self,
        app: &Arc<App>,
        model: &Arc<Model>,
        in_flight: InFlight,
        head: &Head,
    ) -> Result<Generation, ApiError> {
        let choices = self.prompts.len() * self.n as usize;
        if choices > CHOICES_MAX {
            let message = format!("asks for {choices} answers, prompts times n; {CHOICES_MAX} is the most");
            return Err(ApiError::field("n", message));
        }
        if self.half.is_some() && (choices > 1 || self.beams.is_some()) {
            let message = "can share the work for one answer to one prompt";
            return Err(ApiError::field("kv_transfer_params", message));
        }
        let lengths = self.prompts.iter().map(|prompt| prompt.len() as u64).collect();
        let tally = Tally::new(lengths, self.n, app.prompt_tokens_details, self.counts_answers);
        let (mut kept, mut pull) = (None, None);
        let mut job = Job {
            name: head.id.clone(),
            prompts: self.choices().collect(),
            grammar: match &self.wanted {
                None => Wait::Free,
                Some(wanted) => wanted.recent(model).map_or(Wait::Compiling, Wait::Ready),
            },
            turn: self.turn,
            cache_salt: self.cache_salt,
            n: self.n,
            beams: self.beams,
            arrived: self.arrived,
            hands_over: None,
            pulls: None,
        };
        match self.half {
            None => {}
            Some(Half::Prefill(key)) => {
                kept = Some(key.clone());
                job.hands_over = Some(key);
            }
            Some(Half::Decode(remote)) => {
                let (wanted, load) = oneshot::channel();
                job.pulls = Some(wanted);
                pull = Some(transfer::pull(Arc::clone(app), remote, load));
            }
        }
        let compiles = matches!(job.grammar, Wait::Compiling);
        let ticket = app.engine.submit(job).await.map_err(|GivenUp| given_up(app))??;
        pull.map(tokio::spawn);
        let ticket = match self.wanted {
            Some(wanted) if compiles => begin(ticket, wanted, model).await?,
            _ => ticket,
        };
        Ok(Generation { ticket, tally, choices, kept, in_flight })
    }

    /// Choice `p * n + i` is the `i`th answer to prompt `p`; a seed is spread so that they differ.
    fn choices(&self) -> impl Iterator<Item = (Arc<[u32]>, Sampling)> {
        self.prompts.iter().flat_map(move |prompt| {
            (0..self.n).map(move |i| {
                let seed = self.sampling.seed.map(|seed| seed.wrapping_add(u64::from(i)));
                (Arc::clone(prompt), Sampling { seed, ..self.sampling.clone() })
            })
        })
    }
}

impl Generation {
    /// What the other server is told that goes on; `None` if none does, or nothing was kept for it.
    pub(crate) async fn transfer_params(&self, app: &App) -> Option<Value> {
        let (key, transfers) = (self.kept.as_ref()?, app.transfers.as_ref()?);
        let blocks = app.engine.kept(key.clone()).await.ok()??;
        Some(transfers.params(key, &blocks))
    }
}

/// Which half of a request is this server's; `None` is all of it.
///
/// # Errors
/// 400 for what makes no sense, or is not done here.
pub(crate) fn half(app: &App, shared: &Shared) -> Result<Option<Half>, ApiError> {
    const FIELD: &str = "kv_transfer_params";
    let Some(params) = shared.kv_transfer_params.as_ref() else { return Ok(None) };
    if params.as_object().is_some_and(serde_json::Map::is_empty) {
        return Ok(None);
    }
    let none = || ApiError::field(FIELD, "is not supported without --kv-transfer-config");
    let half = app.transfers.as_ref().ok_or_else(none)?.half(params)?;
    if shared.stream == Some(true) && matches!(half, Some(Half::Prefill(_))) {
        return Err(ApiError::field(FIELD, "with do_remote_decode are answered at the end, not in a stream"));
    }
    Ok(half)
}

/// Checks the model's name and begins the answer.
///
/// # Errors
/// 404 for a model that is not served here, 400 for an id that cannot be one.
pub(crate) fn head(
    app: &App,
    model: &Model,
    shared: &Shared,
    prefix: &str,
    tag: &str,
) -> Result<Head, ApiError> {
    let name = app.served_name(shared.model.as_deref())?;
    let tag = match shared.request_id.as_deref() {
        None => tag,
        Some(id) if crate::access::is_tag(id) => id,
        Some(_) => return Err(ApiError::field("request_id", "must be 1 to 128 visible ASCII characters")),
    };
    Ok(Head {
        id: format!("{prefix}-{tag}"),
        created: crate::app::unix_seconds(),
        model: name.to_owned(),
        system_fingerprint: model.fingerprint.clone(),
    })
}

/// Compiles the grammar that a job waits for.
///
/// # Errors
/// What is wrong with it; the job is gone then.
async fn begin(ticket: Ticket, wanted: Wanted, model: &Arc<Model>) -> Result<Ticket, ApiError> {
    let model = Arc::clone(model);
    match aside(move || wanted.compile(&model)).await {
        Ok(grammar) => {
            ticket.begin(grammar);
            Ok(ticket)
        }
        Err(error) => {
            ticket.withdraw();
            Err(error)
        }
    }
}

/// Why the engine let go of a request.
pub(crate) fn given_up(app: &App) -> ApiError {
    if !app.engine.is_alive() && app.is_draining() {
        ApiError::unavailable("the server is shutting down")
    } else if app.engine.is_alive() {
        ApiError::busy("the answer was not read in time; the request was cancelled")
    } else {
        ApiError::internal("the engine failed")
    }
}

/// Runs work that would hold up other connections: templates and tokenizers.
///
/// # Errors
/// What the work returns; 500 if it panics.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal("text processing failed"))?
}

/// The word for `finish_reason`.
pub(crate) fn finish_reason(finish: &Finish) -> &'static str {
    finish.reason.as_str()
}

/// vLLM's `stop_reason`: the stop string or token, null otherwise.
pub(crate) fn stop_reason(finish: Option<&Finish>) -> Value {
    match finish.and_then(|finish| finish.stop.as_ref()) {
        Some(StopReason::Token(id)) => json!(id),
        Some(StopReason::String(text)) => json!(text),
        None => Value::Null,
    }
}

/// The end of an answer that was only there to score the prompt.
pub(crate) fn scored() -> Finish {
    Finish { reason: FinishReason::Length, stop: None }
}

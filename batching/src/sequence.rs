//! One request's life: it waits, it runs, perhaps it waits again.

use crate::id::{RequestId, StepId, Tick, TokenId};
use crate::order::{Candidate, Lane};
use crate::queue::Place;
use crate::reason::Reason;
use crate::request::{FinishReason, Grammar, Request};

/// A request and how far it has come.
///
/// ```text
///   |<--------- known_tokens: prompt and generated --------->| pending | drafts |
///   |<-- computed_tokens -->|<--------- wanted in this step ------------------->|
/// ```
///
/// There is no phase: a long prompt wants many tokens, one that generates wants the one it generated last.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) state: State,
    pub(crate) known_tokens: u32,
    /// Steps in flight that will yield outputs of it: each makes at least one more token known.
    pub(crate) pending: u32,
    /// Drafts and padding of these steps. They count as accepted until their outcome is known.
    pub(crate) pending_drafts: u32,
    /// Drafts of its next tokens that were proposed and not scheduled yet.
    pub(crate) drafts: u32,
    /// How many drafts it is worth.
    pub(crate) draft_reach: u32,
    pub(crate) limits: Limits,
    pub(crate) lane: Lane,
    pub(crate) preemptions: u32,
    /// Outputs planned before so many preemptions are worth nothing.
    pub(crate) lives_from: u32,
    /// The last step that it was scheduled in.
    pub(crate) last_step: StepId,
    /// Why it got less than it wanted in some step, the last time that happened.
    pub(crate) note: Option<(StepId, Reason)>,
    /// When it was first admitted.
    pub(crate) started: Option<Tick>,
    /// Others that wait to fork from it.
    pub(crate) followers: u32,
    pub(crate) request: Box<Request>,
}

/// What is checked for every token, beside what is touched for every token.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Limits {
    /// With so many known tokens it ends.
    known_tokens_max: u32,
    /// Below so many known tokens stops are masked.
    known_tokens_min: u32,
    eos: Option<TokenId>,
    stop_ids: bool,
    grammar: bool,
    items: bool,
}

/// What is true of a sequence now.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum State {
    /// It cannot be scheduled.
    Waiting(Box<Waiting>),
    /// It holds room and is scheduled.
    Running(Running),
}

/// A request that waits.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Waiting {
    /// Its place in the queue, also while it is not there.
    pub(crate) place: Place,
    pub(crate) turn: i64,
    /// Where it is.
    pub(crate) at: At,
    /// How many of its tokens are in the slower tier.
    pub(crate) swapped_tokens: Option<u32>,
    /// Known tokens that the memory had when it was last looked up.
    pub(crate) cached_tokens: u32,
}

/// Where one who waits is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum At {
    /// In the queue.
    Queue,
    /// Beside it: it could not run if all the room were free.
    Aside(Gate),
    /// Beside it, with room for `covered_tokens`: the first `cached_tokens` are here, and up to
    /// `loaded_tokens` they are on their way.
    Loading { cached_tokens: u32, loaded_tokens: u32, covered_tokens: u32 },
    /// As `Loading`, and they have come.
    Loaded { cached_tokens: u32, loaded_tokens: u32, covered_tokens: u32 },
}

/// What one waits for beside room and turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Gate {
    /// Its last output.
    Output,
    /// The room it had, which steps in flight may still touch.
    Fence,
    /// Its grammar.
    Grammar,
    /// The request that it is a sample of, which has not read the prompt.
    Leader(RequestId),
}

/// A request that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Running {
    /// Computed, or planned to be; with drafts, as if all were accepted.
    pub(crate) computed_tokens: u32,
    /// Of them, those whose step has not been applied.
    pub(crate) in_flight_tokens: u32,
    /// It has room for so many.
    pub(crate) covered_tokens: u32,
    /// Counts admissions.
    pub(crate) turn: u64,
    /// It is one of the long prompts that are being read.
    pub(crate) long: bool,
    /// It came with tokens of another machine, and is promised room for all that it knows.
    pub(crate) promised: bool,
    /// It was admitted because it had waited for too long, since then.
    pub(crate) impatient_since: Option<Tick>,
}

impl Sequence {
    pub(crate) fn new(
        request: Request,
        lane: Lane,
        waiting: Waiting,
        model_tokens_max: u32,
        draft_reach: u32,
    ) -> Sequence {
        Sequence {
            id: request.id,
            state: State::Waiting(Box::new(waiting)),
            known_tokens: request.prompt_tokens,
            pending: 0,
            pending_drafts: 0,
            drafts: 0,
            draft_reach,
            limits: Limits::new(&request, model_tokens_max),
            lane,
            preemptions: 0,
            lives_from: 0,
            last_step: StepId(0),
            note: None,
            started: None,
            followers: 0,
            request: Box::new(request),
        }
    }

    /// Tokens generated so far.
    #[inline]
    pub(crate) fn new_tokens(&self) -> u32 {
        self.known_tokens - self.request.prompt_tokens
    }

    /// Tokens that it will know when the steps in flight have been applied, at least.
    #[inline]
    fn sure_tokens(&self) -> u32 {
        self.known_tokens + self.pending
    }

    /// Tokens that it will know then, at most: if all drafts in flight are accepted.
    #[inline]
    pub(crate) fn expected_tokens(&self) -> u32 {
        self.sure_tokens() + self.pending_drafts
    }

    /// True if there is nothing to plan behind the steps in flight: they bring its last token, whatever they bring, or
    /// they may bring more than that.
    #[inline]
    pub(crate) fn ends_in_flight(&self) -> bool {
        let end = self.limits.known_tokens_max;
        self.pending > 0 && (self.sure_tokens() >= end || self.expected_tokens() > end)
    }

    /// True while stops must not be sampled; for sure, where drafts are in flight.
    #[inline]
    pub(crate) fn masks_stops(&self) -> bool {
        self.expected_tokens() < self.limits.known_tokens_min
    }

    #[inline]
    pub(crate) fn needs_mask(&self) -> bool {
        self.limits.grammar
    }

    /// True if an encoder must see parts of its prompt.
    #[inline]
    pub(crate) fn has_items(&self) -> bool {
        self.limits.items
    }

    /// Drafts that can be of use: behind them comes one more token, and then there must be room for it.
    #[inline]
    pub(crate) fn drafts_useful(&self) -> u32 {
        self.limits.known_tokens_max.saturating_sub(self.expected_tokens() + 1)
    }

    #[inline]
    pub(crate) fn running(&self) -> &Running {
        match &self.state {
            State::Running(running) => running,
            State::Waiting(_) => unreachable!("request {} is listed as running, but waits", self.id),
        }
    }

    #[inline]
    pub(crate) fn running_mut(&mut self) -> &mut Running {
        match &mut self.state {
            State::Running(running) => running,
            State::Waiting(_) => unreachable!("request {} is listed as running, but waits", self.id),
        }
    }

    pub(crate) fn waiting(&self) -> &Waiting {
        match &self.state {
            State::Waiting(waiting) => waiting,
            State::Running(_) => unreachable!("request {} is listed as waiting, but runs", self.id),
        }
    }

    pub(crate) fn waiting_mut(&mut self) -> &mut Waiting {
        match &mut self.state {
            State::Waiting(waiting) => waiting,
            State::Running(_) => unreachable!("request {} is listed as waiting, but runs", self.id),
        }
    }

    #[inline]
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    /// What an order may look at.
    pub(crate) fn candidate(&self, turn: i64, cached_tokens: u32) -> Candidate<'_> {
        Candidate { request: &self.request, turn, new_tokens: self.new_tokens(), cached_tokens }
    }

    /// Takes a generated token, and says whether it was the last.
    #[inline]
    pub(crate) fn append(&mut self, token: TokenId, model_tokens_max: u32) -> Option<FinishReason> {
        self.known_tokens += 1;
        let Limits { known_tokens_max, eos, stop_ids, .. } = self.limits;
        if self.known_tokens < known_tokens_max && eos != Some(token) && !stop_ids {
            return None;
        }
        self.request.stop.verdict(token, self.new_tokens(), self.known_tokens, model_tokens_max)
    }
}

impl Limits {
    fn new(request: &Request, model_tokens_max: u32) -> Limits {
        let Request { prompt_tokens, stop, grammar, encoder_items, .. } = request;
        Limits {
            known_tokens_max: prompt_tokens.saturating_add(stop.new_tokens_max).min(model_tokens_max),
            known_tokens_min: prompt_tokens.saturating_add(stop.new_tokens_min),
            eos: stop.eos,
            stop_ids: !stop.stop_ids.is_empty(),
            grammar: *grammar != Grammar::None,
            items: !encoder_items.is_empty(),
        }
    }
}

//! Beam search: of all ways to go on, the likeliest few are followed. Each beam is a request of the batcher; one that
//! goes on twice is forked, one that is given up is cancelled.
//!
//! As in vLLM: each beam offers its `2 width` likeliest tokens; those that end the sequence complete it, of the others
//! the best `width` go on. A beam is worth the sum of its log-probabilities, divided by its length (prompt included,
//! the end not) to the power of the length penalty. Nothing is drawn.

use std::collections::BTreeMap;

use quayline_batching::{self as batching, BeamStep, Continuation, Sampled, StopRules, TokenId, beam_step};

use crate::active::Active;
use crate::adapt::sequence;
use crate::engine::Engine;
use crate::error::Refusal;
use crate::output::{Finish, FinishReason, Logprobs, Output, SampledToken};
use crate::request::{Beams, Request, RequestId};
use crate::sampling::{self, Scratch};

/// Requests from this id on are beams.
const FIRST_BEAM: u64 = 1 << 63;

/// Whether a request of the batcher is a beam.
pub(crate) fn is_beam(id: RequestId) -> bool {
    id.0 >= FIRST_BEAM
}

/// All searches under way, each by the id of its first answer.
#[derive(Debug, Default)]
pub(crate) struct Searches {
    open: BTreeMap<RequestId, Search>,
    /// How many beams there have been.
    beams: u64,
}

#[derive(Debug)]
pub(crate) struct Search {
    request: Request,
    beams: Beams,
    tokens_max: u32,
    /// The token that ends a sequence, if one may.
    eos: Option<u32>,
    /// Those that go on, best first.
    live: Vec<Beam>,
    /// Those that have ended, best first.
    complete: Vec<Beam>,
}

/// One way to go on.
#[derive(Debug, Clone, Default)]
struct Beam {
    /// Prompt, then output.
    tokens: Vec<u32>,
    logprobs: Vec<Logprobs>,
    sum: f64,
    score: f64,
    /// Its request; `None` if it waits for the others, or for a place in the queue.
    request: Option<RequestId>,
    /// What it offers, when its step was computed.
    next: Option<Logprobs>,
    /// Of the first request that stood for it.
    history: History,
    ended: bool,
}

/// What is told of a request and outlives the beams that come and go for it.
#[derive(Debug, Clone, Copy, Default)]
struct History {
    started: Option<crate::request::Tick>,
    cached_tokens: u32,
    loaded_tokens: u32,
    preemptions: u32,
}

impl Searches {
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The search that answers under this id.
    pub(crate) fn of_answer(&self, id: RequestId) -> Option<RequestId> {
        let answers = |search: &Search| search.request.id == id || search.beams.others.contains(&id);
        self.open.iter().find(|(_, search)| answers(search)).map(|(&id, _)| id)
    }

    /// All searches.
    pub(crate) fn ids(&self) -> Vec<RequestId> {
        self.open.keys().copied().collect()
    }

    /// The beams of a search that are in the batcher.
    pub(crate) fn requests_of(&self, search: RequestId) -> Vec<RequestId> {
        let live = self.open.get(&search).map_or(&[][..], |search| &search.live);
        live.iter().filter_map(|beam| beam.request).collect()
    }

    /// What the logits of a beam's last token offer it to go on with.
    pub(crate) fn logprobs(&self, active: &Active, logits: &[f32], scratch: &mut Scratch) -> Logprobs {
        let search = active.search.and_then(|id| self.open.get(&id)).expect("a beam's search is open");
        let top = (2 * search.beams.width()).max(search.request.sampling.logprobs.unwrap_or(0));
        let (best, _) = sampling::most_likely(logits).unwrap_or_default();
        sampling::logprobs(logits, best, top, scratch)
    }

    /// A beam's step was computed, and this is what comes next.
    pub(crate) fn note(&mut self, active: &Active, next: Logprobs) {
        let search = active.search.and_then(|id| self.open.get_mut(&id)).expect("a beam's search is open");
        let id = Some(active.id);
        let beam =
            search.live.iter_mut().find(|beam| beam.request == id).expect("a beam is one of its search");
        beam.next = Some(next);
        beam.history = History {
            started: active.started,
            cached_tokens: active.cached_tokens,
            loaded_tokens: active.loaded_tokens,
            preemptions: active.preemptions,
        };
    }
}

impl Search {
    fn score(&self, tokens: usize, sum: f64) -> f64 {
        sum / (tokens as f64).powf(f64::from(self.beams.length_penalty))
    }

    fn is_ready(&self) -> bool {
        self.live.iter().all(|beam| beam.next.is_some())
    }

    fn grown(&self) -> u32 {
        let known = self.live.first().map_or(0, |beam| beam.tokens.len());
        u32::try_from(known - self.request.prompt.len()).unwrap_or(u32::MAX)
    }

    /// Puts the ends aside that are on offer, and says which beams go on.
    fn decide(&mut self) -> BeamStep {
        let (width, mut on_offer) = (self.beams.width() as usize, Vec::new());
        for place in 0..self.live.len() {
            let offers = self.live[place].next.as_ref().map_or(Vec::new(), |next| next.top.clone());
            for offer in offers.into_iter().take(2 * width) {
                if self.eos == Some(offer.id) {
                    let mut ended = self.follow(place, offer.id);
                    ended.ended = true;
                    self.complete.push(ended);
                } else {
                    let beam = &self.live[place];
                    let score = self.score(beam.tokens.len() + 1, beam.sum + f64::from(offer.logprob));
                    on_offer.push(Continuation { beam: place, token: TokenId(offer.id), score });
                }
            }
        }
        keep_best(&mut self.complete, width);
        beam_step(self.live.len(), width, &on_offer)
    }

    /// The beam at `place` and one of the tokens that it offers.
    fn follow(&self, place: usize, token: u32) -> Beam {
        let Beam { tokens, logprobs, sum, next, history, .. } = &self.live[place];
        let next = next.as_ref().expect("a beam that goes on has been computed");
        let chosen = *next.top.iter().find(|offer| offer.id == token).expect("it was on offer");
        let sum = sum + f64::from(chosen.logprob);
        let ends = self.eos == Some(token);
        let mut tokens = tokens.clone();
        tokens.push(token);
        let mut logprobs = logprobs.clone();
        if let Some(most) = self.request.sampling.logprobs {
            let top = next.top.iter().copied().take(most as usize).collect();
            logprobs.push(Logprobs { chosen, top });
        }
        let score = self.score(tokens.len() - usize::from(ends), sum);
        Beam { tokens, logprobs, sum, score, request: None, next: None, history: *history, ended: false }
    }
}

/// The best first; of equals the one that was found first.
fn keep_best(beams: &mut Vec<Beam>, width: usize) {
    beams.sort_by(|one, other| other.score.total_cmp(&one.score));
    beams.truncate(width);
}

impl Engine {
    /// Queues a search, whose first beam is the prompt.
    ///
    /// # Errors
    /// The request's own, or the batcher's.
    pub(crate) fn add_search(&mut self, request: Request, beams: Beams) -> Result<(), Refusal> {
        let room = self.sizes.model_tokens_max - u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let ends = !request.sampling.ignore_eos;
        let search = Search {
            tokens_max: request.sampling.max_tokens.unwrap_or(room).min(room),
            eos: self.eos.first().copied().filter(|_| ends),
            live: vec![Beam { tokens: request.prompt.to_vec(), ..Beam::default() }],
            complete: Vec::new(),
            request,
            beams,
        };
        let id = search.request.id;
        self.searches.open.insert(id, search);
        if let Err(refusal) = self.add_beam(id, 0) {
            self.searches.open.remove(&id);
            return Err(refusal);
        }
        Ok(())
    }

    /// Makes a request of a beam that has none: it reads all its tokens, as far as the cache does not have them.
    fn add_beam(&mut self, search: RequestId, place: usize) -> Result<(), Refusal> {
        let own = &self.searches.open[&search];
        let (beam, own) = (&own.live[place], &own.request);
        let (prompt, history) = (beam.tokens.clone(), beam.history);
        let id = RequestId(FIRST_BEAM + self.searches.beams);
        let request = Request { id, prompt: prompt.into(), ..own.clone() };
        let active = self.new_beam(&request, search, history)?;
        let planned = request.planned(batching::RequestId(id.0), active.prompt_tokens, NO_END);
        self.admit(&request, active, planned)?;
        self.searches.beams += 1;
        let search = self.searches.open.get_mut(&search).expect("it was just here");
        search.live[place].request = Some(id);
        Ok(())
    }

    fn new_beam(&self, request: &Request, search: RequestId, history: History) -> Result<Active, Refusal> {
        let History { started, cached_tokens, loaded_tokens, preemptions } = history;
        let mut active = Active::new(request, self)?;
        (active.search, active.drafter) = (Some(search), None);
        (active.started, active.preemptions) = (started, preemptions);
        (active.cached_tokens, active.loaded_tokens) = (cached_tokens, loaded_tokens);
        Ok(active)
    }

    /// Beams whose queue was full ask again.
    pub(crate) fn add_homeless_beams(&mut self) {
        let homeless = |beam: &Beam| beam.request.is_none() && beam.next.is_none();
        let places = |(&id, search): (&RequestId, &Search)| {
            let all = search.live.iter().enumerate().filter(|(_, beam)| homeless(beam));
            all.map(move |(place, _)| (id, place)).collect::<Vec<_>>()
        };
        let waiting: Vec<(RequestId, usize)> = self.searches.open.iter().flat_map(places).collect();
        for (search, place) in waiting {
            // The queue is full: the next step asks again.
            let _ = self.add_beam(search, place);
        }
    }

    /// Searches of which a beam was computed go on, if all of theirs are; what their beams get is added to `sampled`.
    /// Call it when a step is computed and before it is applied.
    pub(crate) fn advance_searches(&mut self, sampled: &mut Vec<Sampled>, outputs: &mut Vec<Output>) {
        let computed = |search: &Search| search.live.iter().any(|beam| beam.next.is_some());
        let searches = self.searches.open.iter().filter(|(_, search)| computed(search));
        let searches: Vec<RequestId> = searches.map(|(&id, _)| id).collect();
        for id in searches {
            if self.searches.open[&id].is_ready() {
                self.advance_search(id, sampled, outputs);
            } else {
                self.park(id);
            }
        }
    }

    /// Beams that are ahead of others of theirs leave the batcher: what they offer is known.
    fn park(&mut self, search: RequestId) {
        let search = self.searches.open.get_mut(&search).expect("an open search");
        let ahead = search.live.iter_mut().filter(|beam| beam.next.is_some());
        let leave: Vec<RequestId> = ahead.filter_map(|beam| beam.request.take()).collect();
        leave.into_iter().for_each(|beam| self.drop_beam(beam));
    }

    fn advance_search(&mut self, id: RequestId, sampled: &mut Vec<Sampled>, outputs: &mut Vec<Output>) {
        let search = self.searches.open.get_mut(&id).expect("an open search");
        let BeamStep { kept, forked, dropped } = search.decide();
        if search.grown() + 1 == search.tokens_max {
            let last = kept.iter().chain(&forked).map(|next| search.follow(next.beam, next.token.0));
            let last: Vec<Beam> = last.collect();
            search.complete.extend(last);
            outputs.extend(self.end_search(id));
            return;
        }
        let old: Vec<Option<RequestId>> = search.live.iter().map(|beam| beam.request).collect();
        let follow = |next: &Continuation| (*next, search.follow(next.beam, next.token.0));
        let mut new: Vec<(Continuation, Beam)> = kept.iter().chain(&forked).map(follow).collect();
        dropped.iter().filter_map(|&place| old[place]).for_each(|beam| self.drop_beam(beam));
        for (index, (next, beam)) in new.iter_mut().enumerate() {
            beam.request = match old[next.beam] {
                Some(request) if index < kept.len() => Some(request),
                Some(parent) => self.fork_beam(parent, id, beam.history),
                None => None,
            };
        }
        for beam in new.iter().map(|(_, beam)| beam) {
            let (Some(request), Some(&token)) = (beam.request, beam.tokens.last()) else { continue };
            self.active.get_mut(&request).expect("a beam is active").tokens.push(token);
            let batched = batching::RequestId(request.0);
            let pushed = self.memory.cache.push(sequence(batched), &[token]);
            pushed.expect("a beam is within the longest sequence");
            sampled.push(Sampled { id: batched, token: TokenId(token) });
        }
        new.sort_by(|(one, _), (other, _)| {
            let place = |next: &Continuation| (next.beam, next.token);
            other.score.total_cmp(&one.score).then(place(one).cmp(&place(other)))
        });
        let search = self.searches.open.get_mut(&id).expect("an open search");
        search.live = new.into_iter().map(|(_, beam)| beam).collect();
    }

    /// A second request that knows and holds what `parent` does; `None` if there is no place for it.
    fn fork_beam(&mut self, parent: RequestId, search: RequestId, history: History) -> Option<RequestId> {
        let id = RequestId(FIRST_BEAM + self.searches.beams);
        let [from, to] = [parent, id].map(|id| batching::RequestId(id.0));
        self.batcher.fork(from, to, &mut self.memory).ok()?;
        let tokens = self.active[&parent].tokens.clone();
        let request = Request { id, prompt: tokens.into(), ..self.searches.open[&search].request.clone() };
        let active = self.new_beam(&request, search, history).expect("as its search was accepted");
        self.active.insert(id, active);
        self.searches.beams += 1;
        self.totals.forks += 1;
        Some(id)
    }

    fn drop_beam(&mut self, beam: RequestId) {
        self.batcher.cancel(batching::RequestId(beam.0), &mut self.memory);
        self.forget(beam);
    }

    /// Ends a search: its best sequences are its answers. Those of a search that must end early are what it has.
    pub(crate) fn end_search(&mut self, id: RequestId) -> Vec<Output> {
        let Some(mut search) = self.close_search(id) else { return Vec::new() };
        let width = search.beams.width() as usize;
        if search.complete.len() < width {
            let live = std::mem::take(&mut search.live);
            search.complete.extend(live);
        }
        keep_best(&mut search.complete, width);
        self.totals.finished += 1;
        let ids = std::iter::once(search.request.id).chain(search.beams.others.iter().copied());
        let none = Beam { tokens: search.request.prompt.to_vec(), ..Beam::default() };
        let found = search.complete.iter().chain(std::iter::repeat(&none));
        let outputs: Vec<Output> = ids.zip(found).map(|(id, beam)| self.answer(&search, id, beam)).collect();
        self.totals.output_tokens +=
            outputs.iter().map(|output| u64::from(output.output_tokens)).sum::<u64>();
        outputs
    }

    /// Takes a search and all its beams out; `None` if there is none by this id.
    pub(crate) fn close_search(&mut self, id: RequestId) -> Option<Search> {
        let search = self.searches.open.remove(&id)?;
        search.live.iter().filter_map(|beam| beam.request).for_each(|beam| self.drop_beam(beam));
        Some(search)
    }

    fn answer(&self, search: &Search, id: RequestId, beam: &Beam) -> Output {
        let prompt = search.request.prompt.len();
        let answer = &beam.tokens[prompt..];
        let logprobs = beam.logprobs.iter().cloned().map(Some).chain(std::iter::repeat(None));
        let shown = if beam.ended { &answer[..answer.len() - 1] } else { answer };
        let reason = if beam.ended { FinishReason::Stop } else { FinishReason::Length };
        let sampled = |(&id, logprobs)| SampledToken { id, logprobs };
        Output {
            id,
            tokens: answer.iter().zip(logprobs).map(sampled).collect(),
            text: self.text.decode(shown, search.request.sampling.skip_special_tokens),
            prompt_logprobs: None,
            prompt_tokens: u32::try_from(prompt).unwrap_or(u32::MAX),
            cached_tokens: beam.history.cached_tokens,
            loaded_tokens: beam.history.loaded_tokens,
            output_tokens: u32::try_from(answer.len()).unwrap_or(u32::MAX),
            started: beam.history.started,
            preemptions: beam.history.preemptions,
            beam_score: Some(beam.score),
            finish: Some(Finish { reason, stop: None }),
        }
    }
}

/// A search ends its beams itself.
const NO_END: StopRules =
    StopRules { new_tokens_max: u32::MAX, new_tokens_min: 0, eos: None, stop_ids: Vec::new() };

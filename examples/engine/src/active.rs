//! One request in the engine: its tokens, what chooses the next one, and what makes text of them.

use std::collections::BTreeMap;

use quayline_batching::{self as batching, StopRules, TokenId};
use quayline_gpu_kernels::Draw;

use crate::detokenize::TextStream;
use crate::drafts::Drafter;
use crate::engine::Engine;
use crate::error::Refusal;
use crate::grammar::{Grammar, Guide, GuideState};
use crate::output::{Finish, FinishReason, Logprobs, Output, SampledToken, StopReason};
use crate::request::{Request, RequestId, Sampling, Tick};
use crate::sampling::{self, Chooser, Context, Scratch};
use crate::stop::StopStrings;
use crate::text::Text;

#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) id: RequestId,
    pub(crate) hands_over: bool,
    /// Whether another engine delivered the beginning of its prompt.
    pub(crate) delivered: bool,
    /// The search whose beam it is.
    pub(crate) search: Option<RequestId>,
    pub(crate) arrival: Tick,
    pub(crate) started: Option<Tick>,
    pub(crate) cached_tokens: u32,
    pub(crate) loaded_tokens: u32,
    pub(crate) preemptions: u32,
    pub(crate) preempted_for: Option<batching::Reason>,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens_max: u32,
    pub(crate) cache_salt: Option<String>,
    /// Prompt, then output.
    pub(crate) tokens: Vec<u32>,
    /// Guesses at what comes next, if the engine makes any.
    pub(crate) drafter: Option<Drafter>,
    rules: StopRules,
    chooser: Chooser,
    guide: Option<Guide>,
    stream: TextStream,
    stops: StopStrings,
    user_stop_ids: Vec<u32>,
    include_stop: bool,
    logprobs: Option<u32>,
    prompt_logprobs: Option<PromptLogprobs>,
    /// The token that was chosen last, until [`advance`](Active::advance) takes it.
    chosen: Option<SampledToken>,
}

/// Log-probabilities of the prompt while they come together. A request that starts over computes the same
/// again.
#[derive(Debug)]
struct PromptLogprobs {
    top: u32,
    by_position: BTreeMap<u32, Logprobs>,
}

impl Active {
    /// What `engine` needs to know of a request with a prompt shorter than the longest sequence.
    pub(crate) fn new(request: &Request, engine: &Engine) -> Result<Self, Refusal> {
        let Engine { text, eos, seed, sizes, speculation, .. } = engine;
        let Request { prompt, sampling, .. } = request;
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let bad_words = spellings(text, &sampling.bad_words)?;
        let context =
            Context { seed: sampling::request_seed(*seed, request.id.0), eos: eos.clone(), bad_words };
        let room = sizes.model_tokens_max - prompt_tokens;
        let output_tokens_max = sampling.max_tokens.unwrap_or(room).min(room);
        Ok(Self {
            id: request.id,
            hands_over: request.hands_over,
            delivered: false,
            search: None,
            arrival: request.arrival,
            started: None,
            cached_tokens: 0,
            loaded_tokens: 0,
            preemptions: 0,
            preempted_for: None,
            prompt_tokens,
            output_tokens_max,
            cache_salt: request.cache_salt.clone(),
            tokens: prompt.to_vec(),
            drafter: speculation.map(|speculation| Drafter::new(&speculation, prompt)),
            rules: stop_rules(sampling, output_tokens_max, eos),
            chooser: Chooser::new(sampling, prompt, context),
            guide: request.grammar.as_ref().map(Grammar::guide),
            stream: text.stream(sampling.skip_special_tokens, prompt),
            stops: StopStrings::new(sampling.stop.clone(), sampling.include_stop_str_in_output),
            user_stop_ids: sampling.stop_token_ids.clone(),
            include_stop: sampling.include_stop_str_in_output,
            logprobs: sampling.logprobs,
            prompt_logprobs: sampling
                .prompt_logprobs
                .map(|top| PromptLogprobs { top, by_position: BTreeMap::new() }),
            chosen: None,
        })
    }

    /// When to stop, in the batcher's words.
    pub(crate) fn stop_rules(&self) -> StopRules {
        self.rules.clone()
    }

    pub(crate) fn set_guide(&mut self, grammar: &Grammar) {
        self.guide = Some(grammar.guide());
    }

    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_tokens as usize]
    }

    fn tokens_of_output(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens as usize..]
    }

    pub(crate) fn output_tokens(&self) -> u32 {
        u32::try_from(self.tokens.len()).unwrap_or(u32::MAX) - self.prompt_tokens
    }

    /// Its first drafts: `count`, or as many as there are.
    pub(crate) fn drafts(&self, count: u32) -> &[u32] {
        self.drafter.as_ref().map_or(&[], |drafter| drafter.drafts(count))
    }

    /// Which of the positions `start..end` must give logits for `prompt_logprobs`: each tells of the prompt
    /// token behind it.
    pub(crate) fn prompt_positions(&self, start: u32, end: u32) -> std::ops::Range<u32> {
        match &self.prompt_logprobs {
            Some(_) => start..end.min(self.prompt_tokens - 1).max(start),
            None => start..start,
        }
    }

    /// What the logits at `position` tell of the prompt token behind it, if that is asked for.
    pub(crate) fn prompt_logprobs_at(
        &self,
        position: u32,
        logits: &[f32],
        scratch: &mut Scratch,
    ) -> Option<Logprobs> {
        let next = self.tokens[position as usize + 1];
        self.prompt_logprobs.as_ref().map(|prompt| sampling::logprobs(logits, next, prompt.top, scratch))
    }

    pub(crate) fn note_prompt_logprobs(&mut self, position: u32, logprobs: Logprobs) {
        if let Some(prompt) = &mut self.prompt_logprobs {
            prompt.by_position.insert(position + 1, logprobs);
        }
    }

    /// The next token, chosen from the logits of the last one.
    pub(crate) fn choose(&self, logits: &[f32], scratch: &mut Scratch) -> SampledToken {
        let output = self.tokens_of_output();
        let Some(guide) = &self.guide else {
            let id = self.chooser.choose(logits, output, scratch);
            return SampledToken { id, logprobs: self.logprobs_of(id, logits, scratch) };
        };
        let mut taken = std::mem::take(&mut scratch.taken);
        taken.clear();
        taken.extend_from_slice(logits);
        guide.apply(&mut taken);
        let mut id = self.chooser.choose(&taken, output, scratch);
        if !guide.allows(id) {
            // What the request's own rules leave, its grammar does not take: the grammar goes first.
            id = sampling::most_likely(&taken).map_or_else(|| guide.first(), |(id, _)| id);
        }
        let logprobs = self.logprobs_of(id, &taken, scratch);
        scratch.taken = taken;
        SampledToken { id, logprobs }
    }

    fn logprobs_of(&self, id: u32, logits: &[f32], scratch: &mut Scratch) -> Option<Logprobs> {
        self.logprobs.map(|top| sampling::logprobs(logits, id, top, scratch))
    }

    pub(crate) fn set_chosen(&mut self, token: SampledToken) {
        self.chosen = Some(token);
    }

    /// How a machine draws the token at a position of the output; nothing where only the host can choose: somebody
    /// wants to know how likely the token was, a search decides, the grammar and the request's own rules may have to
    /// be weighed, or more than logits would have to know which drafts stand.
    pub(crate) fn draw(&self, position: u32) -> Option<Draw<'_>> {
        let Self { guide, logprobs, search, drafter, chooser, .. } = self;
        let alone = logprobs.is_none() && search.is_none();
        let agreed = guide.is_none() || !chooser.has_rules();
        let certain = drafter.is_none() || (guide.is_none() && !chooser.looks_back());
        if alone && agreed && certain { chooser.draw(position) } else { None }
    }

    /// Adds the mask of its next token to others, so many words; false where every token may come.
    pub(crate) fn mask(&self, words: usize, masks: &mut Vec<u32>) -> bool {
        let (start, output) = (masks.len(), self.tokens_of_output());
        if let Some(guide) = &self.guide {
            masks.extend(guide.mask().iter().take(words));
            masks.resize(start + words, 0);
        } else if self.chooser.masks(output) {
            masks.resize(start + words, u32::MAX);
            self.chooser.mask(&mut masks[start..], output);
        }
        masks.len() > start
    }

    /// The machine drew this token; none, if no logit that may be drawn is a number.
    pub(crate) fn drew(&mut self, token: Option<u32>) {
        let id = token.unwrap_or_else(|| {
            let last = self.chooser.last_resort();
            self.guide.as_ref().filter(|guide| !guide.allows(last)).map_or(last, Guide::first)
        });
        self.chosen = Some(SampledToken { id, logprobs: None });
    }

    /// What this step brings, to be filled by [`advance`](Active::advance).
    pub(crate) fn output(&mut self) -> Output {
        Output {
            id: self.id,
            tokens: Vec::new(),
            text: String::new(),
            prompt_logprobs: self.take_prompt_logprobs(),
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            loaded_tokens: self.loaded_tokens,
            output_tokens: self.output_tokens(),
            started: self.started,
            preemptions: self.preemptions,
            beam_score: None,
            finish: None,
        }
    }

    /// The token that was chosen and is not part of the output yet.
    pub(crate) fn chosen(&self) -> Option<u32> {
        self.chosen.as_ref().map(|token| token.id)
    }

    /// Makes the chosen token, if there is one, part of the output. Nothing is chosen behind one that ends it, nor
    /// before the grammar, if there is one, has [looked ahead](Active::look_ahead).
    pub(crate) fn advance(&mut self, output: &mut Output) {
        let Some(token) = self.chosen.take() else { return };
        self.tokens.push(token.id);
        self.chooser.push(token.id);
        if let Some(drafter) = &mut self.drafter {
            drafter.push(token.id);
        }
        let verdict = self.verdict(token.id);
        output.finish = verdict.map(|reason| self.finish(reason));
        let guided = self.guide.as_mut().map_or(GuideState::Open, |guide| guide.push(token.id));
        let mut ended_by_token = verdict.is_some_and(|reason| !reason.is_length());
        if !ended_by_token {
            output.finish = end_of_grammar(guided).or(output.finish.take());
            ended_by_token = guided == GuideState::Ended;
        }
        let mut piece = String::new();
        if !ended_by_token || self.include_stop {
            self.stream.push(token.id, &mut piece);
        }
        let may_stop = !ended_by_token && self.output_tokens() > self.rules.new_tokens_min;
        if let Some(stop) = self.stops.push(&piece, may_stop, &mut output.text) {
            let stop = Some(StopReason::String(stop.to_owned()));
            output.finish = Some(Finish { reason: FinishReason::Stop, stop });
        } else if output.finish.is_some() {
            self.stops.finish(&mut output.text);
        }
        output.tokens.push(token);
        output.output_tokens = self.output_tokens();
    }

    /// Makes the mask for the next token, if there will be one and it must be masked.
    pub(crate) fn look_ahead(&mut self, output: &mut Output) {
        if output.finish.is_none()
            && let Some(mut guide) = self.take_guide()
        {
            guide.look_ahead();
            self.guided(guide, output);
        }
    }

    /// Its guide, to look ahead and be given back to [`guided`](Active::guided).
    pub(crate) fn take_guide(&mut self) -> Option<Guide> {
        self.guide.take()
    }

    /// Its guide has looked ahead, and perhaps in vain.
    pub(crate) fn guided(&mut self, guide: Guide, output: &mut Output) {
        if let Some(finish) = end_of_grammar(guide.state()) {
            self.stops.finish(&mut output.text);
            output.finish = Some(finish);
        }
        self.guide = Some(guide);
    }

    /// Why the batcher will end the request on its last token, if it will.
    fn verdict(&self, token: u32) -> Option<batching::FinishReason> {
        let known_tokens = self.prompt_tokens + self.output_tokens();
        self.rules.verdict(TokenId(token), self.output_tokens(), known_tokens, u32::MAX)
    }

    /// The last output of a request that must end without a further token.
    pub(crate) fn give_up(&mut self, reason: batching::Reason) -> Output {
        self.end(match reason {
            batching::Reason::LoadFailed { .. } => FinishReason::Error,
            _ => FinishReason::Length,
        })
    }

    /// The same, for a reason of the wire.
    pub(crate) fn end(&mut self, reason: FinishReason) -> Output {
        let mut output = self.output();
        output.prompt_logprobs = None;
        self.stops.finish(&mut output.text);
        output.finish = Some(Finish { reason, stop: None });
        output
    }

    fn finish(&self, reason: batching::FinishReason) -> Finish {
        let stop = match reason {
            batching::FinishReason::StopId(TokenId(id)) if self.user_stop_ids.contains(&id) => {
                Some(StopReason::Token(id))
            }
            _ => None,
        };
        let reason = if reason.is_length() { FinishReason::Length } else { FinishReason::Stop };
        Finish { reason, stop }
    }

    fn take_prompt_logprobs(&mut self) -> Option<Vec<Option<Logprobs>>> {
        let mut prompt = self.prompt_logprobs.take()?;
        Some((0..self.prompt_tokens).map(|position| prompt.by_position.remove(&position)).collect())
    }
}

fn stop_rules(sampling: &Sampling, output_tokens_max: u32, eos: &[u32]) -> StopRules {
    let ends = if sampling.ignore_eos { &[] } else { eos };
    let further = ends.iter().skip(1).chain(&sampling.stop_token_ids);
    StopRules {
        new_tokens_max: output_tokens_max,
        new_tokens_min: sampling.min_tokens.min(output_tokens_max),
        eos: ends.first().map(|&id| TokenId(id)),
        stop_ids: further.map(|&id| TokenId(id)).collect(),
    }
}

/// How an answer ends with its grammar, if it does.
fn end_of_grammar(state: GuideState) -> Option<Finish> {
    let reason = match state {
        GuideState::Open => return None,
        GuideState::Complete | GuideState::Ended => FinishReason::Stop,
        GuideState::Failed => FinishReason::Error,
    };
    Some(Finish { reason, stop: None })
}

/// The token spellings of bad words: as they are, and behind a space where that is as many tokens but
/// begins with another one.
fn spellings(text: &Text, words: &[String]) -> Result<Vec<Vec<u32>>, Refusal> {
    let mut spellings = Vec::new();
    for word in words {
        let encode = |word: &str| {
            let refuse =
                |error| Refusal::Sampling { parameter: "bad_words", problem: format!("{word:?}: {error}") };
            text.encode(word, false).map_err(refuse)
        };
        let plain = encode(word.trim_start())?;
        let spaced = encode(&format!(" {}", word.trim_start()))?;
        if spaced.len() == plain.len() && spaced.first() != plain.first() {
            spellings.push(spaced);
        }
        spellings.push(plain);
    }
    Ok(spellings)
}

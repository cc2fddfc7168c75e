//! Rows of logits become tokens: on the machine where it draws, and by the threads of the host otherwise.
//!
//! What a row tells is found out for all rows at once, since one does not depend on another. Only behind a draft must
//! the host wait: which token comes there depends on the one before it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use quayline_gpu_kernels as kernels;

use crate::active::Active;
use crate::beam::Searches;
use crate::engine::Engine;
use crate::failure::expected;
use crate::machine::{Machine, no_draw};
use crate::output::{Logprobs, Output, SampledToken};
use crate::request::RequestId;
use crate::sampling::Scratch;
use crate::step::StepMemory;

/// A row of logits, and whose it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) id: RequestId,
    pub(crate) goal: Goal,
    /// Where in the output the token will be that is chosen from it, if one is.
    pub(crate) position: u32,
}

/// What a row of logits is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    /// To tell of the prompt token behind this position.
    Prompt { position: u32 },
    /// To choose the next token. So many drafts are behind it.
    Next { drafts: u32 },
    /// To choose the token behind a draft, if that one is chosen as the `place`th of the step.
    Behind { draft: u32, place: usize },
}

/// What a row told.
#[derive(Debug, Clone, Default)]
enum Told {
    /// Nothing yet: the token before it is not known.
    #[default]
    Nothing,
    /// The machine drew this token; none, if no logit that may be drawn is a number.
    Drawn(Option<u32>),
    Token(SampledToken),
    /// Of a token of the prompt.
    Prompt(Logprobs),
    /// How a beam may go on.
    Beam(Logprobs),
}

/// A row for the host to read.
struct Unread<'a> {
    active: &'a Active,
    goal: Goal,
    logits: &'a [f32],
    told: &'a mut Told,
}

impl Unread<'_> {
    fn read(&mut self, searches: &Searches, scratch: &mut Scratch) {
        let Self { active, goal, logits, .. } = *self;
        *self.told = match goal {
            Goal::Prompt { position } => {
                active.prompt_logprobs_at(position, logits, scratch).map(Told::Prompt)
            }
            Goal::Next { .. } if active.search.is_some() => {
                Some(Told::Beam(searches.logprobs(active, logits, scratch)))
            }
            Goal::Next { .. } => Some(Told::Token(active.choose(logits, scratch))),
            Goal::Behind { .. } => None,
        }
        .unwrap_or_default();
    }
}

impl Engine {
    /// Goes through the logits, in parts that fit into the model's room for them, and chooses tokens. One that has
    /// drafts behind it becomes part of its output before the next is chosen; the last one of each request does not.
    pub(crate) fn choose(
        &mut self,
        step: &mut StepMemory,
        outputs: &mut Vec<Output>,
    ) -> Result<(), kernels::Error> {
        step.drafted.clear();
        let vocab = self.machine.config().vocab;
        let part = self.machine.limits().logits_rows;
        let mut from = 0;
        for wanted in step.wanted.chunks(part) {
            let to = from + u32::try_from(wanted.len()).unwrap_or(u32::MAX);
            let mut told = draw(&mut *self.machine, &self.active, from, wanted)?;
            let all_drawn = wanted.iter().zip(&told).all(|(wanted, told)| {
                matches!(told, Told::Drawn(_)) || !self.active.contains_key(&wanted.id)
            });
            let logits = if all_drawn { Cow::default() } else { expected(self.machine.logits(from..to))? };
            let row = |row: usize| logits.get(row * vocab..(row + 1) * vocab).unwrap_or_default();
            let rows = wanted.iter().zip(&mut told).enumerate();
            let unread = rows.filter(|(_, (_, told))| matches!(told, Told::Nothing));
            let mut unread: Vec<_> = unread
                .filter_map(|(at, (&Wanted { id, goal, .. }, told))| {
                    // Planned ahead: it may have ended meanwhile.
                    Some(Unread { active: self.active.get(&id)?, goal, logits: row(at), told })
                })
                .collect();
            let searches = &self.searches;
            self.workers
                .each(&mut unread, &mut step.scratch, |unread, scratch| unread.read(searches, scratch));
            for (at, (&Wanted { id, goal, .. }, told)) in wanted.iter().zip(told).enumerate() {
                let Some(active) = self.active.get_mut(&id) else { continue };
                match (goal, told) {
                    (Goal::Prompt { position }, Told::Prompt(logprobs)) => {
                        active.note_prompt_logprobs(position, logprobs);
                    }
                    (Goal::Prompt { .. }, _) => {}
                    (Goal::Next { .. }, Told::Beam(logprobs)) => self.searches.note(active, logprobs),
                    (Goal::Next { drafts }, told) => {
                        outputs.push(active.output());
                        step.drafted.push(drafts);
                        active.take_choice(told, row(at), &mut step.scratch[0]);
                    }
                    (Goal::Behind { draft, place }, told) => {
                        let output = outputs.last_mut().expect("its request has chosen before");
                        if output.tokens.len() != place || active.chosen() != Some(draft) {
                            continue;
                        }
                        active.advance(output);
                        active.look_ahead(output);
                        if output.finish.is_none() {
                            active.take_choice(told, row(at), &mut step.scratch[0]);
                        }
                    }
                }
            }
            from = to;
        }
        Ok(())
    }
}

impl Active {
    /// The next token is the one that was told, or is chosen now.
    fn take_choice(&mut self, told: Told, logits: &[f32], scratch: &mut Scratch) {
        match told {
            Told::Drawn(token) => self.drew(token),
            Told::Token(token) => self.set_chosen(token),
            _ => self.set_chosen(self.choose(logits, scratch)),
        }
    }
}

/// Lets the machine draw from the rows of whoever leaves it to it. Who does so depends on the request alone: one
/// request's tokens come all from the machine, or all from the host.
fn draw(
    machine: &mut dyn Machine,
    active: &BTreeMap<RequestId, Active>,
    start: u32,
    wanted: &[Wanted],
) -> Result<Vec<Told>, kernels::Error> {
    let of = |wanted: &Wanted| match wanted.goal {
        Goal::Prompt { .. } => None,
        Goal::Next { .. } | Goal::Behind { .. } => active.get(&wanted.id)?.draw(wanted.position),
    };
    let mut found: Vec<_> = if machine.draws() { wanted.iter().map(of).collect() } else { Vec::new() };
    if found.iter().all(Option::is_none) {
        return Ok(vec![Told::Nothing; wanted.len()]);
    }
    let words = machine.config().vocab.div_ceil(32);
    let mut masks = Vec::new();
    for (wanted, draw) in wanted.iter().zip(&mut found) {
        let row = masks.len() / words;
        if let Some(draw) = draw
            && active[&wanted.id].mask(words, &mut masks)
        {
            draw.mask_row = Some(row);
        }
    }
    let draws: Vec<_> = found.iter().map(|draw| draw.unwrap_or_else(no_draw)).collect();
    let tokens = expected(machine.draw(start, &draws, &masks))?;
    let told =
        |(found, token): (&Option<_>, _)| if found.is_some() { Told::Drawn(token) } else { Told::Nothing };
    Ok(found.iter().zip(tokens).map(told).collect())
}

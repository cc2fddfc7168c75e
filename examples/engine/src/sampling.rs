//! From one row of logits to one token. Everything here is a function of the row, the request and the
//! tokens of its output so far: no state of the machine, no other request.
//!
//! The order is vLLM's: allowed tokens, bad words, minimum length, bias, penalties; then greedy, or
//! temperature, min-p, top-k, top-p and a draw. Log-probabilities are those of the row as the model gave it.

mod draw;
mod exp;
mod logprobs;
mod nucleus;
mod penalty;
mod random;
mod row;
mod rules;

pub(crate) use draw::{Scratch, most_likely};
pub(crate) use logprobs::logprobs;

use quayline_gpu_kernels::Draw;

use crate::request::Sampling;
use penalty::Penalties;
use rules::Rules;

/// What one request does to its logits: its sampling parameters made ready, and what they must remember
/// of its tokens.
#[derive(Debug)]
pub(crate) struct Chooser {
    sampling: Sampling,
    rules: Rules,
    penalties: Penalties,
    seed: u64,
}

/// What a chooser must know besides the parameters.
#[derive(Debug, Default)]
pub(crate) struct Context {
    /// The seed of a request that brought none.
    pub(crate) seed: u64,
    /// End-of-sequence.
    pub(crate) eos: Vec<u32>,
    /// The spellings of `bad_words`.
    pub(crate) bad_words: Vec<Vec<u32>>,
}

impl Chooser {
    pub(crate) fn new(sampling: &Sampling, prompt: &[u32], context: Context) -> Self {
        Self {
            seed: sampling.seed.unwrap_or(context.seed),
            rules: Rules::new(sampling, context.eos, context.bad_words),
            penalties: Penalties::new(sampling, prompt),
            sampling: sampling.clone(),
        }
    }

    /// The next token after `output`. Cost: a few passes over the row.
    pub(crate) fn choose(&self, logits: &[f32], output: &[u32], scratch: &mut Scratch) -> u32 {
        if !self.looks_back() {
            return self.choose_of(logits, output, scratch);
        }
        let mut changed = std::mem::take(&mut scratch.changed);
        changed.clear();
        changed.extend_from_slice(logits);
        self.rules.apply(&mut changed, output);
        self.penalties.apply(&mut changed);
        let chosen = self.choose_of(&changed, output, scratch);
        scratch.changed = changed;
        chosen
    }

    /// The same of logits after rules and penalties.
    fn choose_of(&self, logits: &[f32], output: &[u32], scratch: &mut Scratch) -> u32 {
        let best = draw::most_likely(logits);
        let Some((best, highest)) = best else { return self.rules.last_resort() };
        if self.sampling.is_greedy() {
            return best;
        }
        let position = output.len() as u64;
        draw::draw(logits, highest, &self.sampling, random::uniform(self.seed, position), scratch)
    }

    /// How a machine draws the token behind `position` others, if it can do all that is asked: it has no rules on
    /// single tokens. It takes the most likely token as [`choose`](Chooser::choose) does, and with the same random
    /// number draws the same token but where two meet: its sums round otherwise.
    pub(crate) fn draw(&self, position: u32) -> Option<Draw<'_>> {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let temperature =
            if self.sampling.is_greedy() { 0.0 } else { temperature.max(draw::TEMPERATURE_MIN) };
        let random = random::bits(self.seed, position.into());
        let draw = Draw { temperature, top_k, top_p, min_p, random, ..self.penalties.parameters() };
        (!self.rules.add_to_logits()).then_some(draw)
    }

    /// Whether what is drawn depends on the tokens before it by more than the logits.
    pub(crate) fn looks_back(&self) -> bool {
        self.has_rules() || !self.penalties.are_off()
    }

    /// Whether there are rules on single tokens.
    pub(crate) fn has_rules(&self) -> bool {
        !self.rules.are_off()
    }

    /// The rules on single tokens: whether there are any after this output, which a mask would have to know.
    pub(crate) fn masks(&self, output: &[u32]) -> bool {
        self.rules.forbid_any(output)
    }

    /// Takes out of a mask, bits from the lowest, what may not come after this output.
    pub(crate) fn mask(&self, mask: &mut [u32], output: &[u32]) {
        self.rules.mask(mask, output);
    }

    /// What comes when no token may.
    pub(crate) fn last_resort(&self) -> u32 {
        self.rules.last_resort()
    }

    /// A token became part of the output.
    pub(crate) fn push(&mut self, token: u32) {
        self.penalties.push(token);
    }
}

/// The seed of a request that brought none.
pub(crate) fn request_seed(engine: u64, request: u64) -> u64 {
    random::mix(random::mix(engine) ^ request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(sampling: &Sampling, logits: &[f32], output: &[u32]) -> u32 {
        let mut chooser = Chooser::new(sampling, &[0], Context::default());
        output.iter().for_each(|&token| chooser.push(token));
        chooser.choose(logits, output, &mut Scratch::default())
    }

    #[test]
    fn greedy_takes_the_first_of_the_most_likely() {
        assert_eq!(choose(&Sampling::greedy(), &[0.0, 2.0, 2.0, -1.0], &[]), 1);
    }

    #[test]
    fn a_number_that_is_none_is_never_chosen() {
        assert_eq!(choose(&Sampling::greedy(), &[f32::NAN, -2.0, f32::NAN], &[]), 1);
        let random = Sampling::default();
        assert_eq!(choose(&random, &[f32::NAN, -2.0, f32::NAN], &[]), 1);
    }

    #[test]
    fn the_draw_depends_on_the_seed_and_the_position_alone() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.1).collect();
        let with = |seed| Sampling { seed: Some(seed), ..Sampling::default() };
        let tokens = |seed, at: u32| choose(&with(seed), &logits, &vec![3; at as usize]);
        assert_eq!(tokens(1, 5), tokens(1, 5));
        let differs = (0..20).filter(|&at| tokens(1, at) != tokens(2, at)).count();
        assert!(differs > 10, "{differs}");
        let differs = (0..20).filter(|&at| tokens(1, at) != tokens(1, at + 1)).count();
        assert!(differs > 10, "{differs}");
    }

    #[test]
    fn when_everything_is_forbidden_an_allowed_token_comes() {
        let sampling = Sampling { allowed_token_ids: Some(vec![2]), min_tokens: 1, ..Sampling::greedy() };
        let context = Context { eos: vec![2], ..Context::default() };
        let chooser = Chooser::new(&sampling, &[0], context);
        assert_eq!(chooser.choose(&[1.0, 1.0, 1.0], &[], &mut Scratch::default()), 2);
    }
}

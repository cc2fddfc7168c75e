//! Drafts: guesses at an answer's next tokens, taken from its own text and verified beside its last token.
//!
//! A verified draft is kept if it is what the request would have chosen there anyway. The answer is the same with
//! drafts as without, also where chance decides: a random number belongs to a position, not to a step.

use std::num::NonZeroU32;

use quayline_batching::NgramProposer;

use crate::input::count;

/// How drafts are made and verified, under vLLM's names (`--speculative-config`, method `ngram`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// Most drafts for one request in one step.
    pub num_speculative_tokens: NonZeroU32,
    /// The longest end of the text that is looked for further up, in tokens.
    pub prompt_lookup_max: NonZeroU32,
    /// The shortest one; at most `prompt_lookup_max`.
    pub prompt_lookup_min: NonZeroU32,
    /// While more requests than this run, nobody gets drafts: the machine is busy without.
    pub disable_by_batch_size: Option<u32>,
}

/// Makes one request's drafts.
#[derive(Debug)]
pub(crate) struct Drafter {
    proposer: NgramProposer,
    trust: Trust,
    /// What it expects behind the text, and how much of that has come.
    expected: Vec<u32>,
    came: usize,
    /// How much of it is worth verifying.
    offered: usize,
}

impl Drafter {
    /// For a text that begins with `prompt`. Cost: a few hundred nanoseconds per token.
    pub(crate) fn new(speculation: &Speculation, prompt: &[u32]) -> Self {
        let lengths = [speculation.prompt_lookup_min, speculation.prompt_lookup_max];
        let [min, max] = lengths.map(|length| length.get() as usize);
        let mut proposer = NgramProposer::new(min, max);
        proposer.push(prompt);
        Self { proposer, trust: Trust::default(), expected: Vec::new(), came: 0, offered: 0 }
    }

    /// A token came. What was expected in its place, verified or not, tells how far to trust the next guess.
    pub(crate) fn push(&mut self, token: u32) {
        if let Some(&expected) = self.expected.get(self.came) {
            self.trust.learn(expected == token);
            self.came = if expected == token { self.came + 1 } else { self.expected.len() };
        }
        self.proposer.push(&[token]);
    }

    /// Makes up to `drafts_max` drafts of what comes next, and as few as they deserve. Returns how many.
    pub(crate) fn draft(&mut self, drafts_max: u32) -> u32 {
        let drafts = self.trust.drafts().min(drafts_max);
        self.came = 0;
        // A guess that is not verified still shows what it would have been worth.
        self.proposer.propose(drafts.max(1) as usize, &mut self.expected);
        self.offered = self.expected.len().min(drafts as usize);
        count(self.offered)
    }

    /// The first of the drafts that were made last, `most` of them or all.
    pub(crate) fn drafts(&self, most: u32) -> &[u32] {
        &self.expected[..self.offered.min(most as usize)]
    }
}

/// How often guesses came true of late.
#[derive(Debug)]
struct Trust {
    /// Moving average of 1 for each guess that did and 0 for each that did not.
    rate: f32,
}

/// A new guess weighs so much in the average.
const NEWEST: f32 = 0.125;

/// A draft costs about this part of a step of its request, and pays off if it is accepted more often. Measured with the
/// bundled model: 0.25 for a request that is alone, 0.5 for one of sixteen.
const COST: f32 = 0.4;

impl Default for Trust {
    /// Enough for one draft.
    fn default() -> Self {
        Self { rate: 0.5 }
    }
}

impl Trust {
    fn learn(&mut self, came: bool) {
        self.rate += NEWEST * (f32::from(u8::from(came)) - self.rate);
    }

    /// So many drafts that the last of them, which needs all before it to come true, is worth what it costs.
    fn drafts(&self) -> u32 {
        let (mut drafts, mut chance) = (0, self.rate);
        while chance > COST && drafts < 64 {
            drafts += 1;
            chance *= self.rate;
        }
        drafts
    }
}

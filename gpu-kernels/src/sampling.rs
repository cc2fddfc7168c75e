//! Tokens out of logits: how they are drawn, and which drafts of them stand.

use crate::{Error, Ops};

/// Sampling where the logits are.
///
/// A row's token is a function of its logits and its [`Draw`]; the other rows do not matter.
pub trait Sampling: Ops {
    /// What rows of logits may draw, `[rows, vocabulary]`: after penalties, mask, temperature and cuts.
    type Distributions;

    /// Draws the next token of each row of logits `[rows, vocabulary]`. `mask` holds rows of bits, a bit for each
    /// token that is allowed, in words of 32 from the lowest. Logits that are no number are not drawn.
    ///
    /// # Errors
    /// When lengths disagree, a token is not in the vocabulary, or a number is not what it may be.
    fn sample(&self, logits: &Self::Tensor, draws: &[Draw<'_>], mask: &[u32]) -> Result<Vec<Sampled>, Error>;

    /// The distributions that [`Sampling::sample`] draws from, for [`Sampling::verify`]; their `random` is not used.
    /// At temperature 0 the first of the largest has all of it.
    ///
    /// # Errors
    /// As [`Sampling::sample`].
    fn distributions(
        &self,
        logits: &Self::Tensor,
        draws: &[Draw<'_>],
        mask: &[u32],
    ) -> Result<Self::Distributions, Error>;

    /// Weights `[rows, vocabulary]`, the largest of a row 1, and each row's sum of weights in units of 2^-40, each cut
    /// to a whole one.
    ///
    /// # Errors
    /// When they cannot be brought here.
    fn read_distributions(&self, distributions: &Self::Distributions) -> Result<(Vec<f32>, Vec<u64>), Error>;

    /// Walks down each request's drafts as far as they stand against the target's distributions, and draws the
    /// token after them.
    ///
    /// Without `drafted`, the tokens are exactly those that [`Sampling::sample`] gives one at a time with the same
    /// random numbers. With the distributions that the drafts were drawn from, a draft stands with probability
    /// `p(x) / q(x)`, and what follows a refused one is drawn from what `p` has more than `q` (arXiv 2211.17192,
    /// 2305.09781): more drafts stand, and the tokens are distributed as the target's all the same. At temperature
    /// 0 both are greedy.
    ///
    /// # Errors
    /// When a row, a token or a parent is not there, or lengths disagree.
    fn verify(
        &self,
        target: &Self::Distributions,
        drafted: Option<&Self::Distributions>,
        requests: &[Drafts<'_>],
    ) -> Result<Vec<Verified>, Error>;
}

/// How a row's next token is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// Divides the logits; 0 takes the largest, the first of equals.
    pub temperature: f32,
    /// Only the `top_k` largest stay, and what is equal to the last of them; 0 keeps all.
    pub top_k: u32,
    /// Only the largest stay that have this much of the probability together; 1 keeps all.
    pub top_p: f32,
    /// Only those stay that have this share of the largest probability; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens that occurred are divided by it where positive, else multiplied; 1 is none.
    pub repetition: f32,
    /// Subtracted from logits of tokens that were given out.
    pub presence: f32,
    /// Subtracted for each time that a token was given out.
    pub frequency: f32,
    /// The tokens that occurred, each once.
    pub seen: &'a [Seen],
    /// Row of the mask, or `None`: all are allowed.
    pub mask_row: Option<usize>,
    /// Where in the distribution the draw falls, as a fraction of 2^64: the caller's generator gives it, so that a
    /// request's seed alone decides.
    pub random: u64,
}

impl Default for Draw<'_> {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            seen: &[],
            mask_row: None,
            random: 0,
        }
    }
}

impl Draw<'_> {
    /// What logits are divided by; not so small that its reciprocal is infinite.
    pub(crate) fn divisor(&self) -> f32 {
        if self.temperature == 0.0 { 0.0 } else { self.temperature.max(f32::MIN_POSITIVE) }
    }
}

/// A token that occurred.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Seen {
    /// Its number.
    pub token: u32,
    /// How often it was given out; 0 when it is in the prompt alone.
    pub count: u32,
}

/// What a row got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Sampled {
    /// The token; `u32::MAX` when all were masked.
    pub token: u32,
    /// Natural logarithm of its probability by the logits as they came.
    pub logprob: f32,
}

/// The drafts of one request: a tree below its last token, or a chain, which is a tree without branches.
#[derive(Clone, Copy, Debug)]
pub struct Drafts<'a> {
    /// Row of the target's distributions that follows the request's last token; the row after draft `i` is `row +
    /// 1 + i`.
    pub row: usize,
    /// Each after its parent; of equal parents, in the order in which they are tried.
    pub drafts: &'a [Draft],
    /// Where draws fall, as fractions of 2^64: after the last token, then after each draft.
    pub random: &'a [u64],
}

/// A drafted token.
#[derive(Clone, Copy, Debug)]
pub struct Draft {
    /// Its number.
    pub token: u32,
    /// The draft that it follows, by its index; `None`: the request's last token.
    pub parent: Option<u32>,
    /// Row of the distribution that it was drawn from. Not used without those.
    pub from: usize,
    /// Where the draw falls that decides whether it stands, as a fraction of 2^64. Not used without distributions.
    pub accept: u64,
}

/// What became of a request's drafts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Indices of the drafts that stand, each the parent of the next.
    pub accepted: Vec<u32>,
    /// The token after them; `u32::MAX` when nothing is allowed there.
    pub token: u32,
}

/// A number of 0 to 1 as a fraction of 2^64; 1 is all ones.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "of 0 to 1, and the cast saturates"
)]
pub(crate) fn fraction(x: f32) -> u64 {
    (f64::from(x) * 2_f64.powi(64)) as u64
}

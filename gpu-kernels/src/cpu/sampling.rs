//! The next token of each row of logits, or what it would be drawn from.
//!
//! Nothing is sorted. Which tokens stay is a threshold on the logit: the k-th largest, the one at which the mass
//! reaches p, and the largest plus ln(min_p), found by radix selection. Masses are whole numbers of 2^-40, so sums do
//! not depend on their order. `kernels/sampling.cuh` does the same; exponentials may differ in their last bits.

use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::norm::{load, store};
use super::verify::verify;
use super::workers::Workers;
use super::{Cpu, Isa, Tensor};
use crate::sampling::fraction;
use crate::{Drafts, Draw, Error, Sampled, Sampling, Verified, door};

/// What rows of logits may draw, `[rows, vocabulary]`: after penalties, mask, temperature and cuts.
#[derive(Debug)]
pub struct Distributions {
    /// The largest of a row 1.
    weights: Vec<f32>,
    /// The sum of a row's weights in units of 2^-40, each cut to a whole one.
    totals: Vec<u64>,
    vocabulary: usize,
}

impl Distributions {
    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.totals.len()
    }

    /// Rows and vocabulary.
    fn shape(&self) -> (usize, usize) {
        (self.rows(), self.vocabulary)
    }

    /// The weights of one row, and their sum.
    pub(crate) fn row(&self, row: usize) -> (&[f32], u64) {
        (&self.weights[row * self.vocabulary..][..self.vocabulary], self.totals[row])
    }
}

impl Sampling for Cpu {
    type Distributions = Distributions;

    fn sample(&self, logits: &Tensor, draws: &[Draw<'_>], mask: &[u32]) -> Result<Vec<Sampled>, Error> {
        door::sample(logits.shape(), draws, mask)?;
        let (logits, vocabulary) = (logits.data(), logits.cols());
        Ok(sample((&self.workers, self.isa), Logits { logits, vocabulary, draws, mask }))
    }

    fn distributions(
        &self,
        logits: &Tensor,
        draws: &[Draw<'_>],
        mask: &[u32],
    ) -> Result<Distributions, Error> {
        door::sample(logits.shape(), draws, mask)?;
        let (logits, vocabulary) = (logits.data(), logits.cols());
        Ok(distributions((&self.workers, self.isa), Logits { logits, vocabulary, draws, mask }))
    }

    fn read_distributions(&self, distributions: &Distributions) -> Result<(Vec<f32>, Vec<u64>), Error> {
        Ok((distributions.weights.clone(), distributions.totals.clone()))
    }

    fn verify(
        &self,
        target: &Distributions,
        drafted: Option<&Distributions>,
        requests: &[Drafts<'_>],
    ) -> Result<Vec<Verified>, Error> {
        door::verify(target.shape(), drafted.map(Distributions::shape), requests)?;
        Ok(verify(&self.workers, target, drafted, requests))
    }
}

/// Rows of logits, and how each is drawn from. All shapes are checked.
#[derive(Clone, Copy)]
struct Logits<'a> {
    /// `[draws, vocabulary]`.
    logits: &'a [f32],
    vocabulary: usize,
    draws: &'a [Draw<'a>],
    /// `[mask rows][words of 32 bits]`.
    mask: &'a [u32],
}

impl Logits<'_> {
    /// A row's logits, its draw, and which tokens are allowed.
    fn row(&self, row: usize) -> (&[f32], &Draw<'_>, Option<&[u32]>) {
        let (draw, words) = (&self.draws[row], self.vocabulary.div_ceil(32));
        let mask = draw.mask_row.map(|row| &self.mask[row * words..][..words]);
        (&self.logits[row * self.vocabulary..][..self.vocabulary], draw, mask)
    }
}

/// A token for each row.
fn sample((workers, isa): (&Workers, Isa), of: Logits<'_>) -> Vec<Sampled> {
    let nothing = Sampled { token: 0, logprob: 0.0 };
    let mut rows: Vec<_> = (0..of.draws.len()).map(|row| (row, nothing)).collect();
    workers.each(&mut rows, &mut Vec::new(), |(row, sampled), [x, weights]: &mut [Vec<f32>; 2]| {
        x.resize(of.vocabulary, 0.0);
        weights.resize(of.vocabulary, 0.0);
        let (logits, draw, mask) = of.row(*row);
        let largest = largest(logits);
        exponentials(isa, logits, (largest, 1.0), weights);
        let sum = total(weights);
        let kept = keep(isa, (logits, draw, mask), x, weights);
        let token = self::draw(weights, kept, draw.random);
        let logprob = logits.get(token as usize).map_or(f32::NEG_INFINITY, |x| x - largest - share(sum).ln());
        *sampled = Sampled { token, logprob };
    });
    rows.into_iter().map(|(_, sampled)| sampled).collect()
}

/// What each row is drawn from.
fn distributions((workers, isa): (&Workers, Isa), of: Logits<'_>) -> Distributions {
    let (rows, vocabulary) = (of.draws.len(), of.vocabulary);
    let (mut weights, mut totals) = (vec![0.0; rows * vocabulary], vec![0; rows]);
    let rows = weights.chunks_mut(vocabulary.max(1)).zip(&mut totals).enumerate();
    let mut rows: Vec<_> = rows.collect();
    workers.each(&mut rows, &mut Vec::new(), |(row, (weights, total)), x: &mut Vec<f32>| {
        x.resize(vocabulary, 0.0);
        **total = keep(isa, of.row(*row), x, weights);
    });
    Distributions { weights, totals, vocabulary }
}

/// The row's weights after penalties, mask and temperature, cut by min-p, top-k and top-p; and their sum, 0 if nothing
/// is allowed. `x` is to work in.
fn keep(
    isa: Isa,
    (logits, draw, mask): (&[f32], &Draw<'_>, Option<&[u32]>),
    x: &mut [f32],
    weights: &mut [f32],
) -> u64 {
    penalise(logits, draw, mask, x);
    let largest = largest(x);
    if largest == f32::NEG_INFINITY || draw.temperature == 0.0 {
        weights.fill(0.0);
        let first = x.iter().position(|&x| x == largest && x > f32::NEG_INFINITY);
        first.into_iter().for_each(|first| weights[first] = 1.0);
        return total(weights);
    }
    exponentials(isa, x, (largest, 1.0 / draw.divisor()), weights);
    // min-p bounds the probability, which falls with the temperature.
    let floor = key(draw.min_p.ln().mul_add(draw.divisor(), largest));
    let mut floor = floor.max(key(f32::NEG_INFINITY) + 1);
    if draw.top_k > 0 && (draw.top_k as usize) < x.len() {
        floor = select(x, floor, u64::from(draw.top_k), |_| 1);
    }
    let total = cut(x, floor, weights);
    let top_p = fraction(draw.top_p);
    if top_p == u64::MAX {
        return total;
    }
    let floor = select(x, floor, part(total, top_p) + 1, |i| mass(weights[i]));
    cut(x, floor, weights)
}

/// Logits with their penalties, minus infinity where they are masked or no number. Adding 0 makes one zero of the two.
fn penalise(logits: &[f32], draw: &Draw<'_>, mask: Option<&[u32]>, x: &mut [f32]) {
    for (i, (to, &from)) in x.iter_mut().zip(logits).enumerate() {
        let allowed = mask.is_none_or(|mask| mask[i / 32] >> (i % 32) & 1 == 1);
        *to = if allowed && !from.is_nan() { from + 0.0 } else { f32::NEG_INFINITY };
    }
    for seen in draw.seen {
        let x = &mut x[seen.token as usize];
        *x = if *x > 0.0 { *x / draw.repetition } else { *x * draw.repetition };
        if seen.count > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a penalty")]
            let times = seen.count as f32;
            *x -= draw.frequency.mul_add(times, draw.presence);
        }
    }
}

/// The largest number; minus infinity if there is none.
fn largest(x: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; WIDTH];
    let (whole, rest) = x.as_chunks::<WIDTH>();
    let mut meet = |x: &[f32]| {
        most.iter_mut().zip(x).for_each(|(most, &x)| *most = if x > *most { x } else { *most });
    };
    whole.iter().for_each(|x| meet(x));
    meet(rest);
    most.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Weights of logits below the floor become 0. Gives back the sum of the others.
fn cut(x: &[f32], floor: u32, weights: &mut [f32]) -> u64 {
    for (weight, &x) in weights.iter_mut().zip(x) {
        *weight = if key(x) >= floor { *weight } else { 0.0 };
    }
    total(weights)
}

/// The largest key, at least `floor`, for which the masses of keys from it on reach `wanted`; `floor` if they never do.
/// By eight bits a round, the highest first (radix selection).
fn select(x: &[f32], floor: u32, wanted: u64, mass_of: impl Fn(usize) -> u64) -> u32 {
    // The bits that are known, and the mass of what lies above all keys that begin so.
    let (mut prefix, mut sum) = (0_u32, 0);
    for shift in [24, 16, 8, 0] {
        let mut bins = [0_u64; 256];
        for (i, &x) in x.iter().enumerate() {
            let key = key(x);
            if key >= floor && (key ^ prefix) >> shift < 256 {
                bins[(key >> shift & 0xff) as usize] += mass_of(i);
            }
        }
        let reached = (0..256).rev().find(|&bin| {
            sum += bins[bin as usize];
            sum >= wanted
        });
        let Some(bin) = reached else { return floor };
        (prefix, sum) = (prefix | bin << shift, sum - bins[bin as usize]);
    }
    floor.max(prefix)
}

/// Larger numbers have larger keys.
fn key(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// A weight of at most 1 in units of 2^-40; nothing for what is no number.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "cut to a whole number of 0 to 2^40"
)]
pub(super) fn mass(weight: f32) -> u64 {
    (weight * 1_099_511_627_776.0) as u64
}

/// The sum of a row's masses.
pub(super) fn total(weights: &[f32]) -> u64 {
    weights.iter().map(|&weight| mass(weight)).sum()
}

/// A sum of masses as a number.
#[expect(clippy::cast_precision_loss, reason = "to the nearest")]
pub(super) fn share(total: u64) -> f32 {
    total as f32 / 1_099_511_627_776.0
}

/// `x` times a fraction of 2^64.
fn part(x: u64, fraction: u64) -> u64 {
    ((u128::from(x) * u128::from(fraction)) >> 64) as u64
}

/// The first token, in order of the vocabulary, at which the sum of masses passes a fraction of their total;
/// `u32::MAX` if the total is 0.
pub(super) fn draw(weights: &[f32], total: u64, random: u64) -> u32 {
    let (target, mut sum) = (part(total, random), 0);
    let passes = (0..).zip(weights).find(|&(_, &weight)| {
        sum += mass(weight);
        target < sum
    });
    passes.map_or(u32::MAX, |(token, _)| token)
}

/// `out = e^((x - largest) · factor)`, one number as good as the other: bits depend on no neighbour.
pub(super) fn exponentials(isa: Isa, x: &[f32], (largest, factor): (f32, f32), out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "a number for each");
    dispatch(isa, Exponentials { x, largest, factor, out });
}

struct Exponentials<'a> {
    x: &'a [f32],
    largest: f32,
    factor: f32,
    out: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (largest, factor) = (lanes.splat(self.largest), lanes.splat(self.factor));
        for i in (0..self.x.len()).step_by(WIDTH) {
            let (whole, rest) = (i + WIDTH <= self.x.len(), self.x.len() - i);
            // SAFETY: sixteen numbers, or as many as are left.
            let x = unsafe { load(lanes, self.x.as_ptr().wrapping_add(i), whole, rest) };
            let weight = lanes.exp(lanes.mul(lanes.sub(x, largest), factor));
            // SAFETY: `out` is as long as `x`.
            unsafe { store(lanes, self.out.as_mut_ptr().wrapping_add(i), weight, whole, rest) };
        }
    }
}

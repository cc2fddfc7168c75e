//! Temperature, min-p, top-k, top-p, and the draw, without sorting the vocabulary.
//!
//! Each filter keeps the most likely tokens down to some point, so all of them together are one point:
//! the least logit that stays, and among equal logits the largest id. It is found by sorting tokens
//! roughly, into buckets by the leading bits of their logit, and only the bucket with the point in it finely.

use super::exp::exp;
use crate::request::Sampling;

/// Memory that one draw leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// `e^((logit - highest) / temperature)` of each token.
    weights: Vec<f32>,
    buckets: Vec<Bucket>,
    /// Tokens of one bucket.
    fine: Vec<(f32, u32)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    tokens: u32,
    weight: f64,
}

/// Which tokens stay: those above `logit`, and those equal to it up to the id `last`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    logit: f32,
    last: u32,
}

impl Cut {
    const NONE: Self = Self { logit: f32::NEG_INFINITY, last: 0 };

    fn keeps(self, logit: f32, id: u32) -> bool {
        logit > self.logit || (logit == self.logit && id <= self.last)
    }

    /// The stricter of two.
    fn and(self, other: Self) -> Self {
        if self.logit > other.logit || (self.logit == other.logit && self.last < other.last) {
            self
        } else {
            other
        }
    }
}

/// The first of the highest logits; `None` when there is none above minus infinity.
pub(crate) fn most_likely(logits: &[f32]) -> Option<(u32, f32)> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if highest == f32::NEG_INFINITY {
        return None;
    }
    let (id, _) = (0..).zip(logits).find(|&(_, &logit)| logit == highest)?;
    Some((id, highest))
}

/// Draws a token with the random number `uniform` in [0, 1). `highest` is the highest logit, a finite number.
pub(crate) fn draw(
    logits: &[f32],
    highest: f32,
    sampling: &Sampling,
    uniform: f64,
    scratch: &mut Scratch,
) -> u32 {
    // Like vLLM: closer to 0 the quotients overflow.
    let scale = 1.0 / sampling.temperature.max(0.01);
    let Scratch { weights, buckets, fine } = scratch;
    weights.clear();
    weights.extend(logits.iter().map(|&logit| exp((logit - highest) * scale)));
    let mut row = Row { logits, weights, highest, scale, cut: Cut::NONE };
    if sampling.min_p > 0.0 {
        row.cut = row.cut.and(row.min_p(sampling.min_p));
    }
    if sampling.top_k > 0 && (sampling.top_k as usize) < logits.len() {
        row.fill(buckets);
        row.cut = row.cut.and(row.top_k(sampling.top_k, buckets, fine));
    }
    if sampling.top_p < 1.0 {
        row.fill(buckets);
        row.cut = row.cut.and(row.top_p(f64::from(sampling.top_p), buckets, fine));
    }
    row.pick(uniform)
}

/// Buckets per unit of `(highest - logit) / temperature`.
const BUCKETS_PER_UNIT: f32 = 128.0;
/// The last one also holds all that is less likely: each below `e^-32` of the most likely.
const BUCKETS: usize = 4096;
/// Weights are summed in runs of this length first.
const RUN: usize = 256;

/// One row with the tokens that stay so far.
struct Row<'a> {
    logits: &'a [f32],
    weights: &'a [f32],
    highest: f32,
    scale: f32,
    cut: Cut,
}

impl Row<'_> {
    /// The least logit whose weight is at least `min_p` (the highest has weight 1).
    fn min_p(&self, min_p: f32) -> Cut {
        let stays = self.logits.iter().zip(self.weights).filter(|&(_, &weight)| weight >= min_p);
        Cut { logit: stays.map(|(&logit, _)| logit).fold(f32::INFINITY, f32::min), last: u32::MAX }
    }

    /// The `k` most likely tokens stay, and all that are as likely as the last of them.
    fn top_k(&self, k: u32, buckets: &[Bucket], fine: &mut Vec<(f32, u32)>) -> Cut {
        let mut before = 0;
        let found = buckets.iter().position(|bucket| {
            before += bucket.tokens;
            before >= k
        });
        let Some(bucket) = found else { return Cut::NONE };
        self.sort(bucket, fine);
        let above = before - buckets[bucket].tokens;
        Cut { logit: fine[(k - above - 1) as usize].0, last: u32::MAX }
    }

    /// The fewest tokens whose weights reach the share `p` of all stay.
    fn top_p(&self, p: f64, buckets: &[Bucket], fine: &mut Vec<(f32, u32)>) -> Cut {
        let goal = p * buckets.iter().map(|bucket| bucket.weight).sum::<f64>();
        let mut sum = 0.0;
        for (bucket, &Bucket { tokens, weight }) in buckets.iter().enumerate() {
            if tokens == 0 || sum + weight < goal {
                sum += weight;
                continue;
            }
            self.sort(bucket, fine);
            for &(logit, id) in fine.iter() {
                sum += f64::from(self.weights[id as usize]);
                if sum >= goal {
                    return Cut { logit, last: id };
                }
            }
        }
        Cut::NONE
    }

    fn fill(&self, buckets: &mut Vec<Bucket>) {
        buckets.clear();
        buckets.resize(BUCKETS, Bucket::default());
        for (id, (&logit, &weight)) in (0..).zip(self.logits.iter().zip(self.weights)) {
            if self.cut.keeps(logit, id) {
                let bucket = &mut buckets[self.bucket_of(logit)];
                bucket.tokens += 1;
                bucket.weight += f64::from(weight);
            }
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "a float beyond the last bucket saturates, then is cut"
    )]
    #[expect(clippy::cast_sign_loss, reason = "no logit is above the highest")]
    fn bucket_of(&self, logit: f32) -> usize {
        (((self.highest - logit) * self.scale * BUCKETS_PER_UNIT) as usize).min(BUCKETS - 1)
    }

    /// The tokens of one bucket that stay so far, most likely first, ties by id.
    fn sort(&self, bucket: usize, fine: &mut Vec<(f32, u32)>) {
        let tokens = self.logits.iter().zip(0..).map(|(&logit, id)| (logit, id));
        fine.clear();
        fine.extend(
            tokens.filter(|&(logit, id)| self.cut.keeps(logit, id) && self.bucket_of(logit) == bucket),
        );
        fine.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    }

    /// Walks over the weights in order of ids until the random share of their sum is reached. Should
    /// rounding carry it past the last weight, that one is taken.
    fn pick(&self, uniform: f64) -> u32 {
        let sum = |run| self.kept(run).map(|(_, weight)| weight).sum::<f64>();
        let sums: Vec<f64> = (0..self.weights.len().div_ceil(RUN)).map(sum).collect();
        let mut left = uniform * sums.iter().sum::<f64>();
        let found = sums.iter().position(|&sum| {
            let here = left < sum;
            left -= if here { 0.0 } else { sum };
            here
        });
        let run = found.or_else(|| sums.iter().rposition(|&sum| sum > 0.0)).unwrap_or(0);
        let mut chosen = 0;
        for (id, weight) in self.kept(run).filter(|&(_, weight)| weight > 0.0) {
            chosen = id;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
        chosen
    }

    fn kept(&self, run: usize) -> impl Iterator<Item = (u32, f64)> {
        let ids = run * RUN..(run * RUN + RUN).min(self.weights.len());
        let tokens = (run * RUN..).zip(self.logits[ids.clone()].iter().zip(&self.weights[ids]));
        #[expect(clippy::cast_possible_truncation, reason = "ids are u32")]
        tokens
            .map(|(id, (&logit, &weight))| (id as u32, logit, f64::from(weight)))
            .filter(|&(id, logit, _)| self.cut.keeps(logit, id))
            .map(|(id, _, weight)| (id, weight))
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::{mix, uniform};
    use super::*;

    /// A row of `n` random logits; with `levels`, only so many different ones.
    #[expect(clippy::cast_possible_truncation, reason = "the nearest f32 is wanted")]
    fn row(n: usize, seed: u64, levels: Option<u64>) -> Vec<f32> {
        let logit = |i: usize| match levels {
            Some(levels) => (mix(seed + i as u64) % levels) as f32,
            None => (uniform(seed, i as u64) * 12.0 - 6.0) as f32,
        };
        (0..n).map(logit).collect()
    }

    /// What stays and with which probability, by sorting everything.
    fn exact(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let temperature = f64::from(sampling.temperature);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let weight = |id: usize| (f64::from(logits[id] - logits[order[0]]) / temperature).exp();
        let mut kept = order.clone();
        kept.retain(|&id| weight(id) >= f64::from(sampling.min_p));
        if sampling.top_k > 0 && (sampling.top_k as usize) < kept.len() {
            let least = logits[kept[sampling.top_k as usize - 1]];
            kept.retain(|&id| logits[id] >= least);
        }
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let mut sum = 0.0;
        kept.retain(|&id| {
            let stays = sum < f64::from(sampling.top_p) * total;
            sum += weight(id);
            stays
        });
        let total: f64 = kept.iter().map(|&id| weight(id)).sum();
        let mut probabilities = vec![0.0; logits.len()];
        kept.iter().for_each(|&id| probabilities[id] = weight(id) / total);
        probabilities
    }

    fn cases() -> Vec<Sampling> {
        let base = Sampling::default;
        vec![
            base(),
            Sampling { temperature: 0.5, ..base() },
            Sampling { temperature: 3.0, ..base() },
            Sampling { top_k: 1, ..base() },
            Sampling { top_k: 7, ..base() },
            Sampling { top_p: 0.9, ..base() },
            Sampling { top_p: 0.1, ..base() },
            Sampling { top_p: 1e-6, ..base() },
            Sampling { min_p: 0.05, ..base() },
            Sampling { min_p: 1.0, ..base() },
            Sampling { top_k: 20, top_p: 0.7, min_p: 0.01, temperature: 1.3, ..base() },
        ]
    }

    #[test]
    fn draws_follow_the_exact_probabilities() {
        for (which, sampling) in cases().into_iter().enumerate() {
            for levels in [None, Some(5)] {
                let logits = row(40, 11, levels);
                let expected = exact(&logits, &sampling);
                let (_, highest) = most_likely(&logits).unwrap();
                let mut scratch = Scratch::default();
                let draws = 2_000;
                let mut counts = vec![0.0; logits.len()];
                for i in 0..draws {
                    let id = draw(&logits, highest, &sampling, uniform(which as u64, i), &mut scratch);
                    counts[id as usize] += 1.0;
                }
                let mut chi = 0.0;
                let mut freedom = -1.0;
                for (id, (&count, &probability)) in counts.iter().zip(&expected).enumerate() {
                    let mean = probability * draws as f64;
                    assert!(probability > 0.0 || count == 0.0, "{sampling:?} drew {id}, which does not stay");
                    if mean > 0.0 {
                        chi += (count - mean) * (count - mean) / mean.max(1.0);
                        freedom += 1.0;
                    }
                }
                // Above the mean by five standard deviations: not by chance.
                let limit = freedom + 5.0 * (2.0 * f64::max(freedom, 1.0)).sqrt();
                assert!(chi <= limit, "{sampling:?} {levels:?}: {chi} > {limit}");
            }
        }
    }

    #[test]
    fn a_large_vocabulary_keeps_what_sorting_keeps() {
        for sampling in cases() {
            let logits = row(5_000, 5, None);
            let expected = exact(&logits, &sampling);
            let (_, highest) = most_likely(&logits).unwrap();
            let mut scratch = Scratch::default();
            for i in 0..20 {
                let id = draw(&logits, highest, &sampling, uniform(3, i), &mut scratch);
                assert!(expected[id as usize] > 0.0, "{sampling:?} drew {id}, which does not stay");
            }
        }
    }

    #[test]
    fn the_ends_of_the_random_range_are_safe() {
        for sampling in cases() {
            for logits in [vec![0.5], vec![f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY], row(1000, 1, Some(3))]
            {
                let (_, highest) = most_likely(&logits).unwrap();
                for uniform in [0.0, 1.0 - f64::EPSILON / 2.0] {
                    let id = draw(&logits, highest, &sampling, uniform, &mut Scratch::default());
                    assert!(logits[id as usize].is_finite(), "{sampling:?} {uniform}");
                }
            }
        }
    }
}

//! Temperature, min-p, top-k, top-p, and the draw, without sorting the vocabulary.
//!
//! Top-k leaves few tokens: they are gathered in one pass, by a bar that rises, and only they are looked at further.
//! The other filters may leave any number: what they drop gets the weight 0 (`nucleus.rs` finds what top-p drops), and
//! the draw walks over the row.

use super::exp::exp;
use super::{nucleus, row};
use crate::request::Sampling;

/// Like vLLM: closer to 0 the quotients overflow.
pub(crate) const TEMPERATURE_MIN: f32 = 0.01;

/// Memory that one draw leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// The logits of the tokens that a grammar takes.
    pub(crate) taken: Vec<f32>,
    /// Logits after rules and penalties.
    pub(super) changed: Vec<f32>,
    /// `e^((logit - highest) / temperature)` of each token.
    pub(super) weights: Vec<f32>,
    candidates: Vec<Candidate>,
    nucleus: nucleus::Scratch,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f32,
}

/// The first of the highest logits; `None` when there is none above minus infinity.
pub(crate) fn most_likely(logits: &[f32]) -> Option<(u32, f32)> {
    let highest = row::highest(logits);
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
    let scale = 1.0 / sampling.temperature.max(TEMPERATURE_MIN);
    let Scratch { weights, candidates, nucleus, .. } = scratch;
    if sampling.top_k > 0 && (sampling.top_k as usize) < logits.len() {
        let weight = |logit: f32| exp((logit - highest) * scale);
        gather_top_k(logits, sampling.top_k as usize, weight, candidates);
        candidates.retain(|candidate| candidate.weight >= sampling.min_p);
        if sampling.top_p < 1.0 {
            keep_top(candidates, f64::from(sampling.top_p) * sum(candidates));
        }
        return pick(candidates, uniform);
    }
    row::weights(logits, highest, scale, weights);
    if sampling.min_p > 0.0 {
        row::drop_below(weights, sampling.min_p);
    }
    if sampling.top_p < 1.0 {
        nucleus::keep(weights, f64::from(sampling.top_p), nucleus);
    }
    pick_of_all(weights, uniform)
}

/// The `k` most likely tokens, and all that are as likely as the last of them.
///
/// Tokens below the bar are passed over. Whenever enough have gathered, the bar rises to the `k`-th of them.
fn gather_top_k(logits: &[f32], k: usize, weight: impl Fn(f32) -> f32, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let mut bar = f32::NEG_INFINITY;
    let mut room = (4 * k).max(256);
    for (id, &logit) in (0..).zip(logits) {
        if logit >= bar {
            candidates.push(Candidate { id, logit, weight: 0.0 });
            if candidates.len() == room {
                bar = raise_bar(candidates, k);
                room = room.max(2 * candidates.len());
            }
        }
    }
    raise_bar(candidates, k);
    candidates.sort_unstable_by_key(|candidate| candidate.id);
    for candidate in candidates {
        candidate.weight = weight(candidate.logit);
    }
}

fn raise_bar(candidates: &mut Vec<Candidate>, k: usize) -> f32 {
    if candidates.len() < k {
        return f32::NEG_INFINITY;
    }
    let (_, kth, _) = candidates.select_nth_unstable_by(k - 1, |a, b| b.logit.total_cmp(&a.logit));
    let bar = kth.logit;
    candidates.retain(|candidate| candidate.logit >= bar);
    bar
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.weight)).sum()
}

/// The fewest candidates whose weights reach `goal` stay: the most likely, of equals the first. Then all are in the
/// order of their ids again, in which a draw walks.
fn keep_top(candidates: &mut Vec<Candidate>, goal: f64) {
    candidates.sort_unstable_by(|a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)));
    let mut reached = 0.0;
    candidates.retain(|candidate| {
        let stays = reached < goal;
        reached += f64::from(candidate.weight);
        stays
    });
    candidates.sort_unstable_by_key(|candidate| candidate.id);
}

/// Walks over the candidates until the random share of their sum is reached. Should rounding carry it past
/// the last one, that one is taken.
fn pick(candidates: &[Candidate], uniform: f64) -> u32 {
    let mut left = uniform * sum(candidates);
    let mut chosen = 0;
    for candidate in candidates.iter().filter(|candidate| candidate.weight > 0.0) {
        chosen = candidate.id;
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            break;
        }
    }
    chosen
}

/// The same in order of ids, over all tokens: first to the run, then to the token.
fn pick_of_all(weights: &[f32], uniform: f64) -> u32 {
    let mut left = uniform * row::run_sums(weights).sum::<f64>();
    let mut last_with_weight = 0;
    let found = row::run_sums(weights).enumerate().find(|&(run, sum)| {
        last_with_weight = if sum > 0.0 { run } else { last_with_weight };
        let here = left < sum;
        left -= if here { 0.0 } else { sum };
        here
    });
    let run = found.map_or(last_with_weight, |(run, _)| run);
    let mut chosen = 0;
    for (at, weight) in row::run(weights, run).filter(|&(_, weight)| weight > 0.0) {
        chosen = at;
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    #[expect(clippy::cast_possible_truncation, reason = "ids are u32")]
    let id = chosen as u32;
    id
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

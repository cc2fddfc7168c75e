//! Log-probabilities of one position.

use super::draw::Scratch;
use super::row;
use crate::output::{Logprobs, TokenLogprob};

/// The log-probability and rank of `chosen`, and the `top` most likely tokens, best first, ties by id.
/// Cost: three passes over the row.
pub(crate) fn logprobs(logits: &[f32], chosen: u32, top: u32, scratch: &mut Scratch) -> Logprobs {
    let normaliser = log_sum_exp(logits, &mut scratch.weights);
    #[expect(clippy::cast_possible_truncation, reason = "the nearest f32 is wanted")]
    let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let logit = logits[chosen as usize];
    let rank = logits.iter().filter(|&&other| other >= logit).count().max(1);
    let top = most_likely(logits, top as usize);
    let entry = |(rank, (id, logit)): (u32, (u32, f32))| TokenLogprob { id, logprob: logprob(logit), rank };
    Logprobs {
        chosen: TokenLogprob {
            id: chosen,
            logprob: logprob(logit),
            rank: u32::try_from(rank).unwrap_or(u32::MAX),
        },
        top: (1..).zip(top).map(entry).collect(),
    }
}

/// `ln(sum(e^logit))`, summed in a fixed order.
fn log_sum_exp(logits: &[f32], weights: &mut Vec<f32>) -> f64 {
    let highest = row::highest(logits);
    row::weights(logits, highest, 1.0, weights);
    f64::from(highest) + row::run_sums(weights).sum::<f64>().ln()
}

/// The `n` highest logits in descending order. Keeps a short sorted list: nearly every logit is refused
/// by one comparison.
fn most_likely(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    if n == 0 {
        return best;
    }
    if n > 64 {
        best.extend((0..).zip(logits.iter().copied()));
        best.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        best.truncate(n);
        return best;
    }
    for (id, &logit) in (0..).zip(logits) {
        if best.len() == n && best.last().is_some_and(|&(_, least)| logit <= least) {
            continue;
        }
        let at = best.partition_point(|&(_, other)| other >= logit);
        best.insert(at, (id, logit));
        best.truncate(n);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logprobs(logits: &[f32], chosen: u32, top: u32) -> Logprobs {
        super::logprobs(logits, chosen, top, &mut Scratch::default())
    }

    #[test]
    fn probabilities_sum_to_one_and_ranks_count_from_the_top() {
        let logits = [1.0_f32, 3.0, 2.0, 3.0, f32::NEG_INFINITY];
        let all = logprobs(&logits, 2, 5);
        let sum: f32 = all.top.iter().map(|entry| entry.logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(all.chosen.rank, 3);
        let ids: Vec<u32> = all.top.iter().map(|entry| entry.id).collect();
        assert_eq!(ids, [1, 3, 2, 0, 4]);
        assert_eq!(all.top[3].rank, 4);
        assert_eq!(all.top[4].logprob, f32::NEG_INFINITY);
        assert_eq!(logprobs(&logits, 1, 0).chosen.rank, 2);
    }

    #[test]
    fn the_short_list_is_what_sorting_gives() {
        let logits: Vec<f32> = (0..1000_u64).map(|i| (super::super::random::mix(i) % 97) as f32).collect();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        for n in [1, 2, 20, 64, 65, 1000] {
            assert_eq!(most_likely(&logits, n), sorted[..n]);
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let entry = logprobs(&[1000.0, 999.0], 0, 0).chosen;
        assert!((entry.logprob - -(1.0 + (-1.0_f32).exp()).ln()).abs() < 1e-6);
    }
}

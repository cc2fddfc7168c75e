//! Which of several equal batchers takes a request, when each runs a copy of the model (data parallel
//! ranks). Pure: the caller asks every batcher for its [`Stats`](crate::Stats).

use crate::standing::Stats;

/// How much a waiting request counts against a running one.
const WAITING: u64 = 4;

/// The place of the batcher that should take the next request: of those with the least to do, a waiting
/// request counting as four running ones, the one with the fewest waiting tokens, then the first. `None` if
/// there are none.
pub fn least_loaded<'a>(ranks: impl IntoIterator<Item = &'a Stats>) -> Option<usize> {
    let load =
        |stats: &Stats| (u64::from(stats.waiting) * WAITING + u64::from(stats.running), stats.waiting_tokens);
    let ranks = ranks.into_iter().enumerate();
    ranks.min_by_key(|&(place, stats)| (load(stats), place)).map(|(place, _)| place)
}

/// Deals out prompts so that the ranks have about the same number of tokens to read: the longest first, each
/// to the rank that has the fewest so far. `tokens` is what each rank has already; returns the rank of each
/// prompt, and raises `tokens`. The rank with the most gets at most 4/3 of what would be best (Graham 1969).
///
/// # Panics
/// If there is no rank.
pub fn spread_prompts(prompts: &[u32], tokens: &mut [u64]) -> Vec<usize> {
    let mut longest_first: Vec<usize> = (0..prompts.len()).collect();
    longest_first.sort_by_key(|&prompt| (std::cmp::Reverse(prompts[prompt]), prompt));
    let mut ranks = vec![0; prompts.len()];
    for prompt in longest_first {
        let rank = (0..tokens.len()).min_by_key(|&rank| (tokens[rank], rank)).expect("there is a rank");
        tokens[rank] += u64::from(prompts[prompt]);
        ranks[prompt] = rank;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_waiting_count_more_than_the_running() {
        let rank =
            |waiting, running, waiting_tokens| Stats { waiting, running, waiting_tokens, ..Stats::default() };
        assert_eq!(least_loaded(&[rank(1, 0, 10), rank(0, 4, 0), rank(0, 3, 0)]), Some(2));
        assert_eq!(least_loaded(&[rank(1, 0, 10), rank(0, 4, 0)]), Some(1));
        assert_eq!(least_loaded(&[rank(1, 1, 10), rank(1, 1, 5), rank(1, 1, 5)]), Some(1));
        assert_eq!(least_loaded(&[]), None);
    }

    #[test]
    fn ranks_read_about_the_same() {
        let mut tokens = [0, 0];
        assert_eq!(spread_prompts(&[100, 900, 500, 400], &mut tokens), [0, 0, 1, 1]);
        assert_eq!(tokens, [1000, 900]);
    }
}

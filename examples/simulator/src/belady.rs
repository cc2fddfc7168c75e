//! What no cache can beat: Belady's rule, which knows the future.
//!
//! After each prompt the cache keeps, of all blocks it has or has just seen, those that are asked for again soonest
//! (Belady, IBM Systems Journal 5(2), 1966). A prompt counts what it finds as its longest leading run.
//!
//! This is the optimum for prefixes too. A block is never asked for without those before it, so its next use is never
//! sooner than theirs; whatever is kept, the blocks before it are kept, and every block found is part of the leading
//! run. To keep a block until its next use is an interval between two requests, a cache of `n` blocks is `n` machines,
//! and dropping the interval that ends last keeps the largest number of intervals (Faigle and Nawijn, Discrete Applied
//! Mathematics 58, 1995). So no policy finds more blocks.
//!
//! What it does not say: how many *tokens* or how much *work* could be found at best, since it counts blocks (its
//! shares of these are those of the same run, not bounds); and what a cache could do that must hold a prompt's own
//! blocks while it is served, or that keeps answers as well: that is less.

use std::collections::{BTreeSet, HashMap};

use crate::prompts::Prompts;
use crate::replay::Share;

/// The most blocks that a cache of `capacity` blocks can find.
pub fn optimum(prompts: &Prompts, capacity: u32) -> Share {
    let next = next_uses(prompts);
    let mut share = Share::default();
    // When a kept block is asked for next; and the same the other way round, with the place in the prompt, so that of
    // blocks with one next use the last of the prompt goes first.
    let mut kept: HashMap<u32, (usize, usize)> = HashMap::new();
    let mut by_next: BTreeSet<(usize, usize, u32)> = BTreeSet::new();
    for (prompt, next) in prompts.iter().zip(&next) {
        let hits = prompt.blocks.iter().take_while(|block| kept.contains_key(block)).count();
        share.count(prompt.blocks.len(), prompt.tokens, hits);
        for (place, (&block, &next)) in prompt.blocks.iter().zip(next).enumerate() {
            if let Some((next, place)) = kept.remove(&block) {
                by_next.remove(&(next, place, block));
            }
            if let Some(next) = next {
                kept.insert(block, (next, place));
                by_next.insert((next, place, block));
            }
        }
        while kept.len() > capacity as usize {
            let Some((_, _, block)) = by_next.pop_last() else { break };
            kept.remove(&block);
        }
    }
    share
}

/// For each block of each prompt, the number of the next prompt that has it.
fn next_uses(prompts: &Prompts) -> Vec<Vec<Option<usize>>> {
    let mut seen: Vec<Option<usize>> = vec![None; prompts.distinct_blocks() as usize];
    let mut next: Vec<Vec<Option<usize>>> = Vec::with_capacity(prompts.iter().len());
    for (number, prompt) in prompts.iter().enumerate().rev() {
        next.push(prompt.blocks.iter().map(|&block| seen[block as usize].replace(number)).collect());
    }
    next.reverse();
    next
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Arrival;
    use std::time::Duration;

    fn prompts(blocks: &[&[u64]]) -> Prompts {
        let arrivals: Vec<Arrival> = blocks
            .iter()
            .map(|blocks| Arrival {
                at: Duration::ZERO,
                prompt_tokens: 512 * u32::try_from(blocks.len()).unwrap(),
                output_tokens: 0,
                blocks: blocks.to_vec(),
            })
            .collect();
        Prompts::of(&arrivals).unwrap()
    }

    #[test]
    fn what_comes_back_soonest_is_kept() {
        let trace = prompts(&[&[1, 2], &[3, 4], &[1, 2], &[3, 4]]);
        let hits = |capacity| optimum(&trace, capacity).hit_blocks;
        assert_eq!([0, 1, 2, 3, 4].map(hits), [0, 1, 2, 3, 4]);
    }

    /// Every way to keep blocks after each prompt, tried out.
    fn best(trace: &[Vec<u32>], kept: &[u32], capacity: usize) -> usize {
        let Some((prompt, rest)) = trace.split_first() else { return 0 };
        let hits = prompt.iter().take_while(|block| kept.contains(block)).count();
        let mut all: Vec<u32> = kept.iter().chain(prompt).copied().collect();
        all.sort_unstable();
        all.dedup();
        let ways = (0..1u32 << all.len()).filter(|way| way.count_ones() as usize == capacity.min(all.len()));
        let later = ways.map(|way| {
            let kept: Vec<u32> =
                all.iter().enumerate().filter(|(bit, _)| way >> bit & 1 == 1).map(|(_, &b)| b).collect();
            best(rest, &kept, capacity)
        });
        hits + later.max().unwrap_or(0)
    }

    #[test]
    fn no_way_to_keep_blocks_finds_more() {
        // Paths in a small tree: a beginning, a middle that depends on it, an end that depends on both.
        let mut random = 7u64;
        let mut below = |limit: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % limit
        };
        for run in 0..60 {
            let paths: Vec<Vec<u64>> = (0..5)
                .map(|_| {
                    let (first, second, third) = (below(2), below(2), below(2));
                    let path = [first, 10 + 2 * first + second, 100 + 4 * first + 2 * second + third];
                    path[..1 + usize::try_from(below(3)).unwrap()].to_vec()
                })
                .collect();
            let trace = prompts(&paths.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let blocks: Vec<Vec<u32>> = trace.iter().map(|prompt| prompt.blocks.clone()).collect();
            for capacity in 1..4u32 {
                let expected = best(&blocks, &[], capacity as usize) as u64;
                assert_eq!(
                    optimum(&trace, capacity).hit_blocks,
                    expected,
                    "run {run}: {blocks:?}, {capacity}"
                );
            }
        }
    }
}

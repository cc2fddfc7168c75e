//! Top-p without sorting the vocabulary (Holtzman et al., The Curious Case of Neural Text Degeneration, 2019: the
//! nucleus).
//!
//! Tokens at or below a bar are too few to matter all together. When few are above it, they are sorted. When many are,
//! the row is flat: weights are then summed up in buckets by their leading bits, whose order is that of the weights,
//! and only the bucket in which the sum from the top reaches the goal is sorted.

use super::row;

/// So many are sorted without further ado.
const SORTED_MAX: usize = 1024;

/// Weights are looked through in runs of so many.
const RUN: usize = 64;

/// There are two to the power of this many buckets.
const BUCKET_BITS: u32 = 12;

/// Memory that one call leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    buckets: Vec<f64>,
    /// Bits of the weight, and place.
    members: Vec<(u32, usize)>,
}

/// Sets all weights to 0 but the fewest that have the share `top_p` of the sum: the largest, ties by place. No weight
/// is above 1.
pub(crate) fn keep(weights: &mut [f32], top_p: f64, scratch: &mut Scratch) {
    let total: f64 = row::run_sums(weights).sum();
    let goal = top_p * total;
    // All at or below it together weigh no more than what is left out.
    let bar = (1.0 - top_p) * total / weights.len() as f64;
    #[expect(clippy::cast_possible_truncation, reason = "what lies below will do")]
    let bar = (bar as f32).next_down().max(0.0);
    let (from, above) = match row::count_above(weights, bar) {
        0..=SORTED_MAX => (bar.to_bits() + 1..u32::MAX, 0.0),
        _ => last_bucket(weights, bar, goal, &mut scratch.buckets),
    };
    let Some((least, last)) = least_to_stay(weights, from, goal - above, &mut scratch.members) else {
        return;
    };
    let (until_last, behind) = weights.split_at_mut(last + 1);
    row::drop_below(until_last, least);
    row::drop_below(behind, least.next_up());
}

/// The bits of the weights in the bucket in which the sum from the top reaches `goal`, and the sum above it.
fn last_bucket(weights: &[f32], bar: f32, goal: f64, buckets: &mut Vec<f64>) -> (std::ops::Range<u32>, f64) {
    let lowest = bar.to_bits();
    let width_bits = (u32::BITS - (1.0_f32.to_bits() - lowest).leading_zeros()).saturating_sub(BUCKET_BITS);
    buckets.clear();
    buckets.resize(1 << BUCKET_BITS, 0.0);
    for weight in weights {
        // All that is too little to matter falls into the first bucket.
        let bucket = weight.to_bits().saturating_sub(lowest) >> width_bits;
        buckets[bucket as usize] += f64::from(*weight);
    }
    let mut above = 0.0;
    let mut bucket = buckets.len() - 1;
    while bucket > 0 && above + buckets[bucket] < goal {
        above += buckets[bucket];
        bucket -= 1;
    }
    let bits = |bucket: usize| lowest + (u32::try_from(bucket).unwrap_or(u32::MAX) << width_bits);
    (bits(bucket).max(lowest + 1)..bits(bucket + 1), above)
}

/// Of the weights whose bits are in `from`, from the largest down, the one that reaches `goal`, and its place. Rounding
/// may keep them all from it; then the least, and if there are none, none is dropped.
fn least_to_stay(
    weights: &[f32],
    from: std::ops::Range<u32>,
    goal: f64,
    members: &mut Vec<(u32, usize)>,
) -> Option<(f32, usize)> {
    members.clear();
    for (start, run) in (0..).step_by(RUN).zip(weights.chunks(RUN)) {
        let inside = |weight: &f32| from.contains(&weight.to_bits());
        // Without a branch this is vector instructions, and nearly all runs are passed over.
        if run.iter().fold(false, |any, weight| any | inside(weight)) {
            let here = run.iter().zip(start..).filter(|(weight, _)| inside(weight));
            members.extend(here.map(|(weight, at)| (weight.to_bits(), at)));
        }
    }
    members.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut reached = 0.0;
    let found = members.iter().find(|(bits, _)| {
        reached += f64::from(f32::from_bits(*bits));
        reached >= goal
    });
    found.or(members.last()).map(|&(bits, at)| (f32::from_bits(bits), at))
}

#[cfg(test)]
mod tests {
    use super::super::random::uniform;
    use super::*;

    /// The same by sorting everything.
    fn sorted(weights: &[f32], goal: f64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..weights.len()).filter(|&at| weights[at] > 0.0).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let mut sum = 0.0;
        order.retain(|&at| {
            let stays = sum < goal;
            sum += f64::from(weights[at]);
            stays
        });
        order.sort_unstable();
        order
    }

    fn kept(weights: &[f32], top_p: f64) -> Vec<usize> {
        let mut row = weights.to_vec();
        keep(&mut row, top_p, &mut Scratch::default());
        assert!(row.iter().zip(weights).all(|(after, before)| *after == 0.0 || after == before));
        (0..row.len()).filter(|&at| row[at] > 0.0).collect()
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "the nearest f32 is wanted")]
    fn what_sorting_keeps_stays() {
        for (seed, levels) in [(1, 0.0), (2, 0.0), (3, 1.0), (4, 3.0), (5, 50.0)] {
            let weight = |i: u64| match (levels, uniform(seed, i)) {
                (0.0, share) => (-12.0 * share).exp(),
                (levels, share) => ((share * levels).floor() + 1.0) / levels,
            };
            // Powers of two and their fractions: sums are exact, in whatever order.
            let coarse = |weight: f64| (weight * 4096.0).round() / 4096.0;
            let count = 500 * seed.pow(2);
            let mut weights: Vec<f32> = (0..count).map(|i| coarse(weight(i)) as f32).collect();
            weights[0] = 1.0;
            let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            for share in [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0] {
                let expected = sorted(&weights, share * total);
                assert_eq!(kept(&weights, share), expected, "seed {seed}, {share}");
            }
        }
    }

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "the nearest f32 is wanted")]
    fn a_share_of_nearly_one_keeps_nearly_all() {
        let mut weights: Vec<f32> = (0..5000).map(|i| (-3.0 * uniform(1, i)).exp() as f32).collect();
        weights[7] = 1.0;
        assert!(kept(&weights, f64::from(1.0_f32.next_down())).len() > 4990);
    }

    #[test]
    fn a_row_with_one_weight_keeps_it() {
        assert_eq!(kept(&[0.0, 1.0, 0.0], 0.5), [1]);
        assert_eq!(kept(&[1.0], 1.0), [0]);
    }

    #[test]
    fn of_equal_weights_the_first_stay() {
        assert_eq!(kept(&[1.0; 4096], 0.5), (0..2048).collect::<Vec<_>>());
        assert_eq!(kept(&[1.0; 16], 0.5), (0..8).collect::<Vec<_>>());
    }
}

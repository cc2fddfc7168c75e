//! Percentiles of what was measured.

use serde::Serialize;

/// A sample in five numbers, in the unit of the sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How many values there were.
    pub count: usize,
    /// Their arithmetic mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// Nine of ten are at or below it.
    pub p90: f64,
    /// Ninety-nine of a hundred are at or below it.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Sorts `values` and sums them up; `None` for an empty sample.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a sample has far fewer than 2^52 values")]
    pub fn of(values: &mut [f64]) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        Some(Self {
            count: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(values, 0.50),
            p90: percentile(values, 0.90),
            p99: percentile(values, 0.99),
            max,
        })
    }
}

/// The value below which the share `share` of a sorted sample lies, with a straight line between neighbours
/// (the definition that numpy uses unless told otherwise).
///
/// # Panics
/// If `sorted` is empty or `share` is outside `0.0..=1.0`.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index into a sample is small and not negative"
)]
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    assert!(!sorted.is_empty() && (0.0..=1.0).contains(&share), "share {share} of {} values", sorted.len());
    let position = share * (sorted.len() - 1) as f64;
    let low = position as usize;
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + (sorted[high] - sorted[low]) * (position - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_lies_on_the_line_between_neighbours() {
        let sample = [10.0, 20.0, 30.0, 40.0];
        assert_eq!(percentile(&sample, 0.0), 10.0);
        assert_eq!(percentile(&sample, 0.5), 25.0);
        assert_eq!(percentile(&sample, 1.0), 40.0);
        assert!((percentile(&sample, 0.9) - 37.0).abs() < 1e-9);
    }

    #[test]
    fn one_value_is_every_percentile() {
        let summary = Summary::of(&mut [7.0]).unwrap();
        assert_eq!(
            (summary.p50, summary.p99, summary.mean, summary.max, summary.count),
            (7.0, 7.0, 7.0, 7.0, 1)
        );
    }

    #[test]
    fn the_order_of_the_sample_does_not_matter() {
        let mut forward: Vec<f64> = (0..101).map(f64::from).collect();
        let mut backward: Vec<f64> = (0..101).rev().map(f64::from).collect();
        assert_eq!(Summary::of(&mut forward), Summary::of(&mut backward));
        assert_eq!(Summary::of(&mut forward).unwrap().p90, 90.0);
    }

    #[test]
    fn nothing_has_no_summary() {
        assert_eq!(Summary::of(&mut []), None);
    }
}

//! Many times in few numbers.

/// Mean and quantiles.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Their mean.
    pub mean: f64,
    /// Half of them are no longer than this.
    pub p50: f64,
    /// Nine of ten are no longer than this.
    pub p90: f64,
    /// Ninety-nine of a hundred are no longer than this.
    pub p99: f64,
}

impl Summary {
    /// Of these, in any order; all zero when there are none. Cost: O(n).
    pub fn of(mut values: Vec<f64>) -> Summary {
        if values.is_empty() {
            return Summary::default();
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|share| quantile(&mut values, share));
        Summary { mean, p50, p90, p99 }
    }

    /// Each number with what it is called.
    pub fn named(&self) -> [(&'static str, f64); 4] {
        [("mean", self.mean), ("p50", self.p50), ("p90", self.p90), ("p99", self.p99)]
    }
}

/// The smallest value that `share` of the values do not exceed.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a length")]
    let rank = (share * values.len() as f64).ceil() as usize;
    *values.select_nth_unstable_by(rank.max(1) - 1, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let hundred = (1..=100).rev().map(f64::from).collect();
        assert_eq!(Summary::of(hundred), Summary { mean: 50.5, p50: 50.0, p90: 90.0, p99: 99.0 });
        assert_eq!(Summary::of(vec![7.0]), Summary { mean: 7.0, p50: 7.0, p90: 7.0, p99: 7.0 });
        assert_eq!(Summary::of(vec![]), Summary::default());
    }
}

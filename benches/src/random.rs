//! Numbers that look random and are the same on every run: a hash of a seed, a stream and a counter.

/// A value that is a function of its three arguments only. A prompt drawn with it does not depend on which
/// requests were made before.
///
/// ```
/// use quayline_benches::random::hash;
/// assert_eq!(hash(1, 2, 3), hash(1, 2, 3));
/// assert_ne!(hash(1, 2, 3), hash(1, 3, 2));
/// ```
#[must_use]
pub fn hash(seed: u64, stream: u64, counter: u64) -> u64 {
    mix(mix(mix(seed) ^ stream).wrapping_add(counter))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), after one step of its counter.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A sequence of such numbers.
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    stream: u64,
    counter: u64,
}

impl Random {
    /// The sequence named by `seed` and `stream`.
    #[must_use]
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, counter: 0 }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.counter += 1;
        hash(self.seed, self.stream, self.counter)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        scale(self.bits(), bound)
    }

    /// A number in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        unit(self.bits())
    }

    /// True in a share `probability` of all calls.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// The time to the next arrival of a Poisson process, in units of its mean.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}

/// Maps 64 random bits to `0..bound`.
#[must_use]
pub fn scale(bits: u64, bound: u64) -> u64 {
    ((u128::from(bits) * u128::from(bound)) >> 64) as u64
}

#[expect(clippy::cast_precision_loss, reason = "53 bits are exact in an f64")]
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_kept_and_reached() {
        let mut random = Random::new(7, 0);
        let mut seen = [0_u32; 5];
        for _ in 0..1000 {
            seen[usize::try_from(random.below(5)).unwrap()] += 1;
        }
        assert!(seen.iter().all(|&count| count > 150), "{seen:?}");
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn exponential_gaps_have_mean_one() {
        let mut random = Random::new(3, 9);
        let sum: f64 = (0..20_000).map(|_| random.exponential()).sum();
        assert!((sum / 20_000.0 - 1.0).abs() < 0.03, "{sum}");
    }
}

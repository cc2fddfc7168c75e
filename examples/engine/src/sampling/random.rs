//! Random numbers that are a function of the seed and the position, so that no request disturbs another
//! and a resumed one goes on as it would have.

/// A number in [0, 1), uniform over multiples of 2^-53.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    (bits(seed, position) >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}

/// The same number before it was cut to 53 bits, as a fraction of 2^64.
pub(crate) fn bits(seed: u64, position: u64) -> u64 {
    let start = mix(seed ^ 0x5155_4159_4C49_4E45);
    mix(start.wrapping_add((position + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub(crate) fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::cast_possible_truncation, reason = "a bin below 16")]
    fn numbers_are_spread_evenly_over_positions_and_over_seeds() {
        type Number = fn(u64) -> f64;
        let streams: [Number; 2] = [|i| uniform(7, i), |i| uniform(i, 3)];
        for stream in streams {
            let mut bins = [0_i32; 16];
            for i in 0..16_000 {
                bins[(stream(i) * 16.0) as usize] += 1;
            }
            // 15 degrees of freedom: above 37.7 once in a thousand.
            let chi: f64 = bins.iter().map(|&n| f64::from(n - 1000).powi(2) / 1000.0).sum();
            assert!(chi < 37.7, "{chi} {bins:?}");
        }
    }
}

//! Whose a request is, in a trace that does not say.

/// Draws a tenant below `tenants` for each of `count` requests. The first asks most: the kth has a share in
/// proportion to `1 / k` (Zipf), as tenants of real services are skewed. The same seed draws the same.
pub fn draw(count: usize, tenants: u32, seed: u64) -> Vec<u32> {
    let mut upto: Vec<f64> = Vec::new();
    let mut sum = 0.0;
    for k in 1..=tenants.max(1) {
        sum += 1.0 / f64::from(k);
        upto.push(sum);
    }
    let mut state = seed;
    let mut tenant = || {
        let at = unit(&mut state) * sum;
        (1..).zip(&upto).find(|(_, end)| at < **end).map_or(0, |(k, _)| k - 1)
    };
    (0..count).map(|_| tenant()).collect()
}

/// The next number of a sequence, at least 0 and below 1: Steele, Lea and Flood, *Fast Splittable Pseudorandom
/// Number Generators*, OOPSLA 2014 (SplitMix64).
fn unit(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tenant_asks_most_and_the_seed_decides() {
        let drawn = draw(10_000, 4, 7);
        let of = |tenant| drawn.iter().filter(|&&drawn| drawn == tenant).count();
        // Shares of 12, 6, 4 and 3 in 25.
        assert!((4_600..5_000).contains(&of(0)) && (1_100..1_300).contains(&of(3)), "{} {}", of(0), of(3));
        assert_eq!(drawn, draw(10_000, 4, 7));
        assert_ne!(drawn, draw(10_000, 4, 8));
    }
}

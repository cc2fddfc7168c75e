//! The buckets of vLLM's histograms.

pub(super) const TIME_TO_FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
pub(super) const BETWEEN_TOKENS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
pub(super) const END_TO_END: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
pub(super) const RESIDENCY: [f64; 21] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0,
    300.0, 600.0, 1200.0, 1800.0,
];
/// Bytes.
pub(super) const COPIES: [f64; 10] = [1e6, 5e6, 10e6, 20e6, 40e6, 60e6, 80e6, 100e6, 150e6, 200e6];
pub(super) const PREEMPTIONS: [f64; 7] = [1., 2., 3., 4., 5., 10., 20.];
pub(super) const ITERATION: [f64; 13] =
    [1., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096., 8192., 16384.];

/// 1, 2, 5, 10, 20, 50, … up to the context.
pub(super) fn one_two_five(context: u32) -> Vec<f64> {
    let powers = (0..).map(|power| 10_f64.powi(power));
    let all = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|mantissa| mantissa * power));
    all.take_while(|bucket| *bucket <= f64::from(context)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_in_ones_twos_and_fives() {
        assert_eq!(one_two_five(120), [1., 2., 5., 10., 20., 50., 100.]);
    }
}

//! Passes over one row of logits, in a fixed order of sums and in a form that becomes vector instructions.

use super::exp::exp;

/// Sums run over so many lanes side by side.
const LANES: usize = 16;
/// Lanes are summed up after so many numbers, so that single precision does.
const RUN: usize = 512;

/// The highest logit; minus infinity for a row without numbers.
pub(crate) fn highest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (parts, rest) = row.as_chunks::<LANES>();
    for part in parts {
        for (lane, &logit) in lanes.iter_mut().zip(part) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// How many numbers are above `bar`.
pub(crate) fn count_above(numbers: &[f32], bar: f32) -> usize {
    // Counts of 32 bits become vector instructions; a run is short enough for them.
    let run = |run: &[f32]| run.iter().map(|&number| u32::from(number > bar)).sum::<u32>();
    numbers.chunks(RUN).map(|numbers| run(numbers) as usize).sum()
}

/// The weight `e^((logit - highest) * scale)` of each logit.
pub(crate) fn weights(row: &[f32], highest: f32, scale: f32, out: &mut Vec<f32>) {
    out.clear();
    out.extend(row.iter().map(|&logit| exp((logit - highest) * scale)));
}

/// Sets numbers below `bar` to 0.
pub(crate) fn drop_below(numbers: &mut [f32], bar: f32) {
    for number in numbers {
        *number = if *number >= bar { *number } else { 0.0 };
    }
}

/// The sum of each run of [`RUN`] numbers.
pub(crate) fn run_sums(numbers: &[f32]) -> impl Iterator<Item = f64> {
    numbers.chunks(RUN).map(|run| {
        let mut lanes = [0.0_f32; LANES];
        let (parts, rest) = run.as_chunks::<LANES>();
        for part in parts {
            for (lane, number) in lanes.iter_mut().zip(part) {
                *lane += number;
            }
        }
        f64::from(lanes.iter().chain(rest).sum::<f32>())
    })
}

/// The numbers of a run, with their places.
pub(crate) fn run(numbers: &[f32], run: usize) -> impl Iterator<Item = (usize, f32)> {
    let from = run * RUN;
    let to = (from + RUN).min(numbers.len());
    (from..to).zip(numbers[from..to].iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "whole numbers are exact")]
    fn rows_of_any_length_are_seen_to_the_end() {
        for n in [1_usize, 15, 16, 17, 511, 512, 513, 1100] {
            let row: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(highest(&row), (n - 1) as f32);
            assert_eq!(count_above(&row, 2.5), n.saturating_sub(3));
            let sum: f64 = run_sums(&row).sum();
            assert_eq!(sum, (n * (n - 1) / 2) as f64);
            let all: Vec<usize> = (0..n.div_ceil(RUN)).flat_map(|i| run(&row, i)).map(|(at, _)| at).collect();
            assert!(all.into_iter().eq(0..n));
        }
        assert_eq!(highest(&[f32::NAN, 1.0, f32::NAN]), 1.0);
        assert_eq!(highest(&[f32::NAN]), f32::NEG_INFINITY);
    }
}

//! Rounding floats to small integers, or to E4M3, with a scale, ties to even.

use half::f16;

use crate::fp8;

/// Elements of `in` with one scale when a matrix is rounded to four bits.
pub(crate) const GROUP: usize = 128;

/// Rounds elements to -127..=127 and answers the scale that they share.
pub(crate) fn round_eight(from: &[f32], to: &mut [i8]) -> f32 {
    let scale = largest(from).abs() / 127.0;
    round(from, scale, (-127.0, 127.0), to);
    scale
}

/// Rounds elements to -8..=7 and answers the scale that they share. Four bits reach one further below zero than above:
/// the largest element gets that one.
pub(crate) fn round_four(from: &[f32], to: &mut [i8]) -> f16 {
    let scale = f16::from_f32(largest(from) / -8.0);
    round(from, scale.to_f32(), (-8.0, 7.0), to);
    scale
}

/// Rounds elements to E4M3, of which `to` gets the codes, and answers the scale that they share: the largest element is
/// the largest number.
pub(crate) fn round_fp8(from: &[f32], to: &mut [i8]) -> f32 {
    let scale = largest(from).abs() / fp8::MAX;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for (to, from) in to.iter_mut().zip(from) {
        let number = from * inverse;
        // As with whole numbers, what is none becomes 0.
        *to = fp8::nearest(if number.is_nan() { 0.0 } else { number }).cast_signed();
    }
    scale
}

/// The element that is furthest from zero.
fn largest(from: &[f32]) -> f32 {
    from.iter().fold(0.0_f32, |a, &b| if b.abs() > a.abs() { b } else { a })
}

fn round(from: &[f32], scale: f32, (low, high): (f32, f32), to: &mut [i8]) {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for (to, from) in to.iter_mut().zip(from) {
        #[expect(clippy::cast_possible_truncation, reason = "within eight bits; what is no number becomes 0")]
        let value = (from * inverse).round_ties_even().clamp(low, high) as i8;
        *to = value;
    }
}

//! E4M3, the eight-bit float of weights and caches (arXiv 2209.05433): a sign, four bits of exponent and three of
//! fraction.
//!
//! ```text
//! s eeee fff    ±2^(e - 7) · 1.fff, for e = 0 ±2^-6 · 0.fff; the largest is 448
//! s 1111 111    no number; there are no infinities
//! ```

use half::f16;

use crate::Fp8Source;
use crate::error::{Error, multiple, same};

/// The largest number.
pub(crate) const MAX: f32 = 448.0;
/// The two codes that are no number, without their sign.
const NO_NUMBER: u8 = 0x7f;
/// What [`small`] leaves to the scale.
pub(crate) const SCALE: f32 = 256.0;

/// What a number is worth, times `2^-8`: its bits are then those of an f16, which every processor widens exactly.
#[inline(always)]
pub(crate) fn small(bits: u8) -> f32 {
    f16::from_bits(u16::from(bits & 0x80) << 8 | u16::from(bits & 0x7f) << 7).to_f32()
}

/// Whether a code is no number.
pub(crate) fn is_none(bits: u8) -> bool {
    bits & 0x7f == NO_NUMBER
}

/// The nearest number, ties to even; beyond the largest, that one. What is no number stays none.
pub(crate) fn nearest(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let size = x.abs().min(MAX);
    if x.is_nan() {
        return sign | NO_NUMBER;
    }
    // Below the smallest power of two with a bit of its own for it, steps are 2^-9.
    if size < 1.0 / 64.0 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 8")]
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    let bits = size.to_bits();
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    #[expect(clippy::cast_possible_truncation, reason = "exponents of 2^-6 to 2^8")]
    let code = (rounded - ((127 - 7) << 3)) as u8;
    sign | code
}

/// The elements of a matrix whose parts fit its shape and its blocks, and are numbers. Cost: one pass over them.
pub(crate) fn checked(source: &Fp8Source) -> Result<&[u8], Error> {
    let operator = "weight_fp8";
    let &Fp8Source { rows, cols, block, .. } = source;
    multiple(operator, "outputs", rows, 1)?;
    multiple(operator, "inputs", cols, 1)?;
    multiple(operator, "outputs of a block", block.0, 1)?;
    multiple(operator, "inputs of a block", block.1, if block.1 < cols { 8 } else { 1 })?;
    let blocks = rows.div_ceil(block.0).saturating_mul(cols.div_ceil(block.1));
    same(operator, "scales", source.scales.len(), blocks)?;
    let all = (*source.elements.bytes).as_ref();
    let elements = all.get(source.elements.range.clone()).unwrap_or_default();
    same(operator, "bytes of the elements", elements.len(), rows.saturating_mul(cols))?;
    let refuse = |what, (down, across): (usize, usize)| {
        let (found, supported) = (format!("[{down}, {across}]"), "finite numbers");
        Err(Error::Unsupported { operator, what, found, supported })
    };
    if let Some(at) = source.scales.iter().position(|scale| !scale.is_finite()) {
        let across = cols.div_ceil(block.1);
        return refuse("the scale that is no finite number at", (at / across, at % across));
    }
    match elements.iter().position(|&bits| is_none(bits)) {
        Some(at) => refuse("the element that is no number at", (at / cols, at % cols)),
        None => Ok(elements),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition, and not by way of f16.
    fn worth(bits: u8) -> f32 {
        let (exponent, fraction) = (i32::from(bits >> 3 & 15), f32::from(bits & 7) / 8.0);
        let size =
            if exponent == 0 { fraction / 64.0 } else { (1.0 + fraction) * 2.0_f32.powi(exponent - 7) };
        if bits >> 7 == 1 { -size } else { size }
    }

    fn numbers() -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(|&bits| !is_none(bits))
    }

    #[test]
    fn every_code_is_worth_what_the_format_says() {
        for bits in numbers() {
            assert_eq!((small(bits) * SCALE).to_bits(), worth(bits).to_bits(), "{bits:#x}");
        }
        assert_eq!((worth(0x7e), worth(0x01), worth(0x08)), (MAX, 1.0 / 512.0, 1.0 / 64.0));
    }

    #[test]
    fn rounding_takes_the_nearest_and_of_two_the_even_one() {
        for bits in numbers() {
            assert_eq!(nearest(worth(bits)), bits, "{bits:#x}");
        }
        for low in 0..0x7e_u8 {
            let (below, above) = (worth(low), worth(low + 1));
            let middle = f32::midpoint(below, above);
            assert_eq!(nearest(middle), low + low % 2, "between {low:#x} and the next");
            assert_eq!(nearest(middle.next_down()), low, "{low:#x}");
            assert_eq!(nearest(-middle.next_up()), 0x80 | (low + 1), "{low:#x}");
        }
        assert_eq!([f32::INFINITY, -1e9, f32::NAN].map(nearest), [0x7e, 0xfe, NO_NUMBER]);
    }
}

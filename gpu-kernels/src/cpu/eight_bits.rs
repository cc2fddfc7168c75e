//! Numbers of one byte: E4M3 (OCP 8-bit floating point: 4 bits of exponent, 3 of fraction, largest 448) and whole
//! numbers.

use super::lanes::{Element, Lanes, WIDTH};

/// The largest E4M3.
pub(crate) const E4M3_MOST: f32 = 448.0;
/// The largest whole number.
pub(crate) const INT8_MOST: f32 = 127.0;

/// To nearest, ties to even, cut at 448. What is no number becomes E4M3's.
pub(crate) fn to_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let size = x.abs().min(E4M3_MOST);
    // The spacing of numbers around `size` is an eighth of its power of two, and 2^-9 below 2^-6.
    let exponent = (size.to_bits() >> 23).max(127 - 6);
    let steps = (size * f32::from_bits((127 + 127 + 3 - exponent) << 23)).round_ties_even();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 16, and 126 in all")]
    let bits = ((exponent - 121) * 8 + steps as u32) as u8;
    sign | bits
}

/// To nearest, ties to even, cut at 127. What is no number becomes 0.
pub(crate) fn to_int8(x: f32) -> u8 {
    #[expect(clippy::cast_possible_truncation, reason = "cut at 127; a cast of what is no number gives 0")]
    let whole = x.clamp(-INT8_MOST, INT8_MOST).round_ties_even() as i8;
    whole.to_ne_bytes()[0]
}

#[derive(Clone, Copy)]
pub(crate) struct AsE4m3;
#[derive(Clone, Copy)]
pub(crate) struct AsInt8;

impl Element for AsE4m3 {
    const BYTES: usize = 1;
    /// The bits of E4M3 in the place of an f16's are the number times 2^-8; subnormals come out right.
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise; any alignment will do.
        let bytes = unsafe { at.cast::<[u8; WIDTH]>().read_unaligned() };
        let halves = bytes.map(|x| u16::from(x & 0x80) << 8 | u16::from(x & 0x7f) << 7);
        // SAFETY: sixteen f16.
        let small = unsafe { lanes.load_f16(halves.as_ptr().cast()) };
        lanes.mul(small, lanes.splat(256.0))
    }
}

impl Element for AsInt8 {
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_i8(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::super::lanes::{Kernel, dispatch};
    use super::*;

    struct Widen<'a>(&'a [u8; WIDTH], &'a mut [f32; WIDTH]);

    impl Kernel for Widen<'_> {
        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) {
            // SAFETY: sixteen bytes.
            let wide = unsafe { AsE4m3::load(lanes, self.0.as_ptr()) };
            // SAFETY: sixteen numbers.
            unsafe { lanes.store(self.1.as_mut_ptr(), wide) };
        }
    }

    /// What the bits say (OCP 8-bit floating point, section 5.3).
    fn worth(bits: u8) -> f32 {
        let fraction = f32::from(bits & 7) / 8.0;
        let size = match i32::from(bits >> 3 & 15) {
            0 => fraction * 2.0_f32.powi(-6),
            exponent => (1.0 + fraction) * 2.0_f32.powi(exponent - 7),
        };
        if bits < 128 { size } else { -size }
    }

    #[test]
    fn every_e4m3_is_widened_and_found_again() {
        for isa in Isa::ALL.iter().copied().filter(|isa| isa.available()) {
            for first in (0..=255_u8).step_by(WIDTH) {
                let bytes: [u8; WIDTH] = std::array::from_fn(|i| first + u8::try_from(i).expect("sixteen"));
                let mut wide = [0.0; WIDTH];
                dispatch(isa, Widen(&bytes, &mut wide));
                for (bits, wide) in bytes.into_iter().zip(wide).filter(|(bits, _)| bits & 0x7f != 0x7f) {
                    assert_eq!(wide.to_bits(), worth(bits).to_bits(), "{isa}: {bits:#x}");
                    assert_eq!(to_e4m3(wide), bits, "{wide}");
                }
            }
        }
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest_and_ties_to_even() {
        for bits in 0..0x7e_u8 {
            let (low, high) = (worth(bits), worth(bits + 1));
            let middle = low + (high - low) / 2.0;
            assert_eq!(to_e4m3(middle), if bits % 2 == 0 { bits } else { bits + 1 }, "{middle}");
            assert_eq!((to_e4m3(middle.next_down()), to_e4m3(-middle.next_up())), (bits, bits + 0x81));
        }
        assert_eq!([1e9, -1e9, f32::NAN].map(to_e4m3), [0x7e, 0xfe, 0x7f]);
        assert_eq!([0.5, 1.5, -2.5, 300.0, -300.0, f32::NAN].map(to_int8), [0, 2, 254, 127, 129, 0]);
    }
}

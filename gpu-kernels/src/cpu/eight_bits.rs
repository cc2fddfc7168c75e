//! Cached numbers of one byte: E4M3 and whole numbers.

use super::lanes::{Element, Lanes};
use crate::fp8;

/// The largest whole number.
pub(crate) const INT8_MOST: f32 = 127.0;

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
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        let small = unsafe { lanes.load_e4m3(at) };
        lanes.mul(small, lanes.splat(fp8::SCALE))
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
    use super::super::lanes::{Kernel, WIDTH, dispatch};
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

    #[test]
    fn every_e4m3_is_widened_and_found_again() {
        for isa in Isa::ALL.iter().copied().filter(|isa| isa.available()) {
            for first in (0..=255_u8).step_by(WIDTH) {
                let bytes: [u8; WIDTH] = std::array::from_fn(|i| first + u8::try_from(i).expect("sixteen"));
                let mut wide = [0.0; WIDTH];
                dispatch(isa, Widen(&bytes, &mut wide));
                for (bits, wide) in bytes.into_iter().zip(wide).filter(|(bits, _)| bits & 0x7f != 0x7f) {
                    assert_eq!(fp8::nearest(wide), bits, "{isa}: {bits:#x} became {wide}");
                }
            }
        }
    }

    #[test]
    fn whole_numbers_are_cut_and_ties_are_even() {
        assert_eq!([0.5, 1.5, -2.5, 300.0, -300.0, f32::NAN].map(to_int8), [0, 2, 254, 127, 129, 0]);
    }
}

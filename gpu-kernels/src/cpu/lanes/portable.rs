//! Sixteen lanes as an array; the compiler finds what vectors the target has.

use half::{bf16, f16};

use super::super::digits::BASE;
use super::{Kernel, Lanes, Registers, WIDTH};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// One rounding where the target does that fast, two where it does not.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; WIDTH] {
    std::array::from_fn(f)
}

impl Lanes for Portable {
    type F = [f32; WIDTH];
    type P = [f32; 4];
    type I = [f32; 4];
    type B = [[f32; 4]; 4];
    const PARTS: usize = 4;
    const REGISTERS: Registers = Registers::Quarters;

    #[inline(never)]
    fn apart<K: Kernel>(self, kernel: K) {
        kernel.run(self);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; WIDTH]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| fma(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // Adding and taking away 1.5 · 2^23 leaves no room for a fraction; right for |a| < 2^22.
        const MAGIC: f32 = 12_582_912.0;
        each(|i| (a[i] + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn times_power_of_two(self, a: Self::F, n: Self::F) -> Self::F {
        #[expect(clippy::cast_possible_truncation, reason = "n is whole and small; no number casts to 0")]
        each(|i| a[i] * f32::from_bits((((n[i] as i32) + 127) as u32) << 23))
    }
    #[inline(always)]
    fn zero_below(self, a: Self::F, x: Self::F, bound: Self::F) -> Self::F {
        each(|i| if x[i] < bound[i] { 0.0 } else { a[i] })
    }
    #[inline(always)]
    fn keep(self, a: Self::F, from: usize, to: usize, other: f32) -> Self::F {
        each(|i| if (from..to).contains(&i) { a[i] } else { other })
    }
    #[inline(always)]
    fn sum(self, mut a: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }
    #[inline(always)]
    fn largest(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |most, x| if x > most { x } else { most })
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::F; 16]) -> [Self::F; 16] {
        std::array::from_fn(|i| each(|j| rows[j][i]))
    }

    #[inline(always)]
    fn no_dots(self) -> Self::I {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn dot<const DIGIT: usize>(
        self,
        mut sums: Self::I,
        a: [Self::B; 2],
        x: [*const f32; 2],
    ) -> Self::I {
        if DIGIT == 0 {
            for (a, x) in a.into_iter().zip(x) {
                // SAFETY: the caller's promise.
                let x = unsafe { x.cast::<[f32; 4]>().read_unaligned() };
                for (a, x) in a.into_iter().zip(x) {
                    sums = self.fma_part(a, [x; 4], sums);
                }
            }
        }
        sums
    }
    #[inline(always)]
    fn whole_part(self, a: Self::I) -> Self::P {
        a
    }

    #[inline(always)]
    fn splat_part(self, x: f32) -> Self::P {
        [x; 4]
    }
    #[inline(always)]
    fn mul_part(self, a: Self::P, b: Self::P) -> Self::P {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma_part(self, a: Self::P, b: Self::P, c: Self::P) -> Self::P {
        std::array::from_fn(|i| fma(a[i], b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_first(self, at: *const f32, n: usize) -> Self::F {
        let mut whole = [0.0; WIDTH];
        // SAFETY: the caller's promise, and `n < 16`.
        unsafe { std::ptr::copy_nonoverlapping(at.cast::<u8>(), whole.as_mut_ptr().cast(), n * 4) };
        whole
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { at.cast::<[u16; WIDTH]>().read_unaligned() };
        each(|i| f32::from_bits(u32::from(u16::from_le(bits[i])) << 16))
    }
    #[inline(always)]
    unsafe fn load_firsts_bf16(self, at: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let pairs = unsafe { at.cast::<[u32; WIDTH]>().read_unaligned() };
        each(|i| f32::from_bits(u32::from_le(pairs[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_seconds_bf16(self, at: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let pairs = unsafe { at.cast::<[u32; WIDTH]>().read_unaligned() };
        each(|i| f32::from_bits(u32::from_le(pairs[i]) & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let bytes = unsafe { at.cast::<[i8; WIDTH]>().read_unaligned() };
        each(|i| f32::from(bytes[i]))
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, at: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let codes = unsafe { at.cast::<[u8; WIDTH]>().read_unaligned() };
        each(|i| crate::fp8::small(codes[i]))
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, at: *const u8) -> [Self::B; 2] {
        // SAFETY: the caller's promise.
        let words = unsafe { at.cast::<[u32; 4]>().read_unaligned() }.map(u32::from_le);
        [0, 4].map(|nibble| {
            std::array::from_fn(|byte| {
                words.map(|word| (word >> (8 * byte + nibble) & 15) as u8).map(f32::from)
            })
        })
    }
    #[inline(always)]
    unsafe fn store_digits(self, at: *mut f32, digits: [Self::F; 3]) {
        let [low, middle, high] = digits;
        // SAFETY: the caller's promise.
        unsafe { self.store(at, each(|i| (high[i] * BASE + middle[i]) * BASE + low[i])) };
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        let bits = unsafe { at.cast::<[u16; WIDTH]>().read_unaligned() };
        each(|i| f16::from_bits(u16::from_le(bits[i])).to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, a: Self::F) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::F>().write_unaligned(a) };
    }
    #[inline(always)]
    unsafe fn store_first(self, at: *mut f32, a: Self::F, n: usize) {
        // SAFETY: the caller's promise, and `n < 16`.
        unsafe { std::ptr::copy_nonoverlapping(a.as_ptr().cast::<u8>(), at.cast(), n * 4) };
    }
    #[inline(always)]
    unsafe fn load_part(self, at: *const f32) -> Self::P {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::P>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_part_bf16(self, at: *const u8) -> Self::P {
        // SAFETY: the caller's promise.
        let bits = unsafe { at.cast::<[u16; 4]>().read_unaligned() };
        std::array::from_fn(|i| f32::from_bits(u32::from(u16::from_le(bits[i])) << 16))
    }
    #[inline(always)]
    unsafe fn load_part_f16(self, at: *const u8) -> Self::P {
        // SAFETY: the caller's promise.
        let bits = unsafe { at.cast::<[u16; 4]>().read_unaligned() };
        std::array::from_fn(|i| f16::from_bits(u16::from_le(bits[i])).to_f32())
    }
    #[inline(always)]
    unsafe fn store_part(self, at: *mut f32, a: Self::P) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Self::P>().write_unaligned(a) };
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_write(self, _: *const f32) {}
}

/// Rounds to bf16, ties to even; no number stays no number.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    #[expect(clippy::cast_possible_truncation, reason = "shifted right by 16")]
    let half = if x.is_nan() { quiet as u16 } else { rounded as u16 };
    debug_assert_eq!(half, bf16::from_f32(x).to_bits());
    half
}

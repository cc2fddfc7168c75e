//! Sixteen lanes in four registers.
//!
//! Products are f32 multiply-adds, as everywhere else: the dot products of bf16 that some of these machines have round
//! activations to bf16 first, so they would change what is computed.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a chain of register instructions has one reason to be sound"
)]

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, Lanes, Registers, WIDTH};

/// Proof that the machine has NEON.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

/// # Safety
/// The machine has the feature named at [`Neon`].
#[target_feature(enable = "neon")]
#[inline(never)]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Neon(()));
}

type Four = [float32x4_t; 4];

/// Applies an instruction to all quarters.
macro_rules! four {
    ($instruction:ident($($a:expr),+)) => {{
        // SAFETY: the token proves the feature.
        unsafe {
            [
                $instruction($($a[0]),+),
                $instruction($($a[1]),+),
                $instruction($($a[2]),+),
                $instruction($($a[3]),+),
            ]
        }
    }};
}

impl Neon {
    /// Four rows become four columns.
    #[inline(always)]
    fn transpose4(self, r: Four) -> Four {
        // SAFETY: the token proves the feature.
        unsafe {
            let even = [vtrn1q_f32(r[0], r[1]), vtrn1q_f32(r[2], r[3])].map(|a| vreinterpretq_f64_f32(a));
            let odd = [vtrn2q_f32(r[0], r[1]), vtrn2q_f32(r[2], r[3])].map(|a| vreinterpretq_f64_f32(a));
            [
                vreinterpretq_f32_f64(vzip1q_f64(even[0], even[1])),
                vreinterpretq_f32_f64(vzip1q_f64(odd[0], odd[1])),
                vreinterpretq_f32_f64(vzip2q_f64(even[0], even[1])),
                vreinterpretq_f32_f64(vzip2q_f64(odd[0], odd[1])),
            ]
        }
    }

    /// Sixteen words, at any alignment.
    ///
    /// # Safety
    /// 64 bytes are readable at `at`.
    #[inline(always)]
    unsafe fn words(self, at: *const u8) -> [uint32x4_t; 4] {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            [
                vreinterpretq_u32_u8(vld1q_u8(at)),
                vreinterpretq_u32_u8(vld1q_u8(at.add(16))),
                vreinterpretq_u32_u8(vld1q_u8(at.add(32))),
                vreinterpretq_u32_u8(vld1q_u8(at.add(48))),
            ]
        }
    }
}

impl Lanes for Neon {
    type F = Four;
    type P = float32x4_t;
    type I = int32x4_t;
    type B = uint8x16_t;
    const PARTS: usize = 4;
    const REGISTERS: Registers = Registers::Few;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the machine has the features.
        unsafe { run(kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Four {
        [self.splat_part(x); 4]
    }
    #[inline(always)]
    fn add(self, a: Four, b: Four) -> Four {
        four!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Four, b: Four) -> Four {
        four!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Four, b: Four) -> Four {
        four!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Four, b: Four) -> Four {
        four!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: Four, b: Four) -> Four {
        // `vmaxq` would answer no number where either is none.
        let larger = four!(vcgtq_f32(a, b));
        four!(vbslq_f32(larger, a, b))
    }
    #[inline(always)]
    fn min(self, a: Four, b: Four) -> Four {
        let smaller = four!(vcltq_f32(a, b));
        four!(vbslq_f32(smaller, a, b))
    }
    #[inline(always)]
    fn fma(self, a: Four, b: Four, c: Four) -> Four {
        four!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn round(self, a: Four) -> Four {
        four!(vrndnq_f32(a))
    }
    #[inline(always)]
    fn times_power_of_two(self, a: Four, n: Four) -> Four {
        let (n, bias) = (four!(vcvtq_s32_f32(n)), four!(vdupq_n_s32([127; 4])));
        let exponent = four!(vaddq_s32(n, bias));
        let bits = four!(vdupq_n_s32([23; 4]));
        let shifted = four!(vshlq_s32(exponent, bits));
        self.mul(a, four!(vreinterpretq_f32_s32(shifted)))
    }
    #[inline(always)]
    fn zero_below(self, a: Four, x: Four, bound: Four) -> Four {
        let (a, below) = (four!(vreinterpretq_u32_f32(a)), four!(vcltq_f32(x, bound)));
        let kept = four!(vbicq_u32(a, below));
        four!(vreinterpretq_f32_u32(kept))
    }
    #[inline(always)]
    fn keep(self, a: Four, from: usize, to: usize, other: f32) -> Four {
        let lanes: [u32; WIDTH] = std::array::from_fn(|i| if (from..to).contains(&i) { u32::MAX } else { 0 });
        // SAFETY: `lanes` holds four registers.
        let mask = unsafe { self.words(lanes.as_ptr().cast()) };
        let other = self.splat(other);
        four!(vbslq_f32(mask, a, other))
    }
    #[inline(always)]
    fn sum(self, a: Four) -> f32 {
        // SAFETY: the token proves the feature.
        unsafe {
            let a = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            let a = vadd_f32(vget_low_f32(a), vget_high_f32(a));
            vget_lane_f32::<0>(vpadd_f32(a, a))
        }
    }
    #[inline(always)]
    fn largest(self, a: Four) -> f32 {
        // SAFETY: the token proves the feature.
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))) }
    }
    #[inline(always)]
    fn transpose(self, rows: [Four; 16]) -> [Four; 16] {
        let mut out = rows;
        for row in (0..WIDTH).step_by(4) {
            for quarter in 0..4 {
                let block = [row, row + 1, row + 2, row + 3].map(|row| rows[row][quarter]);
                for (i, column) in self.transpose4(block).into_iter().enumerate() {
                    out[4 * quarter + i][row / 4] = column;
                }
            }
        }
        out
    }

    #[inline(always)]
    fn no_dots(self) -> int32x4_t {
        // SAFETY: the token proves the feature.
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn dot<const DIGIT: usize>(
        self,
        sums: int32x4_t,
        a: [uint8x16_t; 2],
        x: [*const f32; 2],
    ) -> int32x4_t {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let a = a.map(|a| vreinterpretq_s8_u8(a));
            let x = x.map(|x| vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().add(DIGIT).read())));
            let low = vmlal_s8(
                vmull_s8(vget_low_s8(a[0]), vget_low_s8(x[0])),
                vget_low_s8(a[1]),
                vget_low_s8(x[1]),
            );
            let high = vmlal_high_s8(vmull_high_s8(a[0], x[0]), a[1], x[1]);
            vpadalq_s16(sums, vpaddq_s16(low, high))
        }
    }
    #[inline(always)]
    fn whole_part(self, a: int32x4_t) -> float32x4_t {
        // SAFETY: the token proves the feature.
        unsafe { vcvtq_f32_s32(a) }
    }

    #[inline(always)]
    fn splat_part(self, x: f32) -> float32x4_t {
        // SAFETY: the token proves the feature.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    fn mul_part(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves the feature.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn fma_part(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves the feature.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Four {
        // SAFETY: the caller's promise.
        let words = unsafe { self.words(at.cast()) };
        four!(vreinterpretq_f32_u32(words))
    }
    #[inline(always)]
    unsafe fn load_first(self, at: *const f32, n: usize) -> Four {
        let mut whole = [0.0_f32; WIDTH];
        // SAFETY: the caller's promise, and `n < 16`.
        unsafe { std::ptr::copy_nonoverlapping(at.cast::<u8>(), whole.as_mut_ptr().cast(), n * 4) };
        // SAFETY: sixteen elements.
        unsafe { self.load(whole.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> Four {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let halves = [vreinterpretq_u16_u8(vld1q_u8(at)), vreinterpretq_u16_u8(vld1q_u8(at.add(16)))];
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(halves[0]))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(halves[0])),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(halves[1]))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(halves[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_firsts_bf16(self, at: *const u8) -> Four {
        // SAFETY: the caller's promise.
        let pairs = unsafe { self.words(at) };
        let left = four!(vdupq_n_s32([16; 4]));
        let shifted = four!(vshlq_u32(pairs, left));
        four!(vreinterpretq_f32_u32(shifted))
    }
    #[inline(always)]
    unsafe fn load_seconds_bf16(self, at: *const u8) -> Four {
        // SAFETY: the caller's promise.
        let pairs = unsafe { self.words(at) };
        let upper = four!(vdupq_n_u32([0xffff_0000; 4]));
        let kept = four!(vandq_u32(pairs, upper));
        four!(vreinterpretq_f32_u32(kept))
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> Four {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(at));
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        }
    }
    /// Sign and number of a byte, widened with its sign, are seven bits below their places in an f16.
    #[inline(always)]
    unsafe fn load_e4m3(self, at: *const u8) -> Four {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(at));
            let keep = vdupq_n_s16(!0x4000);
            let low = vandq_s16(vshlq_n_s16::<7>(vmovl_s8(vget_low_s8(bytes))), keep);
            let high = vandq_s16(vshlq_n_s16::<7>(vmovl_high_s8(bytes)), keep);
            [
                vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(low))),
                vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(low))),
                vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(high))),
                vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(high))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, at: *const u8) -> [uint8x16_t; 2] {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let bytes = vld1q_u8(at);
            [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)]
        }
    }
    #[inline(always)]
    unsafe fn store_digits(self, at: *mut f32, digits: [Four; 3]) {
        const COLUMNS: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
        let low = four!(vdupq_n_u32([255; 4]));
        let [a, b, c] = digits.map(|digits| {
            let whole = four!(vcvtq_s32_f32(digits));
            let bytes = four!(vreinterpretq_u32_s32(whole));
            four!(vandq_u32(bytes, low))
        });
        for (quarter, (a, (b, c))) in a.into_iter().zip(b.into_iter().zip(c)).enumerate() {
            // SAFETY: the caller's promise, and the token proves the feature.
            unsafe {
                let words = vorrq_u32(vorrq_u32(a, vshlq_n_u32::<8>(b)), vshlq_n_u32::<16>(c));
                let columns = vld1q_u8(COLUMNS.as_ptr());
                vst1q_u8(at.add(4 * quarter).cast(), vqtbl1q_u8(vreinterpretq_u8_u32(words), columns));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> Four {
        // SAFETY: the caller's promise.
        unsafe {
            [
                self.load_part_f16(at),
                self.load_part_f16(at.add(8)),
                self.load_part_f16(at.add(16)),
                self.load_part_f16(at.add(24)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, a: Four) {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            vst1q_f32(at, a[0]);
            vst1q_f32(at.add(4), a[1]);
            vst1q_f32(at.add(8), a[2]);
            vst1q_f32(at.add(12), a[3]);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, at: *mut f32, a: Four, n: usize) {
        let mut whole = [0.0_f32; WIDTH];
        // SAFETY: sixteen elements.
        unsafe { self.store(whole.as_mut_ptr(), a) };
        // SAFETY: the caller's promise, and `n < 16`.
        unsafe { std::ptr::copy_nonoverlapping(whole.as_ptr().cast::<u8>(), at.cast(), n * 4) };
    }
    #[inline(always)]
    unsafe fn load_part(self, at: *const f32) -> float32x4_t {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { vld1q_f32(at) }
    }
    #[inline(always)]
    unsafe fn load_part_bf16(self, at: *const u8) -> float32x4_t {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(at)))) }
    }
    #[inline(always)]
    unsafe fn load_part_f16(self, at: *const u8) -> float32x4_t {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))) }
    }
    #[inline(always)]
    unsafe fn store_part(self, at: *mut f32, a: float32x4_t) {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { vst1q_f32(at, a) };
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch never faults and changes nothing that a program sees.
        unsafe {
            asm!("prfm pldl1keep, [{at}]", at = in(reg) at.addr(), options(nomem, nostack, preserves_flags))
        };
    }
    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        // SAFETY: as above.
        unsafe {
            asm!("prfm pldl2keep, [{at}]", at = in(reg) at.addr(), options(nomem, nostack, preserves_flags))
        };
    }
    #[inline(always)]
    fn prefetch_write(self, at: *const f32) {
        // SAFETY: as above.
        unsafe {
            asm!("prfm pstl1keep, [{at}]", at = in(reg) at.addr(), options(nomem, nostack, preserves_flags))
        };
    }
}

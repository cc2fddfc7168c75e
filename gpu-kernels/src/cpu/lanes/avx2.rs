//! Sixteen lanes in two registers.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a chain of register instructions has one reason to be sound"
)]

use std::arch::asm;
use std::arch::x86_64::*;

use super::{Kernel, Lanes, Registers};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// # Safety
/// The machine has the features named at [`Avx2`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

type Pair = [__m256; 2];

impl Avx2 {
    /// -1 in lanes `from..to` of sixteen, 0 elsewhere.
    #[inline(always)]
    fn between(self, from: usize, to: usize) -> [__m256i; 2] {
        let lanes: [i32; 16] = std::array::from_fn(|i| if (from..to).contains(&i) { -1 } else { 0 });
        // SAFETY: the token proves the feature; `lanes` holds two vectors.
        unsafe {
            [_mm256_loadu_si256(lanes.as_ptr().cast()), _mm256_loadu_si256(lanes.as_ptr().add(8).cast())]
        }
    }

    /// Rows become columns, eight by eight.
    #[inline(always)]
    fn transpose8(self, r: [__m256; 8]) -> [__m256; 8] {
        // SAFETY: the token proves the feature.
        unsafe {
            let mut a = r;
            for i in [0, 4] {
                let (t0, t1) = (_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1]));
                let (t2, t3) =
                    (_mm256_unpacklo_ps(r[i + 2], r[i + 3]), _mm256_unpackhi_ps(r[i + 2], r[i + 3]));
                a[i] = _mm256_shuffle_ps::<0x44>(t0, t2);
                a[i + 1] = _mm256_shuffle_ps::<0xee>(t0, t2);
                a[i + 2] = _mm256_shuffle_ps::<0x44>(t1, t3);
                a[i + 3] = _mm256_shuffle_ps::<0xee>(t1, t3);
            }
            let mut out = a;
            for j in 0..4 {
                out[j] = _mm256_permute2f128_ps::<0x20>(a[j], a[4 + j]);
                out[4 + j] = _mm256_permute2f128_ps::<0x31>(a[j], a[4 + j]);
            }
            out
        }
    }
}

/// Applies an instruction to both halves.
macro_rules! both {
    ($instruction:ident($($a:ident),+)) => {{
        // SAFETY: the token proves the feature.
        unsafe { [$instruction($($a[0]),+), $instruction($($a[1]),+)] }
    }};
}

impl Lanes for Avx2 {
    type F = Pair;
    type P = __m256;
    type I = __m256i;
    type B = __m256i;
    const PARTS: usize = 2;
    const REGISTERS: Registers = Registers::Few;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the machine has the features.
        unsafe { run(kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: the token proves the feature.
        [unsafe { _mm256_set1_ps(x) }; 2]
    }
    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        both!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        both!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        // SAFETY: the token proves the feature.
        a.map(|a| unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) })
    }
    #[inline(always)]
    fn times_power_of_two(self, a: Pair, n: Pair) -> Pair {
        // SAFETY: the token proves the feature.
        let power = n.map(|n| unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        });
        self.mul(a, power)
    }
    #[inline(always)]
    fn zero_below(self, a: Pair, x: Pair, bound: Pair) -> Pair {
        let half = |a, x, bound| {
            // SAFETY: the token proves the feature.
            unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, bound), a) }
        };
        [half(a[0], x[0], bound[0]), half(a[1], x[1], bound[1])]
    }
    #[inline(always)]
    fn keep(self, a: Pair, from: usize, to: usize, other: f32) -> Pair {
        let mask = self.between(from, to);
        let half = |a, mask| {
            // SAFETY: the token proves the feature.
            unsafe { _mm256_blendv_ps(_mm256_set1_ps(other), a, _mm256_castsi256_ps(mask)) }
        };
        [half(a[0], mask[0]), half(a[1], mask[1])]
    }
    #[inline(always)]
    fn sum(self, a: Pair) -> f32 {
        // SAFETY: the token proves the feature.
        unsafe {
            let a = _mm256_add_ps(a[0], a[1]);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn largest(self, a: Pair) -> f32 {
        // SAFETY: the token proves the feature.
        unsafe {
            let a = _mm256_max_ps(a[0], a[1]);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn transpose(self, rows: [Pair; 16]) -> [Pair; 16] {
        // Loops, not closures: a closure that is not inlined is compiled without the instructions.
        let mut out = rows;
        for half in 0..2 {
            for first in [0, 8] {
                let mut block = [rows[0][0]; 8];
                for i in 0..8 {
                    block[i] = rows[first + i][half];
                }
                let block = self.transpose8(block);
                for i in 0..8 {
                    out[8 * half + i][first / 8] = block[i];
                }
            }
        }
        out
    }

    #[inline(always)]
    fn no_dots(self) -> __m256i {
        // SAFETY: the token proves the feature.
        unsafe { _mm256_setzero_si256() }
    }
    /// Four products of digits are at most 4 · 15 · 81: sixteen bits hold them.
    #[inline(always)]
    unsafe fn dot<const DIGIT: usize>(self, sums: __m256i, a: [__m256i; 2], x: [*const f32; 2]) -> __m256i {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let [first, second] = x.map(|x| _mm256_set1_epi32(x.cast::<i32>().add(DIGIT).read()));
            let (first, second) = (_mm256_maddubs_epi16(a[0], first), _mm256_maddubs_epi16(a[1], second));
            let both = _mm256_add_epi16(first, second);
            _mm256_add_epi32(sums, _mm256_madd_epi16(both, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn whole_part(self, a: __m256i) -> __m256 {
        // SAFETY: the token proves the feature.
        unsafe { _mm256_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn splat_part(self, x: f32) -> __m256 {
        // SAFETY: the token proves the feature.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn mul_part(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the token proves the feature.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma_part(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the token proves the feature.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> Pair {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_first(self, at: *const f32, n: usize) -> Pair {
        let mask = self.between(0, n);
        // SAFETY: masked lanes are not touched (nor is their address formed by `add`); the rest is the
        // caller's promise.
        unsafe { [_mm256_maskload_ps(at, mask[0]), _mm256_maskload_ps(at.wrapping_add(8), mask[1])] }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> Pair {
        // SAFETY: the caller's promise.
        unsafe { [self.load_part_bf16(at), self.load_part_bf16(at.wrapping_add(16))] }
    }
    #[inline(always)]
    unsafe fn load_firsts_bf16(self, at: *const u8) -> Pair {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let pairs: [__m256i; 2] = [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())];
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[0])),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_seconds_bf16(self, at: *const u8) -> Pair {
        let mut at = at;
        // The pairs are read again: sixteen registers do not hold them beside the sums while the first halves are
        // multiplied, and a compiler that knows that they are the same would rather keep them than some of the sums.
        // SAFETY: there is no instruction.
        unsafe { asm!("/* {} */", inout(reg) at, options(pure, readonly, nostack, preserves_flags)) };
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            [
                _mm256_castsi256_ps(_mm256_and_si256(upper, _mm256_loadu_si256(at.cast()))),
                _mm256_castsi256_ps(_mm256_and_si256(upper, _mm256_loadu_si256(at.add(32).cast()))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> Pair {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let bytes: [__m128i; 2] =
                [_mm_loadl_epi64(at.cast()), _mm_loadl_epi64(at.wrapping_add(8).cast())];
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes[0])),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes[1])),
            ]
        }
    }
    /// Sign and number of a byte, widened with its sign, are seven bits below their places in an f16.
    #[inline(always)]
    unsafe fn load_e4m3(self, at: *const u8) -> Pair {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())));
            let halves = _mm256_and_si256(words, _mm256_set1_epi16(!0x4000));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, at: *const u8) -> [__m256i; 2] {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let (bytes, low) = (_mm256_loadu_si256(at.cast()), _mm256_set1_epi8(15));
            [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)]
        }
    }
    #[inline(always)]
    unsafe fn store_digits(self, at: *mut f32, digits: [Pair; 3]) {
        let [a, b, c] = digits;
        for (half, (a, (b, c))) in a.into_iter().zip(b.into_iter().zip(c)).enumerate() {
            // SAFETY: the caller's promise, and the token proves the feature.
            unsafe {
                let low = _mm256_set1_epi32(255);
                let a = _mm256_and_si256(_mm256_cvtps_epi32(a), low);
                let b = _mm256_and_si256(_mm256_cvtps_epi32(b), low);
                let c = _mm256_and_si256(_mm256_cvtps_epi32(c), low);
                let words = _mm256_or_si256(a, _mm256_slli_epi32::<8>(b));
                let words = _mm256_or_si256(words, _mm256_slli_epi32::<16>(c));
                let columns = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                    0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                ));
                _mm256_storeu_si256(at.add(8 * half).cast(), _mm256_shuffle_epi8(words, columns));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> Pair {
        // SAFETY: the caller's promise.
        unsafe { [self.load_part_f16(at), self.load_part_f16(at.wrapping_add(16))] }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, a: Pair) {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            _mm256_storeu_ps(at, a[0]);
            _mm256_storeu_ps(at.add(8), a[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_first(self, at: *mut f32, a: Pair, n: usize) {
        let mask = self.between(0, n);
        // SAFETY: masked lanes are not touched; the rest is the caller's promise.
        unsafe {
            _mm256_maskstore_ps(at, mask[0], a[0]);
            _mm256_maskstore_ps(at.wrapping_add(8), mask[1], a[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_part(self, at: *const f32) -> __m256 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm256_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_part_bf16(self, at: *const u8) -> __m256 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_part_f16(self, at: *const u8) -> __m256 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn store_part(self, at: *mut f32, a: __m256) {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm256_storeu_ps(at, a) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    fn prefetch_write(self, at: *const f32) {
        // SAFETY: a prefetch never faults; 64-bit machines without this one do nothing.
        unsafe { asm!("prefetchw [{at}]", at = in(reg) at.addr(), options(nomem, nostack, preserves_flags)) };
    }
}

//! Sixteen lanes in one register.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a chain of register instructions has one reason to be sound"
)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::transmute;
use std::sync::atomic::{Ordering, compiler_fence};

use super::{Kernel, Lanes, Registers, look_up, pairs};

/// Proof that the machine has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C; from `WITH` = [`VNNI`] on also VNNI, and
/// with [`BF16`] VBMI and dot products of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const WITH: u8>(());

const PLAIN: u8 = 0;
const VNNI: u8 = 1;
const BF16: u8 = 2;

/// # Safety
/// The machine has the features named at [`Avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline(never)]
pub(crate) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<PLAIN>(()));
}

/// # Safety
/// The machine has the features named at [`Avx512`], and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
pub(crate) unsafe fn run_dots<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<VNNI>(()));
}

/// # Safety
/// The machine has the features named at [`Avx512`], VNNI, VBMI and BF16.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c"
)]
#[inline(never)]
pub(crate) unsafe fn run_bf16<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<BF16>(()));
}

/// Of two rows of words, 0.. and 32.., the first of each, then the second.
const INTERLEAVED: [[u16; 2]; 16] = {
    let mut places = [[0, 32]; 16];
    let mut lane = 0;
    while lane < 16 {
        #[expect(clippy::cast_possible_truncation, reason = "lanes are few")]
        let place = lane as u16;
        places[lane] = [place, 32 + place];
        lane += 1;
    }
    places
};

impl<const WITH: u8> Avx512<WITH> {
    #[inline(always)]
    fn first(n: usize) -> __mmask16 {
        debug_assert!(n <= 16);
        #[expect(clippy::cast_possible_truncation, reason = "n <= 16, so at most 16 bits are set")]
        let mask = ((1_u32 << n) - 1) as u16;
        mask
    }
}

impl<const WITH: u8> Lanes for Avx512<WITH> {
    type F = __m512;
    type P = __m512;
    type I = __m512i;
    type B = __m512i;
    const PARTS: usize = 1;
    const REGISTERS: Registers = Registers::Many;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        match WITH {
            // SAFETY: the token proves that the machine has the features.
            BF16 => unsafe { run_bf16(kernel) },
            // SAFETY: as above.
            VNNI => unsafe { run_dots(kernel) },
            // SAFETY: as above.
            _ => unsafe { run(kernel) },
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn times_power_of_two(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_scalef_ps(a, n) }
    }
    #[inline(always)]
    fn zero_below(self, a: __m512, x: __m512, bound: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, bound), a) }
    }
    #[inline(always)]
    fn keep(self, a: __m512, from: usize, to: usize, other: f32) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(other), Self::first(to) & !Self::first(from), a) }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: the token proves the feature.
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn transpose(self, rows: [__m512; 16]) -> [__m512; 16] {
        // SAFETY: the token proves the feature.
        unsafe {
            // Within quarters: 4 x 4 blocks of four rows.
            let mut a = rows;
            for i in [0, 4, 8, 12] {
                let (t0, t1) =
                    (_mm512_unpacklo_ps(rows[i], rows[i + 1]), _mm512_unpackhi_ps(rows[i], rows[i + 1]));
                let (t2, t3) = (
                    _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]),
                    _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]),
                );
                a[i] = _mm512_shuffle_ps::<0x44>(t0, t2);
                a[i + 1] = _mm512_shuffle_ps::<0xee>(t0, t2);
                a[i + 2] = _mm512_shuffle_ps::<0x44>(t1, t3);
                a[i + 3] = _mm512_shuffle_ps::<0xee>(t1, t3);
            }
            // Between quarters: a[4 r + j] holds column 4 q + j of rows 4 r.. in quarter q.
            let mut out = a;
            for j in 0..4 {
                let (r0, r1, r2, r3) = (a[j], a[4 + j], a[8 + j], a[12 + j]);
                let t0 = _mm512_shuffle_f32x4::<0x88>(r0, r1);
                let t1 = _mm512_shuffle_f32x4::<0x88>(r2, r3);
                let t2 = _mm512_shuffle_f32x4::<0xdd>(r0, r1);
                let t3 = _mm512_shuffle_f32x4::<0xdd>(r2, r3);
                out[j] = _mm512_shuffle_f32x4::<0x88>(t0, t1);
                out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(t0, t1);
                out[4 + j] = _mm512_shuffle_f32x4::<0x88>(t2, t3);
                out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(t2, t3);
            }
            out
        }
    }

    #[inline(always)]
    fn round_pairs(self, a: __m512, b: __m512) -> __m512 {
        if WITH < BF16 {
            return pairs::round(self, a, b);
        }
        // SAFETY: the token proves the feature; thirty-two bf16 are as long as sixteen f32.
        unsafe { transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(b, a)) }
    }
    #[inline(always)]
    fn dot_pairs(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        if WITH < BF16 {
            return pairs::dot(self, a, b, c);
        }
        // SAFETY: the token proves the feature; sixteen f32 are as long as thirty-two bf16.
        unsafe {
            let [a, b] = [a, b].map(|pairs| transmute::<__m512, __m512bh>(pairs));
            _mm512_dpbf16_ps(c, a, b)
        }
    }
    #[inline(always)]
    fn join_pairs(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe {
            let firsts = _mm512_srli_epi32::<16>(_mm512_castps_si512(a));
            _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaa_aaaa, firsts, _mm512_castps_si512(b)))
        }
    }
    #[inline(always)]
    fn keep_of_pairs(self, pairs: __m512, keep: [bool; 2]) -> __m512 {
        let mask = pairs::mask(keep).cast_signed();
        // SAFETY: the token proves the feature.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(mask))) }
    }
    #[inline(always)]
    unsafe fn load_pairs_bf16(self, at: [*const u8; 2]) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let [a, b] = at.map(|at| _mm512_castsi256_si512(_mm256_loadu_si256(at.cast())));
            let places = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, places, b))
        }
    }

    #[inline(always)]
    fn no_dots(self) -> __m512i {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn dot<const DIGIT: usize>(self, sums: __m512i, a: [__m512i; 2], x: [*const f32; 2]) -> __m512i {
        // SAFETY: the caller's promise, and the token proves the features.
        unsafe {
            let [first, second] = x.map(|x| _mm512_set1_epi32(x.cast::<i32>().add(DIGIT).read()));
            if WITH >= VNNI {
                return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums, a[0], first), a[1], second);
            }
            let (first, second) = (_mm512_maddubs_epi16(a[0], first), _mm512_maddubs_epi16(a[1], second));
            let both = _mm512_add_epi16(first, second);
            _mm512_add_epi32(sums, _mm512_madd_epi16(both, _mm512_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn whole_part(self, a: __m512i) -> __m512 {
        // SAFETY: the token proves the feature.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn splat_part(self, x: f32) -> __m512 {
        self.splat(x)
    }
    #[inline(always)]
    fn mul_part(self, a: __m512, b: __m512) -> __m512 {
        self.mul(a, b)
    }
    #[inline(always)]
    fn fma_part(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        self.fma(a, b, c)
    }

    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm512_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn load_first(self, at: *const f32, n: usize) -> __m512 {
        // SAFETY: masked lanes are not touched; the rest is the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(Self::first(n), at) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let half = _mm256_loadu_si256(at.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn load_firsts_bf16(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_seconds_bf16(self, at: *const u8) -> __m512 {
        let upper = 0xffff_0000_u32.cast_signed();
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(upper), _mm512_loadu_si512(at.cast())))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
    }
    /// Sign and number of a byte, widened with its sign, are seven bits below their places in an f16.
    #[inline(always)]
    unsafe fn load_e4m3(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())));
            _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(!0x4000)))
        }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, at: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let (bytes, low) = (_mm512_loadu_si512(at.cast()), _mm512_set1_epi8(15));
            [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
        }
    }
    #[inline(always)]
    unsafe fn load_pairs_of_i8(self, line: *const u8) -> [__m512; 2] {
        // SAFETY: the caller's promise, and the token proves the features.
        if WITH < BF16 { unsafe { pairs::of_whole(self, line) } } else { unsafe { look_up::whole(line) } }
    }
    #[inline(always)]
    unsafe fn load_pairs_of_e4m3(self, line: *const u8) -> [__m512; 2] {
        // SAFETY: the caller's promise, and the token proves the features.
        if WITH < BF16 { unsafe { pairs::of_e4m3(self, line) } } else { unsafe { look_up::e4m3(line) } }
    }
    #[inline(always)]
    unsafe fn load_pair_of_nibbles<const PAIR: usize>(self, line: *const u8) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { look_up::nibbles::<PAIR>(line) }
    }
    #[inline(always)]
    unsafe fn load_pair_of_twelve<const PAIR: usize>(self, line: *const u8) -> __m512 {
        if WITH < BF16 {
            // SAFETY: the caller's promise.
            return unsafe { pairs::of_twelve(self, line, PAIR) };
        }
        // SAFETY: the caller's promise, and the token proves the features.
        unsafe {
            let word = |bits: u16| _mm512_set1_epi16(bits.cast_signed());
            // Or compilers would read once what two pairs need, and keep it on the stack meanwhile.
            compiler_fence(Ordering::SeqCst);
            let pair = |at: usize| _mm512_loadu_si512(line.wrapping_add(64 * at).cast());
            let whole = if PAIR < 3 {
                _mm512_and_si512(pair(PAIR), word(0x87ff))
            } else {
                let (exponent, upper) = (_mm512_srli_epi16::<4>(pair(0)), _mm512_srli_epi16::<8>(pair(1)));
                let (lower, sign) = (_mm512_srli_epi16::<12>(pair(2)), _mm512_slli_epi16::<4>(pair(2)));
                // Where the mask has ones, the second operand, else the third one.
                let part = _mm512_ternarylogic_epi32::<0xca>(word(0x0780), exponent, upper);
                let part = _mm512_ternarylogic_epi32::<0xca>(word(0x0007), lower, part);
                _mm512_ternarylogic_epi32::<0xca>(word(0x8000), sign, part)
            };
            _mm512_castsi512_ps(whole)
        }
    }
    #[inline(always)]
    unsafe fn store_digits(self, at: *mut f32, digits: [__m512; 3]) {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe {
            let low = _mm512_set1_epi32(255);
            let a = _mm512_and_si512(_mm512_cvtps_epi32(digits[0]), low);
            let b = _mm512_and_si512(_mm512_cvtps_epi32(digits[1]), low);
            let c = _mm512_and_si512(_mm512_cvtps_epi32(digits[2]), low);
            let words = _mm512_or_si512(a, _mm512_slli_epi32::<8>(b));
            let words = _mm512_or_si512(words, _mm512_slli_epi32::<16>(c));
            let columns =
                _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
            _mm512_storeu_si512(at.cast(), _mm512_shuffle_epi8(words, columns));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, a: __m512) {
        // SAFETY: the caller's promise, and the token proves the feature.
        unsafe { _mm512_storeu_ps(at, a) }
    }
    #[inline(always)]
    unsafe fn store_first(self, at: *mut f32, a: __m512, n: usize) {
        // SAFETY: masked lanes are not touched; the rest is the caller's promise.
        unsafe { _mm512_mask_storeu_ps(at, Self::first(n), a) }
    }
    #[inline(always)]
    unsafe fn load_part(self, at: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { self.load(at) }
    }
    #[inline(always)]
    unsafe fn load_part_bf16(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { self.load_bf16(at) }
    }
    #[inline(always)]
    unsafe fn load_part_f16(self, at: *const u8) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { self.load_f16(at) }
    }
    #[inline(always)]
    unsafe fn store_part(self, at: *mut f32, a: __m512) {
        // SAFETY: the caller's promise.
        unsafe { self.store(at, a) }
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

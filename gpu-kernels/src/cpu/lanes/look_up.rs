//! Pairs of bf16 out of tables, with AVX-512.
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a chain of register instructions has one reason to be sound"
)]

use std::arch::x86_64::*;

use super::pairs::{E4M3, NIBBLES, Table, WHOLE};

/// [`Lanes::load_pairs_of_i8`](super::Lanes::load_pairs_of_i8).
///
/// # Safety
/// 64 bytes are readable at `line`; the machine has AVX-512 F, BW and VBMI.
#[inline(always)]
pub(super) unsafe fn whole(line: *const u8) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let bytes = _mm512_loadu_si512(line.cast());
        of(&WHOLE, _mm512_abs_epi8(bytes), bytes)
    }
}

/// [`Lanes::load_pairs_of_e4m3`](super::Lanes::load_pairs_of_e4m3).
///
/// # Safety
/// 64 bytes are readable at `line`; the machine has AVX-512 F, BW and VBMI.
#[inline(always)]
pub(super) unsafe fn e4m3(line: *const u8) -> [__m512; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let bytes = _mm512_loadu_si512(line.cast());
        of(&E4M3, bytes, bytes)
    }
}

/// What a table has for codes, of which the eighth bit does not count, with these signs: the first eight of each
/// quarter, and the others.
///
/// # Safety
/// The machine has AVX-512 F, BW and VBMI.
#[inline(always)]
unsafe fn of(table: &Table, codes: __m512i, signs: __m512i) -> [__m512; 2] {
    // SAFETY: the caller's promise; both halves of the table are 128 bytes.
    unsafe {
        let [low, high] = [&table.low, &table.high].map(|half| {
            let (first, second) = (half.as_ptr().cast(), half.as_ptr().add(64).cast());
            _mm512_permutex2var_epi8(_mm512_loadu_si512(first), codes, _mm512_loadu_si512(second))
        });
        // high | signs & 0x80
        let high = _mm512_ternarylogic_epi32::<0xf8>(high, signs, _mm512_set1_epi8(i8::MIN));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)].map(|x| _mm512_castsi512_ps(x))
    }
}

/// [`Lanes::load_pair_of_nibbles`](super::Lanes::load_pair_of_nibbles). Of what is looked up, bits above the fifth do
/// not count, nor does that one in this table.
///
/// # Safety
/// 64 bytes are readable at `line`; the machine has AVX-512 F and BW.
#[inline(always)]
pub(super) unsafe fn nibbles<const PAIR: usize>(line: *const u8) -> __m512 {
    // SAFETY: the caller's promise; the table is 64 bytes.
    unsafe {
        let words = _mm512_loadu_si512(line.cast());
        let nibbles = match PAIR {
            0 => words,
            1 => _mm512_srli_epi16::<4>(words),
            2 => _mm512_srli_epi16::<8>(words),
            _ => _mm512_srli_epi16::<12>(words),
        };
        _mm512_castsi512_ps(_mm512_permutexvar_epi16(nibbles, _mm512_loadu_si512(NIBBLES.as_ptr().cast())))
    }
}

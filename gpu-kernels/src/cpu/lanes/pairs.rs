//! Pairs of bf16: tables of what is exact in it, and all that lanes do with them by way of memory.

use half::f16;

use super::super::exponents;
use super::{Lanes, WIDTH, round_bf16};

/// The bytes of bf16 numbers for the lower seven bits of a code, whose eighth is the sign.
#[repr(align(64))]
pub(super) struct Table {
    /// Lower halves.
    pub(super) low: [u8; 128],
    /// Upper halves.
    pub(super) high: [u8; 128],
}

/// What a number of four bits less 8 is, twice: the fifth bit does not count.
pub(super) static NIBBLES: [u16; 32] = {
    let (mut table, mut at) = ([0; 32], 0);
    while at < 32 {
        table[at] = upper(at as f32 % 16.0 - 8.0);
        at += 1;
    }
    table
};

/// Whole numbers by their size.
pub(super) static WHOLE: Table = {
    let mut sizes = [0.0; 128];
    let mut size = 0;
    while size < 128 {
        sizes[size] = size as f32;
        size += 1;
    }
    Table::new(sizes)
};

/// E4M3 numbers times 2^-8 ([`fp8::small`](crate::fp8::small)).
pub(super) static E4M3: Table = {
    let (mut sizes, mut code) = ([0.0; 128], 0);
    while code < 128 {
        sizes[code as usize] = f16::from_bits(code << 7).to_f32_const();
        code += 1;
    }
    Table::new(sizes)
};

impl Table {
    const fn new(sizes: [f32; 128]) -> Self {
        let (mut low, mut high, mut code) = ([0; 128], [0; 128], 0);
        while code < 128 {
            [low[code], high[code]] = upper(sizes[code]).to_le_bytes();
            code += 1;
        }
        Self { low, high }
    }
}

/// The bits of a bf16.
const fn upper(x: f32) -> u16 {
    (x.to_bits() >> 16) as u16
}

/// [`Lanes::round_pairs`] by way of memory.
#[inline(always)]
pub(super) fn round<L: Lanes>(lanes: L, a: L::F, b: L::F) -> L::F {
    let mut numbers = [0.0_f32; 2 * WIDTH];
    // SAFETY: sixteen numbers.
    unsafe { lanes.store(numbers.as_mut_ptr(), a) };
    // SAFETY: sixteen more.
    unsafe { lanes.store(numbers[WIDTH..].as_mut_ptr(), b) };
    let pairs = numbers.map(|x| round_bf16(x).to_le());
    // SAFETY: sixteen pairs are as long as sixteen numbers.
    unsafe { lanes.load(pairs.as_ptr().cast()) }
}

/// [`Lanes::dot_pairs`] by way of memory.
#[inline(always)]
pub(super) fn dot<L: Lanes>(lanes: L, a: L::F, b: L::F, c: L::F) -> L::F {
    let wide = |pairs| {
        let mut memory = [0.0_f32; WIDTH];
        // SAFETY: sixteen pairs.
        unsafe { lanes.store(memory.as_mut_ptr(), pairs) };
        let at = memory.as_ptr().cast();
        // SAFETY: sixteen pairs.
        let firsts = unsafe { lanes.load_firsts_bf16(at) };
        // SAFETY: as above.
        [firsts, unsafe { lanes.load_seconds_bf16(at) }]
    };
    let ([a0, a1], [b0, b1]) = (wide(a), wide(b));
    lanes.fma(a1, b1, lanes.fma(a0, b0, c))
}

/// [`Lanes::join_pairs`] by way of memory.
#[inline(always)]
pub(super) fn join<L: Lanes>(lanes: L, a: L::F, b: L::F) -> L::F {
    let [a, b] = [a, b].map(|numbers| words(lanes, numbers));
    let both: [u32; WIDTH] = std::array::from_fn(|lane| a[lane] >> 16 | b[lane] & 0xffff_0000);
    // SAFETY: sixteen words.
    unsafe { lanes.load(both.as_ptr().cast()) }
}

/// [`Lanes::keep_of_pairs`] by way of memory.
#[inline(always)]
pub(super) fn keep<L: Lanes>(lanes: L, pairs: L::F, keep: [bool; 2]) -> L::F {
    let kept = words(lanes, pairs).map(|word| word & mask(keep));
    // SAFETY: sixteen words.
    unsafe { lanes.load(kept.as_ptr().cast()) }
}

/// The bits of a pair that are kept.
#[inline(always)]
pub(super) fn mask([first, second]: [bool; 2]) -> u32 {
    (u32::from(first) * 0xffff) | (u32::from(second) * 0xffff_0000)
}

#[inline(always)]
fn words<L: Lanes>(lanes: L, a: L::F) -> [u32; WIDTH] {
    let mut words = [0; WIDTH];
    // SAFETY: sixteen words.
    unsafe { lanes.store(words.as_mut_ptr().cast(), a) };
    words
}

/// [`Lanes::load_pairs_of_i8`] by way of memory.
///
/// # Safety
/// A line of sixty-four bytes is readable at `line`.
#[inline(always)]
pub(super) unsafe fn of_whole<L: Lanes>(lanes: L, line: *const u8) -> [L::F; 2] {
    // SAFETY: the caller's promise.
    unsafe { of_codes(lanes, line, &WHOLE, |byte| byte.cast_signed().unsigned_abs()) }
}

/// [`Lanes::load_pairs_of_e4m3`] by way of memory.
///
/// # Safety
/// A line of sixty-four bytes is readable at `line`.
#[inline(always)]
pub(super) unsafe fn of_e4m3<L: Lanes>(lanes: L, line: *const u8) -> [L::F; 2] {
    // SAFETY: the caller's promise.
    unsafe { of_codes(lanes, line, &E4M3, |byte| byte) }
}

/// # Safety
/// A line of sixty-four bytes is readable at `line`.
#[inline(always)]
unsafe fn of_codes<L: Lanes>(lanes: L, line: *const u8, table: &Table, code: impl Fn(u8) -> u8) -> [L::F; 2] {
    // SAFETY: the caller's promise.
    let bytes = unsafe { line.cast::<[u8; 4 * WIDTH]>().read_unaligned() };
    let number = |byte: u8| {
        let code = usize::from(code(byte) & 127);
        u16::from_ne_bytes([table.low[code], table.high[code] | byte & 0x80])
    };
    [0, 1].map(|pair| {
        let pairs: [[u16; 2]; WIDTH] = std::array::from_fn(|lane| {
            [0, 1].map(|which| number(bytes[lane / 4 * 16 + pair * 8 + lane % 4 * 2 + which]))
        });
        // SAFETY: sixteen pairs are as long as sixteen numbers.
        unsafe { lanes.load(pairs.as_ptr().cast()) }
    })
}

/// [`Lanes::load_pair_of_nibbles`] by way of memory.
///
/// # Safety
/// A line of sixty-four bytes is readable at `line`.
#[inline(always)]
pub(super) unsafe fn of_nibbles<L: Lanes>(lanes: L, line: *const u8, pair: usize) -> L::F {
    // SAFETY: the caller's promise.
    let words = unsafe { line.cast::<[[[u8; 2]; 2]; WIDTH]>().read_unaligned() };
    let number = |half| NIBBLES[usize::from(u16::from_le_bytes(half) >> (4 * pair) & 15)];
    let pairs = words.map(|word| word.map(number));
    // SAFETY: sixteen pairs are as long as sixteen numbers.
    unsafe { lanes.load(pairs.as_ptr().cast()) }
}

/// [`Lanes::load_pair_of_twelve`] by way of memory.
///
/// # Safety
/// A line of 192 bytes is readable at `line`.
#[inline(always)]
pub(super) unsafe fn of_twelve<L: Lanes>(lanes: L, line: *const u8, pair: usize) -> L::F {
    // SAFETY: the caller's promise.
    let words = unsafe { line.cast::<[[[u8; 2]; 2 * WIDTH]; 3]>().read_unaligned() };
    let pairs = exponents::parted(words.map(|pair| pair.map(u16::from_le_bytes)));
    // SAFETY: sixteen pairs are as long as sixteen numbers.
    unsafe { lanes.load(pairs[pair].map(u16::to_le).as_ptr().cast()) }
}

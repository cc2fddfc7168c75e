//! Sixteen numbers at a time.
//!
//! Every kernel is written once over [`Lanes`], a token that proves that the machine has the instructions. All sums
//! run over sixteen lanes and end in the same tree on every machine, so AVX2, AVX-512 and NEON give equal bits; the
//! portable lanes round products before adding where the target has no fused multiply-add.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod element;
#[cfg(target_arch = "x86_64")]
mod look_up;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pairs;
mod portable;
#[cfg(test)]
mod tests;

pub(crate) use self::element::{AsBf16, AsF16, AsF32, Element, InParts};
pub(crate) use self::portable::round_bf16;

use self::portable::Portable;
use super::Isa;

/// Lanes in a vector.
pub(crate) const WIDTH: usize = 16;

/// What the registers of a machine hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registers {
    /// 32, each a vector.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "nobody else has them yet"))]
    Many,
    /// 16, each half a vector, or 32, each a quarter: room for eight vectors.
    Few,
    /// 16, each a quarter of a vector.
    Quarters,
}

impl Registers {
    /// Those of an instruction set.
    pub(crate) fn of(isa: Isa) -> Self {
        match isa {
            Isa::Portable => Self::Quarters,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Self::Few,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::Few,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => Self::Many,
        }
    }
}

/// The operations that kernels are made of. Arithmetic is safe: holding the token proves that it can run.
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// As many of them as one register holds.
    type P: Copy;
    /// Sums of [`Lanes::dot`], for as many outputs as one register holds lanes.
    type I: Copy;
    /// Four numbers of 0..=15 for each of them.
    type B: Copy;
    /// Registers in a vector.
    const PARTS: usize;
    /// How many vectors of running sums have room.
    const REGISTERS: Registers;
    /// Whether there are 32 registers of a whole vector each.
    const WIDE: bool = matches!(Self::REGISTERS, Registers::Many);
    /// Whether there is room for eight vectors.
    const FEW: bool = matches!(Self::REGISTERS, Registers::Few);
    /// Whether there are 32 registers, of whatever size.
    const MANY: bool = matches!((Self::REGISTERS, Self::PARTS), (Registers::Many, _) | (Registers::Few, 4));

    /// Runs a kernel as a function of its own. What would be many loops in one function is compiled many times
    /// faster so, and runs no slower.
    fn apart<K: Kernel>(self, kernel: K);

    fn splat(self, x: f32) -> Self::F;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger one; where either is no number, `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller one; where either is no number, `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Whole numbers, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for whole `n` in -126..=127.
    fn times_power_of_two(self, a: Self::F, n: Self::F) -> Self::F;
    /// `a` where `x >= bound` or `x` is no number, else 0.
    fn zero_below(self, a: Self::F, x: Self::F, bound: Self::F) -> Self::F;
    /// Lanes `from..to` of `a`, the others `other`.
    fn keep(self, a: Self::F, from: usize, to: usize, other: f32) -> Self::F;
    /// The sum of all lanes: lane `i` and `i + 8` first, then 4, 2, 1 apart.
    fn sum(self, a: Self::F) -> f32;
    /// The largest lane. Not specified when one is no number.
    fn largest(self, a: Self::F) -> f32;
    /// Rows become columns.
    fn transpose(self, rows: [Self::F; 16]) -> [Self::F; 16];

    /// Sixteen pairs of bf16: the elements of `a`, then those of `b`, rounded to nearest, ties to even.
    #[inline(always)]
    fn round_pairs(self, a: Self::F, b: Self::F) -> Self::F {
        pairs::round(self, a, b)
    }
    /// `c` and the two products of each pair of bf16, one after the other. Where there is an instruction for it, it
    /// decides where it rounds; denormal numbers are zeros to it.
    #[inline(always)]
    fn dot_pairs(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        pairs::dot(self, a, b, c)
    }

    /// Sixteen pairs of bf16, the elements of `a` before those of `b`, all of which are bf16.
    #[inline(always)]
    fn join_pairs(self, a: Self::F, b: Self::F) -> Self::F {
        pairs::join(self, a, b)
    }
    /// The firsts or the seconds or both of sixteen pairs of bf16, zeros in the others' place.
    #[inline(always)]
    fn keep_of_pairs(self, pairs: Self::F, keep: [bool; 2]) -> Self::F {
        pairs::keep(self, pairs, keep)
    }
    /// Sixteen pairs of elements of two rows.
    /// # Safety
    /// 16 bf16 are readable at each of `at`, at any alignment.
    #[inline(always)]
    unsafe fn load_pairs_bf16(self, at: [*const u8; 2]) -> Self::F {
        // SAFETY: the caller's promise.
        let [a, b] = at.map(|at| unsafe { self.load_bf16(at) });
        self.join_pairs(a, b)
    }

    /// Zeros.
    fn no_dots(self) -> Self::I;
    /// Adds to the sum of each output the products of its four numbers of each of `a` with one digit of the four of
    /// each of `x`.
    /// # Safety
    /// Four words of [`Lanes::store_digits`] are readable at each of `x`.
    unsafe fn dot<const DIGIT: usize>(self, sums: Self::I, a: [Self::B; 2], x: [*const f32; 2]) -> Self::I;
    /// To f32, ties to even.
    fn whole_part(self, a: Self::I) -> Self::P;
    fn splat_part(self, x: f32) -> Self::P;
    fn mul_part(self, a: Self::P, b: Self::P) -> Self::P;
    fn fma_part(self, a: Self::P, b: Self::P, c: Self::P) -> Self::P;

    /// # Safety
    /// 16 f32 are readable at `at`, at any alignment.
    unsafe fn load(self, at: *const f32) -> Self::F;
    /// The first `n < 16` elements, zeros behind them.
    /// # Safety
    /// `n` f32 are readable at `at`, at any alignment.
    unsafe fn load_first(self, at: *const f32, n: usize) -> Self::F;
    /// # Safety
    /// 16 bf16 are readable at `at`, at any alignment.
    unsafe fn load_bf16(self, at: *const u8) -> Self::F;
    /// # Safety
    /// 16 f16 are readable at `at`, at any alignment.
    unsafe fn load_f16(self, at: *const u8) -> Self::F;
    /// # Safety
    /// 16 signed bytes are readable at `at`.
    unsafe fn load_i8(self, at: *const u8) -> Self::F;
    /// E4M3 numbers times 2^-8 ([`fp8::small`](crate::fp8::small)), none of which is none.
    /// # Safety
    /// 16 bytes are readable at `at`.
    unsafe fn load_e4m3(self, at: *const u8) -> Self::F;
    /// The low and the high nibbles of a register of bytes.
    /// # Safety
    /// `64 / PARTS` bytes are readable at `at`, at any alignment.
    unsafe fn load_nibbles(self, at: *const u8) -> [Self::B; 2];
    /// The two pairs of bf16 of a line of whole numbers, -127..=127 ([`super::integers`]).
    /// # Safety
    /// 64 bytes are readable at `line`, at any alignment.
    #[inline(always)]
    unsafe fn load_pairs_of_i8(self, line: *const u8) -> [Self::F; 2] {
        // SAFETY: the caller's promise.
        unsafe { pairs::of_whole(self, line) }
    }
    /// The same of E4M3 numbers times 2^-8, none of which is none.
    /// # Safety
    /// 64 bytes are readable at `line`, at any alignment.
    #[inline(always)]
    unsafe fn load_pairs_of_e4m3(self, line: *const u8) -> [Self::F; 2] {
        // SAFETY: the caller's promise.
        unsafe { pairs::of_e4m3(self, line) }
    }
    /// One of the four pairs of a line of numbers of four bits, less 8.
    /// # Safety
    /// 64 bytes are readable at `line`, at any alignment.
    #[inline(always)]
    unsafe fn load_pair_of_nibbles<const PAIR: usize>(self, line: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { pairs::of_nibbles(self, line, PAIR) }
    }
    /// One of the four pairs of a line in twelve bits ([`super::exponents`]).
    /// # Safety
    /// 192 bytes are readable at `line`, at any alignment.
    #[inline(always)]
    unsafe fn load_pair_of_twelve<const PAIR: usize>(self, line: *const u8) -> Self::F {
        // SAFETY: the caller's promise.
        unsafe { pairs::of_twelve(self, line, PAIR) }
    }
    /// Whole numbers of three digits, the lowest first, as [`Lanes::dot`] reads them: four words for each four numbers.
    /// Where bytes are multiplied these are four digits each, and nothing; the portable lanes put the number itself
    /// together again, all of it its lowest digit.
    /// # Safety
    /// 64 bytes are writable at `at`, at any alignment.
    unsafe fn store_digits(self, at: *mut f32, digits: [Self::F; 3]);
    /// The first of each of 16 pairs.
    /// # Safety
    /// 32 bf16 are readable at `at`, at any alignment.
    unsafe fn load_firsts_bf16(self, at: *const u8) -> Self::F;
    /// The second of each of 16 pairs.
    /// # Safety
    /// 32 bf16 are readable at `at`, at any alignment.
    unsafe fn load_seconds_bf16(self, at: *const u8) -> Self::F;
    /// # Safety
    /// 16 f32 are writable at `at`, at any alignment.
    unsafe fn store(self, at: *mut f32, a: Self::F);
    /// # Safety
    /// `n < 16` f32 are writable at `at`, at any alignment.
    unsafe fn store_first(self, at: *mut f32, a: Self::F, n: usize);
    /// # Safety
    /// `16 / PARTS` f32 are readable at `at`.
    unsafe fn load_part(self, at: *const f32) -> Self::P;
    /// # Safety
    /// `16 / PARTS` bf16 are readable at `at`.
    unsafe fn load_part_bf16(self, at: *const u8) -> Self::P;
    /// # Safety
    /// `16 / PARTS` f16 are readable at `at`.
    unsafe fn load_part_f16(self, at: *const u8) -> Self::P;
    /// # Safety
    /// `16 / PARTS` f32 are writable at `at`.
    unsafe fn store_part(self, at: *mut f32, a: Self::P);
    /// Asks for a cache line; any address is fine.
    fn prefetch(self, at: *const u8);
    /// The same, into the second-level cache.
    fn prefetch_far(self, at: *const u8);
    /// Asks for a line that will be written, so that no other core keeps it.
    fn prefetch_write(self, at: *const f32);

    /// `e^x` within 2 units in the last place; 0 below -87.33, `e^88.37` above 88.37.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        // x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its series, whose 8th term is below a quarter unit.
        // ln 2 = 355/512 - 2.12e-4: n times the first part is exact.
        let (low, high) = (self.splat(-87.33), self.splat(88.37));
        let bounded = self.min(high, self.max(low, x));
        let n = self.round(self.mul(bounded, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-355.0 / 512.0), bounded);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut y = self.splat(1.0 / 5040.0);
        for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            y = self.fma(y, r, self.splat(factor));
        }
        self.zero_below(self.times_power_of_two(y, n), x, low)
    }

    /// `2^x` for `x` up to 127, within 2^-18 of it; 0 below -126.
    #[inline(always)]
    fn exp2_coarse(self, x: Self::F) -> Self::F {
        // x = n + r with |r| <= 1/2; 2^r by its series, whose 6th term is below 2^-18.
        let low = self.splat(-126.0);
        let bounded = self.max(low, x);
        let n = self.round(bounded);
        let r = self.sub(bounded, n);
        // Powers of ln 2 over factorials.
        let mut y = self.splat(1.333_355_8e-3);
        for factor in [9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0] {
            y = self.fma(y, r, self.splat(factor));
        }
        self.zero_below(self.times_power_of_two(y, n), x, low)
    }

    /// The hyperbolic tangent within a few units in the last place.
    #[inline(always)]
    fn tanh(self, x: Self::F) -> Self::F {
        let (zero, one) = (self.splat(0.0), self.splat(1.0));
        let minus = self.sub(zero, x);
        let size = self.max(x, minus);
        // (1 - e^-2|x|) / (1 + e^-2|x|), with the sign of x.
        let e = self.exp(self.mul(size, self.splat(-2.0)));
        let far = self.div(self.sub(one, e), self.add(one, e));
        let far = self.sub(self.zero_below(far, x, zero), self.zero_below(far, minus, zero));
        // Up to 1/2, where that loses digits: Lambert's continued fraction, whose next term is below 1e-9.
        let bounded = self.min(one, self.max(self.splat(-1.0), x));
        let s = self.mul(bounded, bounded);
        let over = self.fma(self.add(s, self.splat(105.0)), s, self.splat(945.0));
        let under = self.fma(self.fma(s, self.splat(15.0), self.splat(420.0)), s, self.splat(945.0));
        let near = self.div(self.mul(bounded, over), under);
        let half = self.splat(0.5);
        self.add(self.zero_below(far, size, half), self.sub(near, self.zero_below(near, size, half)))
    }
}

/// Arithmetic that is compiled once for each instruction set.
pub(crate) trait Kernel {
    /// Must be `#[inline(always)]`, and all that it calls with `lanes`: only then it is compiled with the
    /// instructions that `lanes` stands for.
    fn run<L: Lanes>(self, lanes: L);
}

/// Runs a kernel with the best instructions of `isa`, which the machine is known to have.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        Isa::Portable => kernel.run(Portable),
        #[cfg(target_arch = "aarch64")]
        // SAFETY: an `Isa` gets into a `Cpu` only after `Isa::available` said yes.
        Isa::Neon => unsafe { neon::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` gets into a `Cpu` only after `Isa::available` said yes.
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::run(kernel) },
    }
}

/// The same for kernels that round to pairs of bf16 and multiply them, which AVX512_BF16 has instructions for.
#[inline]
pub(crate) fn dispatch_pairs<K: Kernel>(isa: Isa, kernel: K) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512Bf16 | Isa::Amx) {
        // SAFETY: as in `dispatch`.
        return unsafe { avx512::run_bf16(kernel) };
    }
    // Tests run it on every machine (`Isa::in_pairs`); to compile it for all lanes would be for nothing.
    if cfg!(test) && isa == Isa::Portable {
        kernel.run(Portable);
    } else {
        unreachable!("{isa} has no products of pairs");
    }
}

/// The same for kernels of which most is [`Lanes::dot`].
#[inline]
pub(crate) fn dispatch_dots<K: Kernel>(isa: Isa, kernel: K) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx) && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: as in `dispatch`, and the machine has the instruction besides.
        return unsafe { avx512::run_dots(kernel) };
    }
    dispatch(isa, kernel);
}

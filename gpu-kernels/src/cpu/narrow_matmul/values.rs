//! Lines of numbers of eight bits and four, widened in registers and multiplied.

use super::super::lanes::{Lanes, WIDTH};
use super::super::tiles::Word;

/// How a line of values is multiplied.
pub(super) trait Values {
    /// What `x` is read in.
    const WORD: Word;
    /// Words of a row of `x` for a line.
    const WORDS: usize;

    /// `sums[i][j] += x[i] · value[j]` for all elements of a line.
    ///
    /// # Safety
    /// `x` has `WORDS` words of R rows, and at `line` and each of the N - 1 places `stride` apart behind it there is
    /// one.
    unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
        lanes: L,
        x: *const f32,
        line: *const u8,
        stride: usize,
        sums: &mut [[L::F; N]; R],
    );

    /// The scales of a group.
    ///
    /// # Safety
    /// A group's first line is readable at `header`.
    unsafe fn scales<L: Lanes>(lanes: L, header: *const u8) -> L::F;
}

/// Values that come from a line in `$part`s of `$together` vectors each, by `$load`, and their scales by `$scale`.
macro_rules! values {
    (
        $(#[$what:meta])*
        $name:ident: $word:ident, $load:ident [$($part:literal)*] of $together:literal, $scale:ident
    ) => {
        $(#[$what])*
        pub(super) struct $name;

        impl Values for $name {
            const WORD: Word = Word::$word;
            const WORDS: usize = [$($part),*].len() * $together;

            #[inline(always)]
            unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
                lanes: L,
                x: *const f32,
                line: *const u8,
                stride: usize,
                sums: &mut [[L::F; N]; R],
            ) {
                $({
                    let mut values = [[lanes.splat(0.0); $together]; N];
                    for (j, values) in values.iter_mut().enumerate() {
                        // SAFETY: the caller's promise.
                        *values = unsafe { $load::<L, $part>(lanes, line.wrapping_add(j * stride)) };
                    }
                    for word in 0..$together {
                        let x = x.wrapping_add(($part * $together + word) * R);
                        for (i, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: the caller's promise.
                            let x = lanes.splat(unsafe { x.wrapping_add(i).read() });
                            for (sum, values) in sums.iter_mut().zip(&values) {
                                *sum = match Self::WORD {
                                    Word::Number => lanes.fma(x, values[word], *sum),
                                    Word::Pair => lanes.dot_pairs(x, values[word], *sum),
                                };
                            }
                        }
                    }
                })*
            }

            #[inline(always)]
            unsafe fn scales<L: Lanes>(lanes: L, header: *const u8) -> L::F {
                // SAFETY: the caller's promise.
                unsafe { lanes.$scale(header.cast()) }
            }
        }
    };
}

values!(
    /// Whole numbers of eight bits.
    Whole: Number, whole [0 1 2 3] of 1, load
);
values!(
    /// E4M3.
    E4m3: Number, e4m3 [0 1 2 3] of 1, load
);
values!(
    /// Whole numbers of eight bits, in pairs of bf16.
    WholePairs: Pair, whole_pairs [0] of 2, load
);
values!(
    /// E4M3, in pairs of bf16.
    E4m3Pairs: Pair, e4m3_pairs [0] of 2, load
);
values!(
    /// Numbers of four bits less 8, in pairs of bf16.
    FourPairs: Pair, four_pair [0 1 2 3] of 1, load_f16
);

/// # Safety
/// A line is readable at `line`.
#[inline(always)]
unsafe fn whole<L: Lanes, const ELEMENT: usize>(lanes: L, line: *const u8) -> [L::F; 1] {
    // SAFETY: the caller's promise.
    [unsafe { lanes.load_i8(line.wrapping_add(ELEMENT * WIDTH)) }]
}

/// # Safety
/// A line is readable at `line`.
#[inline(always)]
unsafe fn e4m3<L: Lanes, const ELEMENT: usize>(lanes: L, line: *const u8) -> [L::F; 1] {
    // SAFETY: the caller's promise.
    [unsafe { lanes.load_e4m3(line.wrapping_add(ELEMENT * WIDTH)) }]
}

/// # Safety
/// A line is readable at `line`.
#[inline(always)]
unsafe fn whole_pairs<L: Lanes, const ALL: usize>(lanes: L, line: *const u8) -> [L::F; 2] {
    // SAFETY: the caller's promise.
    unsafe { lanes.load_pairs_of_i8(line) }
}

/// # Safety
/// A line is readable at `line`.
#[inline(always)]
unsafe fn e4m3_pairs<L: Lanes, const ALL: usize>(lanes: L, line: *const u8) -> [L::F; 2] {
    // SAFETY: the caller's promise.
    unsafe { lanes.load_pairs_of_e4m3(line) }
}

/// # Safety
/// A line is readable at `line`.
#[inline(always)]
unsafe fn four_pair<L: Lanes, const PAIR: usize>(lanes: L, line: *const u8) -> [L::F; 1] {
    // SAFETY: the caller's promise.
    [unsafe { lanes.load_pair_of_nibbles::<PAIR>(line) }]
}

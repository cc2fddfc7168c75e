//! The innermost loop of the products: lines of panels times words of `x`, and how lines of each type are multiplied.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::exponents;
use super::lanes::{Element, Kernel, Lanes, WIDTH};
use super::tiles::{Asks, Word, X_AHEAD};

/// Bytes of a panel between those that are widened and those that are asked for.
const WIDEN_AHEAD: usize = 1024;
/// Lines between two times that a tile asks for a row of where its sums will go.
const SOME_LINES: usize = 8;

/// How lines of a weight are multiplied.
pub(super) trait Line {
    /// Bytes of a line.
    const BYTES: usize;
    /// Pairs of elements of `in` in it.
    const PAIRS: usize = 1;
    /// What `x` is read in.
    const WORD: Word = Word::Number;
    /// Words of a row of `x` for a line.
    const WORDS: usize = Self::PAIRS * Self::WORD.of_pair();
    /// Whether it is shorter than in f32, to which [`Line::widen`] brings it.
    const WIDENS: bool = false;
    /// Whether some numbers lie apart, so that sums begin with what those make ([`super::exponents`]).
    const APART: bool = false;

    /// `sums[i][j] += x[i] · w[j]` for all elements of a line.
    ///
    /// # Safety
    /// `x` has the words of R rows for a line, and at `line` and each of the N - 1 places `stride` apart behind it
    /// there is one.
    unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
        lanes: L,
        x: *const f32,
        line: (*const u8, usize),
        sums: &mut [[L::F; N]; R],
    );

    /// The two elements of each output of a line in f32, if it [widens](Line::WIDENS).
    ///
    /// # Safety
    /// A line is readable.
    #[inline(always)]
    unsafe fn widen<L: Lanes>(_: L, _: *const u8) -> [L::F; 2] {
        unreachable!("multiplied as it is")
    }
}

/// Numbers, one after the other.
impl<E: Element> Line for E {
    const BYTES: usize = 2 * WIDTH * E::BYTES;
    const WIDENS: bool = E::BYTES < 4;

    #[inline(always)]
    unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
        lanes: L,
        x: *const f32,
        (line, stride): (*const u8, usize),
        sums: &mut [[L::F; N]; R],
    ) {
        // SAFETY: the caller's promise.
        unsafe { multiply::<L, Self, R, N, false>(lanes, x, line, stride, sums) };
        // SAFETY: as above.
        unsafe { multiply::<L, Self, R, N, true>(lanes, x.wrapping_add(R), line, stride, sums) };
    }

    #[inline(always)]
    unsafe fn widen<L: Lanes>(lanes: L, line: *const u8) -> [L::F; 2] {
        // SAFETY: the caller's promise.
        let first = unsafe { E::half_line::<L, false>(lanes, line) };
        // SAFETY: as above.
        [first, unsafe { E::half_line::<L, true>(lanes, line) }]
    }
}

/// bf16, multiplied two at a time.
pub(super) struct InPairs;

impl Line for InPairs {
    const BYTES: usize = 4 * WIDTH;
    const WORD: Word = Word::Pair;

    #[inline(always)]
    unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
        lanes: L,
        x: *const f32,
        (line, stride): (*const u8, usize),
        sums: &mut [[L::F; N]; R],
    ) {
        let mut w = [lanes.splat(0.0); N];
        for j in 0..N {
            // SAFETY: the caller's promise; sixteen pairs are as long as sixteen numbers.
            w[j] = unsafe { lanes.load(line.wrapping_add(j * stride).cast()) };
        }
        // SAFETY: the caller's promise.
        unsafe { dot_pairs(lanes, x, w, sums) };
    }
}

/// The same in twelve bits.
pub(super) struct InTwelve;

impl Line for InTwelve {
    const BYTES: usize = exponents::LINE;
    const PAIRS: usize = exponents::PAIRS;
    const WORD: Word = Word::Pair;
    const APART: bool = true;

    #[inline(always)]
    unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
        lanes: L,
        x: *const f32,
        (line, stride): (*const u8, usize),
        sums: &mut [[L::F; N]; R],
    ) {
        // SAFETY: the caller's promise.
        unsafe { pair_of_twelve::<L, 0, R, N>(lanes, x, (line, stride), sums) };
        // SAFETY: as above.
        unsafe { pair_of_twelve::<L, 1, R, N>(lanes, x, (line, stride), sums) };
        // SAFETY: as above.
        unsafe { pair_of_twelve::<L, 2, R, N>(lanes, x, (line, stride), sums) };
        // SAFETY: as above.
        unsafe { pair_of_twelve::<L, 3, R, N>(lanes, x, (line, stride), sums) };
    }
}

/// One of the pairs of a line in twelve bits.
///
/// # Safety
/// That of [`Line::multiply`].
#[inline(always)]
unsafe fn pair_of_twelve<L: Lanes, const PAIR: usize, const R: usize, const N: usize>(
    lanes: L,
    x: *const f32,
    (line, stride): (*const u8, usize),
    sums: &mut [[L::F; N]; R],
) {
    let mut w = [lanes.splat(0.0); N];
    for j in 0..N {
        // SAFETY: the caller's promise.
        w[j] = unsafe { lanes.load_pair_of_twelve::<PAIR>(line.wrapping_add(j * stride)) };
    }
    // SAFETY: the caller's promise: the words of R rows for each pair.
    unsafe { dot_pairs(lanes, x.wrapping_add(PAIR * R), w, sums) };
}

/// `sums[i][j] += x[i] · w[j]` for a pair of elements.
///
/// # Safety
/// `x` has R words.
#[inline(always)]
unsafe fn dot_pairs<L: Lanes, const R: usize, const N: usize>(
    lanes: L,
    x: *const f32,
    w: [L::F; N],
    sums: &mut [[L::F; N]; R],
) {
    for i in 0..R {
        // SAFETY: the caller's promise.
        let x = lanes.splat(unsafe { x.wrapping_add(i).read() });
        for j in 0..N {
            sums[i][j] = lanes.dot_pairs(x, w[j], sums[i][j]);
        }
    }
}

/// Lines `start..start + len` of some panels, `stride` bytes from panel to panel.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    pub(super) here: *const u8,
    pub(super) stride: usize,
    pub(super) start: usize,
    pub(super) len: usize,
    /// No elements are left after these: the sums are complete.
    pub(super) last: bool,
}

impl Lines {
    /// The same lines of N panels in f32, in `to`.
    #[inline(always)]
    pub(super) fn widen<L: Lanes, W: Line, const N: usize>(self, lanes: L, to: &mut [f32]) -> Self {
        let stride = 2 * WIDTH * self.len;
        let widened = &mut to[..N * stride];
        for (j, to) in widened.chunks_exact_mut(stride).enumerate() {
            for (index, to) in to.chunks_exact_mut(2 * WIDTH).enumerate() {
                let from = self.here.wrapping_add(j * self.stride + index * W::BYTES);
                lanes.prefetch(from.wrapping_add(WIDEN_AHEAD));
                // SAFETY: N panels have the lines.
                let [first, second] = unsafe { W::widen(lanes, from) };
                // SAFETY: twice sixteen elements.
                unsafe { lanes.store(to.as_mut_ptr(), first) };
                // SAFETY: as above.
                unsafe { lanes.store(to[WIDTH..].as_mut_ptr(), second) };
            }
        }
        Self { here: widened.as_ptr().cast(), stride: 4 * stride, ..self }
    }
}

/// A tile of R rows against lines of N panels: the innermost loop. Sums come and go through memory, where loops over
/// what is there may be as long as they like: one that is not unrolled would keep all sums from living in registers.
pub(super) struct Tile<'a, W, const R: usize, const N: usize> {
    /// The words of R rows for each line.
    pub(super) x: &'a [f32],
    pub(super) lines: Lines,
    pub(super) asks: Asks,
    /// Bytes from panel to panel of the weight.
    pub(super) far_stride: usize,
    /// `[R][N][16]`: those of other elements, if there are any, and then with these.
    pub(super) sums: &'a mut [f32],
    /// Where the first row of sums will go, and the elements from there to the next one.
    pub(super) to: (*const f32, usize),
    pub(super) element: PhantomData<W>,
}

impl<W: Line, const R: usize, const N: usize> Kernel for Tile<'_, W, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { x, lines, mut asks, far_stride, sums: memory, to: out, .. } = self;
        let Lines { here, stride, start, len, .. } = lines;
        let mut sums = [[lanes.splat(0.0); N]; R];
        if start > 0 || W::APART {
            for i in 0..R {
                for j in 0..N {
                    // SAFETY: R N vectors.
                    sums[i][j] = unsafe { lanes.load(memory.as_ptr().wrapping_add((i * N + j) * WIDTH)) };
                }
            }
        }
        let (mut x, mut at) = (x.as_ptr(), here);
        let mut from = 0;
        for row in 0..=R {
            let to = if row < R { len.min(from + SOME_LINES) } else { len };
            if row < R {
                // Lines that another core has written last are on their way here while there is time.
                for j in 0..N {
                    lanes.prefetch_write(out.0.wrapping_add(row * out.1 + j * WIDTH));
                }
            }
            for _ in from..to {
                asks.ask::<L, R, N>(lanes, W::BYTES, (stride, far_stride));
                if const { L::REGISTERS.one_of_several(R) } {
                    for ahead in (0..W::WORDS * R).step_by(WIDTH) {
                        lanes.prefetch(x.wrapping_add(X_AHEAD + ahead).cast());
                    }
                }
                // SAFETY: `x` has the words of R rows for each line, and N panels have the lines.
                unsafe { W::multiply::<L, R, N>(lanes, x, (at, stride), &mut sums) };
                (x, at) = (x.wrapping_add(W::WORDS * R), at.wrapping_add(W::BYTES));
            }
            from = to;
        }
        for i in 0..R {
            for j in 0..N {
                // SAFETY: R N vectors.
                unsafe { lanes.store(memory.as_mut_ptr().wrapping_add((i * N + j) * WIDTH), sums[i][j]) };
            }
        }
    }
}

/// The first or the second element of a line: `sums[i][j] += x[i] · w[j]`.
///
/// # Safety
/// `x` has R elements, and at `line` and each of the N - 1 places `stride` apart behind it there is a line.
#[inline(always)]
unsafe fn multiply<L: Lanes, E: Element, const R: usize, const N: usize, const SECOND: bool>(
    lanes: L,
    x: *const f32,
    line: *const u8,
    stride: usize,
    sums: &mut [[L::F; N]; R],
) {
    let mut w = [lanes.splat(0.0); N];
    for j in 0..N {
        // SAFETY: the caller's promise.
        w[j] = unsafe { E::half_line::<L, SECOND>(lanes, line.wrapping_add(j * stride)) };
    }
    for i in 0..R {
        // SAFETY: the caller's promise.
        let x = lanes.splat(unsafe { x.wrapping_add(i).read() });
        for j in 0..N {
            sums[i][j] = lanes.fma(x, w[j], sums[i][j]);
        }
    }
}

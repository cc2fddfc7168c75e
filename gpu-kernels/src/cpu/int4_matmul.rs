//! `out = x · wᵀ + bias`, with `w` in four bits.
//!
//! Activations become whole numbers of three digits (see [`super::digits`]). Within a group an output is then three
//! sums of small whole numbers, one for each digit, which are exact in whatever order: machines multiply four pairs of
//! bytes at a time, sixty-four in a register. (The portable lanes multiply the numbers themselves in f32, which
//! rounds.) What a group adds up to, times the scales of both sides, is added to the groups before it. So no sum knows
//! how many rows there are, and every instruction set has the same.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use super::Isa;
use super::digits::{BASE, Digits, QUAD};
use super::integers::{Integers, LINE, Product};
use super::lanes::{Kernel, Lanes, Registers, WIDTH, dispatch_dots};
use super::scratch::Scratch;
use super::tasks::{self, Task};
use super::tiles::{Asks, place};
use super::walk::Walk;
use super::workers::Workers;

/// Most vectors of outputs of a tile.
const SUMS_MAX: usize = 8;
/// Digits of a number.
const DIGITS: usize = 3;
/// Words of `x` for the elements of a line.
const LINE_WORDS: usize = 2 * QUAD;

/// `x` is `[rows, cols]`, in the order of the weights' columns; every product's weight has `cols` columns in groups of
/// one size, and its `out` has `rows` rows. `memory` is to work in.
pub(crate) fn linear(
    (workers, isa): (&Workers, Isa),
    memory: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_>],
) {
    let (cols, group) = (products[0].weight.cols, products[0].weight.group);
    if rows == 0 {
        return;
    }
    let (tile, panels) = shape(Registers::of(isa), rows);
    let digits = Digits::new((workers, isa), memory, x, (rows, cols), (tile, group));
    tasks::run(workers, panels, rows, products, &|task, scratch| {
        dispatch_dots(isa, Run { of: Multiply { digits, task }, tile, scratch });
    });
}

/// Rows of a tile, and the panels whose sums fit beside each other: the kernels of [`Run`].
fn shape(registers: Registers, rows: usize) -> (usize, usize) {
    match (registers, rows) {
        (Registers::Many, 1) => (1, 8),
        (Registers::Many, 2) => (2, 4),
        (Registers::Many, _) => (4, 2),
        (Registers::Few, 1) => (1, 4),
        (Registers::Quarters, 1) => (1, 2),
        (Registers::Few | Registers::Quarters, 2) => (2, 2),
        (Registers::Few | Registers::Quarters, 3) => (3, 1),
        (Registers::Few | Registers::Quarters, _) => (4, 1),
    }
}

/// A group of panels.
#[derive(Clone, Copy)]
struct Multiply<'a> {
    digits: Digits<'a>,
    task: Task<'a, &'a Integers>,
}

/// The kernel: what [`shape`] says, as constants.
struct Run<'a> {
    of: Multiply<'a>,
    /// Rows of a tile.
    tile: usize,
    scratch: &'a mut Scratch,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of, tile, scratch } = self;
        let [memory] = scratch.take([SUMS_MAX * WIDTH]);
        // Constants decide first: shapes that other lanes have are not compiled for these.
        if L::WIDE {
            match tile {
                1 => of.walk::<L, 1, 8>(lanes, memory),
                2 => of.walk::<L, 2, 4>(lanes, memory),
                4 => of.walk::<L, 4, 2>(lanes, memory),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else {
            match tile {
                1 if L::FEW => of.walk::<L, 1, 4>(lanes, memory),
                1 => of.walk::<L, 1, 2>(lanes, memory),
                2 => of.walk::<L, 2, 2>(lanes, memory),
                3 => of.walk::<L, 3, 1>(lanes, memory),
                4 => of.walk::<L, 4, 1>(lanes, memory),
                rows => unreachable!("{rows} rows in a tile"),
            }
        }
    }
}

impl Walk for Multiply<'_> {
    const REST: usize = 1;

    fn task(&self) -> &Task<'_, &Integers> {
        &self.task
    }

    fn tiles(&self) -> usize {
        self.digits.count
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        asks: Asks,
        (tile, panel): (usize, usize),
        sums: &mut [f32],
    ) {
        lanes.apart(Tile::<R, N> { of: self, asks, tile, panel, sums });
    }
}

/// A tile of R rows against N panels from `panel` on: the innermost loop.
struct Tile<'a, const R: usize, const N: usize> {
    of: &'a Multiply<'a>,
    asks: Asks,
    tile: usize,
    panel: usize,
    /// `[R][N][16]`: they grow.
    sums: &'a mut [f32],
}

impl<const R: usize, const N: usize> Kernel for Tile<'_, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of: &Multiply { digits, task: Task { product, .. } }, mut asks, tile, panel, sums } = self;
        let (weight, stride) = (product.weight, product.weight.stride());
        let (mut x, mut row) = (digits.tile(tile).as_ptr(), 0);
        let (scales, scales_len) = digits.scales(tile);
        assert!(sums.len() >= R * N * WIDTH && scales.len() >= R * scales_len, "a tile has R rows");
        for group in 0..weight.groups() {
            let (header, lines) =
                (weight.panel(panel).wrapping_add(group * weight.group_bytes()), weight.lines(group));
            asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
            for part in 0..L::PARTS {
                let mut dots = [[[lanes.no_dots(); DIGITS]; N]; R];
                for line in 0..lines {
                    if part == 0 {
                        asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
                        if row < R {
                            // Lines that another core has written last are on their way here while there is time.
                            for j in 0..N {
                                let out = (product.out, weight.rows);
                                lanes.prefetch_write(place(out, tile * R + row, panel + j).0);
                            }
                            row += 1;
                        }
                    }
                    let x = x.wrapping_add(line * LINE_WORDS * R);
                    let at = header.wrapping_add((line + 1) * LINE + part * LINE / L::PARTS);
                    // SAFETY: `x` has eight words in R rows for every line, and N panels have the line.
                    unsafe { multiply::<L, R, N>(lanes, x, at, stride, &mut dots) };
                }
                for j in 0..N {
                    let header = header.wrapping_add(j * stride);
                    // SAFETY: a group begins with sixteen scales and sixteen zero points.
                    let [scale, offset] = unsafe { scale_and_offset(lanes, header, part) };
                    for i in 0..R {
                        let [unit, x_sum] = [0, 1].map(|which| scales[i * scales_len + 2 * group + which]);
                        let [first, second, third] = dots[i][j].map(|dots| lanes.whole_part(dots));
                        let base = lanes.splat_part(BASE);
                        let number = lanes.fma_part(lanes.fma_part(third, base, second), base, first);
                        let number = lanes.fma_part(offset, lanes.splat_part(x_sum), number);
                        let total = sums[(i * N + j) * WIDTH + part * WIDTH / L::PARTS..].as_mut_ptr();
                        // SAFETY: a part of sixteen sums.
                        let before = unsafe { lanes.load_part(total) };
                        let scale = lanes.mul_part(scale, lanes.splat_part(unit));
                        // SAFETY: as above.
                        unsafe { lanes.store_part(total, lanes.fma_part(number, scale, before)) };
                    }
                }
            }
            x = x.wrapping_add(lines * LINE_WORDS * R);
        }
    }
}

/// A part of the scales of a group, and of what is to be added to its values.
///
/// # Safety
/// The first line of a group is readable at `header`.
#[inline(always)]
unsafe fn scale_and_offset<L: Lanes>(lanes: L, header: *const u8, part: usize) -> [L::P; 2] {
    let (mut offsets, first) = ([0.0; WIDTH], part * WIDTH / L::PARTS);
    // SAFETY: the caller's promise: sixteen zero points lie behind sixteen scales.
    let zeros = unsafe { lanes.load_i8(header.wrapping_add(2 * WIDTH)) };
    // SAFETY: sixteen elements.
    unsafe { lanes.store(offsets.as_mut_ptr(), lanes.sub(lanes.splat(-8.0), zeros)) };
    // SAFETY: the caller's promise.
    let scale = unsafe { lanes.load_part_f16(header.wrapping_add(2 * first)) };
    // SAFETY: a part of sixteen elements.
    [scale, unsafe { lanes.load_part(offsets[first..].as_ptr()) }]
}

/// The elements of a line, for a part of their outputs: `dots[i][j][digit] += x[i][digit] · value[j]`.
///
/// # Safety
/// `x` has eight words in R rows, and at `line` and each of the N - 1 places `stride` apart behind it there is a part
/// of a line.
#[inline(always)]
unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
    lanes: L,
    x: *const f32,
    line: *const u8,
    stride: usize,
    dots: &mut [[[L::I; DIGITS]; N]; R],
) {
    // Several rows share what panels hold, if there are registers for it; else panels go one after the other.
    let together = if L::WIDE && R > 1 { N } else { 1 };
    for first in (0..N).step_by(together) {
        // SAFETY: the caller's promise.
        let mut values = [unsafe { lanes.load_nibbles(line.wrapping_add(first * stride)) }; N];
        for j in 1..together {
            // SAFETY: the caller's promise.
            values[j] = unsafe { lanes.load_nibbles(line.wrapping_add((first + j) * stride)) };
        }
        for i in 0..R {
            let x = x.wrapping_add(i * QUAD);
            let x = [x, x.wrapping_add(QUAD * R)];
            macro_rules! digits {
                ($($digit:literal)*) => {$(
                    for j in 0..together {
                        let sums = &mut dots[i][first + j][$digit];
                        // SAFETY: the caller's promise.
                        *sums = unsafe { lanes.dot::<$digit>(*sums, values[j], x) };
                    }
                )*};
            }
            digits!(0 1 2);
        }
    }
}

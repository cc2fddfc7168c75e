//! `out = x · wᵀ + bias`, with `w` in eight bits; in four too where pairs of bf16 are multiplied.
//!
//! As in [`super::matmul`], lanes run along outputs, and no sum knows how many rows there are. An output is one chain
//! of multiply-adds of activations and numbers of eight bits, which are exact in f32, times its scale; where inputs
//! fall into groups, a second chain adds these in ascending order. Numbers are widened in registers, integers by two
//! instructions, E4M3 by four.
//!
//! Numbers of eight bits and of four less 8 are exact in bf16 too. Machines that multiply pairs look them up, 64 bytes
//! with six instructions, or three where eight would multiply; `x` is rounded to bf16 then. Where zero points of four
//! bits are not 8, the sum of a group's `x` makes up for them.

#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

mod values;

use std::marker::PhantomData;

use super::Isa;
use super::group_sums::group_sums;
use super::integers::{Form, Integers, LINE, Product, STEP};
use super::lanes::{Kernel, Lanes, Registers, WIDTH, dispatch, dispatch_pairs};
use super::scratch::Scratch;
use super::tasks::{self, Task};
use super::tiles::{Asks, Tiles, Word, X_AHEAD, place};
use super::walk::Walk;
use super::workers::Workers;
use values::{E4m3, E4m3Pairs, FourPairs, Values, Whole, WholePairs};

/// Most vectors of sums in a tile.
const SUMS_MAX: usize = 24;

/// `x` is `[rows, cols]`, in the order of the weights' columns; every product's weight has `cols` columns in groups of
/// one size, and its `out` has `rows` rows. `packed` is memory to work in.
pub(crate) fn linear(
    (workers, isa): (&Workers, Isa),
    packed: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_>],
) {
    let Some(&Product { weight: &Integers { cols, group, word, .. }, .. }) = products.first() else { return };
    if rows == 0 {
        return;
    }
    let registers = Registers::of(isa);
    let (tile, panels) = shape(registers, rows.div_ceil(rows.div_ceil(registers.rows_max())));
    let tiles = Tiles::new((workers, isa), packed, (x, 1.0), (rows, cols), (tile, STEP, word));
    let zeros = products.iter().any(|product| product.weight.zeros);
    let rows_of_tiles = if zeros { tiles.count * tile } else { 0 };
    let x_sums = group_sums((workers, isa), x, (rows_of_tiles, cols), group);
    let x = (tiles, &*x_sums);
    tasks::run(workers, panels, rows, products, &|task, scratch| match (task.product.weight.form, word) {
        (Form::Eight, Word::Number) => dispatch(isa, Run::<Whole>::new(x, task, scratch)),
        (Form::E4m3, Word::Number) => dispatch(isa, Run::<E4m3>::new(x, task, scratch)),
        (Form::Eight, Word::Pair) => dispatch_pairs(isa, Run::<WholePairs>::new(x, task, scratch)),
        (Form::E4m3, Word::Pair) => dispatch_pairs(isa, Run::<E4m3Pairs>::new(x, task, scratch)),
        (Form::Four, Word::Pair) => dispatch_pairs(isa, Run::<FourPairs>::new(x, task, scratch)),
        (Form::Four, Word::Number) => unreachable!("four bits and f32 are multiplied by digits"),
    });
}

/// Rows of a tile for at least so many, and the panels whose sums fit beside each other: the kernels of [`Run`].
fn shape(registers: Registers, rows: usize) -> (usize, usize) {
    match (registers, rows) {
        (Registers::Many, 1) => (1, 8),
        (Registers::Many, 2) => (2, 8),
        (Registers::Many, ..=4) => (4, 4),
        (Registers::Many, _) => (8, 3),
        (Registers::Few, 1) => (1, 4),
        (Registers::Few, ..=3) => (3, 2),
        (Registers::Few, _) => (6, 1),
        (Registers::Quarters, 1) => (1, 2),
        (Registers::Quarters, _) => (3, 1),
    }
}

/// A group of panels, for one type of values.
struct Multiply<'a, T> {
    tiles: Tiles<'a>,
    /// `[rows of all tiles][groups]`, or nothing where no weight needs it.
    x_sums: &'a [f32],
    task: Task<'a, &'a Integers>,
    values: PhantomData<T>,
}

/// The kernel: what [`shape`] says, as constants.
struct Run<'a, T> {
    of: Multiply<'a, T>,
    scratch: &'a mut Scratch,
}

impl<'a, T> Run<'a, T> {
    fn new(
        (tiles, x_sums): (Tiles<'a>, &'a [f32]),
        task: Task<'a, &'a Integers>,
        scratch: &'a mut Scratch,
    ) -> Self {
        Self { of: Multiply { tiles, x_sums, task, values: PhantomData }, scratch }
    }
}

impl<T: Values> Kernel for Run<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of, scratch } = self;
        // Constants decide first: shapes that other lanes have are not compiled for these.
        if L::WIDE {
            match of.tiles.rows {
                // Eight bits in pairs: two vectors of each panel, and tables.
                1 if T::WORDS == 2 => lanes.apart(Shape::<T, 1, 4> { of, scratch }),
                2 if T::WORDS == 2 => lanes.apart(Shape::<T, 2, 4> { of, scratch }),
                1 => lanes.apart(Shape::<T, 1, 8> { of, scratch }),
                2 => lanes.apart(Shape::<T, 2, 8> { of, scratch }),
                4 => lanes.apart(Shape::<T, 4, 4> { of, scratch }),
                8 => lanes.apart(Shape::<T, 8, 3> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else if L::FEW {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<T, 1, 4> { of, scratch }),
                3 => lanes.apart(Shape::<T, 3, 2> { of, scratch }),
                6 => lanes.apart(Shape::<T, 6, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<T, 1, 2> { of, scratch }),
                3 => lanes.apart(Shape::<T, 3, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        }
    }
}

/// Tiles of R rows against N panels at a time.
struct Shape<'a, T, const R: usize, const N: usize> {
    of: Multiply<'a, T>,
    scratch: &'a mut Scratch,
}

impl<T: Values, const R: usize, const N: usize> Kernel for Shape<'_, T, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [memory] = self.scratch.take([SUMS_MAX * WIDTH]);
        self.of.walk::<L, R, N>(lanes, memory);
    }
}

impl<T: Values> Walk for Multiply<'_, T> {
    const REST: usize = 2;

    fn task(&self) -> &Task<'_, &Integers> {
        &self.task
    }

    fn tiles(&self) -> usize {
        self.tiles.count
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        mut asks: Asks,
        (tile, panel): (usize, usize),
        totals: &mut [f32],
    ) {
        let product = self.task.product;
        let (weight, stride) = (product.weight, product.weight.stride());
        let (mut x, mut row) = (self.tiles.tile(tile).as_ptr(), 0);
        for group in 0..weight.groups() {
            let start = weight.panel(panel).wrapping_add(group * weight.group_bytes());
            let mut sums = [[lanes.splat(0.0); N]; R];
            asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
            for line in 1..=weight.lines(group) {
                asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
                if row < R {
                    // Lines that another core has written last are on their way here while there is time.
                    for j in 0..N {
                        let out = (product.out, weight.rows);
                        lanes.prefetch_write(place(out, tile * R + row, panel + j).0);
                    }
                    row += 1;
                }
                if const { L::REGISTERS.one_of_several(R) } {
                    for ahead in (0..T::WORDS * R).step_by(LINE / 4) {
                        lanes.prefetch(x.wrapping_add(X_AHEAD + ahead).cast());
                    }
                }
                let at = start.wrapping_add(line * LINE);
                // SAFETY: `x` has the words of R rows for a line, and N panels have the line.
                unsafe { T::multiply::<L, R, N>(lanes, x, at, stride, &mut sums) };
                x = x.wrapping_add(T::WORDS * R);
            }
            for j in 0..N {
                let header = start.wrapping_add(j * stride);
                // SAFETY: every group begins with a line of scales.
                let scale = unsafe { T::scales(lanes, header) };
                if weight.zeros {
                    // SAFETY: with four bits sixteen zero points lie behind sixteen scales.
                    let zeros = unsafe { lanes.load_i8(header.wrapping_add(2 * WIDTH)) };
                    for i in 0..R {
                        let x = self.x_sums[(tile * R + i) * weight.groups() + group];
                        sums[i][j] = lanes.sub(sums[i][j], lanes.mul(zeros, lanes.splat(x)));
                    }
                }
                for i in 0..R {
                    let total = totals[(i * N + j) * WIDTH..][..WIDTH].as_mut_ptr();
                    // SAFETY: sixteen sums.
                    let before = unsafe { lanes.load(total) };
                    // SAFETY: as above.
                    unsafe { lanes.store(total, lanes.fma(sums[i][j], scale, before)) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

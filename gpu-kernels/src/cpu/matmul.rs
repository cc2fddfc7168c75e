//! `out = x · wᵀ + bias`, with `w` in panels.
//!
//! Lanes run along outputs: every output is one chain of multiply-adds over `in` in ascending order, from zero, and
//! nothing is summed across lanes. That order does not know how many rows `x` has, where a chain is interrupted
//! (its sum waits in `out`, which loses nothing) or who computes it, so one row alone and one row among hundreds
//! get the same bits.
//!
//! Where a machine multiplies pairs of bf16 ([`Isa::multiplies_pairs`]) and the weight is bf16, a line is one
//! instruction for each row: `x` is rounded to bf16, sums stay f32, and the order is the same. Most such weights take
//! twelve bits ([`super::exponents`]) and become pairs of bf16 in registers; the few numbers that lie apart come first
//! in the chains of their outputs.
//!
//! All products go through one kernel: a tile of `R` rows of `x` and `N` panels, `R · N` registers of sums, and for
//! each pair of elements a line of every panel, widened in registers. With few rows the limit is the bandwidth of
//! memory: up to eight panels are walked at once, because eight streams reach it where one does not, and each asks
//! for the line two kilobytes ahead. With many rows the limit is multiplications per second: the rows are cut into
//! tiles that pass over the same panels in the second-level cache, and meanwhile ask for the panels that come next.

use std::marker::PhantomData;

use super::Isa;
use super::exponents::{Exponents, X_SCALE};
use super::lanes::{AsBf16, AsF16, AsF32, Kernel, Lanes, Registers, WIDTH, dispatch, dispatch_pairs};
use super::lines::{InPairs, InTwelve, Line, Lines, Tile};
use super::norm::load;
use super::panels::Panels;
use super::scratch::Scratch;
use super::tasks::{self, Task};
use super::tiles::{Asks, Tiles, Word, place, store_sums};
use super::workers::Workers;
use crate::Dtype;

/// Pairs of elements that several tiles pass over before they go on: three panels of as many, and the three that come
/// next, leave half of the second-level cache to `x`.
const DEPTH: usize = 1024;
/// From so many tiles on, panels are widened once for all of them instead of by each: that takes as long as two thirds
/// of a tile, and widening is a ninth of what a tile does.
const WIDEN: usize = 12;
/// Most vectors of sums in a tile.
const SUMS_MAX: usize = 24;

/// One product of a [`linear`] call.
pub(crate) type Product<'a> = super::tasks::Product<'a, &'a Panels>;

/// `x` is `[rows, cols]`; every product's weight has `cols` columns and its `out` has `rows` rows. `packed` is
/// memory to work in.
pub(crate) fn linear(
    with: (&Workers, Isa),
    packed: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_>],
) {
    let kind_of = |product: &Product<'_>| match (product.weight.dtype, &product.weight.exponents) {
        (Dtype::Bf16, Some(_)) => Kind::Twelve,
        (Dtype::Bf16, None) if with.1.multiplies_pairs() => Kind::Pairs,
        _ => Kind::Numbers,
    };
    for kind in [Kind::Twelve, Kind::Pairs, Kind::Numbers] {
        let products: Vec<_> = products.iter().copied().filter(|product| kind_of(product) == kind).collect();
        of_kind(with, packed, (x, kind), rows, &products);
    }
}

/// What is multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Numbers,
    /// Pairs of bf16.
    Pairs,
    /// The same in twelve bits.
    Twelve,
}

/// Those products that read `x` in the same way.
fn of_kind(
    (workers, isa): (&Workers, Isa),
    packed: &mut Scratch,
    (x, kind): (&[f32], Kind),
    rows: usize,
    products: &[Product<'_>],
) {
    let Some(cols) = products.first().map(|product| product.weight.cols) else { return };
    if rows == 0 {
        return;
    }
    let registers = Registers::of(isa);
    let tile = rows.div_ceil(rows.div_ceil(registers.rows_max()));
    let (step, word, scale) = match kind {
        Kind::Numbers => (2, Word::Number, 1.0),
        Kind::Pairs => (2, Word::Pair, 1.0),
        Kind::Twelve => (2 * InTwelve::PAIRS, Word::Pair, X_SCALE),
    };
    let tiles = Tiles::new((workers, isa), packed, (x, scale), (rows, cols), (tile, step, word));
    tasks::run(workers, registers.panels(tile), rows, products, &|task, scratch| match (
        kind,
        task.product.weight.dtype,
    ) {
        (Kind::Numbers, Dtype::F32) => dispatch(isa, Run::<AsF32>::new(tiles, task, scratch)),
        (Kind::Numbers, Dtype::F16) => dispatch(isa, Run::<AsF16>::new(tiles, task, scratch)),
        (Kind::Numbers, Dtype::Bf16) => dispatch(isa, Run::<AsBf16>::new(tiles, task, scratch)),
        (Kind::Pairs, _) => dispatch_pairs(isa, Run::<InPairs>::new(tiles, task, scratch)),
        (Kind::Twelve, _) => dispatch_pairs(isa, Run::<InTwelve>::new(tiles, task, scratch)),
    });
}

impl Registers {
    /// Panels whose sums fit beside each other for so many rows: the `N` of each `R` in [`Run`].
    fn panels(self, rows: usize) -> usize {
        match (self, rows) {
            (Self::Many, ..=2) => 8,
            (Self::Many, 3) => 6,
            (Self::Many, ..=6) => 4,
            (Self::Many, _) => 3,
            (Self::Few, 1) => 4,
            (Self::Few, 2) => 3,
            (Self::Few, 3) => 2,
            (Self::Quarters, 1) => 2,
            (Self::Few | Self::Quarters, _) => 1,
        }
    }
}

/// A group of panels for one type of elements.
struct Multiply<'a, E> {
    tiles: Tiles<'a>,
    task: Task<'a, &'a Panels>,
    element: PhantomData<E>,
}

/// The kernel: what [`Registers::panels`] says, as constants.
struct Run<'a, E> {
    of: Multiply<'a, E>,
    scratch: &'a mut Scratch,
}

impl<'a, E> Run<'a, E> {
    fn new(tiles: Tiles<'a>, task: Task<'a, &'a Panels>, scratch: &'a mut Scratch) -> Self {
        Self { of: Multiply { tiles, task, element: PhantomData }, scratch }
    }
}

impl<E: Line> Kernel for Run<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of, scratch } = self;
        // Constants decide first: shapes that other lanes have are not compiled for these.
        if L::WIDE {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<E, 1, 8> { of, scratch }),
                2 => lanes.apart(Shape::<E, 2, 8> { of, scratch }),
                3 => lanes.apart(Shape::<E, 3, 6> { of, scratch }),
                4 => lanes.apart(Shape::<E, 4, 4> { of, scratch }),
                5 => lanes.apart(Shape::<E, 5, 4> { of, scratch }),
                6 => lanes.apart(Shape::<E, 6, 4> { of, scratch }),
                7 => lanes.apart(Shape::<E, 7, 3> { of, scratch }),
                8 => lanes.apart(Shape::<E, 8, 3> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else if L::FEW {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<E, 1, 4> { of, scratch }),
                2 => lanes.apart(Shape::<E, 2, 3> { of, scratch }),
                3 => lanes.apart(Shape::<E, 3, 2> { of, scratch }),
                4 => lanes.apart(Shape::<E, 4, 1> { of, scratch }),
                5 => lanes.apart(Shape::<E, 5, 1> { of, scratch }),
                6 => lanes.apart(Shape::<E, 6, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<E, 1, 2> { of, scratch }),
                2 => lanes.apart(Shape::<E, 2, 1> { of, scratch }),
                3 => lanes.apart(Shape::<E, 3, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        }
    }
}

/// Whether tiles of R rows may be many and have something to widen.
const fn widens<L: Lanes, W: Line, const R: usize>() -> bool {
    W::WIDENS && L::REGISTERS.one_of_several(R)
}

/// Tiles of R rows against N panels at a time.
struct Shape<'a, E, const R: usize, const N: usize> {
    of: Multiply<'a, E>,
    scratch: &'a mut Scratch,
}

impl<E: Line, const R: usize, const N: usize> Kernel for Shape<'_, E, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        self.of.group::<L, R, N>(lanes, self.scratch);
    }
}

impl<E: Line> Multiply<'_, E> {
    /// The panels of the group: N at a time, or in pairs where they are fewer.
    #[inline(always)]
    fn group<L: Lanes, const R: usize, const N: usize>(&self, lanes: L, scratch: &mut Scratch) {
        for (panel, count, next) in self.task.steps(N, 2) {
            match count {
                1 => self.panels::<L, R, 1>(lanes, scratch, panel, next),
                2 => self.panels::<L, R, 2>(lanes, scratch, panel, next),
                _ => self.panels::<L, R, N>(lanes, scratch, panel, next),
            }
        }
    }

    /// All tiles against N panels from `panel` on.
    #[inline(always)]
    fn panels<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        scratch: &mut Scratch,
        panel: usize,
        next: Option<*const u8>,
    ) {
        let Self { tiles: Tiles { pairs, count: tiles, .. }, task, .. } = *self;
        let (weight, all) = (task.product.weight, pairs / E::PAIRS);
        let wide = const { widens::<L, E, R>() } && tiles >= WIDEN;
        // One tile needs its panels once, so it may as well go through to their end.
        let depth = match (tiles, wide) {
            (1, _) => all,
            (_, false) => all.div_ceil(pairs.div_ceil(DEPTH).max(1)),
            (_, true) => all.div_ceil(pairs.div_ceil(DEPTH / 2).max(1)),
        };
        let [memory, widened] =
            scratch.take([SUMS_MAX * WIDTH, if wide { 2 * N * depth * WIDTH } else { 0 }]);
        let line = E::BYTES;
        let mut start = 0;
        loop {
            let len = depth.min(all - start);
            let last = start + len == all;
            let lines = Lines {
                here: weight.panel(panel).wrapping_add(start * line),
                stride: weight.stride(),
                start,
                len,
                last,
            };
            let next = if last { next } else { Some(lines.here.wrapping_add(len * line)) };
            if const { widens::<L, E, R>() } && wide {
                let lines = lines.widen::<L, E, N>(lanes, widened);
                for tile in 0..tiles {
                    let here = (lines.here, len, <AsF32 as Line>::BYTES);
                    let asks = Asks::new((tile, tiles), here, (next, line), false);
                    self.tile::<L, AsF32, R, N>(lanes, memory, (lines, asks), (tile, panel));
                }
            } else {
                let cold = task.first && tiles > 1 && (panel, start) == (task.from, 0);
                for tile in 0..tiles {
                    let asks = Asks::new((tile, tiles), (lines.here, len, line), (next, line), cold);
                    self.tile::<L, E, R, N>(lanes, memory, (lines, asks), (tile, panel));
                }
            }
            start += len;
            if last {
                return;
            }
        }
    }

    /// Tile number `tile` against lines of N panels from `panel` on, which hold elements of W: those of the weight, or
    /// what became of them.
    #[inline(always)]
    fn tile<L: Lanes, W: Line, const R: usize, const N: usize>(
        &self,
        lanes: L,
        sums: &mut [f32],
        (lines, asks): (Lines, Asks),
        (tile, panel): (usize, usize),
    ) {
        let sums = &mut sums[..R * N * WIDTH];
        let Self { tiles, task: Task { product, rows, .. }, .. } = *self;
        let exponents = product.weight.exponents.as_ref();
        if lines.start > 0 {
            self.fetch::<L, R, N>(lanes, sums, tile * R, panel);
        } else if let Some(exponents) = exponents {
            begin::<R, N>(exponents, tiles.tile(tile), panel, sums);
        }
        let words = W::WORDS * R;
        let x = &tiles.tile(tile)[lines.start * words..];
        assert!(x.len() >= lines.len * words, "a tile is as long as its panels");
        let far_stride = product.weight.stride();
        let (out, cols) = (product.out, product.weight.rows);
        let to = (place((out, cols), tile * R, panel).0.cast_const(), cols);
        lanes.apart(Tile::<W, R, N> {
            x,
            lines,
            asks,
            far_stride,
            sums: &mut *sums,
            to,
            element: PhantomData,
        });
        let scale = exponents.filter(|_| lines.last).map_or(1.0, Exponents::scale);
        let bias = product.bias.filter(|_| lines.last);
        store_sums::<L, R, N>(lanes, sums, (scale, bias), (out, cols), (rows, tile * R, panel));
    }

    /// Sums of elements before these, from `out`.
    #[inline(always)]
    fn fetch<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        sums: &mut [f32],
        row: usize,
        panel: usize,
    ) {
        let Task { product, rows, .. } = self.task;
        let out = (product.out, product.weight.rows);
        for (i, sums) in sums.chunks_exact_mut(N * WIDTH).enumerate().take(rows - row) {
            for (j, sums) in sums.chunks_exact_mut(WIDTH).enumerate() {
                let (at, whole, rest) = place(out, row + i, panel + j);
                // SAFETY: inside `out`, and only this task writes these elements.
                let before = unsafe { load(lanes, at, whole, rest) };
                // SAFETY: sixteen sums.
                unsafe { lanes.store(sums.as_mut_ptr(), before) };
            }
        }
    }
}

/// What the numbers that lie apart in N panels from `panel` on make of a tile, in the scale of the others' sums.
#[inline(always)]
fn begin<const R: usize, const N: usize>(exponents: &Exponents, x: &[f32], panel: usize, sums: &mut [f32]) {
    sums.fill(0.0);
    let scale = 1.0 / exponents.scale();
    for j in 0..N {
        for other in exponents.others(panel + j) {
            let (pair, half) = (other.element as usize / 2, other.element % 2);
            let (value, lane) = (other.value() / X_SCALE, j * WIDTH + usize::from(other.lane));
            let mut products = [0.0; R];
            for (product, pair) in products.iter_mut().zip(&x[pair * R..][..R]) {
                // Eight bits times eight are exact.
                *product = f32::from_bits(pair.to_bits() << (16 * (1 - half)) & 0xffff_0000) * value;
            }
            for (product, sums) in products.iter().zip(sums.chunks_exact_mut(N * WIDTH)) {
                sums[lane] = product.mul_add(scale, sums[lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests;

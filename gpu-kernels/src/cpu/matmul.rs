//! `out = x · wᵀ + bias`, with `w` in panels.
//!
//! Lanes run along outputs: every output is one chain of multiply-adds over `in` in ascending order, from zero, and
//! nothing is summed across lanes. That order does not know how many rows `x` has, where a chain is interrupted
//! (its sum waits in `out`, which loses nothing) or who computes it, so one row alone and one row among hundreds
//! get the same bits.
//!
//! All products go through one kernel: a tile of `R` rows of `x` and `N` panels, `R · N` registers of sums, and for
//! each pair of elements a line of every panel, widened in registers. With few rows the limit is the bandwidth of
//! memory: up to eight panels are walked at once, because eight streams reach it where one does not, and each asks
//! for the line two kilobytes ahead. With many rows the limit is multiplications per second: the rows are cut into
//! tiles that pass over the same panels in the second-level cache, and meanwhile ask for the panels that come next.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::lanes::{AsBf16, AsF16, AsF32, Element, Kernel, Lanes, Registers, WIDTH, dispatch};
use super::norm::load;
use super::panels::Panels;
use super::scratch::Scratch;
use super::tiles::{Asks, Group, Tiles, X_AHEAD, groups, place, store_sums};
use super::workers::{Turn, Workers};
use super::{Isa, SharedOut};
use crate::Dtype;

/// Pairs of elements that several tiles pass over before they go on: three panels of as many, and the three that come
/// next, leave half of the second-level cache to `x`.
const DEPTH: usize = 1024;
/// From so many tiles on, panels are widened once for all of them instead of by each: that takes as long as two thirds
/// of a tile, and widening is a ninth of what a tile does.
const WIDEN: usize = 12;
/// Bytes of a panel between those that are widened and those that are asked for.
const WIDEN_AHEAD: usize = 1024;
/// Lines between two times that a tile asks for a row of where its sums will go.
const SOME_LINES: usize = 8;
/// Most vectors of sums in a tile.
const SUMS_MAX: usize = 24;

/// One product of a [`linear`] call.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a Panels,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, weight.rows]`.
    pub(crate) out: SharedOut,
}

/// `x` is `[rows, cols]`; every product's weight has `cols` columns and its `out` has `rows` rows. `packed` is
/// memory to work in.
pub(crate) fn linear(
    (workers, isa): (&Workers, Isa),
    packed: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_>],
) {
    let Some(cols) = products.first().map(|product| product.weight.cols) else { return };
    if rows == 0 {
        return;
    }
    let registers = Registers::of(isa);
    let tile = rows.div_ceil(rows.div_ceil(registers.rows_max()));
    let tiles = Tiles::new((workers, isa), packed, x, (rows, cols), (tile, 2));
    let panels = products.iter().map(|product| product.weight.count());
    let groups = groups(registers.panels(tile), workers.threads(), panels);
    workers.run_in_sight(groups.len(), &|Turn { index, first, next }, scratch| {
        let group = groups[index];
        let product = products[group.product];
        let next = next.map(|next| products[groups[next].product].weight.panel(groups[next].from));
        match product.weight.dtype {
            Dtype::F32 => {
                let of = Multiply::<AsF32> { tiles, product, group, first, next, rows, element: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
            Dtype::Bf16 => {
                let of =
                    Multiply::<AsBf16> { tiles, product, group, first, next, rows, element: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
            Dtype::F16 => {
                let of = Multiply::<AsF16> { tiles, product, group, first, next, rows, element: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
        }
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
    product: Product<'a>,
    group: Group,
    /// It is the thread's first one.
    first: bool,
    /// The first panel of the thread's next group.
    next: Option<*const u8>,
    /// Rows of `out`.
    rows: usize,
    element: PhantomData<E>,
}

/// The kernel: what [`Registers::panels`] says, as constants.
struct Run<'a, E> {
    of: Multiply<'a, E>,
    scratch: &'a mut Scratch,
}

impl<E: Element> Kernel for Run<'_, E> {
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
const fn widens<L: Lanes, E: Element, const R: usize>() -> bool {
    E::BYTES < 4 && L::REGISTERS.one_of_several(R)
}

/// Tiles of R rows against N panels at a time.
struct Shape<'a, E, const R: usize, const N: usize> {
    of: Multiply<'a, E>,
    scratch: &'a mut Scratch,
}

impl<E: Element, const R: usize, const N: usize> Kernel for Shape<'_, E, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        self.of.group::<L, R, N>(lanes, self.scratch);
    }
}

impl<E: Element> Multiply<'_, E> {
    /// The panels of the group: N at a time, or in pairs where they are fewer.
    #[inline(always)]
    fn group<L: Lanes, const R: usize, const N: usize>(&self, lanes: L, scratch: &mut Scratch) {
        let Group { from, to, .. } = self.group;
        let mut panel = from;
        while panel < to {
            let count = if to - panel >= N { N } else { (to - panel).min(2) };
            let next =
                if panel + count < to { Some(self.product.weight.panel(panel + count)) } else { self.next };
            match count {
                1 => self.panels::<L, R, 1>(lanes, scratch, panel, next),
                2 => self.panels::<L, R, 2>(lanes, scratch, panel, next),
                _ => self.panels::<L, R, N>(lanes, scratch, panel, next),
            }
            panel += count;
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
        let (pairs, tiles, weight) = (self.tiles.pairs, self.tiles.count, self.product.weight);
        let wide = const { widens::<L, E, R>() } && tiles >= WIDEN;
        // One tile needs its panels once, so it may as well go through to their end.
        let depth = match (tiles, wide) {
            (1, _) => pairs,
            (_, false) => pairs.div_ceil(pairs.div_ceil(DEPTH).max(1)),
            (_, true) => pairs.div_ceil(pairs.div_ceil(DEPTH / 2).max(1)),
        };
        let [memory, widened] =
            scratch.take([SUMS_MAX * WIDTH, if wide { 2 * N * depth * WIDTH } else { 0 }]);
        let line = 2 * WIDTH * E::BYTES;
        let mut start = 0;
        loop {
            let len = depth.min(pairs - start);
            let last = start + len == pairs;
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
                    let here = (lines.here, len, 2 * WIDTH * AsF32::BYTES);
                    let asks = Asks::new((tile, tiles), here, (next, line), false);
                    self.tile::<L, AsF32, R, N>(lanes, memory, (lines, asks), (tile, panel));
                }
            } else {
                let cold = self.first && tiles > 1 && (panel, start) == (self.group.from, 0);
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
    fn tile<L: Lanes, W: Element, const R: usize, const N: usize>(
        &self,
        lanes: L,
        sums: &mut [f32],
        (lines, asks): (Lines, Asks),
        (tile, panel): (usize, usize),
    ) {
        let sums = &mut sums[..R * N * WIDTH];
        if lines.start > 0 {
            self.fetch::<L, R, N>(lanes, sums, tile * R, panel);
        }
        let x = &self.tiles.tile(tile)[2 * lines.start * R..];
        assert!(x.len() >= 2 * lines.len * R, "a tile is as long as its panels");
        let far_stride = self.product.weight.stride();
        let (out, cols) = (self.product.out, self.product.weight.rows);
        let to = (place((out, cols), tile * R, panel).0.cast_const(), cols);
        lanes.apart(Tile::<W, R, N> { x, lines, asks, far_stride, sums, to, element: PhantomData });
        let bias = self.product.bias.filter(|_| lines.last);
        store_sums::<L, R, N>(lanes, sums, bias, (out, cols), (self.rows, tile * R, panel));
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
        let out = (self.product.out, self.product.weight.rows);
        for (i, sums) in sums.chunks_exact_mut(N * WIDTH).enumerate().take(self.rows - row) {
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

/// Lines `start..start + len` of some panels, `stride` bytes from panel to panel.
#[derive(Clone, Copy)]
struct Lines {
    here: *const u8,
    stride: usize,
    start: usize,
    len: usize,
    /// No elements are left after these: the sums are complete.
    last: bool,
}

impl Lines {
    /// The same lines of N panels in f32, in `to`.
    #[inline(always)]
    fn widen<L: Lanes, E: Element, const N: usize>(self, lanes: L, to: &mut [f32]) -> Self {
        let (line, stride) = (2 * WIDTH * E::BYTES, 2 * WIDTH * self.len);
        let widened = &mut to[..N * stride];
        for (j, to) in widened.chunks_exact_mut(stride).enumerate() {
            for (index, to) in to.chunks_exact_mut(2 * WIDTH).enumerate() {
                let from = self.here.wrapping_add(j * self.stride + index * line);
                lanes.prefetch(from.wrapping_add(WIDEN_AHEAD));
                // SAFETY: N panels have the lines.
                let first = unsafe { E::half_line::<L, false>(lanes, from) };
                // SAFETY: as above.
                let second = unsafe { E::half_line::<L, true>(lanes, from) };
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
struct Tile<'a, W, const R: usize, const N: usize> {
    /// R elements twice for each line.
    x: &'a [f32],
    lines: Lines,
    asks: Asks,
    /// Bytes from panel to panel of the weight.
    far_stride: usize,
    /// `[R][N][16]`: those of the elements before `lines.start`, if there are any, and then with these.
    sums: &'a mut [f32],
    /// Where the first row of sums will go, and the elements from there to the next one.
    to: (*const f32, usize),
    element: PhantomData<W>,
}

impl<W: Element, const R: usize, const N: usize> Kernel for Tile<'_, W, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { x, lines, mut asks, far_stride, sums: memory, to: out, .. } = self;
        let Lines { here, stride, start, len, .. } = lines;
        let line = 2 * WIDTH * W::BYTES;
        let mut sums = [[lanes.splat(0.0); N]; R];
        if start > 0 {
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
                asks.ask::<L, R, N>(lanes, line, (stride, far_stride));
                if const { L::REGISTERS.one_of_several(R) } {
                    lanes.prefetch(x.wrapping_add(X_AHEAD).cast());
                }
                // SAFETY: `x` has R elements twice for each line, and N panels have the lines.
                unsafe { multiply::<L, W, R, N, false>(lanes, x, at, stride, &mut sums) };
                // SAFETY: as above.
                unsafe { multiply::<L, W, R, N, true>(lanes, x.wrapping_add(R), at, stride, &mut sums) };
                (x, at) = (x.wrapping_add(2 * R), at.wrapping_add(line));
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

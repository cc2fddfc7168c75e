//! `out = x · wᵀ + bias`, with `w` read where it lies.
//!
//! Lanes run along `in`: every output is a dot product whose element `i` goes into running sum `i mod 16`, in
//! ascending order, and whose sixteen sums end in one fixed tree. That order does not know how many rows `x` has, so
//! one row alone and one row among hundreds get the same bits. Three ways through the same sums:
//!
//! - a few rows ([`Direct`]): up to eight weight rows are walked at once and widened in registers, by up to four rows
//!   of `x`, and again by the others while they are near. The limit is the bandwidth of memory, and eight streams
//!   reach it where one does not.
//! - more rows ([`Tiled`]): eight weight rows are widened once into scratch that stays in the first-level cache, and
//!   all rows of `x` pass over it in tiles of 3 x 8 sums held in registers. The limit is multiplications per second.
//! - bf16 weights on a machine with matrix tiles: see [`super::amx`].
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::lanes::{AsBf16, AsF16, AsF32, Element, Kernel, Lanes, WIDTH, dispatch};
use super::scratch::Scratch;
use super::weight::Matrix;
use super::workers::Workers;
use super::{Isa, SharedOut};
use crate::Dtype;

/// Weight rows that are computed together.
const GROUP: usize = 8;
/// Rows of `x` in a tile.
const TILE: usize = 3;
/// Rows of `x` that walk the weights at once, where registers are wide: six at once take longer than twice three.
const PASS: usize = 4;
/// Rows of `x` that walk the weights where they lie.
fn few(isa: Isa) -> usize {
    if matches!(isa.name(), "avx512" | "amx") { 2 * PASS } else { TILE }
}
/// Elements of `in` that are widened at once: a group of them takes 16 KiB, which leaves half of a first-level cache
/// for the rows of `x` that stream past.
const DEPTH: usize = 512;
/// Bytes of `x` that should stay in the second-level cache while a run of weight groups passes.
const BLOCK_BYTES: usize = 512 << 10;

/// One product of a [`linear`] call.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) weight: Matrix<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, weight.rows]`.
    pub(crate) out: SharedOut,
}

/// A run of weight groups of one product, over a block of rows: what one thread does at a time.
#[derive(Clone, Copy)]
struct Piece {
    product: usize,
    /// Weight rows `from..to`.
    from: usize,
    to: usize,
    /// Rows of `x`.
    row: usize,
    rows: usize,
}

/// `x` is `[rows, cols]`; every product's weight has `cols` columns and its `out` has `rows` rows.
pub(crate) fn linear(workers: &Workers, isa: Isa, x: &[f32], rows: usize, products: &[Product<'_>]) {
    if rows == 0 {
        return;
    }
    let pieces = pieces(workers.threads(), few(isa), rows, products);
    workers.run(pieces.len(), &|index, scratch| {
        let piece = pieces[index];
        let product = products[piece.product];
        let x = &x[piece.row * product.weight.cols..];
        if piece.rows > few(isa) {
            return dispatch(isa, Tiled { x, product, piece, scratch });
        }
        match product.weight.dtype {
            Dtype::F32 => dispatch(isa, Direct::<AsF32> { x, product, piece, element: PhantomData }),
            Dtype::Bf16 => dispatch(isa, Direct::<AsBf16> { x, product, piece, element: PhantomData }),
            Dtype::F16 => dispatch(isa, Direct::<AsF16> { x, product, piece, element: PhantomData }),
        }
    });
}

/// Cuts the products so that every thread gets several pieces and no piece is too small to be worth handing out.
fn pieces(threads: usize, few: usize, rows: usize, products: &[Product<'_>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let groups: usize = products.iter().map(|product| product.weight.rows.div_ceil(GROUP)).sum();
    for (index, product) in products.iter().enumerate() {
        let (n, cols) = (product.weight.rows, product.weight.cols);
        let blocks = if rows <= few { 1 } else { (rows * cols * 4).div_ceil(BLOCK_BYTES).max(1) };
        let block =
            if rows <= few { rows } else { rows.div_ceil(blocks).next_multiple_of(TILE).max(8 * TILE) };
        let group_work = (GROUP * cols * block.min(rows)).max(1);
        let least = 16_384_usize.div_ceil(group_work);
        let step = GROUP * groups.div_ceil(8 * threads).clamp(least, least.max(32));
        for from in (0..n).step_by(step) {
            for row in (0..rows).step_by(block) {
                let (to, rows) = ((from + step).min(n), block.min(rows - row));
                pieces.push(Piece { product: index, from, to, row, rows });
            }
        }
    }
    pieces
}

/// Pointers to the rows of one group; past the end the last row stands in, and its sums are thrown away.
#[inline(always)]
fn row_pointers(weight: Matrix<'_>, from: usize) -> [*const u8; GROUP] {
    std::array::from_fn(|j| weight.row((from + j).min(weight.rows - 1)).as_ptr())
}

/// Adds the bias and writes the sums of one row, as many as there are columns.
#[inline(always)]
fn finish(product: &Product<'_>, row: usize, from: usize, mut sums: [f32; GROUP]) {
    let n = product.weight.rows;
    let count = GROUP.min(n - from);
    if let Some(bias) = product.bias {
        for (sum, bias) in sums.iter_mut().zip(&bias[from..from + count]) {
            *sum += bias;
        }
    }
    let at = product.out.row(row, n).wrapping_add(from);
    if count == GROUP {
        // SAFETY: `row` and `from..from + 8` are inside `[rows, n]`, and only this piece writes these elements.
        unsafe { at.cast::<[f32; GROUP]>().write_unaligned(sums) };
    } else {
        // SAFETY: as above, with `count` elements.
        unsafe { at.copy_from_nonoverlapping(sums.as_ptr(), count) };
    }
}

/// The same for sixteen columns.
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "only matrix tiles finish sixteen")
)]
#[inline(always)]
pub(crate) fn finish16<L: Lanes>(lanes: L, product: &Product<'_>, row: usize, from: usize, sums: L::F) {
    let mut all = [0.0; 2 * GROUP];
    // SAFETY: sixteen floats.
    unsafe { lanes.store(all.as_mut_ptr(), sums) };
    let halves = all.as_chunks::<GROUP>().0;
    finish(product, row, from, halves[0]);
    if from + GROUP < product.weight.rows {
        finish(product, row, from + GROUP, halves[1]);
    }
}

/// A few rows of `x`.
struct Direct<'a, E> {
    x: &'a [f32],
    product: Product<'a>,
    piece: Piece,
    element: PhantomData<E>,
}

impl<E: Element> Kernel for Direct<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for from in (self.piece.from..self.piece.to).step_by(GROUP) {
            let passes = self.piece.rows.div_ceil(if L::WIDE { PASS } else { TILE });
            for pass in 0..passes {
                let (row, end) = (pass * self.piece.rows / passes, (pass + 1) * self.piece.rows / passes);
                match end - row {
                    1 => self.group::<L, 1>(lanes, from, row),
                    2 => self.group::<L, 2>(lanes, from, row),
                    3 => self.group::<L, 3>(lanes, from, row),
                    4 if L::WIDE => self.group::<L, 4>(lanes, from, row),
                    rows => unreachable!("{rows} rows in one pass"),
                }
            }
        }
    }
}

impl<E: Element> Direct<'_, E> {
    /// M rows of `x`, from `row` on, and eight weight rows, as many at once as have room for their sums in registers.
    #[inline(always)]
    fn group<L: Lanes, const M: usize>(&self, lanes: L, from: usize, row: usize) {
        let rows = row_pointers(self.product.weight, from);
        let mut sums = [[lanes.splat(0.0); GROUP]; M];
        let at_once = match (L::WIDE, M) {
            (true, ..=TILE) => GROUP,
            (true, _) | (false, 1) => GROUP / 2,
            (false, _) => GROUP / 4,
        };
        for first in (0..GROUP).step_by(at_once) {
            match at_once {
                GROUP => self.rows::<L, M, GROUP>(lanes, &rows, (first, row), &mut sums),
                4 => self.rows::<L, M, { GROUP / 2 }>(lanes, &rows, (first, row), &mut sums),
                _ => self.rows::<L, M, { GROUP / 4 }>(lanes, &rows, (first, row), &mut sums),
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            finish(&self.product, self.piece.row + row + i, from, lanes.sum8(sums));
        }
    }

    /// The sums of weight rows `first..first + N` of a group.
    #[inline(always)]
    fn rows<L: Lanes, const M: usize, const N: usize>(
        &self,
        lanes: L,
        rows: &[*const u8; GROUP],
        (first, row): (usize, usize),
        out: &mut [[L::F; GROUP]; M],
    ) {
        let cols = self.product.weight.cols;
        let x_rows = &self.x[row * cols..(row + M) * cols];
        let (whole, rest) = (cols / WIDTH * WIDTH, cols % WIDTH);
        let ahead = N * cols * E::BYTES;
        let mut sums = [[lanes.splat(0.0); N]; M];
        for k in (0..whole).step_by(WIDTH) {
            let mut x = [lanes.splat(0.0); M];
            for (i, x) in x.iter_mut().enumerate() {
                // SAFETY: `k + 16 <= cols`, and `x` has at least M rows of `cols`.
                *x = unsafe { lanes.load(x_rows.as_ptr().wrapping_add(i * cols + k)) };
            }
            for j in 0..N {
                let at = rows[first + j].wrapping_add(k * E::BYTES);
                lanes.prefetch(at.wrapping_add(ahead));
                // SAFETY: `k + 16 <= cols`, the length of the row.
                let w = unsafe { E::load(lanes, at) };
                for i in 0..M {
                    sums[i][j] = lanes.fma(x[i], w, sums[i][j]);
                }
            }
        }
        if rest > 0 {
            for j in 0..N {
                let at = rows[first + j].wrapping_add(whole * E::BYTES);
                // SAFETY: `rest` elements are left of the row.
                let w = unsafe { E::load_first(lanes, at, rest) };
                for i in 0..M {
                    let at = x_rows.as_ptr().wrapping_add(i * cols + whole);
                    // SAFETY: `rest` elements are left of the row.
                    let x = unsafe { lanes.load_first(at, rest) };
                    sums[i][j] = lanes.fma(x, w, sums[i][j]);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            out[first..first + N].copy_from_slice(&sums);
        }
    }
}

/// Any number of rows of `x`.
struct Tiled<'a> {
    x: &'a [f32],
    product: Product<'a>,
    piece: Piece,
    scratch: &'a mut Scratch,
}

impl Kernel for Tiled<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let cols = self.product.weight.cols;
        let depth = cols.div_ceil(cols.div_ceil(DEPTH).max(1)).next_multiple_of(WIDTH);
        let rows = self.piece.rows;
        // Widened weights `[depth / 16][8][16]`, running sums `[rows][8][16]`, the padded ends of a tile's rows.
        let [wide, sums, ends] =
            self.scratch.take([depth * GROUP, rows.next_multiple_of(TILE) * GROUP * WIDTH, TILE * WIDTH]);
        for from in (self.piece.from..self.piece.to).step_by(GROUP) {
            let group = row_pointers(self.product.weight, from);
            for start in (0..cols).step_by(depth.max(1)) {
                let len = depth.min(cols - start);
                match self.product.weight.dtype {
                    Dtype::F32 => widen::<L, AsF32>(lanes, &group, start, len, wide),
                    Dtype::Bf16 => widen::<L, AsBf16>(lanes, &group, start, len, wide),
                    Dtype::F16 => widen::<L, AsF16>(lanes, &group, start, len, wide),
                }
                let (fresh, last) = (start == 0, start + len == cols);
                // While the tiles multiply, the weights that are widened next come nearer, a few rows with each tile.
                let (next, next_start) = if last { (from + GROUP, 0) } else { (from, start + len) };
                let ahead = Ahead::new(self.product.weight, next, next_start, rows.div_ceil(TILE));
                for (index, row) in (0..rows).step_by(TILE).enumerate() {
                    let tile = Tile {
                        x: &self.x[row * cols + start..],
                        stride: cols,
                        len,
                        wide,
                        sums: &mut sums[row * GROUP * WIDTH..],
                        ends,
                        fresh,
                        finish: last.then_some((&self.product, self.piece.row + row, from)),
                        ahead: ahead.of_tile(index),
                    };
                    match rows - row {
                        1 => tile.run::<L, 1, 0>(lanes),
                        2 => tile.run::<L, 2, 0>(lanes),
                        // Narrow registers have no room for more than the sums.
                        _ => match if L::WIDE { tile.ahead.rows } else { 0 } {
                            0 => tile.run::<L, TILE, 0>(lanes),
                            1 => tile.run::<L, TILE, 1>(lanes),
                            2 => tile.run::<L, TILE, 2>(lanes),
                            _ => tile.run::<L, TILE, 4>(lanes),
                        },
                    }
                }
            }
            if cols == 0 {
                (0..rows).for_each(|row| finish(&self.product, self.piece.row + row, from, [0.0; GROUP]));
            }
        }
    }
}

/// Widens elements `start..start + len` of eight rows into `[len / 16][8][16]`, zeros behind an end.
#[inline(always)]
fn widen<L: Lanes, E: Element>(
    lanes: L,
    rows: &[*const u8; GROUP],
    start: usize,
    len: usize,
    wide: &mut [f32],
) {
    let (whole, rest) = (len / WIDTH, len % WIDTH);
    assert!(wide.len() >= len.div_ceil(WIDTH) * WIDTH * GROUP, "scratch is as deep as the weights");
    for step in 0..whole {
        for (j, row) in rows.iter().enumerate() {
            // SAFETY: the row has at least `start + len` elements.
            let w = unsafe { E::load(lanes, row.wrapping_add((start + step * WIDTH) * E::BYTES)) };
            // SAFETY: asserted above.
            unsafe { lanes.store(wide.as_mut_ptr().wrapping_add((step * GROUP + j) * WIDTH), w) };
        }
    }
    if rest > 0 {
        for (j, row) in rows.iter().enumerate() {
            // SAFETY: `rest` elements are left of the row.
            let w =
                unsafe { E::load_first(lanes, row.wrapping_add((start + whole * WIDTH) * E::BYTES), rest) };
            // SAFETY: asserted above.
            unsafe { lanes.store(wide.as_mut_ptr().wrapping_add((whole * GROUP + j) * WIDTH), w) };
        }
    }
}

/// Which weights to ask memory for during a tile: `rows` rows, `stride` bytes apart.
#[derive(Clone, Copy)]
struct Ahead {
    at: *const u8,
    stride: usize,
    rows: usize,
    bytes: usize,
}

impl Ahead {
    /// The eight rows from `row`, from element `start`, spread over this many tiles.
    #[inline(always)]
    fn new(weight: Matrix<'_>, row: usize, start: usize, tiles: usize) -> Self {
        let bytes = weight.dtype.bytes();
        let stride = weight.cols * bytes;
        let at = weight.bytes.as_ptr().wrapping_add(row * stride + start * bytes);
        let rows = match tiles {
            _ if row >= weight.rows => 0,
            0..4 => 4,
            4..8 => 2,
            _ => 1,
        };
        Self { at, stride, rows, bytes }
    }

    /// The part of the tile with this number.
    #[inline(always)]
    fn of_tile(self, tile: usize) -> Self {
        let first = tile * self.rows;
        let rows = if first < GROUP { self.rows } else { 0 };
        Self { at: self.at.wrapping_add(first * self.stride), rows, ..self }
    }
}

/// Up to three rows of `x` against eight widened weight rows.
struct Tile<'a> {
    x: &'a [f32],
    stride: usize,
    len: usize,
    wide: &'a [f32],
    /// `[rows][8][16]`
    sums: &'a mut [f32],
    ends: &'a mut [f32],
    /// Start from zero instead of from `sums`.
    fresh: bool,
    /// These are the last elements: write the outputs from this row and column on, instead of `sums`.
    finish: Option<(&'a Product<'a>, usize, usize)>,
    ahead: Ahead,
}

impl Tile<'_> {
    /// M rows of `x`; asks for A rows of weights meanwhile.
    #[inline(always)]
    fn run<L: Lanes, const M: usize, const A: usize>(mut self, lanes: L) {
        let (whole, rest) = (self.len / WIDTH, self.len % WIDTH);
        assert!(self.x.len() >= (M - 1) * self.stride + self.len, "x has M rows");
        assert!(self.wide.len() >= self.len.div_ceil(WIDTH) * GROUP * WIDTH, "the weights are widened");
        assert!(self.sums.len() >= M * GROUP * WIDTH, "M rows of sums");
        if rest > 0 {
            for i in 0..M {
                let end = &mut self.ends[i * WIDTH..(i + 1) * WIDTH];
                end.fill(0.0);
                end[..rest].copy_from_slice(&self.x[i * self.stride + whole * WIDTH..][..rest]);
            }
        }
        for part in 0..L::PARTS {
            if L::WIDE {
                self.part::<L, M, GROUP, A>(lanes, part, 0);
            } else {
                self.part::<L, M, { GROUP / 2 }, 0>(lanes, part, 0);
                self.part::<L, M, { GROUP / 2 }, 0>(lanes, part, GROUP / 2);
            }
        }
        if !L::WIDE {
            self.finish_from_memory::<L, M>(lanes);
        }
    }

    /// The sums of one register's lanes, for weight rows `first..first + N`.
    #[inline(always)]
    fn part<L: Lanes, const M: usize, const N: usize, const A: usize>(
        &mut self,
        lanes: L,
        part: usize,
        first: usize,
    ) {
        let (whole, rest) = (self.len / WIDTH, self.len % WIDTH);
        let lane = part * (WIDTH / L::PARTS);
        let mut sums = [[lanes.splat_part(0.0); N]; M];
        if !self.fresh {
            for i in 0..M {
                for j in 0..N {
                    let at = (i * GROUP + first + j) * WIDTH + lane;
                    // SAFETY: `sums` holds M rows of GROUP vectors.
                    sums[i][j] = unsafe { lanes.load_part(self.sums.as_ptr().wrapping_add(at)) };
                }
            }
        }
        let mut x = self.x.as_ptr().wrapping_add(lane);
        let mut w = self.wide.as_ptr().wrapping_add(first * WIDTH + lane);
        let mut ahead = self.ahead.at;
        for _ in 0..whole {
            for row in 0..A {
                lanes.prefetch_far(ahead.wrapping_add(row * self.ahead.stride));
            }
            ahead = ahead.wrapping_add(WIDTH * self.ahead.bytes);
            // SAFETY: step `< len / 16` of M rows of `x` and of the widened weights.
            unsafe { multiply::<L, M, N>(lanes, x, self.stride, w, &mut sums) };
            x = x.wrapping_add(WIDTH);
            w = w.wrapping_add(GROUP * WIDTH);
        }
        if rest > 0 {
            let ends = self.ends.as_ptr().wrapping_add(lane);
            // SAFETY: `ends` holds M vectors, and the widened weights have a padded last step.
            unsafe { multiply::<L, M, N>(lanes, ends, WIDTH, w, &mut sums) };
        }
        if let (Some((product, row, from)), 1, GROUP) = (self.finish, L::PARTS, N) {
            for i in 0..M {
                let whole = std::array::from_fn(|j| lanes.whole(sums[i][j]));
                finish(product, row + i, from, lanes.sum8(whole));
            }
            return;
        }
        for i in 0..M {
            for j in 0..N {
                let at = (i * GROUP + first + j) * WIDTH + lane;
                // SAFETY: as at the load.
                unsafe { lanes.store_part(self.sums.as_mut_ptr().wrapping_add(at), sums[i][j]) };
            }
        }
    }

    /// Outputs of M rows whose sums went through memory, because a register holds only a part of them.
    #[inline(always)]
    fn finish_from_memory<L: Lanes, const M: usize>(&self, lanes: L) {
        if let Some((product, row, from)) = self.finish {
            for i in 0..M {
                let of_row = &self.sums[i * GROUP * WIDTH..][..GROUP * WIDTH];
                // SAFETY: `of_row` holds eight vectors.
                let whole =
                    std::array::from_fn(|j| unsafe { lanes.load(of_row.as_ptr().wrapping_add(j * WIDTH)) });
                finish(product, row + i, from, lanes.sum8(whole));
            }
        }
    }
}

/// One step of 16 elements, or the part of it that a register holds: `sums[i][j] += x[i] · w[j]`.
///
/// # Safety
/// `x` has M rows `stride` apart and `w` has N vectors, a register readable in each.
#[inline(always)]
unsafe fn multiply<L: Lanes, const M: usize, const N: usize>(
    lanes: L,
    x: *const f32,
    stride: usize,
    w: *const f32,
    sums: &mut [[L::P; N]; M],
) {
    let mut rows = [lanes.splat_part(0.0); M];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *row = unsafe { lanes.load_part(x.wrapping_add(i * stride)) };
    }
    for j in 0..N {
        // SAFETY: the caller's promise.
        let w = unsafe { lanes.load_part(w.wrapping_add(j * WIDTH)) };
        for i in 0..M {
            sums[i][j] = lanes.fma_part(rows[i], w, sums[i][j]);
        }
    }
}

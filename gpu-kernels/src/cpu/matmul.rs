//! `out = x · wᵀ + bias`, with `w` read where it lies.
//!
//! Lanes run along `in`: every output is a dot product whose element `i` goes into running sum `i mod 16`, in
//! ascending order, and whose sixteen sums end in one fixed tree. That order does not know how many rows `x` has, so
//! one row alone and one row among hundreds get the same bits. Three ways through the same sums:
//!
//! - up to three rows ([`Direct`]): eight weight rows are walked at once and widened in registers. The limit is the
//!   bandwidth of memory, and eight streams reach it where one does not.
//! - more rows ([`Tiled`]): eight weight rows are widened once into scratch that stays in the first-level cache, and
//!   all rows of `x` pass over it in tiles of 3 x 8 sums held in registers. The limit is multiplications per second.
//! - bf16 weights on a machine with matrix tiles: see [`super::amx`].

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
/// Elements of `in` that are widened at once: a group of them takes 24 KiB.
const DEPTH: usize = 768;
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
    let pieces = pieces(workers.threads(), rows, products);
    workers.run(pieces.len(), &|index, scratch| {
        let piece = pieces[index];
        let product = products[piece.product];
        let x = &x[piece.row * product.weight.cols..];
        if piece.rows > TILE {
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
fn pieces(threads: usize, rows: usize, products: &[Product<'_>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let groups: usize = products.iter().map(|product| product.weight.rows.div_ceil(GROUP)).sum();
    for (index, product) in products.iter().enumerate() {
        let (n, cols) = (product.weight.rows, product.weight.cols);
        let blocks = if rows <= TILE { 1 } else { (rows * cols * 4).div_ceil(BLOCK_BYTES) };
        let block =
            if rows <= TILE { rows } else { rows.div_ceil(blocks).next_multiple_of(TILE).max(8 * TILE) };
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
fn finish(product: &Product<'_>, row: usize, from: usize, sums: [f32; GROUP]) {
    let n = product.weight.rows;
    for j in 0..GROUP.min(n - from) {
        let sum = product.bias.map_or(sums[j], |bias| sums[j] + bias[from + j]);
        // SAFETY: `row` and `from + j` are inside `[rows, n]`, and only this piece writes this element.
        unsafe { product.out.write(row * n + from + j, sum) };
    }
}

/// Up to three rows of `x`.
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
            match self.piece.rows {
                1 => self.group::<L, 1>(lanes, from),
                2 => self.group::<L, 2>(lanes, from),
                _ => self.group::<L, 3>(lanes, from),
            }
        }
    }
}

impl<E: Element> Direct<'_, E> {
    #[inline(always)]
    fn group<L: Lanes, const M: usize>(&self, lanes: L, from: usize) {
        let weight = self.product.weight;
        let rows = row_pointers(weight, from);
        let (whole, rest) = (weight.cols / WIDTH * WIDTH, weight.cols % WIDTH);
        let ahead = GROUP * weight.cols * E::BYTES;
        let mut sums = [[lanes.splat(0.0); GROUP]; M];
        for k in (0..whole).step_by(WIDTH) {
            // SAFETY: `k + 16 <= cols`, and `x` has at least M rows of `cols`.
            let x: [L::F; M] =
                std::array::from_fn(|i| unsafe { lanes.load(self.x.as_ptr().add(i * weight.cols + k)) });
            for j in 0..GROUP {
                let at = rows[j].wrapping_add(k * E::BYTES);
                lanes.prefetch(at.wrapping_add(ahead));
                // SAFETY: `k + 16 <= cols`, the length of the row.
                let w = unsafe { E::load(lanes, at) };
                for i in 0..M {
                    sums[i][j] = lanes.fma(x[i], w, sums[i][j]);
                }
            }
        }
        if rest > 0 {
            for j in 0..GROUP {
                // SAFETY: `rest` elements are left of the row.
                let w = unsafe { E::load_first(lanes, rows[j].wrapping_add(whole * E::BYTES), rest) };
                for i in 0..M {
                    // SAFETY: `rest` elements are left of the row.
                    let x = unsafe { lanes.load_first(self.x.as_ptr().add(i * weight.cols + whole), rest) };
                    sums[i][j] = lanes.fma(x, w, sums[i][j]);
                }
            }
        }
        for i in 0..M {
            finish(&self.product, self.piece.row + i, from, lanes.sum8(sums[i]));
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
            if cols == 0 {
                sums.fill(0.0);
            }
            for start in (0..cols).step_by(depth.max(1)) {
                let len = depth.min(cols - start);
                match self.product.weight.dtype {
                    Dtype::F32 => widen::<L, AsF32>(lanes, &group, start, len, wide),
                    Dtype::Bf16 => widen::<L, AsBf16>(lanes, &group, start, len, wide),
                    Dtype::F16 => widen::<L, AsF16>(lanes, &group, start, len, wide),
                }
                for row in (0..rows).step_by(TILE) {
                    let x = &self.x[row * cols + start..];
                    let sums = &mut sums[row * GROUP * WIDTH..];
                    let tile = TileArgs { x, stride: cols, len, wide, sums, ends, fresh: start == 0 };
                    match rows - row {
                        1 => tile.run::<L, 1>(lanes),
                        2 => tile.run::<L, 2>(lanes),
                        _ => tile.run::<L, TILE>(lanes),
                    }
                }
            }
            for row in 0..rows {
                let of_row = &sums[row * GROUP * WIDTH..][..GROUP * WIDTH];
                // SAFETY: `of_row` holds eight vectors.
                let vectors = std::array::from_fn(|j| unsafe { lanes.load(of_row.as_ptr().add(j * WIDTH)) });
                finish(&self.product, self.piece.row + row, from, lanes.sum8(vectors));
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
            let w = unsafe { E::load(lanes, row.add((start + step * WIDTH) * E::BYTES)) };
            // SAFETY: asserted above.
            unsafe { lanes.store(wide.as_mut_ptr().add((step * GROUP + j) * WIDTH), w) };
        }
    }
    if rest > 0 {
        for (j, row) in rows.iter().enumerate() {
            // SAFETY: `rest` elements are left of the row.
            let w = unsafe { E::load_first(lanes, row.add((start + whole * WIDTH) * E::BYTES), rest) };
            // SAFETY: asserted above.
            unsafe { lanes.store(wide.as_mut_ptr().add((whole * GROUP + j) * WIDTH), w) };
        }
    }
}

/// Up to three rows of `x` against eight widened weight rows.
struct TileArgs<'a> {
    x: &'a [f32],
    stride: usize,
    len: usize,
    wide: &'a [f32],
    /// `[rows][8][16]`
    sums: &'a mut [f32],
    ends: &'a mut [f32],
    /// Start from zero instead of from `sums`.
    fresh: bool,
}

impl TileArgs<'_> {
    #[inline(always)]
    fn run<L: Lanes, const M: usize>(mut self, lanes: L) {
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
                self.part::<L, M, GROUP>(lanes, part, 0);
            } else {
                self.part::<L, M, { GROUP / 2 }>(lanes, part, 0);
                self.part::<L, M, { GROUP / 2 }>(lanes, part, GROUP / 2);
            }
        }
    }

    /// The sums of one register's lanes, for weight rows `first..first + N`.
    #[inline(always)]
    fn part<L: Lanes, const M: usize, const N: usize>(&mut self, lanes: L, part: usize, first: usize) {
        let (whole, rest) = (self.len / WIDTH, self.len % WIDTH);
        let lane = part * (WIDTH / L::PARTS);
        let mut sums = [[lanes.splat_part(0.0); N]; M];
        if !self.fresh {
            for i in 0..M {
                for j in 0..N {
                    let at = (i * GROUP + first + j) * WIDTH + lane;
                    // SAFETY: `sums` holds M rows of GROUP vectors.
                    sums[i][j] = unsafe { lanes.load_part(self.sums.as_ptr().add(at)) };
                }
            }
        }
        let mut x = self.x.as_ptr().wrapping_add(lane);
        let mut w = self.wide.as_ptr().wrapping_add(first * WIDTH + lane);
        for _ in 0..whole {
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
        for i in 0..M {
            for j in 0..N {
                let at = (i * GROUP + first + j) * WIDTH + lane;
                // SAFETY: as at the load.
                unsafe { lanes.store_part(self.sums.as_mut_ptr().add(at), sums[i][j]) };
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
        *row = unsafe { lanes.load_part(x.add(i * stride)) };
    }
    for j in 0..N {
        // SAFETY: the caller's promise.
        let w = unsafe { lanes.load_part(w.add(j * WIDTH)) };
        for i in 0..M {
            sums[i][j] = lanes.fma_part(rows[i], w, sums[i][j]);
        }
    }
}

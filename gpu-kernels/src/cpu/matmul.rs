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
use super::norm::{load, store};
use super::panels::Panels;
use super::scratch::Scratch;
use super::workers::Workers;
use super::{Isa, SharedOut};
use crate::Dtype;

/// Lines between the one that is multiplied and the one that is asked for, where memory is the limit.
pub(super) const AHEAD: usize = 32;
/// Pairs of elements that several tiles pass over before they go on.
const DEPTH: usize = 512;
/// Groups of panels that a piece should have at least.
const GROUPS: usize = 4;
/// Bytes of `x` that should stay in the second-level cache while panels pass.
const BLOCK_BYTES: usize = 512 << 10;

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

/// `x` as the kernel reads it: tiles of `rows` rows, `[tile][in, to an even number][rows]`; zeros where there is
/// nothing.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    x: &'a [f32],
    /// Rows of a tile.
    pub(super) rows: usize,
    /// Tiles.
    count: usize,
    /// Pairs of elements in a row.
    pub(super) pairs: usize,
}

/// A run of panels of one product against a run of tiles: what one thread does at a time.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) product: usize,
    /// Panels `from..to`.
    pub(super) from: usize,
    pub(super) to: usize,
    /// The first tile, and how many.
    pub(super) tile: usize,
    pub(super) tiles: usize,
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
    let count = rows.div_ceil(Registers::of(isa).rows_max());
    let tiles = Tiles::new((workers, isa), packed, x, (rows, cols), (rows.div_ceil(count), 2));
    let (group, depth) = (Registers::of(isa).panels(tiles.rows), tiles.pairs.min(DEPTH));
    let counts = products.iter().map(|product| product.weight.count());
    let pieces = pieces(workers.threads(), group, tiles, depth, counts);
    workers.run(pieces.len(), &|index, scratch| {
        let piece = pieces[index];
        let product = products[piece.product];
        match product.weight.dtype {
            Dtype::F32 => {
                let of = Multiply::<AsF32> { tiles, product, piece, rows, element: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
            Dtype::Bf16 => {
                let of = Multiply::<AsBf16> { tiles, product, piece, rows, element: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
            Dtype::F16 => {
                let of = Multiply::<AsF16> { tiles, product, piece, rows, element: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
        }
    });
}

/// Cuts each product into as many equal pieces for every thread as have several groups of `group` panels: within a
/// piece each group is asked for while the one before it is computed, between pieces nobody knows who goes on. `depth`
/// pairs of elements pass at a time; `counts` are the panels of each product.
pub(super) fn pieces(
    threads: usize,
    group: usize,
    tiles: Tiles<'_>,
    depth: usize,
    counts: impl Iterator<Item = usize>,
) -> Vec<Piece> {
    let tile_bytes = tiles.rows * depth * 2 * 4;
    let block = (BLOCK_BYTES / tile_bytes.max(1)).clamp(1, tiles.count);
    let block = tiles.count.div_ceil(tiles.count.div_ceil(block));
    let mut pieces = Vec::new();
    for (product, panels) in counts.enumerate() {
        let groups = panels.div_ceil(group);
        let parts = threads * (groups / (GROUPS * threads)).clamp(1, 8);
        for part in 0..parts {
            let cut = |part: usize| (part * groups / parts * group).min(panels);
            let (from, to) = (cut(part), cut(part + 1));
            for tile in (0..tiles.count).step_by(block).filter(|_| from < to) {
                pieces.push(Piece { product, from, to, tile, tiles: block.min(tiles.count - tile) });
            }
        }
    }
    pieces
}

impl Registers {
    /// Most rows of a tile.
    fn rows_max(self) -> usize {
        match self {
            Self::Many => 12,
            Self::Few => 6,
            Self::Quarters => 3,
        }
    }

    /// Panels whose sums fit beside each other for so many rows: the `N` of each `R` in [`Multiply::run`].
    fn panels(self, rows: usize) -> usize {
        match (self, rows) {
            (Self::Many, ..=2) => 8,
            (Self::Many, 3) => 6,
            (Self::Many, ..=6) => 4,
            (Self::Many, ..=8) => 3,
            (Self::Many, _) => 2,
            (Self::Few, 1) => 4,
            (Self::Few, 2) => 3,
            (Self::Few, 3) => 2,
            (Self::Quarters, 1) => 2,
            (Self::Few | Self::Quarters, _) => 1,
        }
    }
}

impl<'a> Tiles<'a> {
    /// Tiles of so many rows, with each row of `x`, `[rows, cols]`, padded to a multiple of `step` elements; in
    /// `packed`, or where `x` lies if that is the same.
    pub(super) fn new(
        with: (&Workers, Isa),
        packed: &'a mut Scratch,
        x: &'a [f32],
        (rows, cols): (usize, usize),
        (of, step): (usize, usize),
    ) -> Self {
        let tiles = Self { x, rows: of, count: rows.div_ceil(of), pairs: cols.next_multiple_of(step) / 2 };
        let as_it_lies = of == 1 && rows == 1 && cols == 2 * tiles.pairs;
        if as_it_lies { tiles } else { tiles.pack(with, packed, (rows, cols)) }
    }

    /// The elements of one tile, `[in][rows]`.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &'a [f32] {
        &self.x[tile * self.tile_len()..][..self.tile_len()]
    }

    /// The same from row-major `x`, turned into `packed`.
    fn pack(
        self,
        (workers, isa): (&Workers, Isa),
        packed: &'a mut Scratch,
        (rows, cols): (usize, usize),
    ) -> Self {
        let blocks = cols.div_ceil(WIDTH);
        // Whole vectors are stored, of which the next one overwrites what is beyond its rows; the last one needs a
        // line more.
        let [packed] = packed.take([self.count * self.tile_len() + WIDTH]);
        let to = SharedOut::new(packed);
        workers.rows(self.count * blocks, WIDTH * self.rows, &|from, end| {
            dispatch(isa, Pack { tiles: self, rows, cols, to, from, end });
        });
        Self { x: packed, ..self }
    }

    /// Elements of one tile.
    fn tile_len(&self) -> usize {
        2 * self.pairs * self.rows
    }
}

/// Blocks of sixteen elements of the rows of a tile on their way to where lanes run along rows: blocks `from..end` of
/// all tiles.
struct Pack<'a> {
    tiles: Tiles<'a>,
    rows: usize,
    cols: usize,
    to: SharedOut,
    from: usize,
    end: usize,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { tiles, rows, cols, to, from, end } = self;
        let blocks = cols.div_ceil(WIDTH);
        for index in from..end {
            let (tile, first) = (index / blocks, index % blocks * WIDTH);
            let (whole, rest) = (first + WIDTH <= cols, cols - first);
            let mut block = [lanes.splat(0.0); WIDTH];
            for (row, vector) in (tile * tiles.rows..rows.min((tile + 1) * tiles.rows)).zip(&mut block) {
                // SAFETY: sixteen elements of the row, or as many as are left.
                *vector =
                    unsafe { load(lanes, tiles.x.as_ptr().wrapping_add(row * cols + first), whole, rest) };
            }
            let block = lanes.transpose(block);
            // Behind the last block there is what somebody else writes.
            let last = index + 1 == end || index % blocks + 1 == blocks;
            let elements = WIDTH.min(2 * tiles.pairs - first);
            for (element, &vector) in block.iter().enumerate().take(elements) {
                let at = to.row(0, 0).wrapping_add(tile * tiles.tile_len() + (first + element) * tiles.rows);
                // SAFETY: inside the tile, and of this piece of work; except what a whole vector spills into the next
                // elements, which are written after it.
                unsafe { store(lanes, at, vector, !last, tiles.rows) };
            }
        }
    }
}

/// A piece of work for one type of elements.
struct Multiply<'a, E> {
    tiles: Tiles<'a>,
    product: Product<'a>,
    piece: Piece,
    /// Rows of `out`.
    rows: usize,
    element: PhantomData<E>,
}

/// The kernel.
struct Run<'a, E> {
    of: Multiply<'a, E>,
    scratch: &'a mut Scratch,
}

impl<E: Element> Kernel for Run<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [memory] = self.scratch.take([SUMS_MAX * WIDTH]);
        let multiply = self.of;
        match (L::REGISTERS, multiply.tiles.rows) {
            (Registers::Many, 1) => multiply.panels::<L, 1, 8>(lanes, memory),
            (Registers::Many, 2) => multiply.panels::<L, 2, 8>(lanes, memory),
            (Registers::Many, 3) => multiply.panels::<L, 3, 6>(lanes, memory),
            (Registers::Many, 4) => multiply.panels::<L, 4, 4>(lanes, memory),
            (Registers::Many, 5) => multiply.panels::<L, 5, 4>(lanes, memory),
            (Registers::Many, 6) => multiply.panels::<L, 6, 4>(lanes, memory),
            (Registers::Many, 7) => multiply.panels::<L, 7, 3>(lanes, memory),
            (Registers::Many, 8) => multiply.panels::<L, 8, 3>(lanes, memory),
            (Registers::Many, 9) => multiply.panels::<L, 9, 2>(lanes, memory),
            (Registers::Many, 10) => multiply.panels::<L, 10, 2>(lanes, memory),
            (Registers::Many, 11) => multiply.panels::<L, 11, 2>(lanes, memory),
            (Registers::Many, 12) => multiply.panels::<L, 12, 2>(lanes, memory),
            (Registers::Few, 1) => multiply.panels::<L, 1, 4>(lanes, memory),
            (Registers::Few, 2) => multiply.panels::<L, 2, 3>(lanes, memory),
            (Registers::Few, 3) => multiply.panels::<L, 3, 2>(lanes, memory),
            (Registers::Few, 4) => multiply.panels::<L, 4, 1>(lanes, memory),
            (Registers::Few, 5) => multiply.panels::<L, 5, 1>(lanes, memory),
            (Registers::Few, 6) => multiply.panels::<L, 6, 1>(lanes, memory),
            (Registers::Quarters, 1) => multiply.panels::<L, 1, 2>(lanes, memory),
            (Registers::Quarters, 2) => multiply.panels::<L, 2, 1>(lanes, memory),
            (Registers::Quarters, 3) => multiply.panels::<L, 3, 1>(lanes, memory),
            (_, rows) => unreachable!("{rows} rows in a tile"),
        }
    }
}

impl<E: Element> Multiply<'_, E> {
    /// All panels of the piece, N at a time and the last ones alone.
    #[inline(always)]
    fn panels<L: Lanes, const R: usize, const N: usize>(&self, lanes: L, memory: &mut [f32]) {
        let (Piece { from, to, tiles, .. }, pairs) = (self.piece, self.tiles.pairs);
        // One tile needs its panels once, so it may as well go through to their end.
        let depth = if tiles == 1 { pairs } else { pairs.div_ceil(pairs.div_ceil(DEPTH).max(1)) };
        let mut start = 0;
        loop {
            let len = depth.min(pairs - start);
            let last = start + len == pairs;
            let mut panel = from;
            while panel < to {
                let group = if panel + N <= to { N } else { 1 };
                let next = match panel + group {
                    next if next < to => Some((next, start)),
                    _ if !last => Some((from, start + len)),
                    _ => None,
                };
                let group_of = Group { panel, start, len, last, next, asked: panel > from || start > 0 };
                if group == N {
                    self.group::<L, R, N>(lanes, memory, group_of);
                } else {
                    self.group::<L, R, 1>(lanes, memory, group_of);
                }
                panel += group;
            }
            start += len;
            if last {
                return;
            }
        }
    }

    /// All tiles of the piece against N panels.
    #[inline(always)]
    fn group<L: Lanes, const R: usize, const N: usize>(&self, lanes: L, memory: &mut [f32], group: Group) {
        let Group { panel, start, len, .. } = group;
        let (weight, tiles) = (self.product.weight, self.piece.tiles);
        let line = 2 * WIDTH * E::BYTES;
        let at = |(panel, start): (usize, usize)| weight.panel(panel).wrapping_add(start * line);
        let (here, next) = (at((panel, start)), group.next.map(at));
        for tile in 0..tiles {
            let asks = if tiles == 1 || (tile == 0 && !group.asked) {
                let within = len.saturating_sub(AHEAD);
                let first = Ask { lines: within, at: here.wrapping_add(AHEAD * line), pace: line };
                [first, Ask { lines: len - within, at: next.unwrap_or(here), pace: line }]
            } else {
                // Each of the tiles asks for its share of what comes next.
                let (shares, share) = if group.asked { (tiles, tile) } else { (tiles - 1, tile - 1) };
                let pace = line.div_ceil(shares);
                let from = share * pace * len;
                let at = next.filter(|_| from < line * len).map(|next| next.wrapping_add(from));
                [
                    Ask { lines: len, at: at.unwrap_or(here), pace: if at.is_some() { pace } else { 0 } },
                    Ask::none(here),
                ]
            };
            let tile = self.piece.tile + tile;
            let x = &self.tiles.tile(tile)[2 * start * R..2 * (start + len) * R];
            self.tile::<L, R, N>(lanes, memory, (x, here), asks, (tile * R, group));
        }
    }

    /// One tile against N panels.
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        memory: &mut [f32],
        (x, lines): (&[f32], *const u8),
        asks: [Ask; 2],
        (row, group): (usize, Group),
    ) {
        let (line, stride) = (2 * WIDTH * E::BYTES, self.product.weight.stride());
        // Sums come and go through memory, where loops over what is there may be as long as they like: a loop that
        // is not unrolled would keep all sums from living in registers.
        let memory = &mut memory[..R * N * WIDTH];
        let mut sums = [[lanes.splat(0.0); N]; R];
        if group.start > 0 {
            self.fetch::<L, R, N>(lanes, memory, row, group.panel);
            for i in 0..R {
                for j in 0..N {
                    // SAFETY: R N vectors.
                    sums[i][j] = unsafe { lanes.load(memory.as_ptr().wrapping_add((i * N + j) * WIDTH)) };
                }
            }
        }
        let (mut x, mut at) = (x.as_ptr(), lines);
        for ask in asks {
            let mut ahead = ask.at;
            for _ in 0..ask.lines {
                for j in 0..N {
                    for part in (0..line).step_by(64) {
                        lanes.prefetch(ahead.wrapping_add(j * stride + part));
                    }
                }
                // SAFETY: `x` has R elements twice for each line, and N panels have the lines.
                unsafe { multiply::<L, E, R, N, false>(lanes, x, at, stride, &mut sums) };
                // SAFETY: as above.
                unsafe { multiply::<L, E, R, N, true>(lanes, x.wrapping_add(R), at, stride, &mut sums) };
                x = x.wrapping_add(2 * R);
                at = at.wrapping_add(line);
                ahead = ahead.wrapping_add(ask.pace);
            }
        }
        for i in 0..R {
            for j in 0..N {
                // SAFETY: R N vectors.
                unsafe { lanes.store(memory.as_mut_ptr().wrapping_add((i * N + j) * WIDTH), sums[i][j]) };
            }
        }
        let bias = self.product.bias.filter(|_| group.last);
        let out = (self.product.out, self.product.weight.rows);
        store_sums::<L, R, N>(lanes, memory, bias, out, (self.rows, row, group.panel));
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
        for (i, sums) in sums.chunks_exact_mut(N * WIDTH).enumerate().take(self.rows - row) {
            for (j, sums) in sums.chunks_exact_mut(WIDTH).enumerate() {
                let (at, whole, rest) = self.place(row + i, panel + j);
                // SAFETY: inside `out`, and only this piece writes these elements.
                let before = unsafe { load(lanes, at, whole, rest) };
                // SAFETY: sixteen sums.
                unsafe { lanes.store(sums.as_mut_ptr(), before) };
            }
        }
    }

    /// Where in `out` the sums of a row and a panel go.
    #[inline(always)]
    fn place(&self, row: usize, panel: usize) -> (*mut f32, bool, usize) {
        place((self.product.out, self.product.weight.rows), row, panel)
    }
}

/// Where in `out`, with rows of `cols`, the sums of a row and a panel go: all sixteen (`whole`), or only as many as are
/// left.
#[inline(always)]
fn place((out, cols): (SharedOut, usize), row: usize, panel: usize) -> (*mut f32, bool, usize) {
    let column = panel * WIDTH;
    (out.row(row, cols).wrapping_add(column), column + WIDTH <= cols, cols - column)
}

/// The sums of R rows from `row` on and N panels from `panel` on, and the bias if there is one, to `out`: as many of
/// them as there are of its `rows`.
#[inline(always)]
pub(super) fn store_sums<L: Lanes, const R: usize, const N: usize>(
    lanes: L,
    sums: &[f32],
    bias: Option<&[f32]>,
    out: (SharedOut, usize),
    (rows, row, panel): (usize, usize, usize),
) {
    for (i, sums) in sums.chunks_exact(N * WIDTH).enumerate().take(R.min(rows - row)) {
        for (j, sums) in sums.chunks_exact(WIDTH).enumerate() {
            let (at, whole, rest) = place(out, row + i, panel + j);
            // SAFETY: sixteen sums.
            let mut sum = unsafe { lanes.load(sums.as_ptr()) };
            if let Some(bias) = bias {
                let bias = bias[(panel + j) * WIDTH..].as_ptr();
                // SAFETY: the bias has as many elements as there are outputs.
                sum = lanes.add(sum, unsafe { load(lanes, bias, whole, rest) });
            }
            // SAFETY: inside `out`, and only this piece writes these elements.
            unsafe { store(lanes, at, sum, whole, rest) };
        }
    }
}

/// Lines `start..start + len` of some panels from `panel` on.
#[derive(Clone, Copy)]
struct Group {
    panel: usize,
    start: usize,
    len: usize,
    /// No elements are left after these: the sums are complete.
    last: bool,
    /// The panel and line with which the piece goes on.
    next: Option<(usize, usize)>,
    /// Whether these lines were asked for before.
    asked: bool,
}

/// What to ask memory for during so many lines: first `at`, then `pace` bytes on with each line.
#[derive(Clone, Copy)]
struct Ask {
    lines: usize,
    at: *const u8,
    pace: usize,
}

impl Ask {
    fn none(at: *const u8) -> Self {
        Self { lines: 0, at, pace: 0 }
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

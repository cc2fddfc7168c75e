//! What products of all kinds of weights share: the rows of `x` in tiles, and what is asked of memory meanwhile.
//!
//! A task ([`super::tasks`]) is a group of panels that a kernel walks at once, against all tiles. Threads know their
//! next task when they begin one, so that its panels are on their way while these are multiplied. Bytes that come from
//! memory go into the second-level cache in good time, and from there into the first shortly before their use: the
//! buffers of the first-level cache are few, and a line on its way from memory holds one for ten times as long as one
//! from the next.

use super::lanes::{Kernel, Lanes, Registers, WIDTH, dispatch, dispatch_pairs};
use super::norm::{load, store};
use super::scratch::Scratch;
use super::workers::Workers;
use super::{Isa, SharedOut};

/// Bytes of a panel between the line that is multiplied and the one that is asked for, where memory is the limit.
const AHEAD: usize = 2048;
/// The same where lines wait in the second-level cache.
const NEAR: usize = 512;
/// Elements of a row of `x` between those that are packed and those that are asked for.
const PACK_AHEAD: usize = 64;
/// Elements of `x` between those that are multiplied and those that are asked for.
pub(super) const X_AHEAD: usize = 128;

/// What a word of a tile, 32 bits, holds of a row of `x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// An element.
    Number,
    /// Two elements, rounded to bf16.
    Pair,
}

impl Word {
    /// What products with weights of eight bits and four read.
    pub(super) fn of(isa: Isa) -> Self {
        if isa.rounds_activations() { Self::Pair } else { Self::Number }
    }

    /// Words of a pair of elements.
    pub(super) const fn of_pair(self) -> usize {
        match self {
            Self::Number => 2,
            Self::Pair => 1,
        }
    }

    /// Elements of a word.
    const fn elements(self) -> usize {
        2 / self.of_pair()
    }
}

/// `x` as the kernel reads it: tiles of `rows` rows, `[tile][words of in, to an even number][rows]`; zeros where there
/// is nothing.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    x: &'a [f32],
    word: Word,
    /// Rows of a tile.
    pub(super) rows: usize,
    /// Tiles.
    pub(super) count: usize,
    /// Pairs of elements in a row.
    pub(super) pairs: usize,
}

impl<'a> Tiles<'a> {
    /// Tiles of so many rows, with each row of `x`, `[rows, cols]`, times `scale` and padded to a multiple of `step`
    /// elements; in `packed`, or where `x` lies if that is the same. Numbers have a scale of 1.
    pub(super) fn new(
        with: (&Workers, Isa),
        packed: &'a mut Scratch,
        (x, scale): (&'a [f32], f32),
        (rows, cols): (usize, usize),
        (of, step, word): (usize, usize, Word),
    ) -> Self {
        let pairs = cols.next_multiple_of(step) / 2;
        let tiles = Self { x, word, rows: of, count: rows.div_ceil(of), pairs };
        let as_it_lies = word == Word::Number && of == 1 && rows == 1 && cols == 2 * pairs;
        if as_it_lies { tiles } else { tiles.pack(with, packed, scale, (rows, cols)) }
    }

    /// The words of one tile, `[in][rows]`.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &'a [f32] {
        &self.x[tile * self.tile_len()..][..self.tile_len()]
    }

    /// The same from row-major `x`, turned into `packed`.
    fn pack(
        self,
        (workers, isa): (&Workers, Isa),
        packed: &'a mut Scratch,
        scale: f32,
        (rows, cols): (usize, usize),
    ) -> Self {
        let blocks = cols.div_ceil(WIDTH * self.word.elements());
        // Whole vectors are stored, of which the next one overwrites what is beyond its rows; the last one needs a
        // line more.
        let [packed] = packed.take([self.count * self.tile_len() + WIDTH]);
        let to = SharedOut::new(packed);
        workers.rows(self.count * blocks, WIDTH * self.rows, &|from, end| match self.word {
            Word::Number => dispatch(isa, Pack::<false> { tiles: self, scale, rows, cols, to, from, end }),
            Word::Pair => dispatch_pairs(isa, Pack::<true> { tiles: self, scale, rows, cols, to, from, end }),
        });
        Self { x: packed, ..self }
    }

    /// Words of one tile.
    fn tile_len(&self) -> usize {
        self.word.of_pair() * self.pairs * self.rows
    }
}

/// Blocks of sixteen words of the rows of a tile on their way to where lanes run along rows: blocks `from..end` of all
/// tiles.
struct Pack<'a, const PAIRS: bool> {
    tiles: Tiles<'a>,
    /// Of pairs.
    scale: f32,
    rows: usize,
    cols: usize,
    to: SharedOut,
    from: usize,
    end: usize,
}

impl<const PAIRS: bool> Kernel for Pack<'_, PAIRS> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { tiles, rows, cols, to, from, end, .. } = self;
        let block_len = if PAIRS { 2 * WIDTH } else { WIDTH };
        let scale = lanes.splat(self.scale);
        let blocks = cols.div_ceil(block_len);
        for index in from..end {
            let (tile, block) = (index / blocks, index % blocks);
            let mut words = [lanes.splat(0.0); WIDTH];
            for (row, vector) in (tile * tiles.rows..rows.min((tile + 1) * tiles.rows)).zip(&mut words) {
                let row = tiles.x.as_ptr().wrapping_add(row * cols);
                let first = block * block_len;
                // SAFETY: a row of `cols` elements.
                *vector = unsafe { some(lanes, row, cols, first) };
                if PAIRS {
                    // SAFETY: as above.
                    let second = unsafe { some(lanes, row, cols, first + WIDTH) };
                    *vector = lanes.round_pairs(lanes.mul(*vector, scale), lanes.mul(second, scale));
                }
            }
            let words = lanes.transpose(words);
            // Behind the last block there is what somebody else writes.
            let last = index + 1 == end || block + 1 == blocks;
            let count = WIDTH.min(tiles.word.of_pair() * tiles.pairs - block * WIDTH);
            for (word, &vector) in words.iter().enumerate().take(count) {
                let at = tile * tiles.tile_len() + (block * WIDTH + word) * tiles.rows;
                // SAFETY: inside the tile, and of this piece of work; except what a whole vector spills into the next
                // words, which are written after it.
                unsafe { store(lanes, to.row(0, 0).wrapping_add(at), vector, !last, tiles.rows) };
            }
        }
    }
}

/// Elements `first..first + 16` of a row of `cols`, or as many as are left, zeros behind them.
///
/// # Safety
/// The row is readable.
#[inline(always)]
pub(super) unsafe fn some<L: Lanes>(lanes: L, row: *const f32, cols: usize, first: usize) -> L::F {
    let at = row.wrapping_add(first);
    lanes.prefetch(at.wrapping_add(PACK_AHEAD).cast());
    // SAFETY: sixteen elements of the row, or as many as are left.
    unsafe { load(lanes, at, first + WIDTH <= cols, cols.saturating_sub(first)) }
}

impl Registers {
    /// Most rows of a tile.
    pub(super) const fn rows_max(self) -> usize {
        match self {
            Self::Many => 8,
            Self::Few => 6,
            Self::Quarters => 3,
        }
    }

    /// Whether a tile of so many rows may be one of several: they share rows equally.
    pub(super) const fn one_of_several(self, rows: usize) -> bool {
        2 * rows > self.rows_max()
    }
}

/// What a tile asks of memory with each line that it multiplies.
#[derive(Clone, Copy)]
pub(super) struct Asks {
    /// Into the first-level cache, line by line, up to `turn`, and then from `then` on.
    near: *const u8,
    turn: *const u8,
    then: *const u8,
    /// Into the second-level cache, so many bytes a line.
    far: *const u8,
    pace: usize,
}

impl Asks {
    /// For tile `tile` of `tiles` against `len` lines of `line` bytes at `here`; the thread goes on at `next`, where
    /// lines have `far_line` bytes. If `cold`, nobody has asked for those here, over which several tiles will pass.
    #[inline(always)]
    pub(super) fn new(
        (tile, tiles): (usize, usize),
        (here, len, line): (*const u8, usize, usize),
        (next, far_line): (Option<*const u8>, usize),
        cold: bool,
    ) -> Self {
        // Each of several tiles asks for its share of what comes next; the first one has to bring what is cold.
        let (sharing, before) = if cold { (tiles - 1, tile.saturating_sub(1)) } else { (tiles, tile) };
        let pace = far_line.div_ceil(sharing);
        let from = before * pace * len;
        let share = next.filter(|_| tiles > 1 && from < far_line * len).map(|next| next.wrapping_add(from));
        let (far, pace) = match share {
            _ if cold && tile == 0 => (here.wrapping_add(AHEAD), line),
            Some(share) => (share, pace),
            None => (here, 0),
        };
        let then = if tile + 1 < tiles { here } else { next.unwrap_or(here) };
        let (ahead, bytes) = (if tiles == 1 { AHEAD } else { NEAR }, line * len);
        let near = if ahead < bytes { here.wrapping_add(ahead) } else { then.wrapping_add(ahead - bytes) };
        Self { near, turn: here.wrapping_add(bytes), then, far, pace }
    }

    /// Asks beside a line of each of N panels, `stride` bytes apart; those that are far away are `far_stride` apart.
    #[inline(always)]
    pub(super) fn ask<L: Lanes, const R: usize, const N: usize>(
        &mut self,
        lanes: L,
        line: usize,
        (stride, far_stride): (usize, usize),
    ) {
        for j in 0..N {
            for part in (0..line).step_by(64) {
                lanes.prefetch(self.near.wrapping_add(j * stride + part));
            }
        }
        self.near = self.near.wrapping_add(line);
        if self.near == self.turn {
            self.near = self.then;
        }
        if const { L::REGISTERS.one_of_several(R) } {
            for part in (0..line).step_by(64).take_while(|&part| part == 0 || part < self.pace) {
                for j in 0..N {
                    lanes.prefetch_far(self.far.wrapping_add(j * far_stride + part));
                }
            }
            self.far = self.far.wrapping_add(self.pace);
        }
    }
}

/// Where in `out`, with rows of `cols`, the sums of a row and a panel go: all sixteen (`whole`), or only as many as are
/// left.
#[inline(always)]
pub(super) fn place((out, cols): (SharedOut, usize), row: usize, panel: usize) -> (*mut f32, bool, usize) {
    let column = panel * WIDTH;
    (out.row(row, cols).wrapping_add(column), column + WIDTH <= cols, cols - column)
}

/// The sums of R rows from `row` on and N panels from `panel` on, times `scale`, and the bias if there is one, to
/// `out`: as many of them as there are of its `rows`.
#[inline(always)]
pub(super) fn store_sums<L: Lanes, const R: usize, const N: usize>(
    lanes: L,
    sums: &[f32],
    (scale, bias): (f32, Option<&[f32]>),
    out: (SharedOut, usize),
    (rows, row, panel): (usize, usize, usize),
) {
    for (i, sums) in sums.chunks_exact(N * WIDTH).enumerate().take(R.min(rows - row)) {
        for (j, sums) in sums.chunks_exact(WIDTH).enumerate() {
            let (at, whole, rest) = place(out, row + i, panel + j);
            // SAFETY: sixteen sums.
            let mut sum = lanes.mul(unsafe { lanes.load(sums.as_ptr()) }, lanes.splat(scale));
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

//! Activations as the first operand of a product on tiles.

use super::super::lanes::{Kernel, Lanes, dispatch_pairs};
use super::super::scratch::Scratch;
use super::super::tiles::some;
use super::super::workers::Workers;
use super::super::{Isa, SharedOut};
use super::{Run, SIDE, STEP, TILE};

/// Words of a tile, each a pair of bf16.
const WORDS: usize = TILE / 2;

/// `x` rounded to bf16, `[16 rows of x][groups of in][steps of a group][16 rows][32]`; rows and elements that are not
/// there are zeros.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    words: &'a [f32],
    /// Sixteens of rows.
    pub(super) tiles: usize,
    /// Steps of a row.
    steps: usize,
}

impl<'a> Rows<'a> {
    /// Of `x`, `[rows, cols]`, with groups of so many columns; in `packed`.
    pub(super) fn new(
        (workers, isa): (&Workers, Isa),
        packed: &'a mut Scratch,
        x: &[f32],
        (rows, cols): (usize, usize),
        group: usize,
    ) -> Self {
        let of_group = group.div_ceil(STEP);
        let steps = cols / group * of_group + (cols % group).div_ceil(STEP);
        let tiles = rows.div_ceil(SIDE);
        let [words] = packed.take([tiles * steps * WORDS]);
        let to = SharedOut::new(words);
        workers.rows(tiles, SIDE * steps * STEP, &|from, end| {
            // SAFETY: inside the words, and of this piece of work.
            let words = unsafe { to.slice(from * steps * WORDS, (end - from) * steps * WORDS) };
            dispatch_pairs(isa, Pack { x, rows, cols, group, of_group, steps, tile: from, words });
        });
        Self { words, tiles, steps }
    }

    /// Where some steps of a tile begin.
    pub(super) fn tile(&self, tile: usize, Run { at, steps, .. }: Run) -> *const u16 {
        self.words[(tile * self.steps + at) * WORDS..][..steps * WORDS].as_ptr().cast()
    }
}

/// Some tiles, of which `tile` is the first.
struct Pack<'a> {
    x: &'a [f32],
    rows: usize,
    cols: usize,
    group: usize,
    of_group: usize,
    steps: usize,
    tile: usize,
    words: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        self.words.fill(0.0);
        for (index, tile) in self.words.chunks_exact_mut((self.steps * WORDS).max(1)).enumerate() {
            let first = (self.tile + index) * SIDE;
            for row in first..self.rows.min(first + SIDE) {
                let x = &self.x[row * self.cols..][..self.cols];
                for (group, x) in x.chunks(self.group).enumerate() {
                    for at in (0..x.len()).step_by(STEP) {
                        let step = group * self.of_group + at / STEP;
                        let to = &mut tile[step * WORDS + (row - first) * (STEP / 2)..][..STEP / 2];
                        // SAFETY: as many elements as the group has.
                        let even = unsafe { some(lanes, x.as_ptr(), x.len(), at) };
                        // SAFETY: as above.
                        let odd = unsafe { some(lanes, x.as_ptr(), x.len(), at + STEP / 2) };
                        // SAFETY: sixteen words.
                        unsafe { lanes.store(to.as_mut_ptr(), lanes.round_pairs(even, odd)) };
                    }
                }
            }
        }
    }
}

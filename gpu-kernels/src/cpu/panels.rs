//! Matrices as the products read them: rearranged once, when a weight is made.
//!
//! A matrix `[out, in]` is cut into panels of sixteen outputs. Within a panel, line `i` holds elements `2 i` and `2
//! i + 1` of `in` for each of the sixteen, so that lanes run along outputs and nothing is ever summed across lanes:
//!
//! ```text
//! bf16   w0[2i] w0[2i+1] w1[2i] w1[2i+1] … w15[2i] w15[2i+1]       64 bytes; 16 lines are one matrix tile
//! f16    w0[2i] w1[2i] … w15[2i]  w0[2i+1] w1[2i+1] … w15[2i+1]    64 bytes
//! f32    the same                                                  128 bytes
//! ```
//!
//! A pair of bf16 widens by a shift and by a mask. Panels begin on a cache line and are padded with zeros to
//! sixteen outputs and to 32 elements of `in`.

use std::fmt;
use std::ops::Range;

use super::Isa;
use super::arena::{Arena, Room};
use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::tasks::InPanels;
use super::workers::Workers;
use crate::{Dtype, Error};

/// Elements of `in` to which a panel is padded: what one instruction of a matrix tile takes.
const STEP: usize = 32;
/// Bytes of a row that are turned at once.
const PIECE: usize = 64;

/// A packed matrix.
pub(crate) struct Panels {
    room: Room,
    pub(crate) dtype: Dtype,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) cols: usize,
}

impl fmt::Debug for Panels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Panels([{}, {}] {})", self.rows, self.cols, self.dtype)
    }
}

impl Panels {
    /// Packs `bytes`, row-major `[rows, cols]`, at any alignment. Cost: one pass over the bytes, on all threads.
    pub(crate) fn new(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        bytes: &[u8],
        dtype: Dtype,
        (rows, cols): (usize, usize),
    ) -> Result<Self, Error> {
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "checked at the door");
        let panels = rows.div_ceil(WIDTH);
        let stride =
            cols.checked_next_multiple_of(STEP).and_then(|cols| cols.checked_mul(WIDTH * dtype.bytes()));
        let size = stride.and_then(|stride| stride.checked_mul(panels));
        let room = arena.room(size.ok_or(Error::Memory { operator: "weight", bytes: usize::MAX })?)?;
        let packed = Self { room, dtype, rows, cols };
        workers
            .rows(panels, WIDTH * cols, &|from, to| dispatch(isa, Pack { panels: &packed, bytes, from, to }));
        Ok(packed)
    }

    /// The panels that hold some outputs, and how many other outputs come before: panels are whole.
    pub(crate) fn part(&self, outputs: Range<usize>) -> (Self, usize) {
        assert!(outputs.end <= self.rows, "outputs that are there");
        let (first, last) = (outputs.start / WIDTH, outputs.end.div_ceil(WIDTH));
        let rows = self.rows.min(last * WIDTH) - first * WIDTH;
        let room = self.room.behind(first * self.stride());
        (Self { room, dtype: self.dtype, rows, cols: self.cols }, outputs.start % WIDTH)
    }

    /// How many panels there are.
    pub(crate) fn count(&self) -> usize {
        self.rows.div_ceil(WIDTH)
    }

    /// Bytes from one panel to the next.
    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(STEP) * WIDTH * self.dtype.bytes()
    }

    /// Where a panel begins: [`Panels::stride`] readable bytes.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        debug_assert!(panel < self.count(), "a panel that is there");
        self.room.start().wrapping_add(panel * self.stride())
    }

    /// One row of the matrix, widened. Cost: a cache line for every two elements.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "a row that is there");
        // SAFETY: the panel's bytes, all written when it was packed.
        let panel = unsafe { std::slice::from_raw_parts(self.panel(row / WIDTH), self.stride()) };
        let lane = row % WIDTH;
        let pairs = out.chunks_mut(2);
        match self.dtype {
            Dtype::Bf16 => {
                for (line, out) in panel.as_chunks::<64>().0.iter().zip(pairs) {
                    let pair = line.as_chunks::<4>().0[lane];
                    let pair = u32::from_le_bytes(pair);
                    let values = [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
                    out.copy_from_slice(&values[..out.len()]);
                }
            }
            Dtype::F16 => {
                for (line, out) in panel.as_chunks::<64>().0.iter().zip(pairs) {
                    let halves = line.as_chunks::<2>().0;
                    let values = [halves[lane], halves[WIDTH + lane]].map(half::f16::from_le_bytes);
                    out.copy_from_slice(&values.map(half::f16::to_f32)[..out.len()]);
                }
            }
            Dtype::F32 => {
                for (line, out) in panel.as_chunks::<64>().0.iter().zip(out) {
                    *out = f32::from_le_bytes(line.as_chunks::<4>().0[lane]);
                }
            }
        }
    }
}

impl InPanels for &Panels {
    fn count(self) -> usize {
        self.count()
    }

    #[inline(always)]
    fn panel(self, panel: usize) -> *const u8 {
        self.panel(panel)
    }
}

/// Panels `from..to` on their way into memory.
struct Pack<'a> {
    panels: &'a Panels,
    bytes: &'a [u8],
    from: usize,
    to: usize,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Panels { dtype, rows, cols, .. } = *self.panels;
        let (row_bytes, stride) = (cols * dtype.bytes(), self.panels.stride());
        for panel in self.from..self.to {
            let to = self.panels.panel(panel).cast_mut();
            let there = WIDTH.min(rows - panel * WIDTH);
            for piece in 0..stride / (WIDTH * PIECE) {
                let at = |row: usize| (panel * WIDTH + row) * row_bytes + piece * PIECE;
                let length = PIECE.min(row_bytes.saturating_sub(piece * PIECE));
                let mut block = [lanes.splat(0.0); WIDTH];
                for (row, vector) in block.iter_mut().enumerate().take(if length > 0 { there } else { 0 }) {
                    let mut end = [0; PIECE];
                    let from = &self.bytes[at(row)..][..length];
                    let whole = if length == PIECE {
                        from.as_ptr()
                    } else {
                        end[..length].copy_from_slice(from);
                        end.as_ptr()
                    };
                    // SAFETY: 64 bytes of the row, or of its padded end.
                    *vector = unsafe { lanes.load(whole.cast()) };
                }
                let block = lanes.transpose(block);
                for (line, &vector) in block.iter().enumerate() {
                    let to = to.wrapping_add((piece * WIDTH + line) * PIECE);
                    // SAFETY: inside the panel, which this piece of work alone writes.
                    unsafe { lanes.store(to.cast(), vector) };
                    if dtype == Dtype::F16 {
                        // SAFETY: as above; just written.
                        part_pairs(unsafe { &mut *to.cast::<[[u16; WIDTH]; 2]>() });
                    }
                }
            }
        }
    }
}

/// `a0 b0 a1 b1 …` becomes `a0 a1 … b0 b1 …`.
#[inline(always)]
fn part_pairs(line: &mut [[u16; WIDTH]; 2]) {
    let pairs = *line;
    let pairs = pairs.as_flattened().as_chunks::<2>().0;
    for (lane, pair) in pairs.iter().enumerate() {
        (line[0][lane], line[1][lane]) = (pair[0], pair[1]);
    }
}

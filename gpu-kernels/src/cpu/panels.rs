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
//!
//! Where a machine multiplies pairs of bf16, a number has twelve bits ([`super::exponents`]).

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::Isa;
use super::arena::{Arena, Room};
use super::exponents::{self, Coder, Exponents, Other};
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
    /// What the exponents of bf16 in twelve bits are.
    pub(super) exponents: Option<Exponents>,
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
        with: (&Workers, Isa, &Arena),
        bytes: &[u8],
        dtype: Dtype,
        shape: (usize, usize),
    ) -> Result<Self, Error> {
        if dtype == Dtype::Bf16
            && with.1.multiplies_pairs()
            && let Some(short) = Self::in_twelve(with, bytes, shape)?
        {
            return Ok(short);
        }
        Self::whole(with, bytes, dtype, shape)
    }

    /// The same with all bits of each number.
    pub(super) fn whole(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        bytes: &[u8],
        dtype: Dtype,
        (rows, cols): (usize, usize),
    ) -> Result<Self, Error> {
        let source = Source::new(bytes, dtype, (rows, cols));
        let room = arena.room(source.size()?)?;
        let panels = Self { room, dtype, exponents: None, rows, cols };
        workers.rows(panels.count(), WIDTH * cols, &|from, to| {
            dispatch(isa, Pack { source, panels: &panels, from, to });
        });
        Ok(panels)
    }

    /// The same with bf16 in twelve bits; none if that is too short for too many.
    pub(super) fn in_twelve(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        bytes: &[u8],
        (rows, cols): (usize, usize),
    ) -> Result<Option<Self>, Error> {
        let (dtype, count) = (Dtype::Bf16, rows.div_ceil(WIDTH));
        let source = Source::new(bytes, dtype, (rows, cols));
        let Some(coder) = Coder::new(bytes) else { return Ok(None) };
        let room = arena.room(exponents::bytes(source.size()?))?;
        let others = Mutex::new(vec![Vec::new(); count]);
        workers.rows(count, WIDTH * cols, &|from, to| {
            dispatch(isa, PackInTwelve { source, coder, room: &room, others: &others, from, to });
        });
        let others = others.into_inner().unwrap_or_else(PoisonError::into_inner);
        let exponents = Exponents::new(coder, others, rows * cols);
        Ok(exponents.map(|exponents| Self { room, dtype, exponents: Some(exponents), rows, cols }))
    }

    /// The panels that hold some outputs, and how many other outputs come before: panels are whole.
    pub(crate) fn part(&self, outputs: Range<usize>) -> (Self, usize) {
        assert!(outputs.end <= self.rows, "outputs that are there");
        let (first, last) = (outputs.start / WIDTH, outputs.end.div_ceil(WIDTH));
        let rows = self.rows.min(last * WIDTH) - first * WIDTH;
        let room = self.room.behind(first * self.stride());
        let exponents = self.exponents.as_ref().map(|exponents| exponents.part(first..last));
        (Self { room, dtype: self.dtype, exponents, rows, cols: self.cols }, outputs.start % WIDTH)
    }

    /// How many panels there are.
    pub(crate) fn count(&self) -> usize {
        self.rows.div_ceil(WIDTH)
    }

    /// Bytes from one panel to the next.
    pub(crate) fn stride(&self) -> usize {
        let elements = self.cols.next_multiple_of(STEP);
        match self.exponents {
            Some(_) => elements / (2 * exponents::PAIRS) * exponents::LINE,
            None => elements * WIDTH * self.dtype.bytes(),
        }
    }

    /// Where a panel begins: [`Panels::stride`] readable bytes.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        debug_assert!(panel < self.count(), "a panel that is there");
        self.room.start().wrapping_add(panel * self.stride())
    }

    /// One row of the matrix, widened. Cost: a cache line for every two elements, or three for eight.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "a row that is there");
        // SAFETY: the panel's bytes, all written when it was packed.
        let panel = unsafe { std::slice::from_raw_parts(self.panel(row / WIDTH), self.stride()) };
        let lane = row % WIDTH;
        if let Some(exponents) = &self.exponents {
            return exponents.read_lane(row / WIDTH, panel.as_chunks().0, lane, out);
        }
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

/// A matrix as it comes, row-major.
#[derive(Clone, Copy)]
struct Source<'a> {
    bytes: &'a [u8],
    dtype: Dtype,
    rows: usize,
    cols: usize,
}

impl<'a> Source<'a> {
    fn new(bytes: &'a [u8], dtype: Dtype, (rows, cols): (usize, usize)) -> Self {
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "checked at the door");
        Self { bytes, dtype, rows, cols }
    }

    /// Bytes of a panel with all bits of its numbers, if they can be counted.
    fn stride(self) -> Option<usize> {
        self.cols.checked_next_multiple_of(STEP)?.checked_mul(WIDTH * self.dtype.bytes())
    }

    /// Bytes of all of them.
    fn size(self) -> Result<usize, Error> {
        let size = self.stride().and_then(|stride| stride.checked_mul(self.rows.div_ceil(WIDTH)));
        size.ok_or(Error::Memory { operator: "weight", bytes: usize::MAX })
    }

    /// Packs a panel into `to`, which is as long.
    #[inline(always)]
    fn panel<L: Lanes>(self, lanes: L, panel: usize, to: &mut [[u8; PIECE]]) {
        let Self { bytes, dtype, rows, cols } = self;
        let row_bytes = cols * dtype.bytes();
        let there = WIDTH.min(rows - panel * WIDTH);
        for (piece, to) in to.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
            let at = |row: usize| (panel * WIDTH + row) * row_bytes + piece * PIECE;
            let length = PIECE.min(row_bytes.saturating_sub(piece * PIECE));
            let mut block = [lanes.splat(0.0); WIDTH];
            for (row, vector) in block.iter_mut().enumerate().take(if length > 0 { there } else { 0 }) {
                let mut end = [0; PIECE];
                let from = &bytes[at(row)..][..length];
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
            for (line, &vector) in to.iter_mut().zip(&block) {
                // SAFETY: sixteen words.
                unsafe { lanes.store(line.as_mut_ptr().cast(), vector) };
                if dtype == Dtype::F16 {
                    part_pairs(line);
                }
            }
        }
    }
}

/// Panels `from..to` on their way into memory.
struct Pack<'a> {
    source: Source<'a>,
    panels: &'a Panels,
    from: usize,
    to: usize,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for panel in self.from..self.to {
            let (to, lines) = (self.panels.panel(panel).cast_mut(), self.panels.stride() / PIECE);
            // SAFETY: the panel, which this piece of work alone writes.
            self.source.panel(lanes, panel, unsafe { std::slice::from_raw_parts_mut(to.cast(), lines) });
        }
    }
}

/// The same in twelve bits.
struct PackInTwelve<'a> {
    source: Source<'a>,
    coder: Coder,
    room: &'a Room,
    /// Of each panel, the numbers that lie apart.
    others: &'a Mutex<Vec<Vec<Other>>>,
    from: usize,
    to: usize,
}

impl Kernel for PackInTwelve<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let size = self.source.stride().unwrap_or(0);
        let (mut whole, lines) = (vec![[0; PIECE]; size / PIECE], exponents::bytes(size) / exponents::LINE);
        for panel in self.from..self.to {
            self.source.panel(lanes, panel, &mut whole);
            let to = self.room.start().wrapping_add(panel * exponents::bytes(size)).cast();
            // SAFETY: inside the room, which has as many bytes for each panel, and of this piece of work.
            let to = unsafe { std::slice::from_raw_parts_mut(to, lines) };
            let others = self.coder.code(&whole, to);
            if !others.is_empty() {
                self.others.lock().unwrap_or_else(PoisonError::into_inner)[panel] = others;
            }
        }
    }
}

/// `a0 b0 a1 b1 …` becomes `a0 a1 … b0 b1 …`.
#[inline(always)]
fn part_pairs(line: &mut [u8; PIECE]) {
    let pairs = *line;
    let (firsts, seconds) = line.split_at_mut(PIECE / 2);
    let halves = firsts.as_chunks_mut::<2>().0.iter_mut().zip(seconds.as_chunks_mut::<2>().0);
    for ([a, b, c, d], (first, second)) in pairs.as_chunks::<4>().0.iter().copied().zip(halves) {
        (*first, *second) = ([a, b], [c, d]);
    }
}

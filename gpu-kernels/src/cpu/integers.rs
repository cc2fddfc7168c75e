//! Matrices of small numbers as the products read them: `weight = scale · (value - zero)`.
//!
//! As in [`super::panels`], sixteen outputs are a panel, and lanes run along them. The elements of `in` fall into
//! groups with a scale for each output; a group is a line with its scales and then its values, so that memory is one
//! stream:
//!
//! ```text
//! four bits    16 scales in f16, 16 zero points less 8 in i8, 16 bytes of nothing   64 bytes
//!              8 elements of `in` in a word, in its low nibbles and then in its
//!              high ones, 16 words                                                  64 bytes, group / 8 times
//! eight bits   16 scales in f32                                                     64 bytes
//!              4 elements of `in`, 16 bytes each                                    64 bytes, group / 4 times
//! ```
//!
//! Where products are of pairs of bf16 ([`super::narrow_matmul`], and `amx`), values lie in a line as they are widened
//! to pairs:
//!
//! ```text
//! four bits    the first elements of 4 pairs in the lower half of a word, the second ones in the upper, 16 words
//! eight bits   2 pairs, for each quarter of the outputs: the first of each of the four, and then the second
//! ```
//!
//! Checkpoints of AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) keep their integers, scales and zero points
//! exactly, and those of E4M3 (arXiv 2209.05433) their bytes. Other matrices can be rounded: to eight bits with one
//! scale for an output, to four with one for 128 elements, both around zero.

use std::fmt;

use half::f16;

use super::arena::{Arena, Room};
use super::lanes::WIDTH;
use super::tasks::InPanels;
use super::tiles::Word;
use super::weight::widen;
use super::workers::Workers;
use crate::fp8;
use crate::rounding::{GROUP, round_eight, round_four, round_fp8};
use crate::stored::Stored;
use crate::{Dtype, Error, Fp8Source, Int4Source, Rounding};

/// Bytes of a line.
pub(crate) const LINE: usize = 64;
/// Elements of `in` to which products pad their activations: those of the widest line.
pub(crate) const STEP: usize = 8;

/// What the values of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Four bits.
    Four,
    /// Eight bits, zero points 0.
    Eight,
    /// E4M3 numbers times [`fp8::SCALE`], which their scales have in them.
    E4m3,
}

impl Form {
    /// Elements of `in` in a line.
    pub(crate) fn elements(self) -> usize {
        match self {
            Self::Four => 8,
            Self::Eight | Self::E4m3 => 4,
        }
    }

    /// Where in a line the value of an element of `in` lies for one of sixteen outputs: its byte, and the lowest of its
    /// bits there.
    fn place(self, word: Word, element: usize, lane: usize) -> (usize, usize) {
        match (self, word) {
            (Self::Four, Word::Number) => (lane * 4 + element % 4, element / 4 * 4),
            (Self::Four, Word::Pair) => (lane * 4 + element % 2 * 2 + element / 4, element / 2 % 2 * 4),
            (_, Word::Number) => (element * WIDTH + lane, 0),
            (_, Word::Pair) => (lane / 4 * 16 + element / 2 * 8 + lane % 4 * 2 + element % 2, 0),
        }
    }
}

/// A packed matrix of integers.
pub(crate) struct Integers {
    room: Room,
    pub(crate) form: Form,
    /// What products read `x` in.
    pub(super) word: Word,
    /// Outputs.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) cols: usize,
    /// Inputs with one scale, a multiple of [`STEP`].
    pub(crate) group: usize,
    /// Which input each column is, where it is not its own number (act-order).
    pub(crate) order: Option<Vec<u32>>,
    /// Whether there are zero points but the usual ones.
    pub(crate) zeros: bool,
}

impl fmt::Debug for Integers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { form, rows, cols, group, .. } = self;
        write!(f, "Integers([{rows}, {cols}] {form:?} by {group})")
    }
}

/// One product of a `linear` call.
pub(crate) type Product<'a> = super::tasks::Product<'a, &'a Integers>;

/// A panel before it is packed.
struct Panel {
    /// `[16][in]`, less their usual zero point: -8..=7 or -127..=127; or the codes of E4M3.
    values: Vec<i8>,
    /// `[groups][16]`
    scales: Vec<f32>,
    /// `[groups][16]`, less 8.
    zeros: Vec<i8>,
}

impl Integers {
    /// Rounds a row-major matrix `[rows, cols]`. Cost: one pass over the bytes, on all threads.
    pub(super) fn round(
        with: (&Workers, Word, &Arena),
        bytes: &[u8],
        dtype: Dtype,
        (rows, cols): (usize, usize),
        rounding: Rounding,
    ) -> Result<Self, Error> {
        let (form, group) = match rounding {
            Rounding::Int8 => (Form::Eight, cols.next_multiple_of(STEP).max(STEP)),
            Rounding::Int4 => (Form::Four, GROUP),
            Rounding::Fp8 => (Form::E4m3, cols.next_multiple_of(STEP).max(STEP)),
        };
        let row_bytes = cols * dtype.bytes();
        Self::pack(with, form, (rows, cols, group), &|first, there, panel| {
            for lane in 0..there {
                let row = widen(dtype, &bytes[(first + lane) * row_bytes..][..row_bytes]);
                let values = &mut panel.values[lane * cols..][..cols];
                for (index, (from, to)) in row.chunks(group).zip(values.chunks_mut(group)).enumerate() {
                    panel.scales[index * WIDTH + lane] = match rounding {
                        Rounding::Int8 => round_eight(from, to),
                        Rounding::Int4 => round_four(from, to).to_f32(),
                        Rounding::Fp8 => round_fp8(from, to) * fp8::SCALE,
                    };
                }
            }
        })
    }

    /// Takes a matrix of a checkpoint, bit for bit. Cost: one pass, on all threads.
    pub(super) fn int4(with: (&Workers, Word, &Arena), source: &Int4Source) -> Result<Self, Error> {
        let stored = Stored::new(source, STEP)?;
        let order = stored.order()?;
        let input = |col: usize| order.as_ref().map_or(col, |order| order[col] as usize);
        let &Int4Source { rows, cols, group, .. } = source;
        let packed = Self::pack(with, Form::Four, (rows, cols, group), &|first, there, panel| {
            for lane in 0..there {
                let row = first + lane;
                for (col, to) in panel.values[lane * cols..][..cols].iter_mut().enumerate() {
                    *to = stored.value(row, input(col)).cast_signed() - 8;
                }
                for index in 0..cols / group {
                    panel.scales[index * WIDTH + lane] = stored.scale(row, index).to_f32();
                    panel.zeros[index * WIDTH + lane] = stored.zero(row, index).cast_signed() - 8;
                }
            }
        })?;
        let groups = 0..cols / group;
        let zeros = groups.into_iter().any(|group| (0..rows).any(|row| stored.zero(row, group) != 8));
        Ok(Self { order, zeros, ..packed })
    }

    /// Takes a matrix of E4M3 of a checkpoint, byte for byte. Cost: one pass to check them, and one on all threads.
    pub(super) fn fp8(with: (&Workers, Word, &Arena), source: &Fp8Source) -> Result<Self, Error> {
        let elements = fp8::checked(source)?;
        let &Fp8Source { rows, cols, block, .. } = source;
        let group = if block.1 < cols { block.1 } else { cols.next_multiple_of(STEP) };
        let groups = cols.div_ceil(group);
        Self::pack(with, Form::E4m3, (rows, cols, group), &|first, there, panel| {
            for lane in 0..there {
                let row = first + lane;
                let codes = elements[row * cols..][..cols].iter().map(|code| code.cast_signed());
                panel.values[lane * cols..][..cols].iter_mut().zip(codes).for_each(|(to, code)| *to = code);
                for (index, scale) in source.scales[row / block.0 * groups..][..groups].iter().enumerate() {
                    panel.scales[index * WIDTH + lane] = scale * fp8::SCALE;
                }
            }
        })
    }

    /// Takes elements of one byte, which are checked, and one scale or one of each output. Cost: one pass, on all
    /// threads.
    pub(super) fn bytes(
        with: (&Workers, Word, &Arena),
        (rows, cols): (usize, usize),
        e4m3: bool,
        (elements, scales): (&[u8], &[f32]),
    ) -> Result<Self, Error> {
        let (form, unit) = if e4m3 { (Form::E4m3, fp8::SCALE) } else { (Form::Eight, 1.0) };
        Self::pack(with, form, (rows, cols, cols.next_multiple_of(STEP)), &|first, there, panel| {
            let codes = elements[first * cols..][..there * cols].iter().map(|code| code.cast_signed());
            panel.values.iter_mut().zip(codes).for_each(|(to, code)| *to = code);
            for lane in 0..there {
                panel.scales[lane] = scales[if scales.len() == 1 { 0 } else { first + lane }] * unit;
            }
        })
    }

    /// Packs panels that `fill` makes, given the first row and how many of the sixteen there are.
    fn pack(
        (workers, word, arena): (&Workers, Word, &Arena),
        form: Form,
        (rows, cols, group): (usize, usize, usize),
        fill: &(dyn Fn(usize, usize, &mut Panel) + Sync),
    ) -> Result<Self, Error> {
        let (panels, groups) = (rows.div_ceil(WIDTH), cols.div_ceil(group.max(1)));
        let group_bytes = (group / form.elements()).checked_add(1).and_then(|lines| lines.checked_mul(LINE));
        let size = group_bytes.and_then(|bytes| bytes.checked_mul(groups)?.checked_mul(panels));
        let room = arena.room(size.ok_or(Error::Memory { operator: "weight", bytes: usize::MAX })?)?;
        let packed = Self { room, form, word, rows, cols, group, order: None, zeros: false };
        workers.rows(panels, WIDTH * cols, &|from, to| {
            let mut panel = Panel {
                values: vec![0; WIDTH * cols],
                scales: vec![0.0; groups * WIDTH],
                zeros: vec![0; groups * WIDTH],
            };
            for index in from..to {
                let there = WIDTH.min(rows - index * WIDTH);
                if there < WIDTH {
                    panel.values.fill(0);
                    panel.scales.fill(0.0);
                    panel.zeros.fill(0);
                }
                fill(index * WIDTH, there, &mut panel);
                packed.write(index, &panel);
            }
        });
        Ok(packed)
    }

    fn write(&self, index: usize, panel: &Panel) {
        // SAFETY: the panel's bytes, of which this piece of work alone knows; zeros come first.
        unsafe { self.panel(index).cast_mut().write_bytes(0, self.stride()) };
        // SAFETY: as above; just written.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.panel(index).cast_mut(), self.stride()) };
        let lines = bytes.as_chunks_mut::<LINE>().0;
        for (index, lines) in lines.chunks_exact_mut(self.group_bytes() / LINE).enumerate() {
            let (header, lines) = lines.split_first_mut().expect("a group has a line for its scales");
            let scales = &panel.scales[index * WIDTH..][..WIDTH];
            for (lane, (&scale, &zero)) in scales.iter().zip(&panel.zeros[index * WIDTH..]).enumerate() {
                match self.form {
                    Form::Eight | Form::E4m3 => {
                        header.as_chunks_mut::<4>().0[lane] = scale.to_le_bytes();
                    }
                    Form::Four => {
                        header.as_chunks_mut::<2>().0[lane] = f16::from_f32(scale).to_le_bytes();
                        header[2 * WIDTH + lane] = zero.cast_unsigned();
                    }
                }
            }
            let first = index * self.group;
            for (element, col) in (first..self.cols.min(first + self.group)).enumerate() {
                let (line, place) = (element / self.form.elements(), element % self.form.elements());
                for lane in 0..WIDTH {
                    let value = panel.values[lane * self.cols + col];
                    let (byte, bit) = self.form.place(self.word, place, lane);
                    lines[line][byte] |= match self.form {
                        Form::Eight | Form::E4m3 => value.cast_unsigned(),
                        Form::Four => (value + 8).cast_unsigned() << bit,
                    };
                }
            }
        }
    }

    /// Whether products take `x` apart into digits.
    pub(crate) fn in_digits(&self) -> bool {
        (self.form, self.word) == (Form::Four, Word::Number)
    }

    /// How many panels there are.
    pub(crate) fn count(&self) -> usize {
        self.rows.div_ceil(WIDTH)
    }

    /// Groups of a row.
    pub(crate) fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Lines with values of a group; the last group may need fewer than the first, and takes as much room.
    #[inline(always)]
    pub(crate) fn lines(&self, group: usize) -> usize {
        let elements = self.group.min(self.cols.next_multiple_of(STEP) - group * self.group);
        elements / self.form.elements()
    }

    /// Bytes from one group to the next.
    #[inline(always)]
    pub(crate) fn group_bytes(&self) -> usize {
        (self.group / self.form.elements() + 1) * LINE
    }

    /// Bytes from one panel to the next.
    #[inline(always)]
    pub(crate) fn stride(&self) -> usize {
        self.groups() * self.group_bytes()
    }

    /// Where a panel begins: [`Integers::stride`] readable bytes.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        debug_assert!(panel < self.count(), "a panel that is there");
        self.room.start().wrapping_add(panel * self.stride())
    }

    /// One row of the matrix in f32. Cost: a cache line for every four or eight elements.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "a row that is there");
        // SAFETY: the panel's bytes, all written when it was packed.
        let panel = unsafe { std::slice::from_raw_parts(self.panel(row / WIDTH), self.stride()) };
        let lane = row % WIDTH;
        for (out, bytes) in out.chunks_mut(self.group).zip(panel.chunks_exact(self.group_bytes())) {
            let (header, lines) = bytes.split_at(LINE);
            let lines = lines.as_chunks::<LINE>().0;
            let scale = match self.form {
                Form::Eight | Form::E4m3 => f32::from_le_bytes(header.as_chunks::<4>().0[lane]),
                Form::Four => f16::from_le_bytes(header.as_chunks::<2>().0[lane]).to_f32(),
            };
            let zero = match self.form {
                Form::Four => header[2 * WIDTH + lane].cast_signed(),
                Form::Eight | Form::E4m3 => 0,
            };
            for (element, out) in out.iter_mut().enumerate() {
                let (line, place) = (&lines[element / self.form.elements()], element % self.form.elements());
                let (byte, bit) = self.form.place(self.word, place, lane);
                let value = match self.form {
                    Form::Eight => f32::from(line[byte].cast_signed()),
                    Form::E4m3 => fp8::small(line[byte]),
                    Form::Four => f32::from((line[byte] >> bit & 15).cast_signed() - 8 - zero),
                };
                *out = value * scale;
            }
        }
        if let Some(order) = &self.order {
            let columns = out.to_vec();
            order.iter().zip(columns).for_each(|(&input, x)| out[input as usize] = x);
        }
    }
}

impl InPanels for &Integers {
    fn count(self) -> usize {
        self.count()
    }

    #[inline(always)]
    fn panel(self, panel: usize) -> *const u8 {
        self.panel(panel)
    }
}

//! Weights as the second operand of a product on tiles: those of bf16 where they lie, smaller numbers widened.

use super::super::Isa;
use super::super::integers::{Form, Integers, LINE};
use super::super::lanes::{Kernel, Lanes, WIDTH, dispatch_pairs};
use super::super::panels::Panels;
use super::super::tasks::InPanels;
use super::super::tiles::Word;
use super::{Run, STEP, TILE};
use crate::Dtype;

/// Bytes of a panel between those that are widened and those that are asked for: what a thread has on its way from
/// memory, and what passes while tiles are multiplied.
const AHEAD: usize = 4096;

/// A matrix whose elements, without their scales, are exact in bf16.
pub(crate) trait Columns: InPanels {
    /// Whether this one is, and is packed for it.
    fn fit(self) -> bool;
    /// Outputs and inputs.
    fn shape(self) -> (usize, usize);
    /// Inputs with one scale.
    fn group(self) -> usize;
    /// Whether something is to be taken off the elements.
    fn has_zeros(self) -> bool;
    /// What the sums of a group are multiplied by, and the sum of its `x`, which is taken off them before.
    fn scales<L: Lanes>(self, lanes: L, panel: usize, group: usize) -> (L::F, Option<L::F>);
    /// Some steps of a panel, a tile each: where they lie, or widened in `room`.
    fn tiles(self, isa: Isa, panel: usize, run: Run, room: &mut [f32]) -> *const u8;
}

impl Columns for &Panels {
    fn fit(self) -> bool {
        self.dtype == Dtype::Bf16 && self.exponents.is_none()
    }

    fn shape(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn group(self) -> usize {
        self.cols.max(1)
    }

    fn has_zeros(self) -> bool {
        false
    }

    #[inline(always)]
    fn scales<L: Lanes>(self, lanes: L, _: usize, _: usize) -> (L::F, Option<L::F>) {
        (lanes.splat(1.0), None)
    }

    fn tiles(self, _: Isa, panel: usize, Run { at, .. }: Run, _: &mut [f32]) -> *const u8 {
        self.panel(panel).wrapping_add(at * TILE * 2)
    }
}

impl Columns for &Integers {
    fn fit(self) -> bool {
        self.word == Word::Pair
    }

    fn shape(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn group(self) -> usize {
        self.group
    }

    fn has_zeros(self) -> bool {
        self.zeros
    }

    #[inline(always)]
    fn scales<L: Lanes>(self, lanes: L, panel: usize, group: usize) -> (L::F, Option<L::F>) {
        let header = self.panel(panel).wrapping_add(group * self.group_bytes());
        let scales = match self.form {
            // SAFETY: every group begins with a line of scales.
            Form::Four => unsafe { lanes.load_f16(header) },
            // SAFETY: as above.
            Form::Eight | Form::E4m3 => unsafe { lanes.load(header.cast()) },
        };
        // SAFETY: with four bits sixteen zero points lie behind sixteen scales.
        (scales, self.zeros.then(|| unsafe { lanes.load_i8(header.wrapping_add(2 * WIDTH)) }))
    }

    fn tiles(self, isa: Isa, panel: usize, run: Run, room: &mut [f32]) -> *const u8 {
        let to = &mut room[..run.steps * TILE / 2];
        dispatch_pairs(isa, Widen { weight: self, panel, run, to });
        room.as_ptr().cast()
    }
}

/// Some steps of a panel on their way to tiles.
struct Widen<'a> {
    weight: &'a Integers,
    panel: usize,
    run: Run,
    /// `[steps][16 pairs][16 outputs]`
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.weight.form {
            // SAFETY: a line of the panel.
            Form::Eight => self.lines(lanes, |line| unsafe { lanes.load_pairs_of_i8(line) }),
            // SAFETY: as above.
            Form::E4m3 => self.lines(lanes, |line| unsafe { lanes.load_pairs_of_e4m3(line) }),
            // SAFETY: as above.
            Form::Four => self.lines(lanes, |line| unsafe { pairs_of_nibbles(lanes, line) }),
        }
    }
}

/// # Safety
/// 64 bytes are readable at `line`.
#[inline(always)]
unsafe fn pairs_of_nibbles<L: Lanes>(lanes: L, line: *const u8) -> [L::F; 4] {
    // SAFETY: the caller's promise.
    let first = unsafe { lanes.load_pair_of_nibbles::<0>(line) };
    // SAFETY: as above.
    let second = unsafe { lanes.load_pair_of_nibbles::<1>(line) };
    // SAFETY: as above.
    let third = unsafe { lanes.load_pair_of_nibbles::<2>(line) };
    // SAFETY: as above.
    [first, second, third, unsafe { lanes.load_pair_of_nibbles::<3>(line) }]
}

impl Widen<'_> {
    /// Line by line, each of so many pairs; zeros behind the last.
    #[inline(always)]
    fn lines<L: Lanes, const PAIRS: usize>(self, lanes: L, pairs: impl Fn(*const u8) -> [L::F; PAIRS]) {
        let Self { weight, panel, run, to } = self;
        let first = run.from * STEP / (2 * PAIRS);
        let lines = (run.steps * STEP / (2 * PAIRS)).min(weight.lines(run.group) - first);
        let start = weight.panel(panel);
        let end = start.wrapping_add(weight.stride());
        let mut line = start.wrapping_add(run.group * weight.group_bytes() + (1 + first) * LINE);
        let (to, rest) = to.split_at_mut(lines * PAIRS * WIDTH);
        rest.fill(0.0);
        for to in to.chunks_exact_mut(PAIRS * WIDTH) {
            // Panels are walked in pairs: behind the end of one comes the one after the next.
            let ahead = line.wrapping_add(AHEAD);
            lanes.prefetch_far(if ahead < end { ahead } else { ahead.wrapping_add(weight.stride()) });
            for (to, pairs) in to.chunks_exact_mut(WIDTH).zip(pairs(line)) {
                // SAFETY: sixteen words.
                unsafe { lanes.store(to.as_mut_ptr(), pairs) };
            }
            line = line.wrapping_add(LINE);
        }
    }
}

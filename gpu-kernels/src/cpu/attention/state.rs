//! The online softmax (arXiv 1805.02867): what is kept of each row between chunks, and between segments.
#![expect(clippy::needless_range_loop, reason = "indices over rows, as in the formulas")]

use super::{CHUNK, Lanes, ROWS_MAX, WIDTH};

/// A softmax over some positions, not yet divided by its sum.
pub(super) struct Sums<'a> {
    /// Largest score so far.
    pub(super) most: [f32; ROWS_MAX],
    /// Sum of the weights so far, relative to `most`.
    pub(super) total: [f32; ROWS_MAX],
    /// Sum of weighted values so far, `[rows][padded dim]`.
    pub(super) value: &'a mut [f32],
}

impl<'a> Sums<'a> {
    /// Over no positions.
    pub(super) fn new(value: &'a mut [f32]) -> Self {
        value.fill(0.0);
        Self { most: [f32::NEG_INFINITY; ROWS_MAX], total: [0.0; ROWS_MAX], value }
    }

    pub(super) fn clear(&mut self) {
        self.most = [f32::NEG_INFINITY; ROWS_MAX];
        self.total = [0.0; ROWS_MAX];
        self.value.fill(0.0);
    }

    /// Writes everything into `to`, `[rows][padded dim]` and two numbers for each row.
    #[inline(always)]
    pub(super) fn save(&self, to: &mut [f32]) {
        let (value, rest) = to.split_at_mut(self.value.len());
        value.copy_from_slice(self.value);
        rest[..ROWS_MAX].copy_from_slice(&self.most);
        rest[ROWS_MAX..].copy_from_slice(&self.total);
    }

    /// What [`Sums::save`] wrote.
    #[inline(always)]
    pub(super) fn saved(from: &'a mut [f32]) -> Self {
        let (value, rest) = from.split_at_mut(from.len() - 2 * ROWS_MAX);
        let (mut most, mut total) = ([0.0; ROWS_MAX], [0.0; ROWS_MAX]);
        most.copy_from_slice(&rest[..ROWS_MAX]);
        total.copy_from_slice(&rest[ROWS_MAX..]);
        Self { most, total, value }
    }

    /// Takes in the positions of `other`, which come after those here. A row that sees none of them stays as it is.
    #[inline(always)]
    pub(super) fn merge<L: Lanes>(&mut self, lanes: L, other: &Sums<'_>, rows: usize, wide: usize) {
        assert!(self.value.len() >= rows * wide && other.value.len() >= rows * wide, "state has these rows");
        for row in (0..rows).filter(|&row| other.most[row] > f32::NEG_INFINITY) {
            let most = self.most[row].max(other.most[row]);
            let [before, after] = exponentials(lanes, [self.most[row] - most, other.most[row] - most]);
            self.most[row] = most;
            self.total[row] = self.total[row] * before + other.total[row] * after;
            for column in (row * wide..(row + 1) * wide).step_by(WIDTH) {
                let before = lanes.splat(before);
                // SAFETY: asserted above: rows of `wide` elements, a multiple of sixteen.
                let faded = lanes.mul(unsafe { lanes.load(self.value[column..].as_ptr()) }, before);
                // SAFETY: as above.
                let more = unsafe { lanes.load(other.value[column..].as_ptr()) };
                let sum = lanes.fma(more, lanes.splat(after), faded);
                // SAFETY: as above.
                unsafe { lanes.store(self.value[column..].as_mut_ptr(), sum) };
            }
        }
    }
}

/// `e^x` of two numbers, as lanes compute it.
#[inline(always)]
pub(super) fn exponentials<L: Lanes>(lanes: L, x: [f32; 2]) -> [f32; 2] {
    let mut all = [0.0; WIDTH];
    all[..2].copy_from_slice(&x);
    // SAFETY: sixteen elements.
    let exponents = unsafe { lanes.load(all.as_ptr()) };
    // SAFETY: as above.
    unsafe { lanes.store(all.as_mut_ptr(), lanes.exp(exponents)) };
    [all[0], all[1]]
}

/// What weights are relative to: the largest score, or 0 where a mask has left none.
#[inline(always)]
pub(super) fn base(most: f32) -> f32 {
    if most == f32::NEG_INFINITY { 0.0 } else { most }
}

/// What is known of each row within a segment.
pub(super) struct State<'a> {
    /// First position that each row sees, and the one after its last.
    pub(super) seen: [(usize, usize); ROWS_MAX],
    /// Over the segment so far.
    pub(super) sums: Sums<'a>,
    /// What the last chunk did to `most`: the factor on all that came before it.
    pub(super) fade: [f32; ROWS_MAX + WIDTH],
    /// Scaled queries `[rows][padded dim]`, zeros behind `dim`.
    pub(super) query: &'a mut [f32],
    /// Scores, then weights, `[rows][64]`.
    pub(super) weight: &'a mut [f32],
}

/// The part of a chunk that a row sees.
#[inline(always)]
pub(super) fn clip(seen: (usize, usize), chunk: usize) -> (usize, usize) {
    (seen.0.saturating_sub(chunk).min(CHUNK), seen.1.saturating_sub(chunk).min(CHUNK))
}

/// Turns scores into weights relative to the largest score so far, and moves the running sums.
#[inline(always)]
pub(super) fn soften<L: Lanes>(lanes: L, state: &mut State<'_>, chunk: usize, rows: (usize, usize)) {
    assert!(state.weight.len() >= rows.1 * CHUNK, "state has these rows");
    let mut change = [0.0; ROWS_MAX + WIDTH];
    for row in rows.0..rows.1 {
        let (from, to) = clip(state.seen[row], chunk);
        if from >= to {
            continue;
        }
        let mut most = lanes.splat(f32::NEG_INFINITY);
        for j in 0..CHUNK / WIDTH {
            let at = state.weight[row * CHUNK + j * WIDTH..].as_mut_ptr();
            // SAFETY: sixteen of the row's 64 scores.
            let mut score = unsafe { lanes.load(at) };
            if to - from < CHUNK {
                let lane = |position: usize| position.saturating_sub(j * WIDTH).min(WIDTH);
                score = lanes.keep(score, lane(from), lane(to), f32::NEG_INFINITY);
                // SAFETY: as above.
                unsafe { lanes.store(at, score) };
            }
            most = lanes.max(most, score);
        }
        let most = state.sums.most[row].max(lanes.largest(most));
        change[row] = state.sums.most[row] - base(most);
        state.sums.most[row] = most;
    }
    for first in (rows.0..rows.1).step_by(WIDTH) {
        // SAFETY: there is room for sixteen more than there are rows.
        let change = unsafe { lanes.load(change.as_ptr().wrapping_add(first)) };
        // SAFETY: as above.
        unsafe { lanes.store(state.fade.as_mut_ptr().wrapping_add(first), lanes.exp(change)) };
    }
    for row in rows.0..rows.1 {
        let (from, to) = clip(state.seen[row], chunk);
        if from >= to {
            continue;
        }
        let most = lanes.splat(base(state.sums.most[row]));
        let mut total = lanes.splat(0.0);
        for j in 0..CHUNK / WIDTH {
            let at = state.weight[row * CHUNK + j * WIDTH..].as_mut_ptr();
            // SAFETY: sixteen of the row's 64 scores.
            let weight = lanes.exp(lanes.sub(unsafe { lanes.load(at) }, most));
            total = lanes.add(total, weight);
            // SAFETY: as above.
            unsafe { lanes.store(at, weight) };
        }
        state.sums.total[row] = state.sums.total[row] * state.fade[row] + lanes.sum(total);
    }
}

//! The online softmax (arXiv 1805.02867): what is kept of each row between chunks, and between segments.
#![expect(clippy::needless_range_loop, reason = "indices over rows, as in the formulas")]

use std::f32::consts::LOG2_E;

use super::products::Products;
use super::{CHUNK, Lanes, ROWS_MAX, WIDTH};

/// A softmax over some positions, not yet divided by its sum.
pub(super) struct Sums<'a> {
    /// Largest score so far.
    pub(super) most: [f32; ROWS_MAX],
    /// Sums of the weights so far, relative to `most`, of every sixteenth position each, `[rows][16]`.
    total: &'a mut [f32],
    /// Sum of weighted values so far, `[rows][padded dim]`.
    pub(super) value: &'a mut [f32],
}

impl<'a> Sums<'a> {
    /// Elements of memory for so many rows.
    pub(super) fn len(rows: usize, wide: usize) -> usize {
        rows * (wide + WIDTH)
    }

    /// Over no positions.
    pub(super) fn new(memory: &'a mut [f32], rows: usize) -> Self {
        memory.fill(0.0);
        let (total, value) = memory.split_at_mut(rows * WIDTH);
        Self { most: [f32::NEG_INFINITY; ROWS_MAX], total, value }
    }

    pub(super) fn clear(&mut self) {
        self.most = [f32::NEG_INFINITY; ROWS_MAX];
        self.total.fill(0.0);
        self.value.fill(0.0);
    }

    /// Elements of memory of what [`Sums::save`] writes.
    pub(super) fn saved_len(rows: usize, wide: usize) -> usize {
        ROWS_MAX + Self::len(rows, wide)
    }

    /// Writes everything into `to`.
    #[inline(always)]
    pub(super) fn save(&self, to: &mut [f32]) {
        let (most, rest) = to.split_at_mut(ROWS_MAX);
        let (total, value) = rest.split_at_mut(self.total.len());
        most.copy_from_slice(&self.most);
        total.copy_from_slice(self.total);
        value.copy_from_slice(self.value);
    }

    /// What [`Sums::save`] wrote.
    #[inline(always)]
    pub(super) fn saved(from: &'a mut [f32], rows: usize) -> Self {
        let (of_rows, rest) = from.split_at_mut(ROWS_MAX);
        let (total, value) = rest.split_at_mut(rows * WIDTH);
        let mut most = [0.0; ROWS_MAX];
        most.copy_from_slice(of_rows);
        Self { most, total, value }
    }

    /// The sum of a row's weights.
    #[inline(always)]
    pub(super) fn total<L: Lanes>(&self, lanes: L, row: usize) -> f32 {
        // SAFETY: sixteen sums.
        lanes.sum(unsafe { lanes.load(self.total[row * WIDTH..][..WIDTH].as_ptr()) })
    }

    /// Takes in the positions of `other`, which come after those here. A row that sees none of them stays as it is.
    #[inline(always)]
    pub(super) fn merge<L: Lanes>(&mut self, lanes: L, other: &Sums<'_>, rows: usize, wide: usize) {
        for row in (0..rows).filter(|&row| other.most[row] > f32::NEG_INFINITY) {
            let most = self.most[row].max(other.most[row]);
            let [before, after] = exponentials(lanes, [self.most[row] - most, other.most[row] - most]);
            self.most[row] = most;
            let total = (&mut self.total[row * WIDTH..][..WIDTH], &other.total[row * WIDTH..][..WIDTH]);
            let value = (&mut self.value[row * wide..][..wide], &other.value[row * wide..][..wide]);
            for (to, more) in [total, value] {
                let vectors = to.as_chunks_mut::<WIDTH>().0.iter_mut().zip(more.as_chunks::<WIDTH>().0);
                for (to, more) in vectors {
                    // SAFETY: sixteen numbers.
                    let faded = lanes.mul(unsafe { lanes.load(to.as_ptr()) }, lanes.splat(before));
                    // SAFETY: as above.
                    let more = unsafe { lanes.load(more.as_ptr()) };
                    // SAFETY: as above.
                    unsafe { lanes.store(to.as_mut_ptr(), lanes.fma(more, lanes.splat(after), faded)) };
                }
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

/// Turns scores into weights relative to the largest score so far, and moves the running sums. Weights that will be
/// rounded to bf16 ([`Products::PAIRS`]) are exact to 18 bits only.
#[inline(always)]
pub(super) fn soften<L: Lanes, P: Products>(
    lanes: L,
    state: &mut State<'_>,
    chunk: usize,
    rows: (usize, usize),
) {
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
        let total = &mut state.sums.total[row * WIDTH..][..WIDTH];
        // SAFETY: sixteen sums.
        let mut sums = lanes.mul(unsafe { lanes.load(total.as_ptr()) }, lanes.splat(state.fade[row]));
        for scores in state.weight[row * CHUNK..][..CHUNK].as_chunks_mut::<WIDTH>().0 {
            // SAFETY: sixteen scores.
            let below = lanes.sub(unsafe { lanes.load(scores.as_ptr()) }, most);
            let weight = if P::PAIRS {
                lanes.exp2_coarse(lanes.mul(below, lanes.splat(LOG2_E)))
            } else {
                lanes.exp(below)
            };
            sums = lanes.add(sums, weight);
            // SAFETY: as above.
            unsafe { lanes.store(scores.as_mut_ptr(), weight) };
        }
        // SAFETY: sixteen sums.
        unsafe { lanes.store(total.as_mut_ptr(), sums) };
    }
}

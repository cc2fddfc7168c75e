//! Weighted sums of the rows of V.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::pages::Chunk;
use super::state::{State, clip};
use super::{CHUNK, InParts, Kernel, Lanes, WIDTH};

/// `value[row] = value[row] · fade[row] + Σ weight[row][position] · v[position]`, over what each row sees.
///
/// Rows go together over the positions that all of their group of up to six see; before and after that, at the edges
/// of the mask, each goes alone.
#[inline(always)]
pub(super) fn add_values<L: Lanes, V: Values>(
    lanes: L,
    state: &mut State<'_>,
    values: V,
    (chunk, rows, wide): (usize, (usize, usize), usize),
) {
    assert!(
        state.sums.value.len() >= rows.1 * wide && state.weight.len() >= rows.1 * CHUNK,
        "state has these rows"
    );
    let together = match (L::MANY, V::WIDENED) {
        (true, true) => 6,
        // Seven go as four and three, five as three and two.
        (true, false) => (rows.1 - rows.0).div_ceil((rows.1 - rows.0).div_ceil(4)),
        (false, _) => 3,
    };
    for first in (rows.0..rows.1).step_by(together) {
        let count = together.min(rows.1 - first);
        let seen = |row: usize| clip(state.seen[row], chunk);
        let start = (first..first + count).map(|row| seen(row).0).max().unwrap_or(0);
        let end = (first..first + count).map(|row| seen(row).1).min().unwrap_or(0).max(start);
        for part in [Part::Before, Part::Common, Part::After] {
            if let Part::Common = part {
                if start < end {
                    add_seen_by_all(lanes, state, values, first, count, (start, end), wide);
                }
                continue;
            }
            for row in first..first + count {
                let (from, to) = clip(state.seen[row], chunk);
                let of = match part {
                    Part::Before => (from, to.min(start)),
                    _ => (from.max(end), to),
                };
                if of.0 < of.1 {
                    lanes.apart(Accumulate::<V, 1> { state, values, row, of, wide });
                }
            }
        }
    }
}

/// The rows of V of a chunk.
pub(super) trait Values: Copy {
    /// Whether they are f32 in scratch: there is nothing to do but to load them.
    const WIDENED: bool;

    /// A register of a row, from a column on.
    ///
    /// # Safety
    /// Somebody sees the position, and the row has that many elements from the column on.
    unsafe fn part<L: Lanes>(&self, lanes: L, position: usize, column: usize) -> L::P;
}

/// In scratch, `[64][wide]`.
#[derive(Clone, Copy)]
pub(super) struct Widened<'a> {
    pub(super) values: &'a [f32],
    pub(super) wide: usize,
}

impl Values for Widened<'_> {
    const WIDENED: bool = true;

    #[inline(always)]
    unsafe fn part<L: Lanes>(&self, lanes: L, position: usize, column: usize) -> L::P {
        // SAFETY: the caller's promise; scratch holds a chunk.
        unsafe { lanes.load_part(self.values.as_ptr().wrapping_add(position * self.wide + column)) }
    }
}

/// Where they lie; asks for the next chunk's meanwhile.
#[derive(Clone, Copy)]
pub(super) struct InPlace<'a, E> {
    chunk: &'a Chunk<'a>,
    element: PhantomData<E>,
}

impl<'a, E> InPlace<'a, E> {
    pub(super) fn of(chunk: &'a Chunk<'a>) -> Self {
        Self { chunk, element: PhantomData }
    }
}

impl<E: InParts> Values for InPlace<'_, E> {
    const WIDENED: bool = false;

    #[inline(always)]
    unsafe fn part<L: Lanes>(&self, lanes: L, position: usize, column: usize) -> L::P {
        let (Chunk { here, next, .. }, offset) = (self.chunk, column * E::BYTES);
        lanes.prefetch_far(next.values.wrapping_add(next.at.rows[position] + offset));
        // SAFETY: the caller's promise.
        unsafe { E::load_part(lanes, here.values.wrapping_add(here.at.rows[position] + offset)) }
    }
}

/// The positions of a chunk, as rows that go together see them.
#[derive(Clone, Copy)]
enum Part {
    Before,
    Common,
    After,
}

/// Positions that `count` rows all see.
#[inline(always)]
fn add_seen_by_all<L: Lanes, V: Values>(
    lanes: L,
    state: &mut State<'_>,
    values: V,
    first: usize,
    count: usize,
    of: (usize, usize),
    wide: usize,
) {
    match count {
        6 if L::MANY && V::WIDENED => lanes.apart(Accumulate::<V, 6> { state, values, row: first, of, wide }),
        4 if L::MANY => lanes.apart(Accumulate::<V, 4> { state, values, row: first, of, wide }),
        3 => lanes.apart(Accumulate::<V, 3> { state, values, row: first, of, wide }),
        _ => {
            for row in (first..first + count / 2 * 2).step_by(2) {
                lanes.apart(Accumulate::<V, 2> { state, values, row, of, wide });
            }
            if count % 2 == 1 {
                lanes.apart(Accumulate::<V, 1> { state, values, row: first + count - 1, of, wide });
            }
        }
    }
}

/// Positions `of.0..of.1` for M rows, all columns; what was there before fades first.
struct Accumulate<'a, 's, V, const M: usize> {
    state: &'a mut State<'s>,
    values: V,
    row: usize,
    of: (usize, usize),
    wide: usize,
}

impl<V: Values, const M: usize> Kernel for Accumulate<'_, '_, V, M> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { state, values, row, of, wide } = self;
        let width = WIDTH / L::PARTS;
        let mut fade = [1.0; M];
        // Only the first positions of a chunk meet what came before it.
        fade.swap_with_slice(&mut state.fade[row..row + M]);
        let weight = state.weight[row * CHUNK..].as_ptr();
        let value = state.sums.value[row * wide..].as_mut_ptr();
        let mut column = 0;
        while column < wide {
            let to = value.wrapping_add(column);
            let left = (wide - column) / width;
            let from = (values, column);
            if left >= 4 {
                // SAFETY: `add_values` asserts M rows of state and 64 rows of values; `column + 4 width <= wide`.
                column += unsafe { columns::<L, V, M, 4>(lanes, weight, from, to, of, fade, wide) };
            } else if left >= 2 {
                // SAFETY: as above, with 2.
                column += unsafe { columns::<L, V, M, 2>(lanes, weight, from, to, of, fade, wide) };
            } else {
                // SAFETY: as above, with 1: `wide` is a multiple of 16.
                column += unsafe { columns::<L, V, M, 1>(lanes, weight, from, to, of, fade, wide) };
            }
        }
    }
}

/// N registers of columns for M rows; answers the columns done.
///
/// # Safety
/// `weight` has M rows of 64; `values` has rows `of.0..of.1`, readable for N registers from `column` on, and
/// `value` has M rows, `wide` apart.
#[inline(always)]
unsafe fn columns<L: Lanes, V: Values, const M: usize, const N: usize>(
    lanes: L,
    weight: *const f32,
    (values, column): (V, usize),
    value: *mut f32,
    of: (usize, usize),
    fade: [f32; M],
    wide: usize,
) -> usize {
    let width = WIDTH / L::PARTS;
    let mut sums = [[lanes.splat_part(0.0); N]; M];
    for i in 0..M {
        for j in 0..N {
            // SAFETY: the caller's promise.
            let before = unsafe { lanes.load_part(value.wrapping_add(i * wide + j * width)) };
            sums[i][j] = lanes.mul_part(before, lanes.splat_part(fade[i]));
        }
    }
    for position in of.0..of.1 {
        let mut row = [lanes.splat_part(0.0); N];
        for (j, part) in row.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *part = unsafe { values.part(lanes, position, column + j * width) };
        }
        for i in 0..M {
            // SAFETY: the caller's promise.
            let weight = lanes.splat_part(unsafe { weight.wrapping_add(i * CHUNK + position).read() });
            for j in 0..N {
                sums[i][j] = lanes.fma_part(weight, row[j], sums[i][j]);
            }
        }
    }
    for i in 0..M {
        for j in 0..N {
            // SAFETY: the caller's promise.
            unsafe { lanes.store_part(value.wrapping_add(i * wide + j * width), sums[i][j]) };
        }
    }
    N * width
}

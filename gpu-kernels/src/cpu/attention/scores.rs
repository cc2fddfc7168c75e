//! Scores: queries times keys.
//!
//! Every score is one chain of multiply-adds over the elements of a head in ascending order, with lanes along
//! positions, whether K is read where it lies or from scratch.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::pages::Chunk;
use super::state::{State, clip};
use super::{CHUNK, Element, Kernel, Lanes, WIDTH};

/// Panels in a chunk.
const PANELS: usize = CHUNK / WIDTH;

/// `weight[row][position] = query[row] · key[position]` for all 64 positions, with K where it lies; asks for the next
/// chunk's meanwhile.
#[inline(always)]
pub(super) fn in_place<L: Lanes, E: Element>(
    lanes: L,
    state: &mut State<'_>,
    chunk: Chunk<'_>,
    rows: (usize, usize),
    (wide, dim): (usize, usize),
) {
    assert!(
        state.query.len() >= rows.1 * wide && state.weight.len() >= rows.1 * CHUNK,
        "state has these rows"
    );
    let together = (rows.1 - rows.0).div_ceil((rows.1 - rows.0).div_ceil(if L::WIDE { 4 } else { 2 }));
    for row in (rows.0..rows.1).step_by(together) {
        let query = &state.query[row * wide..];
        let weight = &mut state.weight[row * CHUNK..];
        let of = (wide, dim);
        match together.min(rows.1 - row) {
            4 if L::WIDE => lanes.apart(Panels::<E, 4>::new(query, chunk, weight, of)),
            3 if L::WIDE => lanes.apart(Panels::<E, 3>::new(query, chunk, weight, of)),
            2 => lanes.apart(Panels::<E, 2>::new(query, chunk, weight, of)),
            _ => lanes.apart(Panels::<E, 1>::new(query, chunk, weight, of)),
        }
    }
}

/// M rows, `query` of `of.0` elements each, against as many panels of a chunk at a time as there are registers for.
struct Panels<'a, E, const M: usize> {
    query: &'a [f32],
    chunk: Chunk<'a>,
    /// `[M][64]`.
    weight: &'a mut [f32],
    of: (usize, usize),
    element: PhantomData<E>,
}

impl<'a, E, const M: usize> Panels<'a, E, M> {
    fn new(query: &'a [f32], chunk: Chunk<'a>, weight: &'a mut [f32], of: (usize, usize)) -> Self {
        Self { query, chunk, weight, of, element: PhantomData }
    }
}

impl<E: Element, const M: usize> Kernel for Panels<'_, E, M> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { query, chunk, weight, of, .. } = self;
        assert!(query.len() >= M * of.0 && weight.len() >= M * CHUNK, "M rows of queries and of weights");
        let (query, weight) = (query.as_ptr(), weight.as_mut_ptr());
        if L::WIDE {
            // SAFETY: M rows, as asserted, and a chunk of the cache.
            return unsafe { some_panels::<L, E, M, PANELS>(lanes, query, chunk, 0, weight, of) };
        }
        for first in 0..PANELS {
            // SAFETY: as above.
            unsafe { some_panels::<L, E, M, 1>(lanes, query, chunk, first, weight, of) };
        }
    }
}

/// M rows against N panels from `first` on.
///
/// # Safety
/// `query` has M rows of `wide`, `weight` of 64 elements; the chunk lies in the cache, and has `first + N` panels.
#[inline(always)]
unsafe fn some_panels<L: Lanes, E: Element, const M: usize, const N: usize>(
    lanes: L,
    query: *const f32,
    Chunk { here, next }: Chunk<'_>,
    first: usize,
    weight: *mut f32,
    (wide, dim): (usize, usize),
) {
    let line = 2 * WIDTH * E::BYTES;
    let (mut at, mut ask) = ([here.keys; N], [next.keys; N]);
    for j in 0..N {
        at[j] = here.keys.wrapping_add(here.at.panels[first + j]);
        ask[j] = next.keys.wrapping_add(next.at.panels[first + j]);
    }
    let mut sums = [[lanes.splat(0.0); N]; M];
    for pair in 0..dim.div_ceil(2) {
        for j in 0..N {
            for part in (0..line).step_by(64) {
                lanes.prefetch_far(ask[j].wrapping_add(pair * line + part));
            }
        }
        let query = query.wrapping_add(2 * pair);
        // SAFETY: the panels have a line for every pair, and queries an even number of elements.
        unsafe { half::<L, E, M, N, false>(lanes, query, wide, &at, pair * line, &mut sums) };
        // SAFETY: as above.
        unsafe { half::<L, E, M, N, true>(lanes, query.wrapping_add(1), wide, &at, pair * line, &mut sums) };
    }
    for i in 0..M {
        for j in 0..N {
            // SAFETY: M rows of 64 weights.
            unsafe { lanes.store(weight.wrapping_add(i * CHUNK + (first + j) * WIDTH), sums[i][j]) };
        }
    }
}

/// The first or the second element of a pair.
///
/// # Safety
/// M queries lie `wide` apart, and a line lies at `offset` of each panel.
#[inline(always)]
unsafe fn half<L: Lanes, E: Element, const M: usize, const N: usize, const SECOND: bool>(
    lanes: L,
    query: *const f32,
    wide: usize,
    panels: &[*const u8; N],
    offset: usize,
    sums: &mut [[L::F; N]; M],
) {
    let mut keys = [lanes.splat(0.0); N];
    for j in 0..N {
        // SAFETY: the caller's promise.
        keys[j] = unsafe { E::half_line::<L, SECOND>(lanes, panels[j].wrapping_add(offset)) };
    }
    for i in 0..M {
        // SAFETY: the caller's promise.
        let query = lanes.splat(unsafe { query.wrapping_add(i * wide).read() });
        for j in 0..N {
            sums[i][j] = lanes.fma(query, keys[j], sums[i][j]);
        }
    }
}

/// The same with `keys` in scratch, `[dim][64]`, for rows that see something of the chunk.
#[inline(always)]
pub(super) fn of_widened<L: Lanes>(
    lanes: L,
    state: &mut State<'_>,
    (chunk, keys): (usize, &[f32]),
    rows: (usize, usize),
    (wide, dim): (usize, usize),
) {
    assert!(
        state.query.len() >= rows.1 * wide && state.weight.len() >= rows.1 * CHUNK,
        "state has these rows"
    );
    assert!(keys.len() >= dim * CHUNK && dim <= wide, "a chunk of keys");
    let mut row = rows.0;
    while row < rows.1 {
        let together = match rows.1 - row {
            6.. if L::MANY => 6,
            3.. if !L::MANY => 3,
            2.. => 2,
            _ => 1,
        };
        let query = &state.query[row * wide..];
        let weight = &mut state.weight[row * CHUNK..];
        let seen = state.seen[row..row + together].iter().any(|&seen| {
            let (from, to) = clip(seen, chunk);
            from < to
        });
        match together {
            _ if !seen => {}
            6 if L::MANY => lanes.apart(Widened::<6> { query, keys, weight, wide, dim }),
            3 if !L::MANY => lanes.apart(Widened::<3> { query, keys, weight, wide, dim }),
            2 => lanes.apart(Widened::<2> { query, keys, weight, wide, dim }),
            _ => lanes.apart(Widened::<1> { query, keys, weight, wide, dim }),
        }
        row += together;
    }
}

/// M rows against keys in scratch.
struct Widened<'a, const M: usize> {
    /// `[M][wide]`.
    query: &'a [f32],
    keys: &'a [f32],
    /// `[M][64]`.
    weight: &'a mut [f32],
    wide: usize,
    dim: usize,
}

impl<const M: usize> Kernel for Widened<'_, M> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { query, keys, weight, wide, dim } = self;
        assert!(query.len() >= M * wide && weight.len() >= M * CHUNK, "M rows of queries and of weights");
        let width = WIDTH / L::PARTS;
        for first in (0..CHUNK).step_by(4 * width) {
            let mut sums = [[lanes.splat_part(0.0); 4]; M];
            for d in 0..dim {
                let mut key = [lanes.splat_part(0.0); 4];
                for (j, key) in key.iter_mut().enumerate() {
                    let at = keys.as_ptr().wrapping_add(d * CHUNK + first + j * width);
                    // SAFETY: element `d * 64 + first + 4 width - 1` at most, inside the chunk of keys.
                    *key = unsafe { lanes.load_part(at) };
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: M rows of `wide >= dim` elements.
                    let query = lanes.splat_part(unsafe { query.as_ptr().wrapping_add(i * wide + d).read() });
                    for j in 0..4 {
                        sums[j] = lanes.fma_part(query, key[j], sums[j]);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    let to = weight.as_mut_ptr().wrapping_add(i * CHUNK + first + j * width);
                    // SAFETY: M rows of 64 weights.
                    unsafe { lanes.store_part(to, sum) };
                }
            }
        }
    }
}

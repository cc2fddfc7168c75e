//! Scores and weighted sums in pairs of bf16, where the machine multiplies those ([`crate::Isa::Avx512Bf16`]).
//!
//! Queries and weights are rounded to bf16, as they are on GPUs; K and V are bf16 already, or of one byte, which are
//! exact in bf16. Sums are f32. A score is one chain of [`Lanes::dot_pairs`] over the pairs of elements of a head,
//! ascending; a value one over the pairs of positions of a segment, ascending, of which the halves that a row does not
//! see are zeros in its weights and in its V. So bits do not depend on who else is in the batch, nor on where K and V
//! are read.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use super::pages::Chunk;
use super::products::Products;
use super::state::{State, clip};
use super::{CHUNK, Kernel, Lanes, WIDTH};

/// Panels in a chunk.
pub(super) const PANELS: usize = CHUNK / WIDTH;
/// Bytes of a line of a panel.
pub(super) const LINE: usize = 4 * WIDTH;
/// Rows that have room in registers, four vectors of sums each.
const TOGETHER: usize = 6;

/// In pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct InPairs;

impl Products for InPairs {
    const PAIRS: bool = true;
    const IN_PLACE: bool = true;

    #[inline(always)]
    fn scores<L: Lanes>(
        self,
        lanes: L,
        _: &mut [f32],
        state: &mut State<'_>,
        (chunk, keys): (usize, &[f32]),
        rows: (usize, usize),
        of: Dims,
    ) {
        assert!(keys.len() >= of.dim.div_ceil(2) * CHUNK, "a chunk of keys");
        let panels = std::array::from_fn(|panel| keys[panel * WIDTH..].as_ptr().cast());
        scores::<L, false>(lanes, state, Keys { panels, ask: panels, line: 4 * CHUNK }, (chunk, rows), of);
    }

    #[inline(always)]
    fn add_values<L: Lanes>(
        self,
        lanes: L,
        _: &mut [f32],
        state: &mut State<'_>,
        (values, _): (&[f32], (usize, usize)),
        (chunk, rows, of): (usize, (usize, usize), [usize; 2]),
    ) {
        round_rows(lanes, &mut state.weight[rows.0 * CHUNK..rows.1 * CHUNK], CHUNK);
        let values = Gathered { values, wide: of[1] };
        add_values(lanes, state, (values, (0, CHUNK / 2)), (chunk, rows, of[0]));
    }
}

/// Rounds rows of numbers `[wide]` to pairs, which take the first half of their room.
#[inline(always)]
pub(super) fn round_rows<L: Lanes>(lanes: L, rows: &mut [f32], wide: usize) {
    for row in rows.chunks_exact_mut(wide) {
        for first in (0..wide).step_by(2 * WIDTH) {
            let at = row[first..].as_ptr();
            // SAFETY: rows are whole vectors.
            let a = unsafe { lanes.load(at) };
            let there = first + WIDTH < wide;
            // SAFETY: as above.
            let b = if there { unsafe { lanes.load(at.wrapping_add(WIDTH)) } } else { lanes.splat(0.0) };
            let to = row[first / 2..].as_mut_ptr();
            // SAFETY: sixteen words end before `first + 16` where `first` is not 0, and so where they were read.
            unsafe { lanes.store(to, lanes.round_pairs(a, b)) };
        }
    }
}

/// The first of rows that go together, and their number; all groups are of about the same size.
#[inline(always)]
fn groups(rows: (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.1 - rows.0;
    let together = count.div_ceil(count.div_ceil(TOGETHER));
    (rows.0..rows.1).step_by(together).map(move |row| (row, together.min(rows.1 - row)))
}

/// `weight[row][position] = scale · query[row] · key[position]` for rows that see something of a chunk, with K in its
/// panels where it lies; asks for what comes next meanwhile. Queries are pairs.
#[inline(always)]
pub(super) fn scores_in_place<L: Lanes>(
    lanes: L,
    state: &mut State<'_>,
    Chunk { here, next }: Chunk<'_>,
    of_rows: (usize, (usize, usize)),
    of: Dims,
) {
    let keys = Keys {
        panels: here.at.panels.map(|panel| here.keys.wrapping_add(panel)),
        ask: next.at.panels.map(|panel| next.keys.wrapping_add(panel)),
        line: LINE,
    };
    scores::<L, true>(lanes, state, keys, of_rows, of);
}

/// The same for any [`Keys`]; with ASK, those behind them are asked for.
#[inline(always)]
fn scores<L: Lanes, const ASK: bool>(
    lanes: L,
    state: &mut State<'_>,
    keys: Keys,
    (chunk, rows): (usize, (usize, usize)),
    of: Dims,
) {
    let mut asked = !ASK;
    for (row, count) in groups(rows) {
        let sees = |&seen: &(usize, usize)| clip(seen, chunk).0 < clip(seen, chunk).1;
        if !state.seen[row..row + count].iter().any(sees) {
            continue;
        }
        if asked {
            scores_of::<L, false>(lanes, state, keys, (row, count), of);
        } else {
            scores_of::<L, true>(lanes, state, keys, (row, count), of);
            asked = true;
        }
    }
}

/// Elements of a query, numbers from one to the next, and what their products with keys are multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub(super) dim: usize,
    pub(super) wide: usize,
    pub(super) scale: f32,
}

/// The panels of a chunk of K, those that will be needed next, and the bytes from one line to the next.
#[derive(Clone, Copy)]
struct Keys {
    panels: [*const u8; PANELS],
    ask: [*const u8; PANELS],
    line: usize,
}

#[inline(always)]
fn scores_of<L: Lanes, const ASK: bool>(
    lanes: L,
    state: &mut State<'_>,
    keys: Keys,
    (row, count): (usize, usize),
    of: Dims,
) {
    let (query, weight) = (&state.query[row * of.wide..], &mut state.weight[row * CHUNK..]);
    match count {
        6 => lanes.apart(Scores::<6, ASK> { query, keys, weight, of }),
        5 => lanes.apart(Scores::<5, ASK> { query, keys, weight, of }),
        4 => lanes.apart(Scores::<4, ASK> { query, keys, weight, of }),
        3 => lanes.apart(Scores::<3, ASK> { query, keys, weight, of }),
        2 => lanes.apart(Scores::<2, ASK> { query, keys, weight, of }),
        _ => lanes.apart(Scores::<1, ASK> { query, keys, weight, of }),
    }
}

/// M rows, `query` of pairs `wide` numbers apart, against a chunk.
struct Scores<'a, const M: usize, const ASK: bool> {
    query: &'a [f32],
    keys: Keys,
    /// `[M][64]`.
    weight: &'a mut [f32],
    of: Dims,
}

impl<const M: usize, const ASK: bool> Kernel for Scores<'_, M, ASK> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { query, keys: Keys { panels, ask, line }, weight, of: Dims { dim, wide, scale } } = self;
        let pairs = dim.div_ceil(2);
        assert!(query.len() >= (M - 1) * wide + pairs && weight.len() >= M * CHUNK, "M rows");
        let mut sums = [[lanes.splat(0.0); PANELS]; M];
        for pair in 0..pairs {
            let mut keys = [lanes.splat(0.0); PANELS];
            for j in 0..PANELS {
                if ASK {
                    lanes.prefetch(ask[j].wrapping_add(pair * line));
                }
                // SAFETY: a panel has a line for every pair of elements.
                keys[j] = unsafe { lanes.load(panels[j].wrapping_add(pair * line).cast()) };
            }
            for i in 0..M {
                // SAFETY: M rows, as asserted.
                let query = lanes.splat(unsafe { query.as_ptr().wrapping_add(i * wide + pair).read() });
                for j in 0..PANELS {
                    sums[i][j] = lanes.dot_pairs(query, keys[j], sums[i][j]);
                }
            }
        }
        for i in 0..M {
            for j in 0..PANELS {
                let score = lanes.mul(sums[i][j], lanes.splat(scale));
                // SAFETY: M rows of 64 weights, as asserted.
                unsafe { lanes.store(weight.as_mut_ptr().wrapping_add(i * CHUNK + j * WIDTH), score) };
            }
        }
    }
}

/// V of a chunk, as pairs of positions.
pub(super) trait Values: Copy {
    /// Sixteen columns of positions `2 pair` and `2 pair + 1`, from a multiple of sixteen on.
    ///
    /// # Safety
    /// Somebody sees one of the positions, and the rows have these columns.
    unsafe fn pair<L: Lanes>(&self, lanes: L, pair: usize, column: usize) -> L::F;

    /// Asks for as much of what comes next as these positions have in so many vectors from `column` on.
    #[inline(always)]
    fn ask<L: Lanes>(&self, _: L, _: (usize, usize), _: usize) {}
}

/// In scratch, `[32][wide]`.
#[derive(Clone, Copy)]
struct Gathered<'a> {
    values: &'a [f32],
    wide: usize,
}

impl Values for Gathered<'_> {
    #[inline(always)]
    unsafe fn pair<L: Lanes>(&self, lanes: L, pair: usize, column: usize) -> L::F {
        // SAFETY: the caller's promise; scratch holds a chunk.
        unsafe { lanes.load(self.values.as_ptr().wrapping_add(pair * self.wide + column)) }
    }
}

/// Rows of bf16 where they lie.
impl Values for Chunk<'_> {
    #[inline(always)]
    unsafe fn pair<L: Lanes>(&self, lanes: L, pair: usize, column: usize) -> L::F {
        let here = self.here;
        let at = [2 * pair, 2 * pair + 1].map(|row| here.values.wrapping_add(here.at.rows[row] + 2 * column));
        // SAFETY: the caller's promise; the first position stands in for one that nobody sees.
        unsafe { lanes.load_pairs_bf16(at) }
    }

    /// The same columns of the next chunk.
    #[inline(always)]
    fn ask<L: Lanes>(&self, lanes: L, (pair, column): (usize, usize), vectors: usize) {
        let next = self.next;
        // A line is two vectors.
        for j in (0..vectors).step_by(2) {
            for row in [2 * pair, 2 * pair + 1] {
                lanes.prefetch(next.values.wrapping_add(next.at.rows[row] + 2 * (column + j * WIDTH)));
            }
        }
    }
}

/// [`add_values`] with V where it lies.
#[inline(always)]
pub(super) fn values_in_place<L: Lanes>(
    lanes: L,
    state: &mut State<'_>,
    chunk: Chunk<'_>,
    (first, rows, wide): (usize, (usize, usize), usize),
) {
    round_rows(lanes, &mut state.weight[rows.0 * CHUNK..rows.1 * CHUNK], CHUNK);
    add_values(lanes, state, (chunk, (0, CHUNK / 2)), (first, rows, wide));
}

/// `value[row] = value[row] · fade[row] + Σ weight[row][position] · v[position]`, over what each row sees.
///
/// Only pairs of positions `within.0..within.1` of the chunk count. Rows go together over those that all of their group
/// see whole; before and after that, at the edges of the mask, each goes alone. Weights are pairs, 0 where a row does
/// not see.
#[inline(always)]
pub(super) fn add_values<L: Lanes, V: Values>(
    lanes: L,
    state: &mut State<'_>,
    (values, within): (V, (usize, usize)),
    (chunk, rows, wide): (usize, (usize, usize), usize),
) {
    assert!(
        state.sums.value.len() >= rows.1 * wide && state.weight.len() >= rows.1 * CHUNK,
        "state has these rows"
    );
    for (first, count) in groups(rows) {
        let group = first..first + count;
        let seen = |row: usize| clip(state.seen[row], chunk);
        let start = group.clone().map(|row| seen(row).0.div_ceil(2)).max().unwrap_or(0);
        let start = start.clamp(within.0, within.1);
        let end = group.clone().map(|row| seen(row).1 / 2).min().unwrap_or(0).clamp(start, within.1);
        let edge = |state: &mut State<'_>, row: usize, of: (usize, usize)| {
            let seen = clip(state.seen[row], chunk);
            let of = (of.0.max(seen.0 / 2), of.1.min(seen.1.div_ceil(2)));
            if seen.0 < seen.1 && of.0 < of.1 {
                lanes.apart(Sum::<V, 1, true> { state, values, row, of, seen, wide });
            }
        };
        group.clone().for_each(|row| edge(state, row, (within.0, start)));
        if start < end {
            add_seen_by_all(lanes, state, values, (first, count), (start, end), wide);
        }
        group.for_each(|row| edge(state, row, (end, within.1)));
    }
}

/// The same for pairs `of` of positions that all of `count` rows see, up to eight.
#[inline(always)]
pub(super) fn add_seen_by_all<L: Lanes, V: Values>(
    lanes: L,
    state: &mut State<'_>,
    values: V,
    (row, count): (usize, usize),
    of: (usize, usize),
    wide: usize,
) {
    let seen = (0, CHUNK);
    match count {
        8 => lanes.apart(Sum::<V, 8, false> { state, values, row, of, seen, wide }),
        7 => lanes.apart(Sum::<V, 7, false> { state, values, row, of, seen, wide }),
        6 => lanes.apart(Sum::<V, 6, false> { state, values, row, of, seen, wide }),
        5 => lanes.apart(Sum::<V, 5, false> { state, values, row, of, seen, wide }),
        4 => lanes.apart(Sum::<V, 4, false> { state, values, row, of, seen, wide }),
        3 => lanes.apart(Sum::<V, 3, false> { state, values, row, of, seen, wide }),
        2 => lanes.apart(Sum::<V, 2, false> { state, values, row, of, seen, wide }),
        _ => lanes.apart(Sum::<V, 1, false> { state, values, row, of, seen, wide }),
    }
}

/// Pairs `of.0..of.1` of positions for M rows, all columns; what was there before fades first. At an EDGE positions
/// outside of `seen` count as zeros.
struct Sum<'a, 's, V, const M: usize, const EDGE: bool> {
    state: &'a mut State<'s>,
    values: V,
    row: usize,
    of: (usize, usize),
    seen: (usize, usize),
    wide: usize,
}

impl<V: Values, const M: usize, const EDGE: bool> Kernel for Sum<'_, '_, V, M, EDGE> {
    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let mut fade = [1.0; M];
        // Only the first positions of a chunk meet what came before it.
        fade.swap_with_slice(&mut self.state.fade[self.row..self.row + M]);
        let mut column = 0;
        while column < self.wide {
            column += match (self.wide - column) / WIDTH {
                4.. if M <= 6 => self.columns::<L, 4>(lanes, fade, column),
                2.. => self.columns::<L, 2>(lanes, fade, column),
                _ => self.columns::<L, 1>(lanes, fade, column),
            };
        }
    }
}

impl<V: Values, const M: usize, const EDGE: bool> Sum<'_, '_, V, M, EDGE> {
    /// N vectors of columns; answers the columns done.
    #[inline(always)]
    fn columns<L: Lanes, const N: usize>(&mut self, lanes: L, fade: [f32; M], column: usize) -> usize {
        let Self { values, row, of, seen, wide, .. } = *self;
        let weight = self.state.weight[row * CHUNK..(row + M) * CHUNK].as_ptr();
        let value = self.state.sums.value[row * wide..(row + M) * wide][column..].as_mut_ptr();
        let mut sums = [[lanes.splat(0.0); N]; M];
        for i in 0..M {
            for j in 0..N {
                // SAFETY: `value` has M rows, and N vectors behind `column`.
                let before = unsafe { lanes.load(value.wrapping_add(i * wide + j * WIDTH)) };
                sums[i][j] = lanes.mul(before, lanes.splat(fade[i]));
            }
        }
        for pair in of.0..of.1 {
            let mut v = [lanes.splat(0.0); N];
            values.ask(lanes, (pair, column), N);
            for j in 0..N {
                // SAFETY: all rows see one of the positions.
                v[j] = unsafe { values.pair(lanes, pair, column + j * WIDTH) };
                if EDGE {
                    let sees = [2 * pair, 2 * pair + 1].map(|position| (seen.0..seen.1).contains(&position));
                    v[j] = lanes.keep_of_pairs(v[j], sees);
                }
            }
            for i in 0..M {
                // SAFETY: M rows of 64 numbers, the first half of which are pairs.
                let weight = lanes.splat(unsafe { weight.wrapping_add(i * CHUNK + pair).read() });
                for j in 0..N {
                    sums[i][j] = lanes.dot_pairs(weight, v[j], sums[i][j]);
                }
            }
        }
        for i in 0..M {
            for j in 0..N {
                // SAFETY: as above.
                unsafe { lanes.store(value.wrapping_add(i * wide + j * WIDTH), sums[i][j]) };
            }
        }
        N * WIDTH
    }
}

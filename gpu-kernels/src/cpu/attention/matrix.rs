//! Scores and weighted sums on matrix tiles ([`crate::Isa::Amx`]), for few rows as for many.
//!
//! What is rounded is what [`super::pairs`] rounds. Sixteen rows of queries or of weights are the first tile of a
//! product ([`super::super::amx`]), sixteen pairs of elements of K for sixteen positions, or of positions of V for
//! sixteen columns, the second. Every row of a tile meets all 64 positions of a chunk: what it does not see has weight
//! 0. A zero times what is no number would show, so where V has such, rows that see only part of the chunk go alone,
//! with zeros in V's place. Sums lose the sign of zero at every chunk. So bits do not depend on the other rows.

use super::super::amx::{SUMS, TileUnit};
use super::pairs::{Dims, round_rows};
use super::products::Products;
use super::state::{State, clip};
use super::{CHUNK, Lanes, ROWS_MAX, WIDTH};

/// On matrix tiles.
#[derive(Clone, Copy)]
pub(super) struct OnTiles<U>(pub(super) U);

impl<U: TileUnit> Products for OnTiles<U> {
    const PAIRS: bool = true;
    const IN_PLACE: bool = false;

    fn room(wide: usize) -> usize {
        room(wide)
    }

    fn begin(self) {
        self.0.open();
    }

    fn end(self) {
        self.0.close();
    }

    #[inline(always)]
    fn scores<L: Lanes>(
        self,
        lanes: L,
        room: &mut [f32],
        state: &mut State<'_>,
        (_, keys): (usize, &[f32]),
        rows: (usize, usize),
        Dims { dim, wide, scale }: Dims,
    ) {
        let mut room = Room::of(room, wide);
        let (pairs, steps) = (dim.div_ceil(2), wide.div_ceil(2 * WIDTH));
        for pair in 0..steps * WIDTH {
            for panel in 0..CHUNK / WIDTH {
                let to = &mut room.columns[(panel * steps * WIDTH + pair) * WIDTH..][..WIDTH];
                match keys.get(pair * CHUNK + panel * WIDTH..).filter(|_| pair < pairs) {
                    Some(from) => to.copy_from_slice(&from[..WIDTH]),
                    None => to.fill(0.0),
                }
            }
        }
        for row in rows.0..rows.1 {
            let query = &state.query[row * wide..][..wide / 2];
            for (step, from) in query.chunks(WIDTH).enumerate() {
                let to = &mut room.rows[row_of(row - rows.0, step, steps)..][..WIDTH];
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0.0);
            }
        }
        let tiles = (rows.1 - rows.0).div_ceil(WIDTH);
        for (tile, panel) in (0..tiles).step_by(2).flat_map(|tile| [0, 2].map(|panel| (tile, panel))) {
            room.sums.fill(0.0);
            room.multiply(self.0, (tile, tile + 1 < tiles), [panel, panel + 1], steps);
            for (index, sums) in room.sums.chunks_exact(SUMS).enumerate() {
                let first = rows.0 + (tile + index / 2) * WIDTH;
                for (row, sums) in (first..rows.1).zip(sums.chunks_exact(WIDTH)) {
                    let to = &mut state.weight[row * CHUNK + (panel + index % 2) * WIDTH..][..WIDTH];
                    // SAFETY: sixteen sums.
                    let scaled = lanes.mul(unsafe { lanes.load(sums.as_ptr()) }, lanes.splat(scale));
                    // SAFETY: sixteen scores.
                    unsafe { lanes.store(to.as_mut_ptr(), scaled) };
                }
            }
        }
    }

    /// Weights are 0 where a row does not see, and become pairs here.
    #[inline(always)]
    fn add_values<L: Lanes>(
        self,
        lanes: L,
        room: &mut [f32],
        state: &mut State<'_>,
        (values, valid): (&[f32], (usize, usize)),
        (chunk, rows, of): (usize, (usize, usize), [usize; 2]),
    ) {
        let mut room = Room::of(room, of[1]);
        round_rows(lanes, &mut state.weight[rows.0 * CHUNK..rows.1 * CHUNK], CHUNK);
        let seen = |state: &State<'_>, row: usize| clip(state.seen[row], chunk);
        let whole = (rows.0..rows.1).all(|row| [valid, (0, 0)].contains(&seen(state, row)));
        let number =
            |x: &f32| [x.to_bits() << 16, x.to_bits()].iter().all(|x| x & 0x7f80_0000 != 0x7f80_0000);
        let numbers = |pair: usize| values[pair * of[1]..][..of[0]].iter().all(number);
        if whole || (valid.0 / 2..valid.1.div_ceil(2)).all(numbers) {
            columns(lanes, &mut room, values, valid, of);
            return add(lanes, self.0, &mut room, state, (chunk, rows, of[0]));
        }
        for row in rows.0..rows.1 {
            columns(lanes, &mut room, values, seen(state, row), of);
            add(lanes, self.0, &mut room, state, (chunk, (row, row + 1), of[0]));
        }
    }
}

/// Words of a tile: sixteen rows of sixteen pairs.
const TILE: usize = WIDTH * WIDTH;
/// Tiles along the positions of a chunk.
const STEPS: usize = CHUNK / (2 * WIDTH);

/// Words to work in, for heads of so many elements: tiles of queries or weights, of K or V, and of sums.
const fn room(wide: usize) -> usize {
    let steps = wide.div_ceil(2 * WIDTH);
    let of_rows = ROWS_MAX / WIDTH * if steps > STEPS { steps } else { STEPS } * TILE;
    of_rows + CHUNK / WIDTH * steps * TILE + 4 * SUMS
}

/// The parts of [`room`].
struct Room<'a> {
    /// `[rows / 16][steps][16][16]`
    rows: &'a mut [f32],
    /// `[columns / 16][steps][16][16]`
    columns: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<'a> Room<'a> {
    fn of(all: &'a mut [f32], wide: usize) -> Self {
        let columns = CHUNK / WIDTH * wide.div_ceil(2 * WIDTH) * TILE;
        let (sums, rest) = all.split_at_mut(4 * SUMS);
        let (columns, rows) = rest.split_at_mut(columns);
        Self { rows, columns, sums }
    }

    /// Products of tiles `row` and, if `both`, `row + 1` of rows with columns `column` and `column + 1`, `steps` tiles
    /// each, added to the sums.
    fn multiply<U: TileUnit>(
        &mut self,
        unit: U,
        (row, both): (usize, bool),
        column: [usize; 2],
        steps: usize,
    ) {
        let run = |tiles: &[f32], index: usize| tiles[index * steps * TILE..][..steps * TILE].as_ptr();
        let a = [row, row + usize::from(both)].map(|row| run(self.rows, row).cast());
        let b = column.map(|column| run(self.columns, column).cast());
        // SAFETY: whoever runs attention has opened the unit; runs of tiles were cut out of the room just now.
        unsafe { unit.block(a, b, both, steps, self.sums) };
    }
}

/// V as tiles, `of.0` columns of rows of `of.1`, with zeros in place of positions outside of `seen`.
#[inline(always)]
fn columns<L: Lanes>(lanes: L, room: &mut Room<'_>, values: &[f32], seen: (usize, usize), of: [usize; 2]) {
    for pair in 0..CHUNK / 2 {
        let sees = [2 * pair, 2 * pair + 1].map(|position| (seen.0..seen.1).contains(&position));
        for column in (0..of[0]).step_by(WIDTH) {
            let to = &mut room.columns[column * CHUNK / 2 + pair * WIDTH..][..WIDTH];
            let from = &values[pair * of[1] + column..][..WIDTH];
            match sees {
                [true, true] => to.copy_from_slice(from),
                [false, false] => to.fill(0.0),
                _ => {
                    // SAFETY: sixteen words.
                    let kept = lanes.keep_of_pairs(unsafe { lanes.load(from.as_ptr()) }, sees);
                    // SAFETY: as above.
                    unsafe { lanes.store(to.as_mut_ptr(), kept) };
                }
            }
        }
    }
}

/// Weights, which are pairs, times V as tiles.
#[inline(always)]
fn add<L: Lanes, U: TileUnit>(
    lanes: L,
    unit: U,
    room: &mut Room<'_>,
    state: &mut State<'_>,
    (chunk, rows, wide): (usize, (usize, usize), usize),
) {
    for row in rows.0..rows.1 {
        let (from, to) = clip(state.seen[row], chunk);
        for step in 0..STEPS {
            let tile = &mut room.rows[row_of(row - rows.0, step, STEPS)..][..WIDTH];
            let weights = &state.weight[row * CHUNK + step * WIDTH..][..WIDTH];
            if from < to { tile.copy_from_slice(weights) } else { tile.fill(0.0) }
        }
    }
    let (tiles, panels) = ((rows.1 - rows.0).div_ceil(WIDTH), wide / WIDTH);
    for (tile, panel) in
        (0..tiles).step_by(2).flat_map(|tile| (0..panels).step_by(2).map(move |panel| (tile, panel)))
    {
        let place = |index: usize| {
            let (first, column) = (rows.0 + (tile + index / 2) * WIDTH, panel + index % 2);
            (first..if column < panels { rows.1 } else { first }, column * WIDTH)
        };
        for (index, sums) in room.sums.chunks_exact_mut(SUMS).enumerate() {
            let (of, column) = place(index);
            for (row, sums) in of.zip(sums.chunks_exact_mut(WIDTH)) {
                // SAFETY: sixteen of the row's columns.
                let before = unsafe { lanes.load(state.sums.value[row * wide + column..].as_ptr()) };
                // SAFETY: sixteen sums.
                unsafe { lanes.store(sums.as_mut_ptr(), lanes.mul(before, lanes.splat(state.fade[row]))) };
            }
        }
        // Where there is no second panel the first stands in, and nobody reads its sums.
        let second = if panel + 1 < panels { panel + 1 } else { panel };
        room.multiply(unit, (tile, tile + 1 < tiles), [panel, second], STEPS);
        for (index, sums) in room.sums.chunks_exact(SUMS).enumerate() {
            let (of, column) = place(index);
            for (row, sums) in of.zip(sums.chunks_exact(WIDTH)) {
                // SAFETY: sixteen sums.
                let sum = lanes.add(unsafe { lanes.load(sums.as_ptr()) }, lanes.splat(0.0));
                // SAFETY: sixteen of the row's columns.
                unsafe { lanes.store(state.sums.value[row * wide + column..].as_mut_ptr(), sum) };
            }
        }
    }
}

/// Where a row's words begin among tiles of rows.
fn row_of(row: usize, step: usize, steps: usize) -> usize {
    (row / WIDTH * steps + step) * TILE + row % WIDTH * WIDTH
}

//! Causal attention over blocks.
//!
//! Every query head reduces over the positions of its sequence in chunks of 64 that start at absolute position 0, in
//! ascending order, with the online softmax (arXiv 1805.02867): a running maximum, a running sum and a running
//! weighted sum of values. A score is summed over the head's elements in order; a value element over positions in
//! order. None of this knows the block size, the other queries, the chunking of the prompt or the threads, so neither
//! do the bits.
//!
//! What runs together is one kv head with up to 48 of its queries (tokens x heads of the group): K of a chunk is
//! turned once so that lanes run along positions, V is widened once, and all queries pass over both.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use super::Isa;
use super::batch::Batch;
use super::lanes::{AsBf16, AsF16, AsF32, Element, Kernel, Lanes, WIDTH, dispatch};
use super::out::SharedOut;
use super::pool::KvPool;
use super::scratch::Scratch;
use super::workers::Workers;
use crate::{Attention, Dtype};

/// Positions that are reduced together.
const CHUNK: usize = 64;
/// Up to so many rows read V where it lies; more rows read it from scratch, widened once.
const FEW: usize = 2;
/// Query rows (token x head of the group) that share a pass over K and V.
const ROWS_MAX: usize = 48;

/// What attention reads. All shapes and blocks are checked.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: usize,
    pub(crate) batch: &'a Batch,
    /// `[tokens, query heads * dim]`
    pub(crate) q: &'a [f32],
    pub(crate) attention: Attention,
}

/// `out` has the shape of `q`.
pub(crate) fn attention(workers: &Workers, isa: Isa, step: Step<'_>, out: &mut [f32]) {
    let Step { batch, attention, .. } = step;
    clear_uncovered(batch, attention.heads.query * attention.heads.dim, out);
    let tiles = tiles(batch, &attention);
    let out = SharedOut::new(out);
    workers.run(tiles.len(), &|index, scratch| {
        dispatch(isa, Run { step, out, tile: tiles[index], scratch });
    });
}

/// Rows that belong to no span get zeros.
fn clear_uncovered(batch: &Batch, width: usize, out: &mut [f32]) {
    let mut row = 0;
    for span in &batch.spans {
        out[row * width..span.query_start as usize * width].fill(0.0);
        row = (span.query_start + span.query_len) as usize;
    }
    out[row * width..].fill(0.0);
}

/// Queries of one kv head of one span: rows `row..row + rows` of `query_len x group`, token by token.
#[derive(Clone, Copy)]
struct Tile {
    span: usize,
    kv_head: usize,
    row: usize,
    rows: usize,
    /// Positions that its last query sees, times rows: how long it takes.
    cost: usize,
}

/// All tiles, the longest first, so that none of them starts when the others are nearly done.
fn tiles(batch: &Batch, attention: &Attention) -> Vec<Tile> {
    let heads = attention.heads;
    let group = heads.query / heads.kv;
    let mut tiles = Vec::new();
    for (index, span) in batch.spans.iter().enumerate() {
        let all = span.query_len as usize * group;
        for row in (0..all).step_by(ROWS_MAX) {
            let rows = ROWS_MAX.min(all - row);
            let sees = span.context_len as usize - (span.context_len.min(span.query_len)) as usize
                + (row + rows) / group;
            let sees = attention.window.map_or(sees, |window| sees.min(window as usize + rows));
            let of_head = |kv_head| Tile { span: index, kv_head, row, rows, cost: sees * (rows + 8) };
            tiles.extend((0..heads.kv).map(of_head));
        }
    }
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.cost));
    tiles
}

/// Everything that one tile needs.
struct Run<'a> {
    step: Step<'a>,
    out: SharedOut,
    tile: Tile,
    scratch: &'a mut Scratch,
}

/// What is kept of each row between chunks.
struct State<'a> {
    /// First position that each row sees, and the one after its last.
    seen: [(usize, usize); ROWS_MAX],
    /// Largest score so far.
    most: [f32; ROWS_MAX],
    /// Sum of the weights so far, relative to `most`.
    total: [f32; ROWS_MAX],
    /// What the last chunk did to `most`: the factor on all that came before it.
    fade: [f32; ROWS_MAX],
    /// Scaled queries `[rows][padded dim]`.
    query: &'a mut [f32],
    /// Sum of weighted values so far, `[rows][padded dim]`.
    value: &'a mut [f32],
    /// Scores, then weights, `[rows][64]`.
    weight: &'a mut [f32],
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { step: Step { pool, layer, batch, q, attention }, out, tile, scratch } = self;
        let heads = attention.heads;
        let (group, dim, wide) = (heads.query / heads.kv, heads.dim, pool.layout.token_stride);
        let span = batch.spans[tile.span];
        let rows = tile.rows;
        let [query, value, weight, keys, values] =
            scratch.take([rows * wide, rows * wide, rows * CHUNK, wide * CHUNK, CHUNK * wide]);
        let mut state = State {
            seen: [(0, 0); ROWS_MAX],
            most: [f32::NEG_INFINITY; ROWS_MAX],
            total: [0.0; ROWS_MAX],
            fade: [1.0; ROWS_MAX],
            query,
            value,
            weight,
        };
        state.value.fill(0.0);
        let at = |row: usize| {
            let (token, head) = ((tile.row + row) / group, tile.kv_head * group + (tile.row + row) % group);
            ((span.query_start as usize + token) * heads.query + head) * dim
        };
        for row in 0..rows {
            let end = (span.context_len as usize + (tile.row + row) / group + 1)
                .saturating_sub(span.query_len as usize);
            let start = attention.window.map_or(0, |window| end.saturating_sub(window as usize));
            state.seen[row] = (start, end);
            let to = &mut state.query[row * wide..][..dim];
            for (to, from) in to.iter_mut().zip(&q[at(row)..][..dim]) {
                *to = from * attention.scale;
            }
        }
        let (low, high) = (state.seen[0].0, state.seen[rows - 1].1);
        let pages = Pages { pool, layer, kv_head: tile.kv_head, table: batch.table(tile.span) };
        let valid = |chunk: usize| (low.max(chunk) - chunk, high.min(chunk + CHUNK).saturating_sub(chunk));
        let start = low / CHUNK * CHUNK;
        let mut rows_here = if start < high { pages.rows(start, valid(start)) } else { Rows::default() };
        for chunk in (start..high).step_by(CHUNK) {
            let next = chunk + CHUNK;
            let rows_next = if next < high { pages.rows(next, valid(next)) } else { rows_here };
            let here = Chunk { rows: &rows_here, next: &rows_next, valid: valid(chunk), wide };
            match pool.shape.dtype {
                Dtype::F32 => here.bring::<L, AsF32>(lanes, rows, keys, values),
                Dtype::Bf16 => here.bring::<L, AsBf16>(lanes, rows, keys, values),
                Dtype::F16 => here.bring::<L, AsF16>(lanes, rows, keys, values),
            }
            scores(lanes, &mut state, keys, rows, wide, dim);
            soften(lanes, &mut state, chunk, rows);
            match pool.shape.dtype {
                _ if rows > FEW => add_values(lanes, &mut state, values, chunk, rows, wide),
                Dtype::F32 => here.add_values::<L, AsF32>(lanes, &mut state, chunk, rows),
                Dtype::Bf16 => here.add_values::<L, AsBf16>(lanes, &mut state, chunk, rows),
                Dtype::F16 => here.add_values::<L, AsF16>(lanes, &mut state, chunk, rows),
            }
            rows_here = rows_next;
        }
        for row in 0..rows {
            // SAFETY: this tile alone writes the `dim` elements of its rows, and `out` has the shape of `q`.
            let to = unsafe { out.slice(at(row), dim) };
            let scale = if state.total[row] == 0.0 { 0.0 } else { 1.0 / state.total[row] };
            for (to, from) in to.iter_mut().zip(&state.value[row * wide..]) {
                *to = from * scale;
            }
        }
    }
}

/// The cached rows of one kv head of one span.
struct Pages<'a> {
    pool: &'a KvPool,
    layer: usize,
    kv_head: usize,
    table: &'a [u32],
}

/// Where the rows of K and V of a chunk lie.
#[derive(Clone, Copy)]
struct Rows {
    keys: [*const u8; CHUNK],
    values: [*const u8; CHUNK],
}

impl Default for Rows {
    fn default() -> Self {
        Self { keys: [std::ptr::null(); CHUNK], values: [std::ptr::null(); CHUNK] }
    }
}

impl Pages<'_> {
    /// The rows of positions `chunk + valid.0 .. chunk + valid.1`; where nobody looks, the first stands in.
    #[inline(always)]
    fn rows(&self, chunk: usize, valid: (usize, usize)) -> Rows {
        let (layout, block_size) = (self.pool.layout, self.pool.shape.block_size);
        let head = self.kv_head * layout.head_stride;
        let mut offsets = [0; CHUNK];
        let (mut block, mut token) = ((chunk + valid.0) / block_size, (chunk + valid.0) % block_size);
        for offset in &mut offsets[valid.0..valid.1] {
            let element =
                self.table[block] as usize * layout.page_stride + head + token * layout.token_stride;
            *offset = element * self.pool.shape.dtype.bytes();
            token += 1;
            if token == block_size {
                (block, token) = (block + 1, 0);
            }
        }
        let first = offsets[valid.0];
        offsets[..valid.0].fill(first);
        offsets[valid.1..].fill(first);
        let of = |which: usize| {
            let start = self.pool.plane(self.layer, which).as_ptr();
            offsets.map(|offset| start.wrapping_add(offset))
        };
        Rows { keys: of(0), values: of(1) }
    }
}

/// A chunk on its way into scratch, while the next one is asked for.
struct Chunk<'a> {
    rows: &'a Rows,
    next: &'a Rows,
    /// Positions of the chunk that somebody sees.
    valid: (usize, usize),
    /// Elements of a row, a multiple of 16.
    wide: usize,
}

impl Chunk<'_> {
    /// Widens K, turned to `[wide][64]`, and for more than a few rows V, as `[64][wide]`. What nobody sees is
    /// left as it was, or masked later.
    #[inline(always)]
    fn bring<L: Lanes, E: Element>(&self, lanes: L, rows: usize, keys: &mut [f32], values: &mut [f32]) {
        assert!(
            keys.len() >= self.wide * CHUNK && values.len() >= self.wide * CHUNK,
            "scratch holds a chunk"
        );
        for first in (self.valid.0 / WIDTH * WIDTH..self.valid.1).step_by(WIDTH) {
            for d in (0..self.wide).step_by(WIDTH) {
                let at = |i: usize| self.rows.keys[first + i].wrapping_add(d * E::BYTES);
                // SAFETY: rows are valid and `wide` elements long.
                let block = unsafe { E::turn(lanes, &std::array::from_fn(at)) };
                for i in 0..WIDTH {
                    lanes.prefetch_far(self.next.keys[first + i].wrapping_add(d * E::BYTES));
                    let to = keys.as_mut_ptr().wrapping_add((d + i) * CHUNK + first);
                    // SAFETY: `d + i < wide` and `first + 16 <= 64`: asserted above.
                    unsafe { lanes.store(to, block[i]) };
                }
            }
        }
        if rows <= FEW {
            return;
        }
        for position in self.valid.0..self.valid.1 {
            for d in (0..self.wide).step_by(WIDTH) {
                let at = self.rows.values[position].wrapping_add(d * E::BYTES);
                // SAFETY: rows are valid and `wide` elements long.
                let vector = unsafe { E::load(lanes, at) };
                lanes.prefetch_far(self.next.values[position].wrapping_add(d * E::BYTES));
                let to = values.as_mut_ptr().wrapping_add(position * self.wide + d);
                // SAFETY: asserted above.
                unsafe { lanes.store(to, vector) };
            }
        }
    }

    /// What [`add_values`] does, row by row, with V read where it lies.
    #[inline(always)]
    fn add_values<L: Lanes, E: Element>(&self, lanes: L, state: &mut State<'_>, chunk: usize, rows: usize) {
        for row in 0..rows {
            let of = clip(state.seen[row], chunk);
            if of.0 >= of.1 {
                continue;
            }
            let weight = &state.weight[row * CHUNK..(row + 1) * CHUNK];
            let value = &mut state.value[row * self.wide..(row + 1) * self.wide];
            let mut d = 0;
            while d < self.wide {
                let (fade, value) = (state.fade[row], &mut value[d..]);
                d += match value.len() / WIDTH {
                    4.. => self.columns::<L, E, 4>(lanes, weight, value, d, of, fade),
                    2..4 => self.columns::<L, E, 2>(lanes, weight, value, d, of, fade),
                    _ => self.columns::<L, E, 1>(lanes, weight, value, d, of, fade),
                };
            }
        }
    }

    /// N vectors of columns from `d`; answers the columns done.
    #[inline(always)]
    fn columns<L: Lanes, E: Element, const N: usize>(
        &self,
        lanes: L,
        weight: &[f32],
        value: &mut [f32],
        d: usize,
        of: (usize, usize),
        fade: f32,
    ) -> usize {
        assert!(value.len() >= N * WIDTH && d + N * WIDTH <= self.wide, "N vectors are left");
        let mut sums = [lanes.splat(0.0); N];
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: asserted above.
            let before = unsafe { lanes.load(value.as_ptr().wrapping_add(j * WIDTH)) };
            *sum = lanes.mul(before, lanes.splat(fade));
        }
        for position in of.0..of.1 {
            let weight = lanes.splat(weight[position]);
            for (j, sum) in sums.iter_mut().enumerate() {
                let offset = (d + j * WIDTH) * E::BYTES;
                // SAFETY: positions that a row sees are valid, and rows are `wide` elements long.
                let row = unsafe { E::load(lanes, self.rows.values[position].wrapping_add(offset)) };
                lanes.prefetch_far(self.next.values[position].wrapping_add(offset));
                *sum = lanes.fma(weight, row, *sum);
            }
        }
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: asserted above.
            unsafe { lanes.store(value.as_mut_ptr().wrapping_add(j * WIDTH), sum) };
        }
        N * WIDTH
    }
}

/// `weight[row][position] = query[row] · key[position]` for all 64 positions.
#[inline(always)]
fn scores<L: Lanes>(lanes: L, state: &mut State<'_>, keys: &[f32], rows: usize, wide: usize, dim: usize) {
    assert!(state.query.len() >= rows * wide && state.weight.len() >= rows * CHUNK, "state has these rows");
    assert!(keys.len() >= dim * CHUNK && dim <= wide, "a chunk of keys");
    let mut row = 0;
    while row < rows {
        let query = &state.query[row * wide..];
        let weight = &mut state.weight[row * CHUNK..];
        row += match rows - row {
            6.. if L::WIDE => scores_of::<L, 6>(lanes, query, keys, weight, wide, dim),
            3.. if !L::WIDE => scores_of::<L, 3>(lanes, query, keys, weight, wide, dim),
            2.. => scores_of::<L, 2>(lanes, query, keys, weight, wide, dim),
            _ => scores_of::<L, 1>(lanes, query, keys, weight, wide, dim),
        };
    }
}

/// M rows; answers M.
#[inline(always)]
fn scores_of<L: Lanes, const M: usize>(
    lanes: L,
    query: &[f32],
    keys: &[f32],
    weight: &mut [f32],
    wide: usize,
    dim: usize,
) -> usize {
    let width = WIDTH / L::PARTS;
    for first in (0..CHUNK).step_by(4 * width) {
        let mut sums = [[lanes.splat_part(0.0); 4]; M];
        for d in 0..dim {
            let mut key = [lanes.splat_part(0.0); 4];
            for (j, key) in key.iter_mut().enumerate() {
                // SAFETY: element `d * 64 + first + 4 width - 1` at most, inside the chunk of keys.
                *key = unsafe { lanes.load_part(keys.as_ptr().wrapping_add(d * CHUNK + first + j * width)) };
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
                // SAFETY: M rows of 64 weights.
                unsafe {
                    lanes.store_part(weight.as_mut_ptr().wrapping_add(i * CHUNK + first + j * width), sum)
                };
            }
        }
    }
    M
}

/// The part of a chunk that a row sees.
#[inline(always)]
fn clip(seen: (usize, usize), chunk: usize) -> (usize, usize) {
    (seen.0.saturating_sub(chunk).min(CHUNK), seen.1.saturating_sub(chunk).min(CHUNK))
}

/// Turns scores into weights relative to the largest score so far, and moves the running sums.
#[inline(always)]
fn soften<L: Lanes>(lanes: L, state: &mut State<'_>, chunk: usize, rows: usize) {
    assert!(state.weight.len() >= rows * CHUNK, "state has these rows");
    let mut change = [0.0; ROWS_MAX];
    for row in 0..rows {
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
        let most = state.most[row].max(lanes.largest(most));
        change[row] = state.most[row] - most;
        state.most[row] = most;
    }
    for first in (0..rows).step_by(WIDTH) {
        // SAFETY: ROWS_MAX is a multiple of 16.
        let change = unsafe { lanes.load(change.as_ptr().wrapping_add(first)) };
        // SAFETY: as above.
        unsafe { lanes.store(state.fade.as_mut_ptr().wrapping_add(first), lanes.exp(change)) };
    }
    for row in 0..rows {
        let (from, to) = clip(state.seen[row], chunk);
        if from >= to {
            continue;
        }
        let most = lanes.splat(state.most[row]);
        let mut total = lanes.splat(0.0);
        for j in 0..CHUNK / WIDTH {
            let at = state.weight[row * CHUNK + j * WIDTH..].as_mut_ptr();
            // SAFETY: sixteen of the row's 64 scores.
            let weight = lanes.exp(lanes.sub(unsafe { lanes.load(at) }, most));
            total = lanes.add(total, weight);
            // SAFETY: as above.
            unsafe { lanes.store(at, weight) };
        }
        state.total[row] = state.total[row] * state.fade[row] + lanes.sum(total);
    }
}

/// `value[row] = value[row] · fade[row] + Σ weight[row][position] · v[position]`, over what each row sees.
///
/// Rows go together over the positions that all of their group of up to six see; before and after that, at the edges
/// of the mask, each goes alone.
#[inline(always)]
fn add_values<L: Lanes>(
    lanes: L,
    state: &mut State<'_>,
    values: &[f32],
    chunk: usize,
    rows: usize,
    wide: usize,
) {
    assert!(state.value.len() >= rows * wide && state.weight.len() >= rows * CHUNK, "state has these rows");
    assert!(values.len() >= CHUNK * wide, "a chunk of values");
    let together = if L::WIDE { 6 } else { 3 };
    for first in (0..rows).step_by(together) {
        let count = together.min(rows - first);
        let seen = |row: usize| clip(state.seen[row], chunk);
        let start = (first..first + count).map(|row| seen(row).0).max().unwrap_or(0);
        let end = (first..first + count).map(|row| seen(row).1).min().unwrap_or(0).max(start);
        for part in [Part::Before, Part::Common, Part::After] {
            if let Part::Common = part {
                if start < end {
                    common(lanes, state, values, first, count, (start, end), wide);
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
                    accumulate::<L, 1>(lanes, state, values, row, of, wide);
                }
            }
        }
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
fn common<L: Lanes>(
    lanes: L,
    state: &mut State<'_>,
    values: &[f32],
    first: usize,
    count: usize,
    of: (usize, usize),
    wide: usize,
) {
    match count {
        6 if L::WIDE => accumulate::<L, 6>(lanes, state, values, first, of, wide),
        3 if !L::WIDE => accumulate::<L, 3>(lanes, state, values, first, of, wide),
        _ => {
            for row in (first..first + count / 2 * 2).step_by(2) {
                accumulate::<L, 2>(lanes, state, values, row, of, wide);
            }
            if count % 2 == 1 {
                accumulate::<L, 1>(lanes, state, values, first + count - 1, of, wide);
            }
        }
    }
}

/// Positions `of.0..of.1` for M rows, all columns; what was there before fades first.
#[inline(always)]
fn accumulate<L: Lanes, const M: usize>(
    lanes: L,
    state: &mut State<'_>,
    values: &[f32],
    row: usize,
    of: (usize, usize),
    wide: usize,
) {
    let width = WIDTH / L::PARTS;
    let mut fade = [1.0; M];
    // Only the first positions of a chunk meet what came before it.
    fade.swap_with_slice(&mut state.fade[row..row + M]);
    let weight = state.weight[row * CHUNK..].as_ptr();
    let value = state.value[row * wide..].as_mut_ptr();
    let mut column = 0;
    while column < wide {
        let (from, to) = (values.as_ptr().wrapping_add(column), value.wrapping_add(column));
        let left = (wide - column) / width;
        if left >= 4 {
            // SAFETY: the caller asserts M rows of state and 64 rows of values; `column + 4 width <= wide`.
            column += unsafe { columns::<L, M, 4>(lanes, weight, from, to, of, fade, wide) };
        } else if left >= 2 {
            // SAFETY: as above, with 2.
            column += unsafe { columns::<L, M, 2>(lanes, weight, from, to, of, fade, wide) };
        } else {
            // SAFETY: as above, with 1: `wide` is a multiple of 16.
            column += unsafe { columns::<L, M, 1>(lanes, weight, from, to, of, fade, wide) };
        }
    }
}

/// N registers of columns for M rows; answers the columns done.
///
/// # Safety
/// `weight` has M rows of 64; `values` has rows `of.0..of.1` and `value` has M rows, `wide` apart, each readable for N
/// registers.
#[inline(always)]
unsafe fn columns<L: Lanes, const M: usize, const N: usize>(
    lanes: L,
    weight: *const f32,
    values: *const f32,
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
            *part = unsafe { lanes.load_part(values.wrapping_add(position * wide + j * width)) };
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

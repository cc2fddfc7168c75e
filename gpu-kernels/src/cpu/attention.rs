//! Causal attention over blocks.
//!
//! Every query head reduces over the positions of its sequence in chunks of 64 that start at absolute position 0, in
//! ascending order, with the online softmax (arXiv 1805.02867): a running maximum, a running sum and a running
//! weighted sum of values. A score is summed over the head's elements in order; a value element over positions in
//! order. None of this knows the block size, the other queries, the chunking of the prompt or the threads, so neither
//! do the bits.
//!
//! What runs together is one kv head with up to 48 of its queries (tokens x heads of the group): K of a chunk is turned
//! once so that lanes run along positions, V is widened, and all queries pass over both. Where the queries are few, as
//! in generating, a thread takes several kv heads in turn, which lie beside each other in every block: then memory is
//! read in long runs.
#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

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
/// Up to so many rows read V where it lies, those of one group of heads with one token; more rows read it from scratch,
/// widened once.
const FEW: usize = 8;
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
    let tiles = tiles(workers.threads(), batch, &attention);
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

/// Queries of some kv heads of one span: of each head, rows `row..row + rows` of `query_len x group`, token by token.
#[derive(Clone, Copy)]
struct Tile {
    span: usize,
    kv_head: usize,
    /// Heads that lie one after the other in every block, so that memory is read in longer runs.
    kv_heads: usize,
    row: usize,
    /// Rows of each head.
    rows: usize,
    /// Positions that its last query sees, times rows: how long it takes.
    cost: usize,
}

/// All tiles, the longest first, so that none of them starts when the others are nearly done.
fn tiles(threads: usize, batch: &Batch, attention: &Attention) -> Vec<Tile> {
    let heads = attention.heads;
    let group = heads.query / heads.kv;
    // Every thread gets at least two tiles, if there are so many heads.
    let heads_max = (batch.spans.len() * heads.kv / (2 * threads)).clamp(1, heads.kv);
    let mut tiles = Vec::new();
    for (span, of_span) in batch.spans.iter().enumerate() {
        let all = of_span.query_len as usize * group;
        for row in (0..all).step_by(ROWS_MAX) {
            let rows = ROWS_MAX.min(all - row);
            let sees = of_span.context_len as usize - (of_span.context_len.min(of_span.query_len)) as usize
                + (row + rows) / group;
            let sees = attention.window.map_or(sees, |window| sees.min(window as usize + rows));
            let step = heads_max.min(ROWS_MAX / rows);
            for kv_head in (0..heads.kv).step_by(step) {
                let kv_heads = step.min(heads.kv - kv_head);
                tiles.push(Tile { span, kv_head, kv_heads, row, rows, cost: sees * (rows + 8) * kv_heads });
            }
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
    fade: [f32; ROWS_MAX + WIDTH],
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
        let rows = tile.rows * tile.kv_heads;
        let [query, value, weight, keys, values] =
            scratch.take([rows * wide, rows * wide, rows * CHUNK, wide * CHUNK, CHUNK * wide]);
        let mut state = State {
            seen: [(0, 0); ROWS_MAX],
            most: [f32::NEG_INFINITY; ROWS_MAX],
            total: [0.0; ROWS_MAX],
            fade: [1.0; ROWS_MAX + WIDTH],
            query,
            value,
            weight,
        };
        state.value.fill(0.0);
        let at = |row: usize| {
            let (kv_head, row) = (tile.kv_head + row / tile.rows, tile.row + row % tile.rows);
            let (token, head) = (row / group, kv_head * group + row % group);
            ((span.query_start as usize + token) * heads.query + head) * dim
        };
        for row in 0..rows {
            let end = (span.context_len as usize + (tile.row + row % tile.rows) / group + 1)
                .saturating_sub(span.query_len as usize);
            let start = attention.window.map_or(0, |window| end.saturating_sub(window as usize));
            state.seen[row] = (start, end);
            let to = &mut state.query[row * wide..][..dim];
            for (to, from) in to.iter_mut().zip(&q[at(row)..][..dim]) {
                *to = from * attention.scale;
            }
        }
        let (low, high) = (state.seen[0].0, state.seen[rows - 1].1);
        let pages = Pages { pool, table: batch.table(tile.span) };
        let valid = |chunk: usize| (low.max(chunk) - chunk, high.min(chunk + CHUNK).saturating_sub(chunk));
        let start = low / CHUNK * CHUNK;
        let (mut here, mut next) = ([0; CHUNK], [0; CHUNK]);
        if start < high {
            pages.offsets(start, valid(start), &mut here);
        }
        for chunk in (start..high).step_by(CHUNK) {
            if chunk + CHUNK < high {
                pages.offsets(chunk + CHUNK, valid(chunk + CHUNK), &mut next);
            }
            for index in 0..tile.kv_heads {
                let of_head = |index: usize| pages.head(layer, tile.kv_head + index);
                let last = index + 1 == tile.kv_heads;
                let of_chunk = Chunk {
                    planes: of_head(index),
                    here: &here,
                    planes_next: of_head(if last { 0 } else { index + 1 }),
                    next: if last { &next } else { &here },
                    valid: valid(chunk),
                    wide,
                };
                let many = tile.rows > FEW;
                match pool.shape.dtype {
                    Dtype::F32 => of_chunk.bring::<L, AsF32>(lanes, many, keys, values),
                    Dtype::Bf16 => of_chunk.bring::<L, AsBf16>(lanes, many, keys, values),
                    Dtype::F16 => of_chunk.bring::<L, AsF16>(lanes, many, keys, values),
                }
                let rows = (index * tile.rows, (index + 1) * tile.rows);
                scores(lanes, &mut state, keys, rows, wide, dim);
                soften(lanes, &mut state, chunk, rows);
                let of = (chunk, rows, wide);
                match pool.shape.dtype {
                    _ if many => add_values(lanes, &mut state, Widened { values, wide }, of),
                    Dtype::F32 => add_values(lanes, &mut state, InPlace::<AsF32>::of(&of_chunk), of),
                    Dtype::Bf16 => add_values(lanes, &mut state, InPlace::<AsBf16>::of(&of_chunk), of),
                    Dtype::F16 => add_values(lanes, &mut state, InPlace::<AsF16>::of(&of_chunk), of),
                }
            }
            here = next;
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

/// The cached rows of one span.
struct Pages<'a> {
    pool: &'a KvPool,
    table: &'a [u32],
}

/// Where the rows of a chunk begin in K, and in V alike: bytes from the first row of the head ([`Pages::head`]).
type Offsets = [usize; CHUNK];

impl Pages<'_> {
    /// The first row of a head in K and in V.
    #[inline(always)]
    fn head(&self, layer: usize, head: usize) -> [*const u8; 2] {
        let bytes = head * self.pool.layout.head_stride * self.pool.shape.dtype.bytes();
        [
            self.pool.plane(layer, 0).as_ptr().wrapping_add(bytes),
            self.pool.plane(layer, 1).as_ptr().wrapping_add(bytes),
        ]
    }

    /// The rows of positions `chunk + valid.0 .. chunk + valid.1`; where nobody looks, the first stands in.
    #[inline(always)]
    fn offsets(&self, chunk: usize, valid: (usize, usize), offsets: &mut Offsets) {
        let (layout, block_size) = (self.pool.layout, self.pool.shape.block_size);
        let bytes = self.pool.shape.dtype.bytes();
        let (mut block, mut token) = ((chunk + valid.0) / block_size, (chunk + valid.0) % block_size);
        let mut position = valid.0;
        while position < valid.1 {
            // The tokens of a block lie one after the other.
            let count = (block_size - token).min(valid.1 - position);
            let first = self.table[block] as usize * layout.page_stride + token * layout.token_stride;
            for (i, offset) in offsets[position..position + count].iter_mut().enumerate() {
                *offset = (first + i * layout.token_stride) * bytes;
            }
            position += count;
            (block, token) = (block + 1, 0);
        }
        let first = offsets[valid.0];
        offsets[..valid.0].fill(first);
        offsets[valid.1..].fill(first);
    }
}

/// A head's chunk on its way into registers and scratch, while the next one is asked for.
struct Chunk<'a> {
    /// The head's first rows of K and of V.
    planes: [*const u8; 2],
    here: &'a Offsets,
    planes_next: [*const u8; 2],
    next: &'a Offsets,
    /// Positions of the chunk that somebody sees.
    valid: (usize, usize),
    /// Elements of a row, a multiple of 16.
    wide: usize,
}

impl Chunk<'_> {
    /// Widens K, turned to `[wide][64]`, and for `many` rows V, as `[64][wide]`. What nobody sees is
    /// left as it was, or masked later.
    #[inline(always)]
    fn bring<L: Lanes, E: Element>(&self, lanes: L, many: bool, keys: &mut [f32], values: &mut [f32]) {
        assert!(
            keys.len() >= self.wide * CHUNK && values.len() >= self.wide * CHUNK,
            "scratch holds a chunk"
        );
        for first in (self.valid.0 / WIDTH * WIDTH..self.valid.1).step_by(WIDTH) {
            for d in (0..self.wide).step_by(WIDTH) {
                let mut rows = [std::ptr::null(); WIDTH];
                for i in 0..WIDTH {
                    rows[i] = self.planes[0].wrapping_add(self.here[first + i] + d * E::BYTES);
                }
                // SAFETY: rows are valid and `wide` elements long.
                let block = unsafe { E::turn(lanes, &rows) };
                for i in 0..WIDTH {
                    lanes.prefetch_far(self.planes_next[0].wrapping_add(self.next[first + i] + d * E::BYTES));
                    let to = keys.as_mut_ptr().wrapping_add((d + i) * CHUNK + first);
                    // SAFETY: `d + i < wide` and `first + 16 <= 64`: asserted above.
                    unsafe { lanes.store(to, block[i]) };
                }
            }
        }
        if !many {
            return;
        }
        for position in self.valid.0..self.valid.1 {
            for d in (0..self.wide).step_by(WIDTH) {
                let at = self.planes[1].wrapping_add(self.here[position] + d * E::BYTES);
                // SAFETY: rows are valid and `wide` elements long.
                let vector = unsafe { E::load(lanes, at) };
                lanes.prefetch_far(self.planes_next[1].wrapping_add(self.next[position] + d * E::BYTES));
                let to = values.as_mut_ptr().wrapping_add(position * self.wide + d);
                // SAFETY: asserted above.
                unsafe { lanes.store(to, vector) };
            }
        }
    }
}

/// `weight[row][position] = query[row] · key[position]` for all 64 positions.
#[inline(always)]
fn scores<L: Lanes>(
    lanes: L,
    state: &mut State<'_>,
    keys: &[f32],
    rows: (usize, usize),
    wide: usize,
    dim: usize,
) {
    assert!(
        state.query.len() >= rows.1 * wide && state.weight.len() >= rows.1 * CHUNK,
        "state has these rows"
    );
    assert!(keys.len() >= dim * CHUNK && dim <= wide, "a chunk of keys");
    let mut row = rows.0;
    while row < rows.1 {
        let query = &state.query[row * wide..];
        let weight = &mut state.weight[row * CHUNK..];
        row += match rows.1 - row {
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
fn soften<L: Lanes>(lanes: L, state: &mut State<'_>, chunk: usize, rows: (usize, usize)) {
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
        let most = state.most[row].max(lanes.largest(most));
        change[row] = state.most[row] - most;
        state.most[row] = most;
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
fn add_values<L: Lanes, V: Values>(
    lanes: L,
    state: &mut State<'_>,
    values: V,
    (chunk, rows, wide): (usize, (usize, usize), usize),
) {
    assert!(
        state.value.len() >= rows.1 * wide && state.weight.len() >= rows.1 * CHUNK,
        "state has these rows"
    );
    let together = match (L::WIDE, V::WIDENED) {
        (true, true) => 6,
        (true, false) => 4,
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
                    accumulate::<L, V, 1>(lanes, state, values, row, of, wide);
                }
            }
        }
    }
}

/// The rows of V of a chunk.
trait Values: Copy {
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
struct Widened<'a> {
    values: &'a [f32],
    wide: usize,
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
struct InPlace<'a, E> {
    values: *const u8,
    here: &'a Offsets,
    values_next: *const u8,
    next: &'a Offsets,
    element: PhantomData<E>,
}

impl<'a, E> InPlace<'a, E> {
    fn of(chunk: &Chunk<'a>) -> Self {
        Self {
            values: chunk.planes[1],
            here: chunk.here,
            values_next: chunk.planes_next[1],
            next: chunk.next,
            element: PhantomData,
        }
    }
}

impl<E: Element> Values for InPlace<'_, E> {
    const WIDENED: bool = false;

    #[inline(always)]
    unsafe fn part<L: Lanes>(&self, lanes: L, position: usize, column: usize) -> L::P {
        let offset = column * E::BYTES;
        lanes.prefetch_far(self.values_next.wrapping_add(self.next[position] + offset));
        // SAFETY: the caller's promise.
        unsafe { E::load_part(lanes, self.values.wrapping_add(self.here[position] + offset)) }
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
fn common<L: Lanes, V: Values>(
    lanes: L,
    state: &mut State<'_>,
    values: V,
    first: usize,
    count: usize,
    of: (usize, usize),
    wide: usize,
) {
    match count {
        6 if L::WIDE && V::WIDENED => accumulate::<L, V, 6>(lanes, state, values, first, of, wide),
        4 if L::WIDE => accumulate::<L, V, 4>(lanes, state, values, first, of, wide),
        3 => accumulate::<L, V, 3>(lanes, state, values, first, of, wide),
        _ => {
            for row in (first..first + count / 2 * 2).step_by(2) {
                accumulate::<L, V, 2>(lanes, state, values, row, of, wide);
            }
            if count % 2 == 1 {
                accumulate::<L, V, 1>(lanes, state, values, first + count - 1, of, wide);
            }
        }
    }
}

/// Positions `of.0..of.1` for M rows, all columns; what was there before fades first.
#[inline(always)]
fn accumulate<L: Lanes, V: Values, const M: usize>(
    lanes: L,
    state: &mut State<'_>,
    values: V,
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
        let to = value.wrapping_add(column);
        let left = (wide - column) / width;
        if left >= 4 {
            // SAFETY: the caller asserts M rows of state and 64 rows of values; `column + 4 width <= wide`.
            column += unsafe { columns::<L, V, M, 4>(lanes, weight, (values, column), to, of, fade, wide) };
        } else if left >= 2 {
            // SAFETY: as above, with 2.
            column += unsafe { columns::<L, V, M, 2>(lanes, weight, (values, column), to, of, fade, wide) };
        } else {
            // SAFETY: as above, with 1: `wide` is a multiple of 16.
            column += unsafe { columns::<L, V, M, 1>(lanes, weight, (values, column), to, of, fade, wide) };
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

//! Causal attention over blocks.
//!
//! Every query head reduces over the positions of its sequence in segments of 512 that start at absolute position 0,
//! and within them in chunks of 64, both in ascending order, with the online softmax (arXiv 1805.02867): a running
//! maximum, a running sum and a running weighted sum of values, of the segment and then of all before it. A score is
//! summed over the head's elements in order; a value element over the positions of a segment in order. None of this
//! knows the block size, the other queries, the chunking of the prompt or the threads, so neither do the bits.
//!
//! What runs together is one kv head with up to 96 of its queries (tokens x heads of the group). Where they are few, as
//! in generating, K is read in its panels and V in its rows, where they lie, and a thread takes several kv heads in
//! turn, which lie beside each other in every block: then memory is read in long runs. For many queries both are
//! widened once. Where there is too little else to share out, threads take segments of one sequence, and what they
//! found is merged in order.

mod call;
mod merge;
mod pages;
mod scores;
mod shaping;
mod state;
mod values;

pub(crate) use merge::merge_states;
pub(crate) use shaping::Shaping;
pub use shaping::{Floats, TreeMask};

use super::Isa;
use super::batch::Batch;
use super::eight_bits::{AsE4m3, AsInt8};
use super::lanes::{AsBf16, AsF16, AsF32, Element, InParts, Kernel, Lanes, WIDTH, dispatch};
use super::out::SharedOut;
use super::pool::{Form, KvPool, OfPlane, padded};
use super::scratch::Scratch;
use super::workers::Workers;
use crate::{Attention, Heads, Span};

use pages::{Chunk, Pages, Places};
use shaping::{Shape, scale};
use state::{State, Sums, base, exponentials, soften};
use values::{InPlace, Widened, add_values};

/// Positions that are reduced together.
const CHUNK: usize = 64;
/// Positions whose sums are complete before they meet those of other segments.
const SEGMENT: usize = 8 * CHUNK;
/// Up to so many rows read K and V where they lie, those of one group of heads with one token; more rows read them from
/// scratch, widened once.
const FEW: usize = 8;
/// Query rows (token x head of the group) that share a pass over K and V.
const ROWS_MAX: usize = 96;

/// What attention reads. All shapes and blocks are checked.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: usize,
    pub(crate) batch: &'a Batch,
    pub(crate) q: Queries<'a>,
    pub(crate) attention: Attention,
    pub(crate) shaping: Shaping<'a>,
    /// `[tokens, query heads]`, minus infinities.
    pub(crate) lse: Option<SharedOut>,
}

/// The queries of a step. Of latents, a query has elements that values have too, and others behind them.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[tokens, query heads * value_dim]`
    pub(crate) values: &'a [f32],
    /// Elements of a value, and of a head's output.
    pub(crate) value_dim: usize,
    /// `[tokens, query heads * (dim - value_dim)]`
    pub(crate) others: &'a [f32],
}

impl Queries<'_> {
    /// Elements from one head's values to the next: whole vectors.
    fn wide(&self) -> usize {
        padded(self.value_dim)
    }

    /// The query at a place, times `scale`.
    #[inline(always)]
    fn scaled(&self, place: usize, scale: f32, to: &mut [f32]) {
        let (values, others) = to.split_at_mut(self.value_dim);
        let behind = others.len();
        let parts = [
            (values, &self.values[place * self.value_dim..][..self.value_dim]),
            (others, &self.others[place * behind..][..behind]),
        ];
        for (to, from) in parts {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * scale);
        }
    }
}

/// `out` is `[tokens, query heads * value_dim]`. `memory` is to work in.
pub(crate) fn attention(
    (workers, isa): (&Workers, Isa),
    memory: &mut Scratch,
    step: Step<'_>,
    out: &mut [f32],
) {
    let Step { batch, attention, q, .. } = step;
    clear_uncovered(batch, attention.heads.query * q.value_dim, out);
    let out = SharedOut::new(out);
    let mut tiles = tiles(workers.threads(), &step);
    let size = cut(workers.threads(), q.wide(), &mut tiles);
    let [sums] = memory.take([size]);
    let sums = SharedOut::new(sums);
    let mut pieces: Vec<_> =
        tiles.iter().flat_map(|tile| (0..tile.parts).map(move |part| (tile, part))).collect();
    // The longest first, so that none of them starts when the others are nearly done.
    pieces.sort_by_key(|(tile, _)| std::cmp::Reverse(tile.cost / tile.parts));
    workers.run(pieces.len(), &|index, scratch| {
        let (tile, part) = pieces[index];
        dispatch(isa, Run { step, out, tile, part, sums, scratch });
    });
    let cut: Vec<_> = tiles.iter().filter(|tile| tile.parts > 1).collect();
    if !cut.is_empty() {
        workers.run(cut.len(), &|index, scratch| {
            dispatch(isa, Merge { step, out, tile: cut[index], sums, scratch });
        });
    }
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
struct Tile {
    span: Span,
    /// The span's number.
    index: usize,
    kv_head: usize,
    /// Heads that lie one after the other in every block, so that memory is read in longer runs.
    kv_heads: usize,
    row: usize,
    /// Rows of each head.
    rows: usize,
    /// Positions `low..high` are seen by somebody.
    low: usize,
    high: usize,
    /// Positions times rows: how long it takes.
    cost: usize,
    /// Into how many pieces its segments are cut.
    parts: usize,
    /// Where the sums of its first segment lie, if there are several pieces.
    sums: usize,
}

fn tiles(threads: usize, step: &Step<'_>) -> Vec<Tile> {
    let Step { batch, attention: Attention { heads, .. }, .. } = *step;
    let group = heads.query / heads.kv;
    // Every thread gets at least two tiles, if there are so many heads.
    let heads_max = (batch.spans.len() * heads.kv / (2 * threads)).clamp(1, heads.kv);
    let mut tiles = Vec::new();
    for (index, &span) in batch.spans.iter().enumerate() {
        let all = span.query_len as usize * group;
        for row in (0..all).step_by(ROWS_MAX) {
            let rows = ROWS_MAX.min(all - row);
            let (low, _) = seen(span, step, row / group);
            let (_, high) = seen(span, step, (row + rows - 1) / group);
            let step = heads_max.min(ROWS_MAX / rows);
            for kv_head in (0..heads.kv).step_by(step) {
                let kv_heads = step.min(heads.kv - kv_head);
                let cost = high.saturating_sub(low) * (rows + 8) * kv_heads;
                tiles.push(Tile {
                    span,
                    index,
                    kv_head,
                    kv_heads,
                    row,
                    rows,
                    low,
                    high,
                    cost,
                    parts: 1,
                    sums: 0,
                });
            }
        }
    }
    tiles
}

/// The first position that a query token of the span sees, and the one after its last.
fn seen(span: Span, Step { attention, shaping, .. }: &Step<'_>, token: usize) -> (usize, usize) {
    let end = (span.context_len as usize + token + 1).saturating_sub(span.query_len as usize);
    let start = attention.window.map_or(0, |window| end.saturating_sub(window as usize));
    (start, if shaping.causal { end } else { span.context_len as usize })
}

/// Cuts what is too long for one thread. Answers how much memory the sums take that have to be merged.
fn cut(threads: usize, wide: usize, tiles: &mut [Tile]) -> usize {
    let share = tiles.iter().map(|tile| tile.cost).sum::<usize>().div_ceil(2 * threads).max(1);
    let mut size = 0;
    for tile in tiles.iter_mut().filter(|_| threads > 1) {
        let segments = tile.segments();
        tile.parts = tile.cost.div_ceil(share).clamp(1, segments.len().max(1));
        if tile.parts > 1 {
            tile.sums = size;
            size += segments.len() * tile.sums_len(wide);
        }
    }
    size
}

impl Tile {
    /// The segments that somebody sees something of.
    fn segments(&self) -> std::ops::Range<usize> {
        self.low / SEGMENT..self.high.div_ceil(SEGMENT)
    }

    fn rows_all(&self) -> usize {
        self.rows * self.kv_heads
    }

    /// Elements that hold the sums of a segment.
    fn sums_len(&self, wide: usize) -> usize {
        self.rows_all() * wide + 2 * ROWS_MAX
    }

    /// Which token of the span a row is of, and which query head.
    #[inline(always)]
    fn token_and_head(&self, row: usize, heads: Heads) -> (usize, usize) {
        let group = heads.query / heads.kv;
        let (kv_head, row) = (self.kv_head + row / self.rows, self.row + row % self.rows);
        (row / group, kv_head * group + row % group)
    }

    /// The number of a row's head among those of all tokens: heads of `q` and of `out` lie in that order.
    #[inline(always)]
    fn place(&self, row: usize, heads: Heads) -> usize {
        let (token, head) = self.token_and_head(row, heads);
        (self.span.query_start as usize + token) * heads.query + head
    }
}

/// One piece of a tile.
struct Run<'a> {
    step: Step<'a>,
    out: SharedOut,
    tile: &'a Tile,
    part: usize,
    /// Sums of the segments of tiles that are cut.
    sums: SharedOut,
    scratch: &'a mut Scratch,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { step, out, tile, part, sums, scratch } = self;
        let Step { pool, q, attention, .. } = step;
        let (group, dim) = (attention.heads.query / attention.heads.kv, attention.heads.dim);
        let (wide, rows) = (pool.layout.wide, tile.rows_all());
        let sums_len = rows * q.wide();
        let [query, value, weight, all, keys, values] =
            scratch.take([rows * wide, sums_len, rows * CHUNK, sums_len, wide * CHUNK, CHUNK * wide]);
        let mut state = State {
            seen: [(0, 0); ROWS_MAX],
            sums: Sums::new(value),
            fade: [1.0; ROWS_MAX + WIDTH],
            query,
            weight,
        };
        for row in 0..rows {
            state.seen[row] = seen(tile.span, &step, (tile.row + row % tile.rows) / group);
            let (to, behind) = state.query[row * wide..][..wide].split_at_mut(dim);
            q.scaled(tile.place(row, attention.heads), attention.scale, to);
            behind.fill(0.0);
        }
        let mut all = Sums::new(all);
        let segments = tile.segments();
        let edge = |part: usize| segments.start + part * segments.len() / tile.parts;
        for segment in edge(part)..edge(part + 1) {
            state.sums.clear();
            let of = (tile.low.max(segment * SEGMENT), tile.high.min((segment + 1) * SEGMENT));
            self::segment(lanes, step, tile, &mut state, [&mut *keys, &mut *values], of);
            if tile.parts == 1 {
                all.merge(lanes, &state.sums, rows, q.wide());
            } else {
                let start = tile.sums + (segment - segments.start) * tile.sums_len(q.wide());
                // SAFETY: inside the sums, and of this segment of this tile alone.
                state.sums.save(unsafe { sums.slice(start, tile.sums_len(q.wide())) });
            }
        }
        if tile.parts == 1 {
            finish(lanes, tile, &step, &all, out);
        }
    }
}

/// All pieces of a tile become one.
struct Merge<'a> {
    step: Step<'a>,
    out: SharedOut,
    tile: &'a Tile,
    sums: SharedOut,
    scratch: &'a mut Scratch,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { step, out, tile, sums, scratch } = self;
        let (wide, rows) = (step.q.wide(), tile.rows_all());
        let [all] = scratch.take([rows * wide]);
        let mut all = Sums::new(all);
        let len = tile.sums_len(wide);
        for segment in 0..tile.segments().len() {
            // SAFETY: inside the sums, and this task alone reads those of this tile.
            let saved = unsafe { sums.slice(tile.sums + segment * len, len) };
            all.merge(lanes, &Sums::saved(saved), rows, wide);
        }
        finish(lanes, tile, &step, &all, out);
    }
}

/// Divides by the sums, with a sink among them if there is one.
#[inline(always)]
fn finish<L: Lanes>(lanes: L, tile: &Tile, step: &Step<'_>, all: &Sums<'_>, out: SharedOut) {
    let (wide, value_dim, heads) = (step.q.wide(), step.q.value_dim, step.attention.heads);
    for row in 0..tile.rows_all() {
        let (place, mut most, mut total, mut keep) =
            (tile.place(row, heads), all.most[row], all.total[row], 1.0);
        if let Some(sinks) = step.shaping.sinks {
            let sink = sinks[place % heads.query];
            let larger = most.max(sink);
            let [of_all, of_sink] = exponentials(lanes, [most - base(larger), sink - base(larger)]);
            (most, total, keep) = (larger, total * of_all + of_sink, of_all);
        }
        // SAFETY: this tile alone writes the elements of its rows, and `out` has so many for each.
        let to = unsafe { out.slice(place * value_dim, value_dim) };
        let scale = if total == 0.0 { 0.0 } else { keep / total };
        for (to, from) in to.iter_mut().zip(&all.value[row * wide..]) {
            *to = from * scale;
        }
        if let Some(lse) = step.lse.filter(|_| total > 0.0) {
            // SAFETY: as above, a number for each head of a token.
            let lse = unsafe { lse.slice(place, 1) };
            lse[0] = most + total.ln();
        }
    }
}

/// Positions `low..high`, all of one segment, for all heads of a tile.
#[inline(always)]
fn segment<L: Lanes>(
    lanes: L,
    step: Step<'_>,
    tile: &Tile,
    state: &mut State<'_>,
    [keys, values]: [&mut [f32]; 2],
    (low, high): (usize, usize),
) {
    let Step { pool, layer, batch, q, attention, shaping, .. } = step;
    let (dim, wide) = (attention.heads.dim, pool.layout.wide);
    let pages = Pages { pool, table: batch.table(tile.index) };
    let valid = |chunk: usize| (low.max(chunk) - chunk, high.min(chunk + CHUNK) - chunk);
    let start = low / CHUNK * CHUNK;
    let nowhere = Places { panels: [0; CHUNK / WIDTH], rows: [0; CHUNK] };
    let (mut here, mut next) = (nowhere, nowhere);
    if start < high {
        pages.places(start, valid(start), &mut here);
    }
    for chunk in (start..high).step_by(CHUNK) {
        if chunk + CHUNK < high {
            pages.places(chunk + CHUNK, valid(chunk + CHUNK), &mut next);
        }
        for index in 0..tile.kv_heads {
            let head = |index: usize, at| pages.head(layer, tile.kv_head + index, at);
            let last = index + 1 == tile.kv_heads;
            let of_chunk = Chunk {
                here: head(index, &here),
                next: if last { head(0, &next) } else { head(index + 1, &here) },
            };
            let rows = (index * tile.rows, (index + 1) * tile.rows);
            let few = tile.rows <= FEW && pool.form.bytes() > 1 && pool.latent_dim.is_none();
            let (of, mut scales) = ((chunk, valid(chunk)), [0.0; CHUNK]);
            match pool.form {
                Form::F32 if few && pages.in_panels() => {
                    scores::in_place::<L, AsF32>(lanes, state, of_chunk, rows, (wide, dim));
                }
                Form::Bf16 if few && pages.in_panels() => {
                    scores::in_place::<L, AsBf16>(lanes, state, of_chunk, rows, (wide, dim));
                }
                Form::F16 if few && pages.in_panels() => {
                    scores::in_place::<L, AsF16>(lanes, state, of_chunk, rows, (wide, dim));
                }
                form => {
                    match form {
                        Form::F32 => pages.widen_keys::<L, AsF32>(lanes, of, of_chunk, keys),
                        Form::Bf16 => pages.widen_keys::<L, AsBf16>(lanes, of, of_chunk, keys),
                        Form::F16 => pages.widen_keys::<L, AsF16>(lanes, of, of_chunk, keys),
                        Form::E4m3 => pages.widen_keys::<L, AsE4m3>(lanes, of, of_chunk, keys),
                        Form::Int8 => pages.widen_keys::<L, AsInt8>(lanes, of, of_chunk, keys),
                    }
                    scores::of_widened(lanes, state, (chunk, &*keys), rows, (wide, dim));
                }
            }
            if pages.scales((layer, 0, tile.kv_head + index), of, &mut scales) {
                scale(lanes, state, rows, &scales);
            }
            if shaping.changes_scores() {
                let heads = attention.heads;
                lanes.apart(Shape { shaping, tile, heads, state: &mut *state, chunk, rows });
            }
            soften(lanes, state, chunk, rows);
            if pages.scales((layer, 1, tile.kv_head + index), of, &mut scales) {
                scale(lanes, state, rows, &scales);
            }
            let to = (chunk, rows, q.wide());
            match pool.form {
                Form::F32 if few => add_values(lanes, state, InPlace::<AsF32>::of(&of_chunk), to),
                Form::Bf16 if few => add_values(lanes, state, InPlace::<AsBf16>::of(&of_chunk), to),
                Form::F16 if few => add_values(lanes, state, InPlace::<AsF16>::of(&of_chunk), to),
                form => {
                    match form {
                        Form::F32 => pages.widen_values::<L, AsF32>(lanes, of.1, of_chunk, values),
                        Form::Bf16 => pages.widen_values::<L, AsBf16>(lanes, of.1, of_chunk, values),
                        Form::F16 => pages.widen_values::<L, AsF16>(lanes, of.1, of_chunk, values),
                        Form::E4m3 => pages.widen_values::<L, AsE4m3>(lanes, of.1, of_chunk, values),
                        Form::Int8 => pages.widen_values::<L, AsInt8>(lanes, of.1, of_chunk, values),
                    }
                    add_values(lanes, state, Widened { values, wide }, to);
                }
            }
        }
        here = next;
    }
}

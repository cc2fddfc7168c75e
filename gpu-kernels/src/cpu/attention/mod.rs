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
//! turn, which lie beside each other in every block: then memory is read in long runs (`in_order.rs`). For many queries
//! both are widened once, or made pairs, which panels of K are already. Where there is too little else to share out,
//! threads take segments of one sequence, and what they found is merged in order.
//!
//! That is so whatever multiplies: f32 on any machine (`scores.rs`, `values.rs`), pairs of bf16 (`pairs.rs`) or matrix
//! tiles (`matrix.rs`) where the machine has them and K and V are exact in bf16.

mod call;
mod in_order;
#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
mod matrix;
mod merge;
mod pages;
mod pairs;
mod products;
mod scores;
mod segment;
mod shaping;
mod state;
#[cfg(test)]
mod tests;
mod tiles;
mod values;

pub(crate) use merge::merge_states;
pub(crate) use shaping::Shaping;
pub use shaping::{Floats, TreeMask};

use super::Isa;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::Hardware;
use super::batch::Batch;
use super::eight_bits::{AsE4m3, AsInt8};
use super::lanes::{AsBf16, AsF16, AsF32, Element, InParts, Kernel, Lanes, WIDTH, dispatch, dispatch_pairs};
use super::out::SharedOut;
use super::pool::{Form, KvPool, Layout, OfPlane, padded};
use super::scratch::Scratch;
use super::workers::Workers;
use crate::Attention;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use matrix::OnTiles;
use pairs::InPairs;
use products::{InF32, Products};
use state::{State, Sums, base, exponentials};
use tiles::{Tile, cut, seen, tiles};

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
    let with = (workers, isa);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let (Isa::Amx, true, Some(unit)) = (isa, step.pool.of_bf16(), Hardware::get()) {
        return attention_by(OnTiles(unit), with, memory, step, out);
    }
    if isa.multiplies_pairs() && step.pool.of_bf16() {
        attention_by(InPairs, with, memory, step, out);
    } else {
        attention_by(InF32, with, memory, step, out);
    }
}

/// The same by this arithmetic.
fn attention_by<P: Products + Sync>(
    by: P,
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
        let run = Run { by, step, out, tile, part, sums, scratch };
        if P::PAIRS { dispatch_pairs(isa, run) } else { dispatch(isa, run) }
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

/// One piece of a tile.
struct Run<'a, P> {
    by: P,
    step: Step<'a>,
    out: SharedOut,
    tile: &'a Tile,
    part: usize,
    /// Sums of the segments of tiles that are cut.
    sums: SharedOut,
    scratch: &'a mut Scratch,
}

impl<P: Products> Kernel for Run<'_, P> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { by, step, out, tile, part, sums, scratch } = self;
        let Step { pool, q, attention, .. } = step;
        let (group, dim) = (attention.heads.query / attention.heads.kv, attention.heads.dim);
        let (wide, rows) = (pool.layout.wide, tile.rows_all());
        let sums_len = Sums::len(rows, q.wide());
        let [query, value, weight, all, chunk, work] =
            scratch.take([rows * wide, sums_len, rows * CHUNK, sums_len, wide * CHUNK, P::room(wide)]);
        let mut state = State {
            seen: [(0, 0); ROWS_MAX],
            sums: Sums::new(value, rows),
            fade: [1.0; ROWS_MAX + WIDTH],
            query,
            weight,
        };
        for row in 0..rows {
            state.seen[row] = seen(tile.span, &step, (tile.row + row % tile.rows) / group);
            let (to, behind) = state.query[row * wide..][..wide].split_at_mut(dim);
            // Queries that are bf16 stay what they are: scores are scaled then.
            let scale = if P::PAIRS { 1.0 } else { attention.scale };
            q.scaled(tile.place(row, attention.heads), scale, to);
            behind.fill(0.0);
        }
        if P::PAIRS {
            pairs::round_rows(lanes, state.query, wide);
        }
        let mut all = Sums::new(all, rows);
        let mut room = [chunk, work];
        by.begin();
        let segments = tile.segments();
        let edge = |part: usize| segments.start + part * segments.len() / tile.parts;
        for segment in edge(part)..edge(part + 1) {
            state.sums.clear();
            let of = (tile.low.max(segment * SEGMENT), tile.high.min((segment + 1) * SEGMENT));
            segment::segment((lanes, by), step, tile, &mut state, &mut room, of);
            if tile.parts == 1 {
                all.merge(lanes, &state.sums, rows, q.wide());
            } else {
                let start = tile.sums + (segment - segments.start) * tile.sums_len(q.wide());
                // SAFETY: inside the sums, and of this segment of this tile alone.
                state.sums.save(unsafe { sums.slice(start, tile.sums_len(q.wide())) });
            }
        }
        by.end();
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
        let [all] = scratch.take([Sums::len(rows, wide)]);
        let mut all = Sums::new(all, rows);
        let len = tile.sums_len(wide);
        for segment in 0..tile.segments().len() {
            // SAFETY: inside the sums, and this task alone reads those of this tile.
            let saved = unsafe { sums.slice(tile.sums + segment * len, len) };
            all.merge(lanes, &Sums::saved(saved, rows), rows, wide);
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
            (tile.place(row, heads), all.most[row], all.total(lanes, row), 1.0);
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

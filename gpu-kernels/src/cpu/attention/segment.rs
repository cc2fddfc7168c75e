//! The positions of a segment, chunk by chunk: scores of all heads of a tile, their weights, weighted sums of values.
//!
//! Heads lie one after the other in every block, so each of the three goes through all of them: K and V are read in
//! long runs, and what comes next is asked for meanwhile, of V by the last head's K and of the next chunk's K by the
//! last head's V. Where heads have few rows, K and V are even read in the order of memory (`in_order.rs`).

use super::in_order::InOrder;
use super::pages::{Chunk, Pages, Places};
use super::pairs::Dims;
use super::products::{InF32, Products};
use super::shaping::{Shape, scale};
use super::state::{State, soften};
use super::tiles::Tile;
use super::values::{InPlace, add_values};
use super::{AsBf16, AsE4m3, AsF16, AsF32, AsInt8, CHUNK, FEW, Form, Lanes, Step, WIDTH, pairs, scores};

/// Positions `low..high`, all of one segment, for all heads of a tile. `scratch` has room for K or V of a chunk, and
/// what the products ask for.
#[inline(always)]
pub(super) fn segment<L: Lanes, P: Products>(
    (lanes, by): (L, P),
    step: Step<'_>,
    tile: &Tile,
    state: &mut State<'_>,
    scratch: &mut [&mut [f32]; 2],
    (low, high): (usize, usize),
) {
    let Step { pool, layer, batch, shaping, .. } = step;
    let pages = Pages { pool, table: batch.table(tile.index) };
    let valid = |chunk: usize| (low.max(chunk) - chunk, high.min(chunk + CHUNK) - chunk);
    let start = low / CHUNK * CHUNK;
    let nowhere = Places { panels: [0; CHUNK / WIDTH], rows: [0; CHUNK] };
    let (mut here, mut next) = (nowhere, nowhere);
    if start < high {
        pages.places(start, valid(start), &mut here);
    }
    let few = P::IN_PLACE && tile.rows <= FEW && pool.form.bytes() > 1 && pool.latent_dim.is_none();
    let in_order = P::PAIRS && few && pool.form == Form::Bf16;
    let parts = if in_order { pages.parts(tile.kv_heads) } else { None };
    let dims = Dims { dim: pool.shape.head_dim, wide: pool.layout.wide, scale: step.attention.scale };
    let rows = |index: usize| (index * tile.rows, (index + 1) * tile.rows);
    let all = (0, tile.rows_all());
    for chunk in (start..high).step_by(CHUNK) {
        if chunk + CHUNK < high {
            pages.places(chunk + CHUNK, valid(chunk + CHUNK), &mut next);
        }
        let (of, mut scales) = ((chunk, valid(chunk)), [0.0; CHUNK]);
        let head = |index: usize| pages.head(layer, tile.kv_head + index, &here);
        let of_head = |index: usize, next| OfHead {
            of,
            chunk: Chunk { here: head(index), next },
            rows: rows(index),
            few,
        };
        let in_order =
            parts.as_ref().map(|parts| InOrder::new(&pages, (layer, tile.kv_head), parts, [&here, &next]));
        if let Some(in_order) = in_order {
            in_order.scores(lanes, state, (tile.rows, dims));
        } else {
            for index in 0..tile.kv_heads {
                let last = index + 1 == tile.kv_heads;
                let after = if last { head(0).values_as_keys() } else { head(index + 1) };
                scores_of_head((lanes, by), &pages, state, scratch, of_head(index, after), dims);
                if pages.scales((layer, 0, tile.kv_head + index), of, &mut scales) {
                    scale(lanes, state, rows(index), &scales);
                }
            }
        }
        if shaping.changes_scores() {
            let heads = step.attention.heads;
            lanes.apart(Shape { shaping, tile, heads, state: &mut *state, chunk, rows: all });
        }
        soften::<L, P>(lanes, state, chunk, all);
        if let Some(in_order) = in_order {
            in_order.add_values(lanes, state, (chunk, tile.rows, step.q.wide()));
        } else {
            let of_next = pages.head(layer, tile.kv_head, &next).keys_as_values();
            for index in 0..tile.kv_heads {
                let last = index + 1 == tile.kv_heads;
                let after = if last { of_next } else { head(index + 1) };
                if pages.scales((layer, 1, tile.kv_head + index), of, &mut scales) {
                    scale(lanes, state, rows(index), &scales);
                }
                values_of_head((lanes, by), &pages, state, scratch, of_head(index, after), step.q.wide());
            }
        }
        here = next;
    }
}

/// A chunk of a kv head, and the rows of a tile that look at it.
#[derive(Clone, Copy)]
struct OfHead<'a> {
    /// Its first position, and the part of it that somebody sees.
    of: (usize, (usize, usize)),
    chunk: Chunk<'a>,
    rows: (usize, usize),
    /// Whether they are so few that K and V are read where they lie.
    few: bool,
}

/// The scores of a kv head's rows over a chunk.
#[inline(always)]
fn scores_of_head<L: Lanes, P: Products>(
    (lanes, by): (L, P),
    pages: &Pages<'_>,
    state: &mut State<'_>,
    [scratch, room]: &mut [&mut [f32]; 2],
    OfHead { of, chunk, rows, few }: OfHead<'_>,
    dims: Dims,
) {
    let to = (dims.wide, dims.dim);
    match pages.pool.form {
        // Nothing is won by gathering pairs of panels: they are what lies there.
        Form::Bf16 if P::PAIRS && P::IN_PLACE && pages.in_panels() => {
            pairs::scores_in_place(lanes, state, chunk, (of.0, rows), dims);
        }
        Form::F32 if few && pages.in_panels() => {
            scores::in_place::<L, AsF32>(lanes, state, chunk, rows, to);
        }
        Form::Bf16 if few && pages.in_panels() => {
            scores::in_place::<L, AsBf16>(lanes, state, chunk, rows, to);
        }
        Form::F16 if few && pages.in_panels() => {
            scores::in_place::<L, AsF16>(lanes, state, chunk, rows, to);
        }
        form => {
            match form {
                Form::F32 => pages.gather_keys::<L, AsF32, InF32>(lanes, of, chunk, scratch),
                Form::Bf16 => pages.gather_keys::<L, AsBf16, P>(lanes, of, chunk, scratch),
                Form::F16 => pages.gather_keys::<L, AsF16, InF32>(lanes, of, chunk, scratch),
                Form::E4m3 => pages.gather_keys::<L, AsE4m3, P>(lanes, of, chunk, scratch),
                Form::Int8 => pages.gather_keys::<L, AsInt8, P>(lanes, of, chunk, scratch),
            }
            by.scores(lanes, room, state, (of.0, *scratch), rows, dims);
        }
    }
}

/// The values of a chunk, weighted, go to the sums of a kv head's rows.
#[inline(always)]
fn values_of_head<L: Lanes, P: Products>(
    (lanes, by): (L, P),
    pages: &Pages<'_>,
    state: &mut State<'_>,
    [scratch, room]: &mut [&mut [f32]; 2],
    OfHead { of, chunk, rows, few }: OfHead<'_>,
    columns: usize,
) {
    let to = (of.0, rows, columns);
    match pages.pool.form {
        Form::Bf16 if P::PAIRS && few => pairs::values_in_place(lanes, state, chunk, to),
        Form::F32 if few => add_values(lanes, state, InPlace::<AsF32>::of(&chunk), to),
        Form::Bf16 if few => add_values(lanes, state, InPlace::<AsBf16>::of(&chunk), to),
        Form::F16 if few => add_values(lanes, state, InPlace::<AsF16>::of(&chunk), to),
        form => {
            match form {
                Form::F32 => pages.gather_values::<L, AsF32, InF32>(lanes, of.1, chunk, scratch),
                Form::Bf16 => pages.gather_values::<L, AsBf16, P>(lanes, of.1, chunk, scratch),
                Form::F16 => pages.gather_values::<L, AsF16, InF32>(lanes, of.1, chunk, scratch),
                Form::E4m3 => pages.gather_values::<L, AsE4m3, P>(lanes, of.1, chunk, scratch),
                Form::Int8 => pages.gather_values::<L, AsInt8, P>(lanes, of.1, chunk, scratch),
            }
            let to = (of.0, rows, [columns, pages.pool.layout.wide]);
            by.add_values(lanes, room, state, (*scratch, of.1), to);
        }
    }
}

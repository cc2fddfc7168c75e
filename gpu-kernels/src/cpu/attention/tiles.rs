//! What threads share out: queries of a span, and the pieces that long contexts are cut into.

use super::state::Sums;
use super::{ROWS_MAX, SEGMENT, Step};
use crate::{Attention, Heads, Span};

/// Queries of some kv heads of one span: of each head, rows `row..row + rows` of `query_len x group`, token by token.
pub(super) struct Tile {
    pub(super) span: Span,
    /// The span's number.
    pub(super) index: usize,
    pub(super) kv_head: usize,
    /// Heads that lie one after the other in every block, so that memory is read in longer runs.
    pub(super) kv_heads: usize,
    pub(super) row: usize,
    /// Rows of each head.
    pub(super) rows: usize,
    /// Positions `low..high` are seen by somebody.
    pub(super) low: usize,
    pub(super) high: usize,
    /// Positions times rows: how long it takes.
    pub(super) cost: usize,
    /// Into how many pieces its segments are cut.
    pub(super) parts: usize,
    /// Where the sums of its first segment lie, if there are several pieces.
    pub(super) sums: usize,
}

pub(super) fn tiles(threads: usize, step: &Step<'_>) -> Vec<Tile> {
    let Step { batch, attention: Attention { heads, .. }, .. } = *step;
    let group = heads.query / heads.kv;
    // Every thread gets two tiles at least, or four segments, which `cut` shares out, if there are heads enough.
    let segments = |&span: &Span| {
        let last = (span.query_len as usize).saturating_sub(1);
        let (low, high) = (seen(span, step, 0).0, seen(span, step, last).1);
        high.div_ceil(SEGMENT).saturating_sub(low / SEGMENT)
    };
    let pieces = (2 * batch.spans.len()).max(batch.spans.iter().map(segments).sum());
    let heads_max = (pieces * heads.kv / (4 * threads)).clamp(1, heads.kv);
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
pub(super) fn seen(span: Span, Step { attention, shaping, .. }: &Step<'_>, token: usize) -> (usize, usize) {
    let end = (span.context_len as usize + token + 1).saturating_sub(span.query_len as usize);
    let start = attention.window.map_or(0, |window| end.saturating_sub(window as usize));
    (start, if shaping.causal { end } else { span.context_len as usize })
}

/// Cuts what is too long for one thread. Answers how much memory the sums take that have to be merged.
pub(super) fn cut(threads: usize, wide: usize, tiles: &mut [Tile]) -> usize {
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
    pub(super) fn segments(&self) -> std::ops::Range<usize> {
        self.low / SEGMENT..self.high.div_ceil(SEGMENT)
    }

    pub(super) fn rows_all(&self) -> usize {
        self.rows * self.kv_heads
    }

    /// Elements that hold the sums of a segment.
    pub(super) fn sums_len(&self, wide: usize) -> usize {
        Sums::saved_len(self.rows_all(), wide)
    }

    /// Which token of the span a row is of, and which query head.
    #[inline(always)]
    pub(super) fn token_and_head(&self, row: usize, heads: Heads) -> (usize, usize) {
        let group = heads.query / heads.kv;
        let (kv_head, row) = (self.kv_head + row / self.rows, self.row + row % self.rows);
        (row / group, kv_head * group + row % group)
    }

    /// The number of a row's head among those of all tokens: heads of `q` and of `out` lie in that order.
    #[inline(always)]
    pub(super) fn place(&self, row: usize, heads: Heads) -> usize {
        let (token, head) = self.token_and_head(row, heads);
        (self.span.query_start as usize + token) * heads.query + head
    }
}

//! Which thread block attends to what: a step's tiles of query rows, cut along the context to fill the machine.

use std::cmp::Reverse;

use crate::Span;

/// Positions that the kernels for all GPUs add up together. As `CHUNK` of `kernels/softmax.cuh`.
pub const CHUNK: u32 = 256;

/// Rows of a tile of the small shape, which splits a tile's positions among its warps.
pub const ROWS_FEW: u32 = 16;
/// Rows of a tile of the large shape, which splits rows.
pub const ROWS_MANY: u32 = 64;

/// What of a layer's attention decides how a step is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cut {
    /// Query heads per kv head: rows per token.
    pub group: u32,
    /// Kv heads: each is worked on alone.
    pub kv_heads: u32,
    /// Positions that a query sees, its own included; 0 is all before it.
    pub window: u32,
    /// Whether a query sees nothing after itself.
    pub causal: bool,
    /// Rows of a tile of a span that has more than [`ROWS_FEW`]: [`ROWS_MANY`], or what the kernel at hand has.
    pub rows_many: u32,
    /// Positions that are added up together, from the first on; cuts are made at their multiples: [`CHUNK`], or what
    /// the kernel at hand has.
    pub chunk: u32,
    /// Blocks that the machine runs at once.
    pub slots: u32,
}

/// A tile of query rows and a range of chunks, for one kv head after the other. As `Item` of `kernels/attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Item {
    /// Index of the span.
    pub span: u32,
    /// First row: token · group + head, from the span's start.
    pub row: u32,
    /// First chunk.
    pub chunk_first: u32,
    /// One after the last chunk.
    pub chunk_last: u32,
    /// Where the first chunk's result goes; [`Item::WHOLE`]: all chunks are here and the result is final.
    pub partial: u32,
}

impl Item {
    /// Marks an item that holds all chunks of its rows.
    pub const WHOLE: u32 = u32::MAX;
}

/// Partial results to add up. As `MergeTile` of `kernels/merge.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Merge {
    /// First partial result.
    pub partial: u32,
    /// How many.
    pub count: u32,
    /// First row of the span in the step.
    pub query_start: u32,
    /// First row of the tile in the span.
    pub row: u32,
    /// Rows of the tile.
    pub rows: u32,
}

/// The work of one block shape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// The longest first, so that none starts when the others are nearly done.
    pub items: Vec<Item>,
    /// Tiles that were cut.
    pub merges: Vec<Merge>,
    /// Partial results of all of them, each of `ROWS` rows and all kv heads.
    pub partials: u32,
}

/// A step's work: tiles of [`ROWS_FEW`] rows, and of [`ROWS_MANY`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Spans of few rows: decoding.
    pub few: Work,
    /// Spans of many: prompts.
    pub many: Work,
}

/// Cuts a step. Results do not depend on how: chunks are added in the same order wherever that happens.
///
/// The block shapes run one after the other, so each is cut by itself. Cost: linear in items, and a sort.
#[must_use]
pub fn plan(spans: &[Span], cut: Cut) -> Plan {
    let (mut few, mut many) = (Vec::with_capacity(spans.len()), Vec::new());
    for (index, span) in (0..).zip(spans) {
        let rows = span.query_len * cut.group;
        if rows <= ROWS_FEW {
            cut_rows(index, span, cut, ROWS_FEW, &mut few);
        } else {
            cut_rows(index, span, cut, cut.rows_many, &mut many);
        }
    }
    Plan { few: Work::of(few, cut), many: Work::of(many, cut) }
}

/// Lengths up to which items are counted, not compared.
const COUNTED: usize = 4096;

/// Puts items in the order of their length, the longest first, and equal ones as they come.
fn longest_first(items: &mut Vec<Item>) {
    let length = |item: &Item| (item.chunk_last - item.chunk_first) as usize;
    let (mut least, mut most) = (usize::MAX, 0);
    for item in &*items {
        (least, most) = (least.min(length(item)), most.max(length(item)));
    }
    if least >= most {
        return;
    }
    if most - least > COUNTED {
        items.sort_by_key(|item| Reverse(length(item)));
        return;
    }
    let mut starts = vec![0_u32; most - least + 2];
    for item in &*items {
        starts[most - length(item) + 1] += 1;
    }
    for i in 1..starts.len() {
        starts[i] += starts[i - 1];
    }
    let mut ordered = items.clone();
    for item in &*items {
        let place = &mut starts[most - length(item)];
        ordered[*place as usize] = *item;
        *place += 1;
    }
    *items = ordered;
}

impl Work {
    /// A tile is cut when it holds more than an even share of all chunks, into pieces of at most that share.
    fn of(tiles: Vec<Tile>, cut: Cut) -> Self {
        let all: u64 =
            tiles.iter().map(|tile| u64::from(tile.chunks())).sum::<u64>() * u64::from(cut.kv_heads);
        let share = u32::try_from(all.div_ceil(u64::from(cut.slots.max(1)))).unwrap_or(u32::MAX).max(1);
        let mut work = Self { items: Vec::with_capacity(tiles.len()), ..Self::default() };
        for tile in tiles {
            work.add(tile, share);
        }
        longest_first(&mut work.items);
        work
    }

    fn add(&mut self, tile: Tile, share: u32) {
        let Tile { span, row, rows, first, last, query_start } = tile;
        if tile.chunks() <= share {
            self.items.push(Item { span, row, chunk_first: first, chunk_last: last, partial: Item::WHOLE });
            return;
        }
        let pieces = tile.chunks().div_ceil(share);
        let length = tile.chunks().div_ceil(pieces);
        for start in (first..last).step_by(length as usize) {
            let partial = self.partials + start - first;
            let end = last.min(start + length);
            self.items.push(Item { span, row, chunk_first: start, chunk_last: end, partial });
        }
        self.merges.push(Merge { partial: self.partials, count: tile.chunks(), query_start, row, rows });
        self.partials += tile.chunks();
    }
}

#[derive(Clone, Copy)]
struct Tile {
    span: u32,
    query_start: u32,
    row: u32,
    rows: u32,
    /// Chunks `first..last` hold all that the tile's rows see.
    first: u32,
    last: u32,
}

impl Tile {
    fn chunks(&self) -> u32 {
        self.last - self.first
    }
}

/// Adds the tiles of a span.
fn cut_rows(index: u32, span: &Span, cut: Cut, tile_rows: u32, tiles: &mut Vec<Tile>) {
    let (all, mut row) = (span.query_len * cut.group, 0);
    while row < all {
        let rows = tile_rows.min(all - row);
        // Most spans are one tile, which needs no division.
        let (first_token, last_token) = if rows == all {
            (0, span.query_len - 1)
        } else {
            (row / cut.group, (row + rows - 1) / cut.group)
        };
        // One past the position of a token; 0 when it lies before the context.
        let reach = |token: u32| (span.context_len + token + 1).saturating_sub(span.query_len);
        let high = if cut.causal { reach(last_token) } else { span.context_len };
        let low = if cut.window == 0 { 0 } else { reach(first_token).saturating_sub(cut.window) };
        let last = high.div_ceil(cut.chunk);
        let first = (low / cut.chunk).min(last);
        tiles.push(Tile { span: index, query_start: span.query_start, row, rows, first, last });
        row += rows;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use super::*;

    fn cut() -> Cut {
        let (rows_many, chunk, slots) = (ROWS_MANY, CHUNK, 264);
        Cut { group: 4, kv_heads: 8, window: 0, causal: true, rows_many, chunk, slots }
    }

    fn decode(contexts: impl IntoIterator<Item = u32>) -> Vec<Span> {
        let span = |(row, context_len)| Span { query_start: row, query_len: 1, context_len };
        (0..).zip(contexts).map(span).collect()
    }

    /// How often each chunk of each tile is computed; tiles without a context count chunk 0 once.
    fn covered(work: &Work) -> BTreeMap<(u32, u32), Vec<u32>> {
        let mut covered: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        for item in &work.items {
            covered.entry((item.span, item.row)).or_default().extend(item.chunk_first..item.chunk_last);
        }
        covered.values_mut().for_each(|chunks| chunks.sort_unstable());
        covered
    }

    #[test]
    fn every_chunk_of_every_row_is_computed_once() {
        let lengths = [(1, 1), (1, 256), (1, 257), (17, 300), (500, 9000), (3, 0), (0, 5), (40, 2)];
        let mut spans = Vec::new();
        for (query_len, context_len) in lengths {
            let query_start = spans.last().map_or(0, |span: &Span| span.query_start + span.query_len);
            spans.push(Span { query_start, query_len, context_len });
        }
        for slots in [1, 7, 264] {
            let plan = plan(&spans, Cut { slots, ..cut() });
            let mut rows: BTreeMap<u32, u32> = BTreeMap::new();
            for (work, tile) in [(&plan.few, ROWS_FEW), (&plan.many, ROWS_MANY)] {
                for ((span, row), chunks) in covered(work) {
                    let Span { query_len, context_len, .. } = spans[span as usize];
                    let last_token = (row + tile).min(query_len * 4).div_ceil(4);
                    let sees = (context_len + last_token).saturating_sub(query_len);
                    let expected: Vec<u32> = (0..sees.div_ceil(CHUNK)).collect();
                    assert_eq!(chunks, expected, "{slots} slots, span {span}, row {row}");
                    *rows.entry(span).or_default() += tile.min(query_len * 4 - row);
                }
                let partials: u32 = work.merges.iter().map(|merge| merge.count).sum();
                assert_eq!(partials, work.partials);
            }
            for (index, span) in (0..).zip(&spans) {
                assert_eq!(rows.get(&index).copied().unwrap_or(0), span.query_len * 4, "span {index}");
            }
        }
    }

    #[test]
    fn a_long_context_among_short_ones_is_cut_to_an_even_share() {
        let plan = plan(&decode([131_072].into_iter().chain(std::iter::repeat_n(1000, 63))), cut());
        let all: u32 = plan.few.items.iter().map(|item| item.chunk_last - item.chunk_first).sum();
        let share = (all * 8).div_ceil(264);
        assert!(plan.few.items.iter().all(|item| item.chunk_last - item.chunk_first <= share));
        assert_eq!(plan.few.merges.len(), 1);
        assert!(plan.many.items.is_empty());
    }

    #[test]
    fn a_full_machine_cuts_nothing() {
        let plan = plan(&decode([4096; 64]), cut());
        assert!(plan.few.merges.is_empty());
        assert!(plan.few.items.iter().all(|item| item.partial == Item::WHOLE));
    }

    #[test]
    fn a_window_leaves_out_what_nobody_sees() {
        let plan = plan(&decode([4096]), Cut { window: 128, ..cut() });
        assert_eq!(plan.few.items.iter().map(|item| item.chunk_first).min(), Some(15));
    }

    #[test]
    fn prompts_are_cut_to_shares_of_their_own() {
        let prompt = Span { query_start: 0, query_len: 64, context_len: 131_072 };
        let of_both = plan(&[&[prompt][..], &decode([4096; 64])].concat(), cut());
        assert_eq!(of_both, Plan { few: of_both.few.clone(), ..plan(&[prompt], cut()) });
        assert!(of_both.many.merges.len() > 1);
    }

    #[test]
    fn spans_of_many_rows_stay_with_their_kind_when_their_tiles_are_small() {
        let plan = plan(
            &[Span { query_start: 0, query_len: 8, context_len: 64 }],
            Cut { rows_many: ROWS_FEW, ..cut() },
        );
        assert!(plan.few.items.is_empty());
        assert_eq!(plan.many.items.len(), 2);
    }

    #[test]
    #[ignore = "a measurement: --release, --nocapture"]
    fn time_of_a_plan() {
        for (name, spans) in [
            ("1 x 1k", decode([1024])),
            ("64 x 4k", decode([4096; 64])),
            ("256 x 1k..5k", decode((0..256).map(|i| 1024 + i * 16))),
            ("1 x 128k + 63 x 1k", decode([131_072].into_iter().chain([1000; 63]))),
        ] {
            let mut times: Vec<_> = (0..2001)
                .map(|_| {
                    let start = Instant::now();
                    std::hint::black_box(plan(std::hint::black_box(&spans), cut()));
                    start.elapsed()
                })
                .collect();
            times.sort_unstable();
            println!("plan of {name}: median {:?}", times[1000]);
        }
    }
}

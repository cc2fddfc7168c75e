//! K and V in the order of memory, in pairs of bf16, where every kv head of a tile has one row: generating, with as
//! many kv heads as query heads.
//!
//! In every block the heads lie one after the other, so sixteen positions of one head, then of the next, are one long
//! run, and of blocks that follow each other so are all: then one thread reads nearly as fast as the memory gives. What
//! lies four such parts further on is asked for meanwhile: after the last of K the chunk's V, after the last of V the
//! next chunk's K. Sums keep their order, and so their bits. With several rows to a head this was slower: their sums
//! wait for each other in one panel, where four of a head have room in registers (`pairs.rs`).

use super::pages::{Pages, Part, Places};
use super::pairs::{self, Dims, LINE, PANELS, add_values, round_rows};
use super::state::State;
use super::{CHUNK, Kernel, Lanes, WIDTH};

/// The two planes of a layer.
const KEYS: usize = 0;
const VALUES: usize = 1;

/// A chunk of all heads of a tile.
#[derive(Clone, Copy)]
pub(super) struct InOrder<'a> {
    /// Parts of a chunk in the order of memory ([`Pages::parts`]).
    parts: &'a [Part],
    /// Where K and V of the tile's first head lie, and bytes from there to the next head's.
    planes: [*const u8; 2],
    strides: [usize; 2],
    /// Where the chunk lies, and the one after it.
    here: &'a Places,
    next: &'a Places,
}

impl<'a> InOrder<'a> {
    /// `of` is the layer and the tile's first kv head; then where the chunk and the next one lie.
    #[inline(always)]
    pub(super) fn new(
        pages: &Pages<'_>,
        of: (usize, usize),
        parts: &'a [Part],
        [here, next]: [&'a Places; 2],
    ) -> Self {
        let first = pages.head(of.0, of.1, here);
        let strides = pages.pool.layout.head_strides.map(|stride| stride * pages.pool.form.bytes());
        Self { parts, planes: [first.keys, first.values], strides, here, next }
    }

    /// `weight[row][position] = scale · query[row] · key[position]` for all 64 positions and the row of each head.
    /// Queries are pairs.
    #[inline(always)]
    pub(super) fn scores<L: Lanes>(self, lanes: L, state: &mut State<'_>, of: Dims) {
        for (index, &part) in self.parts.iter().enumerate() {
            let ask = match self.parts.get(index + PANELS) {
                Some(&part) => self.panel(KEYS, part),
                None => self.panel(VALUES, self.parts[index + PANELS - self.parts.len()]),
            };
            let (query, score) = (part.head * of.wide, part.head * CHUNK + part.panel * WIDTH);
            let (query, score) = (&state.query[query..], &mut state.weight[score..]);
            lanes.apart(Panel { query, keys: [self.panel(KEYS, part), ask], score, of });
        }
    }

    /// `value[row] = value[row] · fade[row] + Σ weight[row][position] · v[position]` over what each row sees, for
    /// `wide` columns.
    #[inline(always)]
    pub(super) fn add_values<L: Lanes>(self, lanes: L, state: &mut State<'_>, (chunk, wide): (usize, usize)) {
        let count = self.parts.len();
        round_rows(lanes, &mut state.weight[..count / PANELS * CHUNK], CHUNK);
        for (index, &part) in self.parts.iter().enumerate() {
            let next = match self.parts.get(index + PANELS) {
                Some(&part) => self.rows(VALUES, part, self.here),
                None => self.rows(KEYS, self.parts[index + PANELS - count], self.next),
            };
            let values = Values { here: self.rows(VALUES, part, self.here), next };
            let within = (part.panel * WIDTH / 2, (part.panel + 1) * WIDTH / 2);
            add_values(lanes, state, (values, within), (chunk, (part.head, part.head + 1), wide));
        }
    }

    /// Where a part of K lies; V lies in its plane as K does in its own, so it can be asked for alike.
    #[inline(always)]
    fn panel(self, which: usize, Part { head, panel }: Part) -> *const u8 {
        self.planes[which].wrapping_add(head * self.strides[which] + self.here.panels[panel])
    }

    /// Where a part of V lies, or what of K is asked for alike.
    #[inline(always)]
    fn rows(self, which: usize, Part { head, panel }: Part, at: &'a Places) -> Rows<'a> {
        let head = self.planes[which].wrapping_add(head * self.strides[which]);
        Rows { head, at: &at.rows.as_chunks().0[panel] }
    }
}

/// A row of pairs against a panel.
struct Panel<'a> {
    query: &'a [f32],
    /// The panel, and the one to ask for.
    keys: [*const u8; 2],
    /// Where sixteen scores go.
    score: &'a mut [f32],
    of: Dims,
}

impl Kernel for Panel<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { query, keys: [keys, ask], score, of: Dims { dim, scale, .. } } = self;
        let mut sum = lanes.splat(0.0);
        for (pair, &query) in query[..dim.div_ceil(2)].iter().enumerate() {
            lanes.prefetch(ask.wrapping_add(pair * LINE));
            // SAFETY: a panel has a line for every pair of elements.
            let keys = unsafe { lanes.load(keys.wrapping_add(pair * LINE).cast()) };
            sum = lanes.dot_pairs(lanes.splat(query), keys, sum);
        }
        // SAFETY: sixteen scores.
        unsafe { lanes.store(score[..WIDTH].as_mut_ptr(), lanes.mul(sum, lanes.splat(scale))) };
    }
}

/// Sixteen rows of V of a head, each so many bytes from the head's first.
#[derive(Clone, Copy)]
struct Rows<'a> {
    head: *const u8,
    at: &'a [usize; WIDTH],
}

impl Rows<'_> {
    /// Column `column` of a position of the chunk, which is one of these sixteen.
    #[inline(always)]
    fn element(self, position: usize, column: usize) -> *const u8 {
        self.head.wrapping_add(self.at[position % WIDTH] + 2 * column)
    }
}

/// A part of V on its way into registers, and what is asked for meanwhile.
#[derive(Clone, Copy)]
struct Values<'a> {
    here: Rows<'a>,
    next: Rows<'a>,
}

impl pairs::Values for Values<'_> {
    #[inline(always)]
    unsafe fn pair<L: Lanes>(&self, lanes: L, pair: usize, column: usize, ask: bool) -> L::F {
        let positions = [2 * pair, 2 * pair + 1];
        if ask {
            positions.iter().for_each(|&position| lanes.prefetch(self.next.element(position, column)));
        }
        // SAFETY: the caller's promise; the first position stands in for one that nobody sees.
        unsafe { lanes.load_pairs_bf16(positions.map(|position| self.here.element(position, column))) }
    }
}

//! K and V in the order of memory, in pairs of bf16, where a kv head has few rows: generating.
//!
//! In every block the heads lie one after the other, so sixteen positions of one head, then of the next, are one long
//! run, and of blocks that follow each other so are all: then one thread reads nearly as fast as the memory gives.
//! Where the heads of a token lie side by side, that is so of K, which has panels; V goes by runs of a token.
//! What lies a few of these parts further on is asked for meanwhile, line after line, also where V is read by columns:
//! after the last of K the chunk's V, after the last of V the next chunk's K. Sums keep their order, and so their bits.
//!
//! From the caches this is slower than head by head (`pairs.rs`): the sums of a row wait for each other in one panel,
//! where four of a head have room in registers, and the sums of values come and go with every sixteen positions. Up to
//! [`super::FEW`] rows memory is slower still.
#![expect(clippy::needless_range_loop, reason = "indices over rows, as in the formulas")]

use super::pages::{Pages, Part, Places};
use super::pairs::{self, Dims, LINE, PANELS, add_seen_by_all, add_values, round_rows};
use super::state::{State, clip};
use super::{CHUNK, Kernel, KvPool, Lanes, Layout, WIDTH};

/// How much is asked for before it is needed, in bytes; more leaves the nearest cache again.
const AHEAD: usize = 6 << 10;
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
    /// Of a part of K, and of V.
    runs: [Runs; 2],
    /// Where the chunk lies, and the one after it.
    here: &'a Places,
    next: &'a Places,
    /// How many parts are asked for before they are needed.
    ahead: usize,
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
        let bytes = pages.pool.layout.wide * WIDTH * pages.pool.form.bytes();
        let ahead = AHEAD.div_ceil(bytes).min(parts.len());
        let strides = pages.pool.layout.head_strides.map(|stride| stride * pages.pool.form.bytes());
        let runs = [Runs::ONE, Runs::of_values(pages.pool)];
        Self { parts, planes: [first.keys, first.values], strides, runs, here, next, ahead }
    }

    /// `weight[row][position] = scale · query[row] · key[position]` for all 64 positions and `rows` rows of each head.
    /// Queries are pairs.
    #[inline(always)]
    pub(super) fn scores<L: Lanes>(self, lanes: L, state: &mut State<'_>, (rows, of): (usize, Dims)) {
        for (index, &part) in self.parts.iter().enumerate() {
            let ask = match self.parts.get(index + self.ahead) {
                Some(&part) => self.lines(KEYS, part, self.here),
                None => self.lines(VALUES, self.parts[index + self.ahead - self.parts.len()], self.here),
            };
            let first = part.head * rows;
            let panel = Panel {
                query: &state.query[first * of.wide..],
                keys: self.part(KEYS, part, self.here),
                ask,
                score: &mut state.weight[first * CHUNK + part.panel * WIDTH..],
                of,
            };
            match rows {
                8 => lanes.apart(OfRows::<8>(panel)),
                7 => lanes.apart(OfRows::<7>(panel)),
                6 => lanes.apart(OfRows::<6>(panel)),
                5 => lanes.apart(OfRows::<5>(panel)),
                4 => lanes.apart(OfRows::<4>(panel)),
                3 => lanes.apart(OfRows::<3>(panel)),
                2 => lanes.apart(OfRows::<2>(panel)),
                _ => lanes.apart(OfRows::<1>(panel)),
            }
        }
    }

    /// `value[row] = value[row] · fade[row] + Σ weight[row][position] · v[position]` over what each row sees, for
    /// `wide` columns.
    #[inline(always)]
    pub(super) fn add_values<L: Lanes>(
        self,
        lanes: L,
        state: &mut State<'_>,
        (chunk, rows, wide): (usize, usize, usize),
    ) {
        let count = self.parts.len();
        let all = count / PANELS * rows;
        round_rows(lanes, &mut state.weight[..all * CHUNK], CHUNK);
        let whole = state.seen[..all].iter().all(|&seen| clip(seen, chunk) == (0, CHUNK));
        for (index, &part) in self.parts.iter().enumerate() {
            let next = match self.parts.get(index + self.ahead) {
                Some(&part) => self.lines(VALUES, part, self.here),
                None => self.lines(KEYS, self.parts[index + self.ahead - count], self.next),
            };
            let head = self.planes[VALUES].wrapping_add(part.head * self.strides[VALUES]);
            let values = Values { head, rows: &self.here.rows, next };
            let within = (part.panel * WIDTH / 2, (part.panel + 1) * WIDTH / 2);
            let first = part.head * rows;
            if whole {
                add_seen_by_all(lanes, state, values, (first, rows), within, wide);
            } else {
                add_values(lanes, state, (values, within), (chunk, (first, first + rows), wide));
            }
        }
    }

    /// Where a part of K or V begins.
    #[inline(always)]
    fn part(self, which: usize, Part { head, panel }: Part, at: &Places) -> *const u8 {
        self.planes[which].wrapping_add(head * self.strides[which] + at.panels[panel])
    }

    #[inline(always)]
    fn lines(self, which: usize, part: Part, at: &Places) -> Lines {
        Lines { first: self.part(which, part, at), runs: self.runs[which] }
    }
}

/// How the lines of a part lie: all in one run, or those of V in a run for each position, where the heads of a token
/// lie side by side.
#[derive(Clone, Copy)]
struct Runs {
    /// Lines of a run: a power of two, of which this is the logarithm.
    length: u32,
    /// Bytes from one to the next.
    stride: usize,
}

impl Runs {
    const ONE: Self = Self { length: usize::BITS - 1, stride: 0 };

    #[inline(always)]
    fn of_values(pool: &KvPool) -> Self {
        let Layout { wide, token_stride, .. } = pool.layout;
        if token_stride == wide {
            return Self::ONE;
        }
        Self { length: (2 * wide / LINE).ilog2(), stride: 2 * token_stride }
    }
}

/// The lines of a part, in the order of memory.
#[derive(Clone, Copy)]
struct Lines {
    first: *const u8,
    runs: Runs,
}

impl Lines {
    #[inline(always)]
    fn line(self, index: usize) -> *const u8 {
        let Runs { length, stride } = self.runs;
        let (run, line) = (index >> length, index & ((1 << length) - 1));
        self.first.wrapping_add(run * stride + line * LINE)
    }
}

/// Rows of pairs against a panel.
struct Panel<'a> {
    query: &'a [f32],
    keys: *const u8,
    /// The part to ask for.
    ask: Lines,
    /// Where sixteen scores of each row go, 64 apart.
    score: &'a mut [f32],
    of: Dims,
}

/// M of them.
struct OfRows<'a, const M: usize>(Panel<'a>);

impl<const M: usize> Kernel for OfRows<'_, M> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Panel { query, keys, ask, score, of: Dims { dim, wide, scale } } = self.0;
        let pairs = dim.div_ceil(2);
        assert!(query.len() >= (M - 1) * wide + pairs && score.len() >= (M - 1) * CHUNK + WIDTH, "M rows");
        let mut sums = [lanes.splat(0.0); M];
        for pair in 0..pairs {
            lanes.prefetch(ask.line(pair));
            // SAFETY: a panel has a line for every pair of elements.
            let keys = unsafe { lanes.load(keys.wrapping_add(pair * LINE).cast()) };
            for i in 0..M {
                // SAFETY: M rows, as asserted.
                let query = lanes.splat(unsafe { query.as_ptr().wrapping_add(i * wide + pair).read() });
                sums[i] = lanes.dot_pairs(query, keys, sums[i]);
            }
        }
        for i in 0..M {
            let score = score.as_mut_ptr().wrapping_add(i * CHUNK);
            // SAFETY: sixteen scores of M rows, as asserted.
            unsafe { lanes.store(score, lanes.mul(sums[i], lanes.splat(scale))) };
        }
    }
}

/// V of a head on its way into registers, and the part to ask for meanwhile.
#[derive(Clone, Copy)]
struct Values<'a> {
    head: *const u8,
    /// Where the positions of the chunk lie, bytes from the head's first.
    rows: &'a [usize; CHUNK],
    next: Lines,
}

impl pairs::Values for Values<'_> {
    #[inline(always)]
    unsafe fn pair<L: Lanes>(&self, lanes: L, pair: usize, column: usize) -> L::F {
        let at = [2 * pair, 2 * pair + 1].map(|row| self.head.wrapping_add(self.rows[row] + 2 * column));
        // SAFETY: the caller's promise; the first position stands in for one that nobody sees.
        unsafe { lanes.load_pairs_bf16(at) }
    }

    /// The next of the lines of the other part: it has as many as this one, half a line for a vector.
    #[inline(always)]
    fn ask<L: Lanes>(&self, lanes: L, (pair, column): (usize, usize), vectors: usize) {
        let line = column / WIDTH * (WIDTH / 2) + pair % (WIDTH / 2) * vectors;
        (line..line + vectors).for_each(|line| lanes.prefetch(self.next.line(line)));
    }
}

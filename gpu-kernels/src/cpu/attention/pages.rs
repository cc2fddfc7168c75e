//! Where a chunk of positions lies in the cache.

use super::pairs::{LINE, PANELS};
use super::products::Products;
use super::{CHUNK, Element, KvPool, Lanes, Layout, OfPlane, WIDTH};

/// The cached K and V of one span.
pub(super) struct Pages<'a> {
    pub(super) pool: &'a KvPool,
    pub(super) table: &'a [u32],
}

/// Where a chunk lies in K and in V: bytes from the first of a head ([`Pages::head`]), whichever it is.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// The panel of each sixteen positions, if blocks are made of whole ones ([`Pages::in_panels`]).
    pub(super) panels: [usize; CHUNK / WIDTH],
    /// The row of V of each position.
    pub(super) rows: [usize; CHUNK],
}

/// Sixteen positions of a head: a panel of K, and as many rows of V.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) head: usize,
    pub(super) panel: usize,
}

/// A chunk of one head.
#[derive(Clone, Copy)]
pub(super) struct Of<'a> {
    /// The first panel of K and the first row of V of the head.
    pub(super) keys: *const u8,
    pub(super) values: *const u8,
    pub(super) at: &'a Places,
}

impl Of<'_> {
    /// What is asked for after the last K of a chunk: V, which lies in its plane as K does in its own.
    pub(super) fn values_as_keys(self) -> Self {
        Of { keys: self.values, ..self }
    }

    /// What is asked for after the last V of a chunk: K.
    pub(super) fn keys_as_values(self) -> Self {
        Of { values: self.keys, ..self }
    }
}

/// A head's chunk on its way into registers, while the next one is asked for.
#[derive(Clone, Copy)]
pub(super) struct Chunk<'a> {
    pub(super) here: Of<'a>,
    pub(super) next: Of<'a>,
}

impl Pages<'_> {
    /// The chunk at `at` of a head.
    #[inline(always)]
    pub(super) fn head<'a>(&self, layer: usize, head: usize, at: &'a Places) -> Of<'a> {
        let plane = |which: usize| {
            let bytes = head * self.pool.layout.head_strides[which] * self.pool.form.bytes();
            self.pool.plane(layer, which).as_ptr().wrapping_add(bytes)
        };
        Of { keys: plane(0), values: plane(1), at }
    }

    /// The parts of a chunk of so many heads, four of each, in the order of memory, if each is one run in K, and in V
    /// one too or runs of so many lines each as a power of two.
    pub(super) fn parts(&self, heads: usize) -> Option<Vec<Part>> {
        let Layout { wide, token_stride, .. } = self.pool.layout;
        let apart = token_stride != wide;
        if !self.in_panels() || apart && !(wide.is_power_of_two() && 2 * wide >= LINE) {
            return None;
        }
        let of_block = (self.pool.shape.block_size / WIDTH).min(PANELS);
        // Those of a head in one block lie one after the other, unless those of a token do.
        let run = if PANELS.is_multiple_of(of_block) && !apart { of_block } else { 1 };
        let runs = (0..PANELS).step_by(run).flat_map(|first| (0..heads).map(move |head| (first, head)));
        Some(
            runs.flat_map(|(first, head)| (first..first + run).map(move |panel| Part { head, panel }))
                .collect(),
        )
    }

    /// Whether every sixteen positions are a panel of K of their own.
    #[inline(always)]
    pub(super) fn in_panels(&self) -> bool {
        self.pool.shape.block_size.is_multiple_of(WIDTH) && self.pool.latent_dim.is_none()
    }

    /// Positions `chunk + valid.0 .. chunk + valid.1`; where nobody looks, the first stands in.
    #[inline(always)]
    pub(super) fn places(&self, chunk: usize, valid: (usize, usize), places: &mut Places) {
        let (layout, block_size) = (self.pool.layout, self.pool.shape.block_size);
        let bytes = self.pool.form.bytes();
        let (mut block, mut token) = ((chunk + valid.0) / block_size, (chunk + valid.0) % block_size);
        let mut position = valid.0;
        while position < valid.1 {
            // The tokens of a block lie one after the other.
            let count = (block_size - token).min(valid.1 - position);
            let page = self.table[block] as usize * layout.page_stride * bytes;
            let first = page + token * layout.token_stride * bytes;
            for (i, row) in places.rows[position..position + count].iter_mut().enumerate() {
                *row = first + i * layout.token_stride * bytes;
            }
            if self.in_panels() {
                for panel in position / WIDTH..(position + count).div_ceil(WIDTH) {
                    let token = token / WIDTH + panel - position / WIDTH;
                    places.panels[panel] = page + token * WIDTH * layout.token_stride * bytes;
                }
            }
            position += count;
            (block, token) = (block + 1, 0);
        }
        let Places { panels, rows } = places;
        let (first, panel) = (rows[valid.0], panels[valid.0 / WIDTH]);
        rows[..valid.0].fill(first);
        rows[valid.1..].fill(first);
        panels[..valid.0 / WIDTH].fill(panel);
        panels[valid.1.div_ceil(WIDTH)..].fill(panel);
    }

    /// K of a chunk, for blocks of any size: widened to `[dim][64]`, or, of numbers that are bf16, as pairs of them,
    /// `[dim / 2][64]`. What nobody sees is left as it was, or holds what the cache holds.
    #[inline(always)]
    pub(super) fn gather_keys<L: Lanes, E: Element, P: Products>(
        &self,
        lanes: L,
        (chunk, valid): (usize, (usize, usize)),
        Chunk { here, next }: Chunk<'_>,
        keys: &mut [f32],
    ) {
        if self.pool.latent_dim.is_some() {
            return self.turn_rows::<L, E, P>(lanes, Chunk { here, next }, keys);
        }
        let (layout, block_size, width) = (self.pool.layout, self.pool.shape.block_size, self.pool.lanes());
        let (pairs, line) = (self.pool.shape.head_dim.div_ceil(2), 2 * width * E::BYTES);
        assert!(keys.len() >= 2 * pairs * CHUNK, "scratch holds a chunk");
        let mut position = valid.0;
        while position < valid.1 {
            let (block, token) = ((chunk + position) / block_size, (chunk + position) % block_size);
            let lane = token % width;
            let count = WIDTH.min(width - lane).min(valid.1 - position);
            let page = self.table[block] as usize * layout.page_stride;
            let panel = here.keys.wrapping_add((page + (token - lane) * layout.token_stride) * E::BYTES);
            let ask = next.keys.wrapping_add(next.at.panels[position / WIDTH]);
            let mut part = [0; 2 * WIDTH * 4];
            for pair in 0..pairs {
                let mut at = panel.wrapping_add(pair * line);
                if self.in_panels() {
                    (0..line).step_by(64).for_each(|part| {
                        lanes.prefetch_far(ask.wrapping_add(pair * line + part));
                    });
                }
                if (count, width) != (WIDTH, WIDTH) {
                    // SAFETY: the line has `width` pairs of elements, and `lane + count` is at most that.
                    unsafe { E::part_of_line(at, (lane, count, width), &mut part) };
                    at = part.as_ptr();
                }
                // SAFETY: a line for every pair of elements, in the panel or in `part`.
                let first = unsafe { E::half_line::<L, false>(lanes, at) };
                // SAFETY: as above.
                let second = unsafe { E::half_line::<L, true>(lanes, at) };
                let mut put = |line: usize, numbers: L::F| {
                    let to = &mut keys[line * CHUNK..][..CHUNK];
                    if position + WIDTH <= CHUNK {
                        // What this writes too much is written again, or nobody sees it.
                        // SAFETY: sixteen positions are left.
                        unsafe { lanes.store(to[position..].as_mut_ptr(), numbers) };
                    } else {
                        let mut all = [0.0; WIDTH];
                        // SAFETY: sixteen elements.
                        unsafe { lanes.store(all.as_mut_ptr(), numbers) };
                        to[position..position + count].copy_from_slice(&all[..count]);
                    }
                };
                if P::PAIRS {
                    put(pair, lanes.join_pairs(first, second));
                } else {
                    put(2 * pair, first);
                    put(2 * pair + 1, second);
                }
            }
            position += count;
        }
    }

    /// The rows of a chunk of latents, which are keys too, in the same two forms.
    #[inline(always)]
    fn turn_rows<L: Lanes, E: Element, P: Products>(
        &self,
        lanes: L,
        Chunk { here, next }: Chunk<'_>,
        keys: &mut [f32],
    ) {
        let wide = self.pool.layout.wide;
        assert!(keys.len() >= wide * CHUNK, "scratch holds a chunk");
        for (first, d) in
            (0..CHUNK).step_by(WIDTH).flat_map(|at| (0..wide).step_by(WIDTH).map(move |d| (at, d)))
        {
            let mut block = [lanes.splat(0.0); WIDTH];
            for (position, vector) in (first..).zip(&mut block) {
                let offset = d * E::BYTES;
                lanes.prefetch_far(next.values.wrapping_add(next.at.rows[position] + offset));
                // SAFETY: rows are in the cache and `wide` elements long; the first stands in where nobody looks.
                *vector =
                    unsafe { E::load(lanes, here.values.wrapping_add(here.at.rows[position] + offset)) };
            }
            let mut put = |line: usize, numbers: L::F| {
                let to = keys.as_mut_ptr().wrapping_add(line * CHUNK + first);
                // SAFETY: asserted above.
                unsafe { lanes.store(to, numbers) };
            };
            let turned = lanes.transpose(block);
            if P::PAIRS {
                let pairs = turned.as_chunks::<2>().0;
                (d / 2..).zip(pairs).for_each(|(line, &[a, b])| put(line, lanes.join_pairs(a, b)));
            } else {
                (d..).zip(turned).for_each(|(line, numbers)| put(line, numbers));
            }
        }
    }

    /// What the numbers of positions `chunk + valid.0 .. chunk + valid.1` are multiplied by, if they are to be.
    #[inline(always)]
    pub(super) fn scales(
        &self,
        (layer, which, head): (usize, usize, usize),
        (chunk, valid): (usize, (usize, usize)),
        to: &mut [f32; CHUNK],
    ) -> bool {
        let (block_size, kv_heads) = (self.pool.shape.block_size, self.pool.shape.kv_heads);
        match self.pool.scales(layer, which) {
            None => return false,
            Some(OfPlane::One(scale)) => to.fill(scale),
            Some(OfPlane::PerHead(scales)) => {
                to.fill(1.0);
                for (position, to) in to.iter_mut().enumerate().take(valid.1).skip(valid.0) {
                    let (block, token) = ((chunk + position) / block_size, (chunk + position) % block_size);
                    *to = scales[(self.table[block] as usize * block_size + token) * kv_heads + head];
                }
            }
        }
        true
    }

    /// V of a chunk: widened to `[64][wide]`, or, of numbers that are bf16, as pairs of two positions, `[32][wide]`.
    #[inline(always)]
    pub(super) fn gather_values<L: Lanes, E: Element, P: Products>(
        &self,
        lanes: L,
        valid: (usize, usize),
        Chunk { here, next }: Chunk<'_>,
        values: &mut [f32],
    ) {
        let wide = self.pool.layout.wide;
        assert!(values.len() >= CHUNK * wide && valid.1 <= CHUNK, "scratch holds a chunk");
        let together = if P::PAIRS { 2 } else { 1 };
        for position in (valid.0 / together * together..valid.1).step_by(together) {
            for d in (0..wide).step_by(WIDTH) {
                let place = |position: usize| {
                    lanes.prefetch_far(next.values.wrapping_add(next.at.rows[position] + d * E::BYTES));
                    here.values.wrapping_add(here.at.rows[position] + d * E::BYTES)
                };
                let numbers = if P::PAIRS {
                    // SAFETY: rows are in the cache and `wide` elements long; the first stands in where nobody looks.
                    unsafe { E::load_pairs(lanes, [position, position + 1].map(place)) }
                } else {
                    // SAFETY: as above.
                    unsafe { E::load(lanes, place(position)) }
                };
                let to = values.as_mut_ptr().wrapping_add(position / together * wide + d);
                // SAFETY: asserted above.
                unsafe { lanes.store(to, numbers) };
            }
        }
    }
}

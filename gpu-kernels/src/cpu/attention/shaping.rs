//! What becomes of scores before they are weights: a cap, a slope along positions, a mask. A chunk's scores are changed
//! where the products left them, so attention that asks for none of it does not know of it.

use super::state::{State, clip};
use super::{CHUNK, Kernel, Lanes, Tile, WIDTH};
use crate::Heads;

/// Numbers of heads ([`crate::Ops::Floats`]).
#[derive(Clone, Debug)]
pub struct Floats {
    pub(crate) numbers: Vec<f32>,
}

/// Which of its own span's tokens each token sees ([`crate::Ops::tree_mask`]).
#[derive(Clone, Debug)]
pub struct TreeMask {
    pub(crate) bits: Vec<u32>,
    pub(crate) tokens: usize,
    pub(crate) words: usize,
}

impl TreeMask {
    fn sees(&self, token: usize, key: usize) -> bool {
        self.bits[token * self.words + key / 32] >> (key % 32) & 1 == 1
    }
}

/// What shapes the scores of a step, checked. Slopes and sinks: one of each query head.
#[derive(Clone, Copy)]
pub(crate) struct Shaping<'a> {
    /// A query sees nothing after itself, and there is no mask.
    pub(crate) causal: bool,
    pub(crate) softcap: Option<f32>,
    pub(crate) slopes: Option<&'a [f32]>,
    pub(crate) sinks: Option<&'a [f32]>,
    pub(crate) mask: Option<&'a TreeMask>,
}

impl Shaping<'_> {
    /// Whether scores are not what the products say.
    #[inline(always)]
    pub(super) fn changes_scores(&self) -> bool {
        self.softcap.is_some() || self.slopes.is_some() || self.mask.is_some()
    }
}

/// The scores of some rows of a tile over a chunk.
pub(super) struct Shape<'a, 's> {
    pub(super) shaping: Shaping<'a>,
    pub(super) tile: &'a Tile,
    pub(super) heads: Heads,
    pub(super) state: &'a mut State<'s>,
    pub(super) chunk: usize,
    pub(super) rows: (usize, usize),
}

impl Kernel for Shape<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { shaping, tile, heads, state, chunk, rows } = self;
        let span = tile.span;
        let (context, queries) = (span.context_len as usize, span.query_len as usize);
        for row in rows.0..rows.1 {
            let (from, to) = clip(state.seen[row], chunk);
            if from >= to {
                continue;
            }
            let (token, head) = tile.token_and_head(row, heads);
            let scores = &mut state.weight[row * CHUNK..][..CHUNK];
            if let Some(cap) = shaping.softcap {
                let cap = lanes.splat(cap);
                each(lanes, scores, |score, _| lanes.mul(lanes.tanh(lanes.div(score, cap)), cap));
            }
            if let Some(slopes) = shaping.slopes {
                let slope = lanes.splat(slopes[head]);
                // Both are exact below 2^24, and so is what they are apart.
                #[expect(clippy::cast_precision_loss, reason = "positions are below 2^24")]
                let first = (chunk + queries) as f32 - (context + token) as f32;
                each(lanes, scores, |score, place| {
                    lanes.fma(slope, lanes.add(lanes.splat(first), place), score)
                });
            }
            if let Some(mask) = shaping.mask {
                let own = context.saturating_sub(queries);
                let token = span.query_start as usize + token;
                for position in chunk.max(own)..(chunk + CHUNK).min(context) {
                    if !mask.sees(token, position - own) {
                        scores[position - chunk] = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Multiplies scores by what keys are scaled by, or weights by what values are.
#[inline(always)]
pub(super) fn scale<L: Lanes>(lanes: L, state: &mut State<'_>, rows: (usize, usize), scales: &[f32; CHUNK]) {
    for row in state.weight[rows.0 * CHUNK..rows.1 * CHUNK].chunks_exact_mut(CHUNK) {
        for (x, by) in row.as_chunks_mut::<WIDTH>().0.iter_mut().zip(scales.as_chunks::<WIDTH>().0) {
            // SAFETY: sixteen elements.
            let by = unsafe { lanes.load(by.as_ptr()) };
            // SAFETY: as above.
            let product = lanes.mul(unsafe { lanes.load(x.as_ptr()) }, by);
            // SAFETY: as above.
            unsafe { lanes.store(x.as_mut_ptr(), product) };
        }
    }
}

/// Changes the scores of a row, which come with their places in the chunk.
#[inline(always)]
fn each<L: Lanes>(lanes: L, scores: &mut [f32], change: impl Fn(L::F, L::F) -> L::F) {
    #[rustfmt::skip]
    const PLACES: [f32; WIDTH] = [
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    ];
    // SAFETY: sixteen elements.
    let mut place = unsafe { lanes.load(PLACES.as_ptr()) };
    for scores in scores.as_chunks_mut::<WIDTH>().0 {
        // SAFETY: sixteen elements.
        let score = unsafe { lanes.load(scores.as_ptr()) };
        // SAFETY: as above.
        unsafe { lanes.store(scores.as_mut_ptr(), change(score, place)) };
        #[expect(clippy::cast_precision_loss, reason = "sixteen")]
        let step = lanes.splat(WIDTH as f32);
        place = lanes.add(place, step);
    }
}

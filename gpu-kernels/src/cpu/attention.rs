//! Causal attention over blocks.

use super::batch::Batch;
use super::pool::KvPool;
use super::weight::widen;
use crate::Attention;

/// `q` and `out` are `[tokens, query heads * dim]`.
pub(crate) fn attention(
    pool: &KvPool,
    layer: usize,
    batch: &Batch,
    q: &[f32],
    attention: Attention,
    out: &mut [f32],
) {
    let heads = attention.heads;
    let (dim, width) = (heads.dim, heads.query * heads.dim);
    out.fill(0.0);
    for (index, span) in batch.spans.iter().enumerate() {
        for i in 0..span.query_len {
            let row = (span.query_start + i) as usize;
            let end = (span.context_len + i + 1).saturating_sub(span.query_len) as usize;
            let start = attention.window.map_or(0, |window| end.saturating_sub(window as usize));
            for head in 0..heads.query {
                let at = row * width + head * dim;
                let kv_head = head / (heads.query / heads.kv);
                let load = |which: usize, position: usize| {
                    let block = batch.table(index)[position / batch.block_size] as usize;
                    let layout = pool.layout;
                    let element = block * layout.page_stride
                        + kv_head * layout.head_stride
                        + position % batch.block_size * layout.token_stride;
                    pool.elements(layer, which, element, dim)
                };
                let query = &q[at..at + dim];
                let out = &mut out[at..at + dim];
                one(query, start..end, attention.scale, load, out);
            }
        }
    }
}

/// One query head: softmax of the scaled scores, then the weighted mean of the values.
fn one(
    query: &[f32],
    positions: std::ops::Range<usize>,
    scale: f32,
    load: impl Fn(usize, usize) -> Vec<f32>,
    out: &mut [f32],
) {
    let scores: Vec<f32> = positions
        .clone()
        .map(|position| scale * query.iter().zip(load(0, position)).map(|(q, k)| q * k).sum::<f32>())
        .collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for (score, position) in scores.iter().zip(positions) {
        let weight = (score - max).exp();
        total += weight;
        for (out, value) in out.iter_mut().zip(load(1, position)) {
            *out += weight * value;
        }
    }
    if total > 0.0 {
        for out in out {
            *out /= total;
        }
    }
}

impl KvPool {
    fn elements(&self, layer: usize, which: usize, element: usize, len: usize) -> Vec<f32> {
        widen(self.shape.dtype, self.element_bytes(layer, which, element, len))
    }
}

//! What operators ask of their arguments, on whatever machine. Behind the door nothing is checked.

mod grouped;
mod latent;
mod quantised;
mod sampling;
mod strides;

use std::collections::{BTreeMap, BTreeSet};

pub(crate) use grouped::{Routed, combine, expert_linear, lora, route};
pub(crate) use latent::{
    LATENT_DIM_MAX, LATENT_ROPE_MAX, Pool, append_latent, attend_latent, head_linear, keys_and_values,
    latent_pool,
};
pub(crate) use quantised::{quant_tensor, weight_bytes};
pub(crate) use sampling::{sample, verify};
pub(crate) use strides::{memory, strides};

use crate::cpu::Batch;
use crate::error::{at_most, below, multiple, same};
use crate::shape::HEAD_DIM_MAX;
use crate::{Attention, Error, Gate, Heads, KvShape, KvStorage};

/// The shape of activations, and the rows that they have room for.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) rows_max: usize,
}

impl Rows {
    /// `Ok` if this output takes so many rows of such a width.
    fn takes(self, operator: &'static str, rows: usize, cols: usize) -> Result<(), Error> {
        same(operator, "width of the output", self.cols, cols)?;
        at_most(operator, "rows of the output", rows, self.rows_max)
    }
}

pub(crate) fn embed((rows, cols): (usize, usize), tokens: &[u32], out: Rows) -> Result<(), Error> {
    out.takes("embed", tokens.len(), cols)?;
    tokens.iter().try_for_each(|&token| below("embed", "token", token as usize, rows))
}

pub(crate) fn gather_rows(x: Rows, rows: &[u32], out: Rows) -> Result<(), Error> {
    out.takes("gather_rows", rows.len(), x.cols)?;
    rows.iter().try_for_each(|&row| below("gather_rows", "row", row as usize, x.rows))
}

pub(crate) fn rms_norm(x: Rows, out: Rows) -> Result<(), Error> {
    out.takes("rms_norm", x.rows, x.cols)
}

pub(crate) fn add_rms_norm(residual: Rows, delta: Rows, out: Rows) -> Result<(), Error> {
    same("add_rms_norm", "width of delta", delta.cols, residual.cols)?;
    same("add_rms_norm", "rows of delta", delta.rows, residual.rows)?;
    out.takes("add_rms_norm", residual.rows, residual.cols)
}

/// A weight of `out` outputs and `into` inputs.
pub(crate) fn linear(x: Rows, (out, into): (usize, usize), to: Rows) -> Result<(), Error> {
    same("linear", "in of the weight", into, x.cols)?;
    to.takes("linear", x.rows, out)
}

/// A gated activation.
pub(crate) fn gated(act: Gate, gate: Rows, up: Rows, out: Rows) -> Result<(), Error> {
    let operator = act.name();
    if let Gate::SwigluOai { alpha, limit } = act {
        number(operator, "an alpha of", alpha, alpha.is_finite(), "a finite one")?;
        number(operator, "a limit of", limit, limit > 0.0, "one above 0")?;
    }
    same(operator, "width of up", up.cols, gate.cols)?;
    same(operator, "rows of up", up.rows, gate.rows)?;
    out.takes(operator, gate.rows, gate.cols)
}

/// A norm of heads of so many elements.
pub(crate) fn head_norm(x: Rows, dim: usize) -> Result<(), Error> {
    multiple("head_norm", "width of x", x.cols, dim)
}

pub(crate) fn rope_table(cos: &[f32], sin: &[f32], rotary_dim: usize) -> Result<(), Error> {
    multiple("rope_table", "rotary_dim", rotary_dim, 2)?;
    multiple("rope_table", "length of cos", cos.len(), rotary_dim / 2)?;
    same("rope_table", "length of sin", sin.len(), cos.len())
}

/// A table of so many positions and rotated elements.
pub(crate) fn rope(
    batch: &Batch,
    (positions, rotary_dim): (usize, usize),
    q: Rows,
    k: Rows,
    heads: Heads,
) -> Result<(), Error> {
    check_heads("rope", heads)?;
    at_most("rope", "rotary_dim", rotary_dim, heads.dim)?;
    same("rope", "width of q", q.cols, heads.query * heads.dim)?;
    same("rope", "width of k", k.cols, heads.kv * heads.dim)?;
    same("rope", "rows of q", q.rows, batch.tokens())?;
    same("rope", "rows of k", k.rows, batch.tokens())?;
    batch.position_top.map_or(Ok(()), |top| below("rope", "position", top as usize, positions))
}

/// The scales of a pool of eight-bit numbers.
pub(crate) fn storage(storage: KvStorage) -> Result<(), Error> {
    let KvStorage::Fp8 { key_scale, value_scale } = storage else { return Ok(()) };
    [("keys with a scale of", key_scale), ("values with a scale of", value_scale)].into_iter().try_for_each(
        |(what, scale)| {
            number("kv_pool", what, scale, scale.is_finite() && scale > 0.0, "a finite one above 0")
        },
    )
}

pub(crate) fn append(pool: KvShape, layer: usize, batch: &Batch, k: Rows, v: Rows) -> Result<(), Error> {
    below("append", "layer", layer, pool.layers)?;
    same("append", "block_size of the batch", batch.block_size, pool.block_size)?;
    for (width, rows, tensor) in [("width of k", "rows of k", k), ("width of v", "rows of v", v)] {
        same("append", width, tensor.cols, pool.kv_heads * pool.head_dim)?;
        same("append", rows, tensor.rows, batch.tokens())?;
    }
    let slots = pool.blocks * pool.block_size;
    let top = batch.slot_top.map(|top| usize::try_from(top).unwrap_or(usize::MAX));
    top.map_or(Ok(()), |top| below("append", "slot", top, slots))
}

pub(crate) fn attention(
    pool: KvShape,
    layer: usize,
    batch: &Batch,
    q: Rows,
    heads: Heads,
    out: Rows,
) -> Result<(), Error> {
    check_heads("attention", heads)?;
    below("attention", "layer", layer, pool.layers)?;
    same("attention", "block_size of the batch", batch.block_size, pool.block_size)?;
    same("attention", "kv heads", heads.kv, pool.kv_heads)?;
    same("attention", "head size", heads.dim, pool.head_dim)?;
    same("attention", "width of q", q.cols, heads.query * heads.dim)?;
    same("attention", "rows of q", q.rows, batch.tokens())?;
    out.takes("attention", q.rows, q.cols)?;
    batch.block_top.map_or(Ok(()), |top| below("attention", "block", top as usize, pool.blocks))
}

/// What shapes scores, as numbers.
pub(crate) struct Shaping {
    pub(crate) softcap: Option<f32>,
    /// Lengths.
    pub(crate) slopes: Option<usize>,
    pub(crate) sinks: Option<usize>,
    pub(crate) lse: Option<usize>,
    /// Tokens, and words of each.
    pub(crate) mask: Option<(usize, usize)>,
}

pub(crate) fn scores(batch: &Batch, attention: Attention, shaping: &Shaping) -> Result<(), Error> {
    let Attention { heads, scale, window } = attention;
    window.map_or(Ok(()), |window| multiple("attention", "window", window as usize, 1))?;
    number("attention", "a scale of", scale, scale.is_finite(), "a finite one")?;
    if let Some(cap) = shaping.softcap {
        let legal = cap.is_finite() && cap > 0.0;
        number("attention", "a soft-cap of", cap, legal, "a finite one above 0")?;
    }
    for (dimension, found) in [("number of slopes", shaping.slopes), ("number of sinks", shaping.sinks)] {
        found.map_or(Ok(()), |found| same("attention", dimension, found, heads.query))?;
    }
    if let Some((tokens, words)) = shaping.mask {
        same("attention", "rows of the mask", tokens, batch.tokens())?;
        let longest = batch.spans.iter().map(|span| span.query_len as usize).max().unwrap_or(0);
        at_most("attention", "tokens of a masked span", longest, words * 32)?;
    }
    shaping
        .lse
        .map_or(Ok(()), |found| same("attention", "length of the LSE", found, batch.tokens() * heads.query))
}

/// The tokens of a mask of so many words each.
pub(crate) fn tree_mask(bits: &[u32], words: usize) -> Result<usize, Error> {
    multiple("tree_mask", "number of words", bits.len(), words)?;
    Ok(bits.len() / words)
}

/// Two attentions with the lengths of their LSEs.
pub(crate) fn merge_states(a: (Rows, usize), b: (Rows, usize), heads: usize) -> Result<(), Error> {
    same("merge_states", "width of b", b.0.cols, a.0.cols)?;
    same("merge_states", "rows of b", b.0.rows, a.0.rows)?;
    multiple("merge_states", "width of a", a.0.cols, heads)?;
    same("merge_states", "length of the LSE of a", a.1, a.0.rows * heads)?;
    same("merge_states", "length of the LSE of b", b.1, a.1)
}

pub(crate) fn copy_blocks(pool: KvShape, pairs: &[(u32, u32)]) -> Result<(), Error> {
    pairs.iter().try_for_each(|&(from, to)| {
        below("copy_blocks", "source block", from as usize, pool.blocks)?;
        below("copy_blocks", "target block", to as usize, pool.blocks)
    })
}

/// Lists of copies between slots, none of which is in two of them.
pub(crate) fn copy_slots(pool: KvShape, lists: &[&[(u64, u64)]]) -> Result<(), Error> {
    let (slots, mut owner) = (pool.blocks * pool.block_size, BTreeMap::new());
    for (index, list) in lists.iter().enumerate() {
        for slot in list.iter().flat_map(|&(from, to)| [from, to]) {
            below("copy_slots", "slot", usize::try_from(slot).unwrap_or(usize::MAX), slots)?;
            same("copy_slots", "list of a slot", index, *owner.entry(slot).or_insert(index))?;
        }
    }
    Ok(())
}

/// Blocks that are copied to the host, of so many bytes each.
pub(crate) fn save_blocks(pool: KvShape, blocks: &[(u32, &mut [u8])], bytes: usize) -> Result<(), Error> {
    blocks.iter().try_for_each(|(block, to)| one_block("save_blocks", pool, *block, (to.len(), bytes)))
}

/// Blocks that are copied from the host, of so many bytes each, none of them twice.
pub(crate) fn load_blocks(pool: KvShape, blocks: &[(u32, &[u8])], bytes: usize) -> Result<(), Error> {
    let mut written = BTreeSet::new();
    blocks.iter().try_for_each(|(block, from)| {
        one_block("load_blocks", pool, *block, (from.len(), bytes))?;
        let times = if written.insert(*block) { 1 } else { 2 };
        same("load_blocks", "times that a block is in the list", times, 1)
    })
}

fn one_block(
    operator: &'static str,
    pool: KvShape,
    block: u32,
    (found, bytes): (usize, usize),
) -> Result<(), Error> {
    below(operator, "block", block as usize, pool.blocks)?;
    same(operator, "number of bytes", found, bytes)
}

/// The rows that so many elements are.
pub(crate) fn write(x: Rows, elements: usize) -> Result<usize, Error> {
    if elements == 0 {
        return Ok(0);
    }
    multiple("write", "number of elements", elements, x.cols)?;
    let rows = elements / x.cols;
    at_most("write", "rows of the output", rows, x.rows_max)?;
    Ok(rows)
}

fn check_heads(operator: &'static str, heads: Heads) -> Result<(), Error> {
    multiple(operator, "query heads", heads.query, heads.kv)?;
    multiple(operator, "head size", heads.dim, 1)?;
    at_most(operator, "head size", heads.dim, HEAD_DIM_MAX)
}

/// A number that is legal or not.
fn number(
    operator: &'static str,
    what: &'static str,
    found: f32,
    legal: bool,
    supported: &'static str,
) -> Result<(), Error> {
    if legal {
        return Ok(());
    }
    Err(Error::Unsupported { operator, what, found: found.to_string(), supported })
}

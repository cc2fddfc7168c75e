//! What latent attention asks of its arguments.

use super::{Batch, Rows};
use crate::error::{at_most, below, multiple, same};
use crate::{Error, KvShape, KvStorage, LatentShape};

/// The sizes that the operators are made for.
pub(crate) const LATENT_DIM_MAX: usize = 512;
pub(crate) const LATENT_ROPE_MAX: usize = 64;

/// A pool, and how much of a row is the latent if it holds latents.
#[derive(Clone, Copy)]
pub(crate) struct Pool {
    pub(crate) shape: KvShape,
    pub(crate) latent_dim: Option<usize>,
}

/// A pool of latents, as one of keys with one head for all.
pub(crate) fn latent_pool(shape: LatentShape, storage: KvStorage) -> Result<KvShape, Error> {
    let operator = "latent_pool";
    let LatentShape { layers, blocks, block_size, latent_dim, rope_dim, dtype } = shape;
    for (dimension, found, max) in
        [("latent_dim", latent_dim, LATENT_DIM_MAX), ("rope_dim", rope_dim, LATENT_ROPE_MAX)]
    {
        multiple(operator, dimension, found, 8)?;
        at_most(operator, dimension, found, max)?;
    }
    super::storage(storage)?;
    if storage == KvStorage::Int8PerHead {
        return Err(Error::Unsupported {
            operator,
            what: "latents as",
            found: format!("{storage:?}"),
            supported: "the activations' type and E4M3",
        });
    }
    Ok(KvShape { layers, blocks, block_size, kv_heads: 1, head_dim: latent_dim + rope_dim, dtype })
}

/// `Ok` if the pool holds keys and values.
pub(crate) fn keys_and_values(operator: &'static str, latent_dim: Option<usize>) -> Result<(), Error> {
    same(operator, "planes of a layer", if latent_dim.is_some() { 1 } else { 2 }, 2)
}

/// Elements of latents and of rotated keys.
fn dims(operator: &'static str, pool: Pool) -> Result<(usize, usize), Error> {
    let Some(latent_dim) = pool.latent_dim else {
        let dimension = "planes of a layer";
        return Err(Error::Shape { operator, dimension, found: 2, expected: 1 });
    };
    Ok((latent_dim, pool.shape.head_dim - latent_dim))
}

/// A table has so many positions and rotated elements. Gives back the elements of latents and of rotated keys.
pub(crate) fn append_latent(
    pool: Pool,
    layer: usize,
    batch: &Batch,
    (latent, rope): (Rows, Rows),
    table: Option<(usize, usize)>,
) -> Result<(usize, usize), Error> {
    let (operator, shape) = ("append_latent", pool.shape);
    let (latent_dim, rope_dim) = dims(operator, pool)?;
    below(operator, "layer", layer, shape.layers)?;
    same(operator, "block_size of the batch", batch.block_size, shape.block_size)?;
    same(operator, "width of the latent", latent.cols, latent_dim)?;
    same(operator, "width of the key", rope.cols, rope_dim)?;
    same(operator, "rows of the latent", latent.rows, batch.tokens())?;
    same(operator, "rows of the key", rope.rows, batch.tokens())?;
    if let Some(top) = batch.slot_top {
        let slot = usize::try_from(top).unwrap_or(usize::MAX);
        below(operator, "slot", slot, shape.blocks * shape.block_size)?;
    }
    if let Some((positions, rotary_dim)) = table {
        same(operator, "rotary_dim", rotary_dim, rope_dim)?;
        batch.position_top.map_or(Ok(()), |top| below(operator, "position", top as usize, positions))?;
    }
    Ok((latent_dim, rope_dim))
}

/// The two parts of queries of so many heads. Gives back the elements of latents and of rotated keys.
pub(crate) fn attend_latent(
    pool: Pool,
    layer: usize,
    batch: &Batch,
    (latent, rope): (Rows, Rows),
    heads: usize,
    out: Rows,
) -> Result<(usize, usize), Error> {
    let operator = "attend_latent";
    let (latent_dim, rope_dim) = dims(operator, pool)?;
    multiple(operator, "heads", heads, 1)?;
    below(operator, "layer", layer, pool.shape.layers)?;
    same(operator, "block_size of the batch", batch.block_size, pool.shape.block_size)?;
    same(operator, "width of q", latent.cols, heads * latent_dim)?;
    same(operator, "width of the rotated q", rope.cols, heads * rope_dim)?;
    same(operator, "rows of q", latent.rows, batch.tokens())?;
    same(operator, "rows of the rotated q", rope.rows, batch.tokens())?;
    out.takes(operator, latent.rows, heads * latent_dim)?;
    batch.block_top.map_or(Ok(()), |top| below(operator, "block", top as usize, pool.shape.blocks))?;
    Ok((latent_dim, rope_dim))
}

/// Matrices of all heads, outputs and inputs. Gives back those of one.
pub(crate) fn head_linear(
    x: Rows,
    (outs, into): (usize, usize),
    heads: usize,
    out: Rows,
) -> Result<(usize, usize), Error> {
    let operator = "head_linear";
    multiple(operator, "width of x", x.cols, heads)?;
    multiple(operator, "out of the weights of all heads", outs, heads)?;
    same(operator, "in of the weights", into, x.cols / heads)?;
    multiple(operator, "in of a head", into, 8)?;
    multiple(operator, "out of a head", outs / heads, 8)?;
    out.takes(operator, x.rows, outs)?;
    Ok((outs / heads, into))
}

//! Latent attention: rows of latents with rotated keys behind them, which all heads read as keys and as values.

use std::sync::PoisonError;

use super::attention::{Floats, Queries};
use super::{Batch, Cpu, KvPool, RopeTable, SharedOut, Tensor, Weight, append};
use crate::{
    Attention, Error, Heads, KvOrder, KvStorage, Latent, LatentAttention, LatentQuery, LatentShape, Scores,
    door,
};

impl Latent for Cpu {
    fn latent_pool(&self, shape: LatentShape, storage: KvStorage) -> Result<KvPool, Error> {
        KvPool::new(door::latent_pool(shape, storage)?, storage, KvOrder::default(), Some(shape.latent_dim))
    }

    fn latent_block_bytes(&self, shape: LatentShape, storage: KvStorage) -> Result<usize, Error> {
        KvPool::block_bytes(door::latent_pool(shape, storage)?, storage, Some(shape.latent_dim))
    }

    fn append_latent(
        &self,
        pool: &mut KvPool,
        layer: usize,
        batch: &Batch,
        latent: &Tensor,
        rope: &Tensor,
        norm: Option<(&Weight, f32)>,
        table: Option<&RopeTable>,
    ) -> Result<(), Error> {
        let parts = (latent.shape(), rope.shape());
        let turned = table.map(|table| (table.positions(), table.rotary_dim()));
        let (latent_dim, rope_dim) = door::append_latent(pool.dims(), layer, batch, parts, turned)?;
        let norm = match norm {
            Some((weight, eps)) => Some((weight.vector("append_latent", latent_dim)?, eps)),
            None => None,
        };
        let mut memory = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let [normed, turned] = memory.take([latent.data().len(), rope.data().len()]);
        normed.copy_from_slice(latent.data());
        turned.copy_from_slice(rope.data());
        if let Some((weight, eps)) = norm {
            self.norm_heads(normed, weight, eps);
        }
        if let Some(table) = table {
            table.rotate(&self.workers, self.isa, &batch.positions, turned, (1, rope_dim));
        }
        append::append_latents((&self.workers, self.isa), pool, layer, &batch.slots, [normed, turned]);
        Ok(())
    }

    fn attend_latent(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        q: LatentQuery<'_, Self>,
        attention: LatentAttention,
        scores: Scores<'_, Self>,
        out: &mut Tensor,
        lse: Option<&mut Floats>,
    ) -> Result<(), Error> {
        let LatentAttention { heads, scale, window } = attention;
        let parts = (q.latent.shape(), q.rope.shape());
        let (value_dim, rope_dim) =
            door::attend_latent(pool.dims(), layer, batch, parts, heads, out.shape())?;
        let heads = Heads { query: heads, kv: 1, dim: value_dim + rope_dim };
        let q = Queries { values: q.latent.data(), value_dim, others: q.rope.data() };
        self.attend_rows((pool, layer, batch), q, Attention { heads, scale, window }, scores, out, lse)
    }

    fn head_linear(&self, x: &Tensor, weights: &Weight, heads: usize, out: &mut Tensor) -> Result<(), Error> {
        let weights = weights.floats("head_linear")?;
        let (each, _) = door::head_linear(x.shape(), (weights.rows, weights.cols), heads, out.shape())?;
        out.set_rows(x.rows());
        // The part of head `h` of token `t` is row `t · heads + h`.
        let parts = u32::try_from(x.rows() * heads).unwrap_or(u32::MAX);
        let heads = u32::try_from(heads).unwrap_or(u32::MAX);
        let of = |head| (head..parts).step_by(heads as usize).map(move |part| (head, part));
        let list: Vec<(u32, u32)> = (0..heads).flat_map(of).collect();
        let out = SharedOut::new(out.data_mut());
        self.grouped(x.data(), weights, each, &list, &|part| part, &|_, part, sums| {
            // SAFETY: every part is in the list once.
            unsafe { out.slice(part * each, each) }.copy_from_slice(sums);
        });
        Ok(())
    }
}

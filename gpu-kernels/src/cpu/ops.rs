//! The operators as a trait asks for them: the door, then who does it.

use std::borrow::Cow;
use std::sync::PoisonError;

use super::attention::Queries;
use super::integers::Form;
use super::matmul::Product;
use super::norm::RmsNorm;
use super::out::SharedOut;
use super::weight::Matrix;
use super::{
    Batch, Cpu, Floats, KvPool, RopeTable, Tensor, TreeMask, Weight, activation, append, attention, embed,
    integers, norm,
};
use crate::door;
use crate::error::same;
use crate::{
    Attention, BatchInput, Error, Fp8Source, Gate, HeadNorms, Heads, Int4Source, KvOrder, KvShape, KvStorage,
    Norm, Ops, Projection, RopeStyle, Rounding, Scores, WeightSource,
};

impl Ops for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;
    type RopeTable = RopeTable;
    type KvPool = KvPool;
    type Batch = Batch;
    type Floats = Floats;
    type TreeMask = TreeMask;

    fn tensor(&self, rows_max: usize, cols: usize) -> Result<Tensor, Error> {
        Tensor::new(rows_max, cols)
    }

    fn weight(&self, source: WeightSource) -> Result<Weight, Error> {
        Weight::new((&self.workers, self.isa, &self.arena), &source)
    }

    fn weight_rounded(&self, source: WeightSource, rounding: Rounding) -> Result<Weight, Error> {
        Weight::rounded((&self.workers, self.isa, &self.arena), &source, rounding)
    }

    fn weight_int4(&self, source: &Int4Source) -> Result<Weight, Error> {
        Weight::int4((&self.workers, self.isa, &self.arena), source)
    }

    fn weight_fp8(&self, source: &Fp8Source) -> Result<Weight, Error> {
        Weight::fp8((&self.workers, self.isa, &self.arena), source)
    }

    fn table(&self, source: WeightSource) -> Result<Weight, Error> {
        Weight::table(source)
    }

    fn rope_table(
        &self,
        cos: &[f32],
        sin: &[f32],
        rotary_dim: usize,
        style: RopeStyle,
    ) -> Result<RopeTable, Error> {
        RopeTable::new(cos, sin, rotary_dim, style)
    }

    fn kv_pool_ordered(&self, shape: KvShape, storage: KvStorage, order: KvOrder) -> Result<KvPool, Error> {
        door::storage(storage)?;
        KvPool::new(shape, storage, order, None)
    }

    fn kv_block_bytes_stored(&self, shape: KvShape, storage: KvStorage) -> Result<usize, Error> {
        door::storage(storage)?;
        KvPool::block_bytes(shape, storage, None)
    }

    fn batch(&self, input: BatchInput<'_>) -> Result<Batch, Error> {
        Batch::new(input)
    }

    fn embed(&self, table: &Weight, tokens: &[u32], out: &mut Tensor) -> Result<(), Error> {
        let table = table.rows("embed")?;
        door::embed(table.shape(), tokens, out.shape())?;
        out.set_rows(tokens.len());
        embed::embed(&self.workers, self.isa, table, tokens, out.data_mut());
        Ok(())
    }

    fn rms_norm_as(&self, x: &Tensor, norm: Norm<'_, Self>, out: &mut Tensor) -> Result<(), Error> {
        let (weight, offset, eps) = (norm.weight.vector("rms_norm", x.cols())?, norm.offset(), norm.eps);
        door::rms_norm(x.shape(), out.shape())?;
        out.set_rows(x.rows());
        // The norm writes `x` only where there is something to add.
        let (from, out) = (SharedOut::new_read(x.data()), SharedOut::new(out.data_mut()));
        let norm = RmsNorm { weight, offset, eps, x: from, add: None, out };
        norm::rms_norm(&self.workers, self.isa, x.rows(), norm);
        Ok(())
    }

    fn add_rms_norm_as(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_, Self>,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let weight = norm.weight.vector("add_rms_norm", residual.cols())?;
        let (offset, eps) = (norm.offset(), norm.eps);
        door::add_rms_norm(residual.shape(), delta.shape(), out.shape())?;
        out.set_rows(residual.rows());
        let rows = residual.rows();
        let (x, out) = (SharedOut::new(residual.data_mut()), SharedOut::new(out.data_mut()));
        let norm = RmsNorm { weight, offset, eps, x, add: Some(delta.data()), out };
        norm::rms_norm(&self.workers, self.isa, rows, norm);
        Ok(())
    }

    fn linear(&self, x: &Tensor, projections: &mut [Projection<'_, Self>]) -> Result<(), Error> {
        for projection in projections.iter() {
            let weight = projection.weight.matrix("linear")?.shape();
            door::linear(x.shape(), weight, projection.out.shape())?;
            if let Some(bias) = projection.bias {
                bias.vector("linear", weight.0)?;
            }
        }
        let (mut floats, mut eights, mut fours) = (Vec::with_capacity(projections.len()), vec![], vec![]);
        for projection in projections.iter_mut() {
            let matrix = projection.weight.matrix("linear")?;
            let bias = match projection.bias {
                Some(bias) => Some(bias.vector("linear", matrix.shape().0)?),
                None => None,
            };
            projection.out.set_rows(x.rows());
            let out = SharedOut::new(projection.out.data_mut());
            match matrix {
                Matrix::Floats(weight) => floats.push(Product { weight, bias, out }),
                Matrix::Integers(weight) => match weight.form {
                    Form::Eight | Form::E4m3 => eights.push(integers::Product { weight, bias, out }),
                    Form::Four => fours.push(integers::Product { weight, bias, out }),
                },
            }
        }
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        self.multiply(&mut packed, (x.data(), x.rows()), floats);
        self.multiply_integers(&mut packed, (x.data(), x.rows()), &eights);
        self.multiply_integers(&mut packed, (x.data(), x.rows()), &fours);
        Ok(())
    }

    fn head_norm(&self, x: &mut Tensor, weight: &Weight, eps: f32) -> Result<(), Error> {
        let dim = weight.vector_len();
        let weight = weight.vector("head_norm", dim)?;
        door::head_norm(x.shape(), dim)?;
        self.norm_heads(x.data_mut(), weight, eps);
        Ok(())
    }

    fn rope(
        &self,
        batch: &Batch,
        table: &RopeTable,
        q: &mut Tensor,
        k: &mut Tensor,
        heads: Heads,
    ) -> Result<(), Error> {
        door::rope(batch, (table.positions(), table.rotary_dim()), q.shape(), k.shape(), heads)?;
        let (workers, positions) = (&self.workers, &batch.positions);
        table.rotate(workers, self.isa, positions, q.data_mut(), (heads.query, heads.dim));
        table.rotate(workers, self.isa, positions, k.data_mut(), (heads.kv, heads.dim));
        Ok(())
    }

    fn append(
        &self,
        pool: &mut KvPool,
        layer: usize,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(), Error> {
        door::keys_and_values("append", pool.latent_dim)?;
        door::append(pool.shape, layer, batch, k.shape(), v.shape())?;
        append::append((&self.workers, self.isa), pool, layer, &batch.slots, k.data(), v.data());
        Ok(())
    }

    fn rope_append(
        &self,
        pool: &mut KvPool,
        layer: usize,
        batch: &Batch,
        table: &RopeTable,
        norms: Option<HeadNorms<'_, Self>>,
        q: &mut Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: Heads,
    ) -> Result<(), Error> {
        door::rope(batch, (table.positions(), table.rotary_dim()), q.shape(), k.shape(), heads)?;
        door::keys_and_values("append", pool.latent_dim)?;
        door::append(pool.shape, layer, batch, k.shape(), v.shape())?;
        same("rope_append", "kv heads", heads.kv, pool.shape.kv_heads)?;
        let weights = match norms {
            None => None,
            Some(HeadNorms { q, k, eps }) => {
                let of = |weight| Weight::vector(weight, "rope_append", heads.dim);
                Some((of(q)?, of(k)?, eps))
            }
        };
        let mut memory = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let [turned] = memory.take([k.data().len()]);
        turned.copy_from_slice(k.data());
        if let Some((of_q, of_k, eps)) = weights {
            self.norm_heads(q.data_mut(), of_q, eps);
            self.norm_heads(turned, of_k, eps);
        }
        let (workers, positions) = (&self.workers, &batch.positions);
        table.rotate(workers, self.isa, positions, q.data_mut(), (heads.query, heads.dim));
        table.rotate(workers, self.isa, positions, turned, (heads.kv, heads.dim));
        append::append((workers, self.isa), pool, layer, &batch.slots, turned, v.data());
        Ok(())
    }

    fn attend(
        &self,
        pool: &KvPool,
        layer: usize,
        batch: &Batch,
        q: &Tensor,
        attention: Attention,
        scores: Scores<'_, Self>,
        out: &mut Tensor,
        lse: Option<&mut Floats>,
    ) -> Result<(), Error> {
        door::keys_and_values("attention", pool.latent_dim)?;
        door::attention(pool.shape, layer, batch, q.shape(), attention.heads, out.shape())?;
        let q = Queries { values: q.data(), value_dim: attention.heads.dim, others: &[] };
        self.attend_rows((pool, layer, batch), q, attention, scores, out, lse)
    }

    fn merge_states(
        &self,
        (a, lse_a): (&mut Tensor, &mut Floats),
        (b, lse_b): (&Tensor, &Floats),
        heads: usize,
    ) -> Result<(), Error> {
        door::merge_states((a.shape(), lse_a.numbers.len()), (b.shape(), lse_b.numbers.len()), heads)?;
        attention::merge_states(&self.workers, (a.data_mut(), lse_a), (b.data(), lse_b));
        Ok(())
    }

    fn floats(&self, numbers: &[f32]) -> Result<Floats, Error> {
        Ok(Floats { numbers: numbers.to_vec() })
    }

    fn read_floats(&self, floats: &Floats) -> Result<Vec<f32>, Error> {
        Ok(floats.numbers.clone())
    }

    fn tree_mask(&self, bits: &[u32], words: usize) -> Result<TreeMask, Error> {
        Ok(TreeMask { tokens: door::tree_mask(bits, words)?, bits: bits.to_vec(), words })
    }

    fn gated(&self, gate: Gate, x: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<(), Error> {
        door::gated(gate, x.shape(), up.shape(), out.shape())?;
        out.set_rows(x.rows());
        activation::gated((&self.workers, self.isa), gate, x.data(), up.data(), out.data_mut());
        Ok(())
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), Error> {
        door::gather_rows(x.shape(), rows, out.shape())?;
        out.set_rows(rows.len());
        let cols = x.cols();
        if cols > 0 {
            for (to, &row) in out.data_mut().chunks_exact_mut(cols).zip(rows) {
                to.copy_from_slice(&x.data()[row as usize * cols..][..cols]);
            }
        }
        Ok(())
    }

    fn copy_blocks(&self, pool: &mut KvPool, pairs: &[(u32, u32)]) -> Result<(), Error> {
        door::copy_blocks(pool.shape, pairs)?;
        for &(from, to) in pairs {
            pool.copy_block(from, to);
        }
        Ok(())
    }

    fn copy_slots(&self, pool: &mut KvPool, lists: &[&[(u64, u64)]]) -> Result<(), Error> {
        door::copy_slots(pool.shape, lists)?;
        for &(from, to) in lists.iter().copied().flatten() {
            #[expect(clippy::cast_possible_truncation, reason = "below the number of slots")]
            pool.copy_slot(from as usize, to as usize);
        }
        Ok(())
    }

    fn save_blocks(&self, pool: &KvPool, blocks: &mut [(u32, &mut [u8])]) -> Result<(), Error> {
        door::save_blocks(pool.shape, blocks, pool.bytes_of_block())?;
        blocks.iter_mut().for_each(|(block, bytes)| pool.save_block(*block, bytes));
        Ok(())
    }

    fn load_blocks(&self, pool: &mut KvPool, blocks: &[(u32, &[u8])]) -> Result<(), Error> {
        door::load_blocks(pool.shape, blocks, pool.bytes_of_block())?;
        blocks.iter().for_each(|(block, bytes)| pool.load_block(*block, bytes));
        Ok(())
    }

    fn read<'a>(&self, x: &'a Tensor) -> Result<Cow<'a, [f32]>, Error> {
        Ok(Cow::Borrowed(x.data()))
    }

    fn write(&self, x: &mut Tensor, elements: &[f32]) -> Result<(), Error> {
        x.set_rows(door::write(x.shape(), elements.len())?);
        x.data_mut().copy_from_slice(elements);
        Ok(())
    }
}

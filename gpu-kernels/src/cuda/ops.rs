//! The operators as a trait asks for them: the door, then who does it.

use std::borrow::Cow;

use super::attention::Call;
use super::elementwise::NormBy;
use super::memory::Memory;
use super::tensor::Matrix;
use super::{Batch, Cuda, Floats, KvPool, RopeTable, Tensor, TreeMask, Weight};
use crate::door;
use crate::{
    Attention, BatchInput, Error, Fp8Source, Gate, HeadNorms, Heads, Int4Source, KvOrder, KvShape, KvStorage,
    Norm, Ops, Projection, RopeStyle, Rounding, Scores, WeightSource,
};

impl Ops for Cuda {
    type Tensor = Tensor;
    type Weight = Weight;
    type RopeTable = RopeTable;
    type KvPool = KvPool;
    type Batch = Batch;
    type Floats = Floats;
    type TreeMask = TreeMask;

    fn tensor(&self, rows_max: usize, cols: usize) -> Result<Tensor, Error> {
        Tensor::new(&self.device, rows_max, cols)
    }

    fn weight(&self, source: WeightSource) -> Result<Weight, Error> {
        Weight::new(&self.device, self.dtype, &source)
    }

    fn weight_rounded(&self, source: WeightSource, rounding: Rounding) -> Result<Weight, Error> {
        match source.shape[..] {
            [_, _] => self.rounded(&source, rounding).map(Weight::of_integers),
            _ => self.weight(source),
        }
    }

    fn weight_int4(&self, source: &Int4Source) -> Result<Weight, Error> {
        self.stored(source).map(Weight::of_integers)
    }

    fn weight_fp8(&self, source: &Fp8Source) -> Result<Weight, Error> {
        self.fp8(source)
    }

    fn rope_table(
        &self,
        cos: &[f32],
        sin: &[f32],
        rotary_dim: usize,
        style: RopeStyle,
    ) -> Result<RopeTable, Error> {
        RopeTable::new(&self.device, cos, sin, rotary_dim, style)
    }

    fn kv_pool_ordered(&self, shape: KvShape, storage: KvStorage, order: KvOrder) -> Result<KvPool, Error> {
        door::storage(storage)?;
        KvPool::new(&self.device, self.dtype, shape, storage, order)
    }

    fn kv_block_bytes_stored(&self, shape: KvShape, storage: KvStorage) -> Result<usize, Error> {
        door::storage(storage)?;
        KvPool::bytes_of_block(&shape, storage)
    }

    fn batch(&self, input: BatchInput<'_>) -> Result<Batch, Error> {
        Batch::new(&self.device, input, false)
    }

    fn embed(&self, table: &Weight, tokens: &[u32], out: &mut Tensor) -> Result<(), Error> {
        let table = table.matrix("embed")?;
        door::embed(table.shape(), tokens, out.shape())?;
        match table {
            Matrix::Floats(floats) => self.gather((floats.address(), floats.stride()), tokens, out),
            Matrix::Integers(integers) => self.gather_integers(integers, tokens, out),
        }
    }

    fn rms_norm_as(&self, x: &Tensor, norm: Norm<'_, Self>, out: &mut Tensor) -> Result<(), Error> {
        let weight = norm.weight.vector("rms_norm", x.cols())?;
        door::rms_norm(x.shape(), out.shape())?;
        out.set_rows(x.rows());
        self.norm(x, None, NormBy { weight, eps: norm.eps, offset: norm.offset() }, out)
    }

    fn add_rms_norm_as(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_, Self>,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let weight = norm.weight.vector("add_rms_norm", residual.cols())?;
        door::add_rms_norm(residual.shape(), delta.shape(), out.shape())?;
        out.set_rows(residual.rows());
        let by = NormBy { weight, eps: norm.eps, offset: norm.offset() };
        self.norm(residual, Some(delta), by, out)
    }

    fn linear(&self, x: &Tensor, projections: &mut [Projection<'_, Self>]) -> Result<(), Error> {
        for projection in projections.iter() {
            let weight = projection.weight.matrix("linear")?.shape();
            door::linear(x.shape(), weight, projection.out.shape())?;
            if let Some(bias) = projection.bias {
                bias.vector("linear", weight.0)?;
            }
        }
        for projection in projections.iter_mut() {
            projection.out.set_rows(x.rows());
            self.gemm(x, projection)?;
        }
        Ok(())
    }

    fn head_norm(&self, x: &mut Tensor, weight: &Weight, eps: f32) -> Result<(), Error> {
        let dim = weight.cols();
        let weight = weight.vector("head_norm", dim)?;
        door::head_norm(x.shape(), dim)?;
        self.norm_heads(x, dim, weight, eps)
    }

    fn rope(
        &self,
        batch: &Batch,
        table: &RopeTable,
        q: &mut Tensor,
        k: &mut Tensor,
        heads: Heads,
    ) -> Result<(), Error> {
        self.check_rope(batch, table, q, k, heads)?;
        self.rotate(batch, table, q, k, heads)
    }

    fn append(
        &self,
        pool: &mut KvPool,
        layer: usize,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(), Error> {
        self.check_append(pool, layer, batch, k, v)?;
        self.store(pool, layer, batch, k, v)
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
        self.norm_rotate_store(pool, layer, batch, table, norms, q, k, v, heads)
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
        self.check_attention(pool, layer, batch, q, attention, out)?;
        let value_dim = attention.heads.dim;
        let call = Call { cuda: self, pool, batch, attention, scores, value_dim, q_rope: None };
        call.run(layer, q, out, lse)
    }

    fn merge_states(
        &self,
        a: (&mut Tensor, &mut Floats),
        b: (&Tensor, &Floats),
        heads: usize,
    ) -> Result<(), Error> {
        door::merge_states((a.0.shape(), a.1.len), (b.0.shape(), b.1.len), heads)?;
        self.merge(a, b, heads)
    }

    fn floats(&self, numbers: &[f32]) -> Result<Floats, Error> {
        Ok(Floats { memory: Memory::of(&self.device, bytemuck::cast_slice(numbers))?, len: numbers.len() })
    }

    fn read_floats(&self, floats: &Floats) -> Result<Vec<f32>, Error> {
        let mut numbers = vec![0.0; floats.len];
        if floats.len > 0 {
            self.device.download(floats.memory.address(), bytemuck::cast_slice_mut(&mut numbers))?;
        }
        Ok(numbers)
    }

    fn tree_mask(&self, bits: &[u32], words: usize) -> Result<TreeMask, Error> {
        let tokens = door::tree_mask(bits, words)?;
        Ok(TreeMask { memory: Memory::of(&self.device, bytemuck::cast_slice(bits))?, tokens, words })
    }

    fn gated(&self, gate: Gate, x: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<(), Error> {
        door::gated(gate, x.shape(), up.shape(), out.shape())?;
        self.gate(gate, x, up, out)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<(), Error> {
        door::gather_rows(x.shape(), rows, out.shape())?;
        self.gather((x.address(), x.stride()), rows, out)
    }

    fn copy_blocks(&self, pool: &mut KvPool, pairs: &[(u32, u32)]) -> Result<(), Error> {
        door::copy_blocks(pool.shape, pairs)?;
        self.copy(pool, pairs)
    }

    fn copy_slots(&self, pool: &mut KvPool, lists: &[&[(u64, u64)]]) -> Result<(), Error> {
        door::copy_slots(pool.shape, lists)?;
        self.move_tokens(pool, lists)
    }

    fn save_blocks(&self, pool: &KvPool, blocks: &mut [(u32, &mut [u8])]) -> Result<(), Error> {
        door::save_blocks(pool.shape, blocks, pool.block_bytes())?;
        self.save(pool, blocks)
    }

    fn load_blocks(&self, pool: &mut KvPool, blocks: &[(u32, &[u8])]) -> Result<(), Error> {
        door::load_blocks(pool.shape, blocks, pool.block_bytes())?;
        self.load(pool, blocks)
    }

    fn read<'a>(&self, x: &'a Tensor) -> Result<Cow<'a, [f32]>, Error> {
        Ok(Cow::Owned(x.read(&self.device, self.dtype)?))
    }

    fn write(&self, x: &mut Tensor, elements: &[f32]) -> Result<(), Error> {
        x.set_rows(door::write(x.shape(), elements.len())?);
        x.write(&self.device, self.dtype, elements)
    }
}

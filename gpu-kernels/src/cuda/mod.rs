//! The operators on an NVIDIA GPU, sm_80 (Ampere) or later.
//!
//! The kernels are CUDA C++ of our own, in `kernels/`: they include no header of a toolkit. This module checks
//! shapes, cuts the work and launches; what it launches on is a [`Device`].

mod attention;
mod batch;
#[cfg(any(test, feature = "cuda"))]
mod cache;
mod copy;
#[cfg(feature = "cuda")]
mod cublaslt;
mod device;
#[cfg(feature = "cuda")]
mod driver;
mod elementwise;
#[cfg(any(test, feature = "cuda"))]
mod embedded;
mod gemm;
mod graph;
mod hopper;
mod hopper_product;
mod latent;
mod memory;
mod moe;
mod norm;
#[cfg(feature = "cuda")]
mod nvrtc;
mod plan;
mod pool;
#[cfg(feature = "cuda")]
mod probe;
#[cfg(feature = "cuda")]
mod products;
mod quant;
mod rope;
mod sample;
mod source;
mod tensor;
mod verify;

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

pub use attention::{Floats, TreeMask};
pub use batch::Batch;
#[cfg(feature = "cuda")]
pub use cublaslt::CublasLt;
pub use device::{
    Address, Device, EncodedTileMap, Launch, MemoryUse, Recording, Stream, TileElement, TileMap,
    Work as LibraryWork,
};
pub use graph::Graph;
pub use moe::Routing;
pub use norm::{QuantTensor, RowStorage};
pub use plan::{CHUNK, Cut, Item, Merge, Plan, ROWS_FEW, ROWS_MANY, Work, plan};
pub use pool::KvPool;
pub use quant::QuantSource;
pub use rope::RopeTable;
pub use sample::Distributions;
pub use source::{HEADERS, OPTIONS, SOURCES, Source};
pub use tensor::{Tensor, Weight};

use attention::Call;
use elementwise::NormBy;
use memory::{Keeper, Memory};
use tensor::Matrix;

use crate::door;
use crate::error::at_most;
use crate::{
    Attention, BatchInput, Dtype, Error, Fp8Source, Gate, HeadNorms, Heads, Int4Source, KvOrder, KvShape,
    KvStorage, Norm, Ops, Projection, RopeStyle, Rounding, Scores, WeightSource,
};

/// The operators, on a device.
///
/// Activations are bf16 or f16, and weights are rounded to that when they are brought over. Sums are f32.
#[derive(Debug)]
pub struct Cuda {
    device: Arc<Keeper>,
    dtype: Dtype,
    /// Partial results of attention.
    workspace: Mutex<Arc<Memory>>,
    /// Prompts take Hopper's kernel where there is one.
    fast_prompts: bool,
    /// Launches may begin while those before them end.
    early_launches: bool,
    /// What multiplies in our kernels' place.
    #[cfg(feature = "cuda")]
    products: Option<Arc<products::Products>>,
}

impl Cuda {
    /// The operators on a given device, with activations of a given type.
    ///
    /// # Errors
    /// When the type is neither bf16 nor f16.
    pub fn on(device: Arc<dyn Device>, dtype: Dtype) -> Result<Self, Error> {
        if dtype == Dtype::F32 {
            return Err(Error::Unsupported {
                operator: "cuda",
                what: "activations of",
                found: dtype.to_string(),
                supported: "bf16 and f16",
            });
        }
        let device = Keeper::new(device);
        let workspace = Mutex::new(Arc::new(Memory::new(&device, 0)?));
        Ok(Self {
            device,
            dtype,
            workspace,
            fast_prompts: false,
            early_launches: true,
            #[cfg(feature = "cuda")]
            products: None,
        })
    }

    /// Whether prompts take the kernels that are made for Hopper, on such a GPU: attention of spans of more than 16
    /// rows of a kv head, and products of more than 64 rows with matrices of the activations' type. They sum in
    /// another order: with them, a token's bits depend on how its prompt was cut into steps, and on what else was in
    /// the step. Off at first.
    #[must_use]
    pub fn with_fast_prompts(self, fast_prompts: bool) -> Self {
        Self { fast_prompts, ..self }
    }

    /// Whether a launch may begin while the one before it ends, on a GPU that can (Hopper and later, with a driver of
    /// CUDA 12.4 or later; "programmatic dependent launch"): its blocks are in place when the last results are there, in
    /// a [`Graph`] too. No result depends on it. On at first.
    #[must_use]
    pub fn with_early_launches(self, early_launches: bool) -> Self {
        Self { early_launches, ..self }
    }

    /// How activations and weights are stored.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How much memory the device has, if it can tell.
    ///
    /// # Errors
    /// When the device fails.
    pub fn memory_use(&self) -> Result<Option<MemoryUse>, Error> {
        self.device.memory_use()
    }

    /// A step whose work has room for any contexts, so that a [`Graph`] of it can be replayed for others: see
    /// [`Batch::refill`].
    ///
    /// # Errors
    /// As [`Ops::batch`].
    pub fn fixed_batch(&self, input: BatchInput<'_>) -> Result<Batch, Error> {
        Batch::new(&self.device, input, true)
    }

    /// Launches a kernel that exists once for each type of activations.
    fn launch<A: bytemuck::Pod>(
        &self,
        file: &'static str,
        kernel: &str,
        blocks: u32,
        threads: usize,
        shared_bytes: usize,
        argument: &A,
    ) -> Result<(), Error> {
        self.start(file, &format!("{kernel}_{}", self.dtype), blocks, threads, shared_bytes, argument)
    }

    /// Launches a kernel; an empty grid is nothing to do.
    fn start<A: bytemuck::Pod>(
        &self,
        file: &'static str,
        kernel: &str,
        blocks: u32,
        threads: usize,
        shared_bytes: usize,
        argument: &A,
    ) -> Result<(), Error> {
        if blocks == 0 {
            return Ok(());
        }
        let most = self.device.shared_bytes_max();
        at_most("launch", "shared memory of a block, in bytes", shared_bytes, most as usize)?;
        let launch = Launch {
            file,
            kernel,
            blocks,
            threads: count("launch", "threads", threads)?,
            shared_bytes: count("launch", "shared memory", shared_bytes)?,
            argument: bytemuck::bytes_of(argument),
            early: self.early_launches,
        };
        // SAFETY: the operators check shapes and indices against the memory whose addresses they pass, and that
        // memory is borrowed for the call; releases come after it in the device's order.
        unsafe { self.device.launch(launch) }
    }
}

/// A dimension as kernels take it.
fn count(operator: &'static str, dimension: &'static str, n: usize) -> Result<u32, Error> {
    u32::try_from(n).map_err(|_| Error::TooLarge { operator, dimension, found: n, max: u32::MAX as usize })
}

/// Blocks of a grid that share `n` things, `each` a block.
fn divide(operator: &'static str, n: usize, each: usize) -> Result<u32, Error> {
    let blocks = n.div_ceil(each);
    at_most(operator, "blocks of a grid", blocks, i32::MAX as usize)?;
    count(operator, "blocks of a grid", blocks)
}

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

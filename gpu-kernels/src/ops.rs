//! The operators of a dense decoder, and the arguments that they share.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{Dtype, Error, Heads, KvShape, RopeStyle};

/// Bytes that outlive the weights cut from them: a mapped file, usually.
pub type WeightBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Where the elements of a weight lie. Little-endian, row-major, any alignment.
#[derive(Clone)]
pub struct WeightSource {
    /// The buffer, shared by all weights of a file.
    pub bytes: WeightBytes,
    /// The part of the buffer that is this weight; its length must be exactly what shape and type need.
    pub range: Range<usize>,
    /// How an element is stored.
    pub dtype: Dtype,
    /// `[n]` for a norm weight or a bias, `[out, in]` for a projection or an embedding table.
    pub shape: Vec<usize>,
}

impl fmt::Debug for WeightSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightSource")
            .field("range", &self.range)
            .field("dtype", &self.dtype)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

/// A part of a buffer.
#[derive(Clone)]
pub struct WeightPart {
    /// The buffer, shared by all weights of a file.
    pub bytes: WeightBytes,
    /// The part of it.
    pub range: Range<usize>,
}

impl fmt::Debug for WeightPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeightPart").field("range", &self.range).finish_non_exhaustive()
    }
}

/// A matrix `[rows, cols]` (`[out, in]`) of 4-bit integers as a checkpoint stores it, where
/// `weight = scale · (value - zero)` with a scale and a zero point for every `group` elements of `in` of every output.
/// Little-endian words of eight integers; scales are f16, `[cols / group, rows]`.
#[derive(Clone, Debug)]
pub struct Int4Source {
    /// In which order the integers lie.
    pub layout: Int4Layout,
    /// Outputs, a multiple of 8.
    pub rows: usize,
    /// Inputs, a multiple of `group`.
    pub cols: usize,
    /// Elements of `in` with one scale, a multiple of 8.
    pub group: usize,
    /// The integers, `qweight`.
    pub values: WeightPart,
    /// The zero points, `qzeros`.
    pub zeros: WeightPart,
    /// The scales, `scales`.
    pub scales: WeightPart,
    /// The group of each input, `g_idx` (i32, `[cols]`); `None`: one group after the other. An implementation may
    /// refuse any other order (act-order).
    pub group_of: Option<WeightPart>,
}

/// How 4-bit integers lie in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Layout {
    /// AWQ's GEMM form: values `[cols, rows / 8]` and zero points `[cols / group, rows / 8]`, of eight outputs in the
    /// order 0 2 4 6 1 3 5 7 from the lowest bits on.
    Awq,
    /// GPTQ: values `[cols / 8, rows]`, eight elements of `in` in a word; zero points `[cols / group, rows / 8]` less
    /// one.
    Gptq,
    /// GPTQ's second version: the same, with zero points as they are.
    GptqV2,
}

/// Integers to which [`Ops::weight_rounded`] rounds, ties to even.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Eight bits, one scale for each output, zero point 0.
    Int8,
    /// Four bits, one f16 scale for each 128 elements of `in` of each output, zero point 8.
    Int4,
}

/// One matrix product of [`Ops::linear`]: `out = x · weightᵀ + bias`.
pub struct Projection<'a, O: Ops + ?Sized> {
    /// `[out, in]`.
    pub weight: &'a O::Weight,
    /// `[out]`, added after the sum.
    pub bias: Option<&'a O::Weight>,
    /// `[rows, out]`; takes the rows of `x`.
    pub out: &'a mut O::Tensor,
}

impl<O: Ops + ?Sized> fmt::Debug for Projection<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Projection").field("bias", &self.bias.is_some()).finish_non_exhaustive()
    }
}

/// The part of one sequence that a step computes.
///
/// The span's queries are rows `query_start..query_start + query_len` of the step's activations. They are the
/// *last* `query_len` positions of a context of `context_len` tokens: query `i` sits at position
/// `context_len - query_len + i` and sees that position and those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// First row of the span.
    pub query_start: u32,
    /// Rows of the span; 0 is legal.
    pub query_len: u32,
    /// Tokens of the sequence whose K and V are in the cache, this step's included. 0 is legal: the output is zeros.
    pub context_len: u32,
}

/// One step's tokens, as flat arrays. All indices are checked once, when the batch is made.
#[derive(Clone, Copy, Debug)]
pub struct BatchInput<'a> {
    /// Position of each token in its sequence, for RoPE. `[tokens]`.
    pub positions: &'a [u32],
    /// Where each token's K and V go: `block * block_size + offset`; a negative slot is skipped. `[tokens]`.
    pub slots: &'a [i64],
    /// The sequences, in ascending order of rows and not overlapping. Rows in no span get zeros from attention.
    pub spans: &'a [Span],
    /// Physical block of each logical block, `[spans, blocks_max]` row-major, where
    /// `blocks_max = block_tables.len() / spans.len()`. Entries at or past the context's end are not read.
    pub block_tables: &'a [u32],
    /// Tokens per block; must be the pool's.
    pub block_size: usize,
}

/// How a layer attends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads, kv heads, head size.
    pub heads: Heads,
    /// Factor on the scores, usually `1 / sqrt(dim)`.
    pub scale: f32,
    /// Positions that a query sees, its own included (Mistral's sliding window); `None` sees all before it.
    pub window: Option<u32>,
}

/// The arithmetic of a dense decoder (Llama, Qwen, Mistral) on one machine.
///
/// A forward pass is written once over this trait and runs wherever the trait is implemented. Activations are
/// matrices `[rows, cols]`, one row per token, that grow and shrink up to the rows they were made for: an operator
/// gives its output the rows of its input.
///
/// **Batch invariance.** The bits of a row of any output depend on that row's own inputs (and, in attention, on its
/// own sequence) and on nothing else: not on the other rows, their number, the chunking of the prompt, the size of
/// a block, or the number of threads.
///
/// **Errors.** Every operator checks all shapes at the door and returns an [`Error`] naming the dimension; then
/// nothing has been written.
pub trait Ops {
    /// Activations `[rows, cols]`.
    type Tensor;
    /// A matrix `[out, in]` or a vector `[n]` of the checkpoint.
    type Weight;
    /// Cosines and sines of rotary embedding.
    type RopeTable;
    /// K and V of all layers, in blocks.
    type KvPool;
    /// One step's positions, slots, spans and block tables.
    type Batch;

    /// Activations with room for `rows_max` rows; starts with no rows.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn tensor(&self, rows_max: usize, cols: usize) -> Result<Self::Tensor, Error>;

    /// Takes a weight from its bytes, and keeps it in whatever form products read it fastest: the bytes are not needed
    /// afterwards. Cost: one pass over them.
    ///
    /// # Errors
    /// When the range does not hold exactly the shape's elements, the shape has not one or two dimensions, or the
    /// memory cannot be had.
    fn weight(&self, source: WeightSource) -> Result<Self::Weight, Error>;

    /// Takes a matrix and keeps it in small integers; a vector is kept as it is. Cost: one pass over the bytes.
    ///
    /// # Errors
    /// As [`Ops::weight`], and where integers are not computed with.
    fn weight_rounded(&self, source: WeightSource, rounding: Rounding) -> Result<Self::Weight, Error> {
        let _ = source;
        Err(no_integers("weight_rounded", format!("{rounding:?}")))
    }

    /// Takes a matrix of 4-bit integers from its bytes. Products have the sums that the integers, scales and zero
    /// points say, without rounding activations.
    ///
    /// # Errors
    /// When the parts do not hold exactly what the shape needs, a dimension is no multiple of 8 or of the group, the
    /// memory cannot be had, or integers are not computed with.
    fn weight_int4(&self, source: &Int4Source) -> Result<Self::Weight, Error> {
        Err(no_integers("weight_int4", format!("{:?}", source.layout)))
    }

    /// Takes a matrix that only [`Ops::embed`] reads, and no product: it may be used where it lies, so that memory
    /// holds the rows that are used.
    ///
    /// # Errors
    /// When the range does not hold exactly the shape's elements, or the shape has not two dimensions.
    fn table(&self, source: WeightSource) -> Result<Self::Weight, Error> {
        self.weight(source)
    }

    /// A table for [`Ops::rope`]: `cos` and `sin` are `[positions, rotary_dim / 2]`. All scalings (linear, Llama 3,
    /// YaRN) are the caller's: they only change these numbers.
    ///
    /// # Errors
    /// When the lengths differ or are no multiple of `rotary_dim / 2`, or `rotary_dim` is odd or zero.
    fn rope_table(
        &self,
        cos: &[f32],
        sin: &[f32],
        rotary_dim: usize,
        style: RopeStyle,
    ) -> Result<Self::RopeTable, Error>;

    /// Memory for K and V. It takes address space now and pages when they are written.
    ///
    /// # Errors
    /// When a dimension is zero, the head size is above 256, or the memory cannot be had.
    fn kv_pool(&self, shape: KvShape) -> Result<Self::KvPool, Error>;

    /// Bytes that [`Ops::kv_pool`] takes for one block over all layers, so that a caller can turn memory into blocks.
    ///
    /// # Errors
    /// As [`Ops::kv_pool`].
    fn kv_block_bytes(&self, shape: KvShape) -> Result<usize, Error>;

    /// Checks a step's indices and brings them to where the arithmetic runs.
    ///
    /// # Errors
    /// When lengths disagree, spans overlap or leave the rows, or a context is longer than its block table.
    fn batch(&self, input: BatchInput<'_>) -> Result<Self::Batch, Error>;

    /// Rows of the table: `out[i] = table[tokens[i]]`.
    ///
    /// # Errors
    /// When a token is not in the table, or widths or rows do not fit.
    fn embed(&self, table: &Self::Weight, tokens: &[u32], out: &mut Self::Tensor) -> Result<(), Error>;

    /// `out = x / sqrt(mean(x²) + eps) · weight` per row (RMSNorm, arXiv 1910.07467); sums in f32.
    ///
    /// # Errors
    /// When widths or rows do not fit.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;

    /// `residual += delta`, then `out = rms_norm(residual)`: the seam between two halves of a layer, in one pass.
    ///
    /// # Errors
    /// When widths or rows do not fit.
    fn add_rms_norm(
        &self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;

    /// Several matrix products of the same `x`: `out = x · weightᵀ + bias` for each projection (q, k, v; gate, up).
    ///
    /// # Errors
    /// When `in` of a weight is not the width of `x`, or an output does not fit.
    fn linear(&self, x: &Self::Tensor, projections: &mut [Projection<'_, Self>]) -> Result<(), Error>;

    /// RMSNorm of every head on its own (Qwen3's q and k norm), in place. The head size is the weight's length.
    ///
    /// # Errors
    /// When the width of `x` is no multiple of the weight's length.
    fn head_norm(&self, x: &mut Self::Tensor, weight: &Self::Weight, eps: f32) -> Result<(), Error>;

    /// Rotates `q` `[tokens, heads.query * dim]` and `k` `[tokens, heads.kv * dim]` in place by each token's position.
    /// Only the first `rotary_dim` elements of a head turn.
    ///
    /// # Errors
    /// When shapes disagree or a position lies beyond the table.
    fn rope(
        &self,
        batch: &Self::Batch,
        table: &Self::RopeTable,
        q: &mut Self::Tensor,
        k: &mut Self::Tensor,
        heads: Heads,
    ) -> Result<(), Error>;

    /// Writes `k` and `v` `[tokens, kv_heads * head_dim]` of each token into its slot of `layer`, rounded to the
    /// pool's type. Negative slots are skipped; of equal slots the last token wins.
    ///
    /// # Errors
    /// When shapes disagree, or the layer or a slot is not in the pool.
    fn append(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        batch: &Self::Batch,
        k: &Self::Tensor,
        v: &Self::Tensor,
    ) -> Result<(), Error>;

    /// Causal attention of `q` `[tokens, heads.query * dim]` over the blocks of each span (PagedAttention, arXiv
    /// 2309.06180; online softmax, arXiv 1805.02867). `append` of the same layer comes first. A query that sees
    /// nothing gets zeros.
    ///
    /// # Errors
    /// When shapes disagree, or the layer or a block is not in the pool.
    fn attention(
        &self,
        pool: &Self::KvPool,
        layer: usize,
        batch: &Self::Batch,
        q: &Self::Tensor,
        attention: Attention,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;

    /// `out = silu(gate) · up`, `silu(x) = x / (1 + exp(-x))` (SwiGLU, arXiv 2002.05202).
    ///
    /// # Errors
    /// When shapes disagree.
    fn silu_mul(&self, gate: &Self::Tensor, up: &Self::Tensor, out: &mut Self::Tensor) -> Result<(), Error>;

    /// `out[i] = x[rows[i]]`: the rows whose logits are wanted.
    ///
    /// # Errors
    /// When a row is not in `x`, or widths or rows do not fit.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32], out: &mut Self::Tensor) -> Result<(), Error>;

    /// Copies whole blocks, K and V of all layers, in the order given: `(from, to)`.
    ///
    /// # Errors
    /// When a block is not in the pool.
    fn copy_blocks(&self, pool: &mut Self::KvPool, pairs: &[(u32, u32)]) -> Result<(), Error>;

    /// Copies a block, K and V of all layers, out of the pool into `bytes`, as many as [`Ops::kv_block_bytes`]. What
    /// they mean is known to [`Ops::load_block`] of a pool of the same shape alone.
    ///
    /// # Errors
    /// When the block is not in the pool, or `bytes` has another length.
    fn save_block(&self, pool: &Self::KvPool, block: u32, bytes: &mut [u8]) -> Result<(), Error>;

    /// Copies what [`Ops::save_block`] gave over a block of the pool.
    ///
    /// # Errors
    /// As [`Ops::save_block`].
    fn load_block(&self, pool: &mut Self::KvPool, block: u32, bytes: &[u8]) -> Result<(), Error>;

    /// The elements of `x`, row-major, on the host.
    ///
    /// # Errors
    /// When they cannot be brought there.
    fn read<'a>(&self, x: &'a Self::Tensor) -> Result<Cow<'a, [f32]>, Error>;

    /// Makes `x` hold these elements; their number gives the rows.
    ///
    /// # Errors
    /// When they are no whole number of rows, or too many.
    fn write(&self, x: &mut Self::Tensor, elements: &[f32]) -> Result<(), Error>;
}

fn no_integers(operator: &'static str, found: String) -> Error {
    Error::Unsupported { operator, what: "a matrix of integers", found, supported: "bf16, f16 and f32" }
}

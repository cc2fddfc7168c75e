//! The operators of a dense decoder, and the arguments that they share.

use std::borrow::Cow;
use std::fmt;

use crate::{
    Attention, Error, Fp8Source, Gate, HeadNorms, Heads, Int4Source, KvOrder, KvShape, KvStorage, Norm,
    RopeStyle, Rounding, Scores, WeightSource,
};

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
    /// Numbers that belong to heads: a slope or a sink of each, or what [`Ops::attend`] gives as LSE.
    type Floats;
    /// Which of its own span's tokens each token sees.
    type TreeMask;

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

    /// Takes a matrix and keeps it in eight bits or four; a vector is kept as it is. Cost: one pass over the bytes.
    ///
    /// # Errors
    /// As [`Ops::weight`], and where integers are not computed with.
    fn weight_rounded(&self, source: WeightSource, rounding: Rounding) -> Result<Self::Weight, Error> {
        let _ = source;
        Err(no_integers("weight_rounded", format!("{rounding:?}")))
    }

    /// Takes a matrix of 4-bit integers from its bytes. Products have the sums that the integers, scales and zero
    /// points say; activations are rounded only where they are for bf16 weights.
    ///
    /// # Errors
    /// When the parts do not hold exactly what the shape needs, a dimension is no multiple of 8 or of the group, the
    /// memory cannot be had, or integers are not computed with.
    fn weight_int4(&self, source: &Int4Source) -> Result<Self::Weight, Error> {
        Err(no_integers("weight_int4", format!("{:?}", source.layout)))
    }

    /// Takes a matrix of E4M3 numbers from its bytes. Products have the sums that numbers and scales say; activations
    /// are rounded only where they are for bf16 weights.
    ///
    /// # Errors
    /// When elements or scales do not hold exactly what the shape and the blocks need, one of them is no number, the
    /// memory cannot be had, or such numbers are not computed with.
    fn weight_fp8(&self, source: &Fp8Source) -> Result<Self::Weight, Error> {
        Err(no_integers("weight_fp8", format!("[{}, {}] E4M3", source.rows, source.cols)))
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
    fn kv_pool(&self, shape: KvShape) -> Result<Self::KvPool, Error> {
        self.kv_pool_stored(shape, KvStorage::Same)
    }

    /// The same, stored as asked.
    ///
    /// # Errors
    /// As [`Ops::kv_pool`], and when a scale is not finite and above 0.
    fn kv_pool_stored(&self, shape: KvShape, storage: KvStorage) -> Result<Self::KvPool, Error> {
        self.kv_pool_ordered(shape, storage, KvOrder::default())
    }

    /// The same, with the heads and tokens of a block in the order asked for. The CPU keeps sixteen tokens of K
    /// together in either ([`cpu::KvPool`](crate::cpu::KvPool)).
    ///
    /// # Errors
    /// As [`Ops::kv_pool_stored`].
    fn kv_pool_ordered(
        &self,
        shape: KvShape,
        storage: KvStorage,
        order: KvOrder,
    ) -> Result<Self::KvPool, Error>;

    /// Bytes that [`Ops::kv_pool`] takes for one block over all layers, so that a caller can turn memory into blocks.
    ///
    /// # Errors
    /// As [`Ops::kv_pool`].
    fn kv_block_bytes(&self, shape: KvShape) -> Result<usize, Error> {
        self.kv_block_bytes_stored(shape, KvStorage::Same)
    }

    /// Bytes that [`Ops::kv_pool_stored`] takes for one block over all layers, scales included.
    ///
    /// # Errors
    /// As [`Ops::kv_pool_stored`].
    fn kv_block_bytes_stored(&self, shape: KvShape, storage: KvStorage) -> Result<usize, Error>;

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
    ) -> Result<(), Error> {
        self.rms_norm_as(x, Norm { weight, eps, gemma: false }, out)
    }

    /// [`Ops::rms_norm`], also in Gemma's form: `· (1 + weight)`.
    ///
    /// # Errors
    /// When widths or rows do not fit.
    fn rms_norm_as(
        &self,
        x: &Self::Tensor,
        norm: Norm<'_, Self>,
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
    ) -> Result<(), Error> {
        self.add_rms_norm_as(residual, delta, Norm { weight, eps, gemma: false }, out)
    }

    /// [`Ops::add_rms_norm`], also in Gemma's form.
    ///
    /// # Errors
    /// When widths or rows do not fit.
    fn add_rms_norm_as(
        &self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        norm: Norm<'_, Self>,
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

    /// The norm of q's and k's heads if there is one, their rotation, and the way of k and v into the cache: what
    /// [`Ops::head_norm`], [`Ops::rope`] and [`Ops::append`] do one after the other, but without rounding in between.
    /// `q` changes in place; `k` and `v` do not.
    ///
    /// # Errors
    /// As those three, and then nothing has been written.
    #[expect(clippy::too_many_arguments, reason = "three operators in one")]
    fn rope_append(
        &self,
        pool: &mut Self::KvPool,
        layer: usize,
        batch: &Self::Batch,
        table: &Self::RopeTable,
        norms: Option<HeadNorms<'_, Self>>,
        q: &mut Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        heads: Heads,
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
    ) -> Result<(), Error> {
        self.attend(pool, layer, batch, q, attention, Scores::default(), out, None)
    }

    /// Attention with all that [`Ops::attention`] does not say: caps, slopes, sinks and masks; and the natural
    /// logarithm of each row's sum of exponentials, `[tokens, query heads]`, minus infinity where a row sees nothing
    /// and has no sink, and for rows in no span.
    ///
    /// # Errors
    /// As [`Ops::attention`]; and when the window is 0, the scale is not finite, the soft-cap is not finite and above
    /// 0, or slopes, sinks, mask or LSE have other lengths than heads, tokens and spans ask for.
    #[expect(clippy::too_many_arguments, reason = "what is read, how, and what is written")]
    fn attend(
        &self,
        pool: &Self::KvPool,
        layer: usize,
        batch: &Self::Batch,
        q: &Self::Tensor,
        attention: Attention,
        scores: Scores<'_, Self>,
        out: &mut Self::Tensor,
        lse: Option<&mut Self::Floats>,
    ) -> Result<(), Error>;

    /// One attention out of two over different parts of the same contexts (a shared prefix, and the rest): `a` and
    /// `lse_a` become those of both (arXiv 2501.01005, section 2.2). Parts that saw nothing (LSE minus infinity) change
    /// nothing.
    ///
    /// # Errors
    /// When shapes disagree.
    fn merge_states(
        &self,
        a: (&mut Self::Tensor, &mut Self::Floats),
        b: (&Self::Tensor, &Self::Floats),
        heads: usize,
    ) -> Result<(), Error>;

    /// Numbers for [`Scores`], or room for an LSE.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn floats(&self, numbers: &[f32]) -> Result<Self::Floats, Error>;

    /// What floats hold.
    ///
    /// # Errors
    /// When they cannot be brought here.
    fn read_floats(&self, floats: &Self::Floats) -> Result<Vec<f32>, Error>;

    /// Which of its own span's tokens each token sees: `[tokens, words]`, bit `j` (of word `j / 32`, lowest first) for
    /// the span's token `j`. What comes before the span is seen by all.
    ///
    /// # Errors
    /// When `words` does not divide the bits, or the memory cannot be had.
    fn tree_mask(&self, bits: &[u32], words: usize) -> Result<Self::TreeMask, Error>;

    /// `out = silu(gate) · up`, `silu(x) = x / (1 + exp(-x))` (SwiGLU, arXiv 2002.05202).
    ///
    /// # Errors
    /// When shapes disagree.
    fn silu_mul(&self, gate: &Self::Tensor, up: &Self::Tensor, out: &mut Self::Tensor) -> Result<(), Error> {
        self.gated(Gate::Silu, gate, up, out)
    }

    /// `out = gate(x) · up`, element by element, `[rows, cols]` all three.
    ///
    /// # Errors
    /// When shapes disagree, or `alpha` is not finite or `limit` not above 0.
    fn gated(
        &self,
        gate: Gate,
        x: &Self::Tensor,
        up: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<(), Error>;

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

    /// Copies K and V of single tokens between slots, of all layers: the drafts of a tree that stand go to the slots
    /// that the sequence goes on from. A list is made in order, each `(from, to)`; lists share no slot.
    ///
    /// # Errors
    /// When a slot is not in the pool, or in two lists.
    fn copy_slots(&self, pool: &mut Self::KvPool, lists: &[&[(u64, u64)]]) -> Result<(), Error>;

    /// Copies blocks, K and V of all layers, out of the pool: each into its own bytes, as many as
    /// [`Ops::kv_block_bytes`]. What they mean is known to [`Ops::load_blocks`] of a pool of the same shape and order
    /// alone. A GPU gathers them in one launch and brings them over in one copy.
    ///
    /// # Errors
    /// When a block is not in the pool, or has bytes of another length.
    fn save_blocks(&self, pool: &Self::KvPool, blocks: &mut [(u32, &mut [u8])]) -> Result<(), Error>;

    /// Copies what [`Ops::save_blocks`] gave over blocks of the pool, the same way back.
    ///
    /// # Errors
    /// As [`Ops::save_blocks`], and when a block is in the list twice.
    fn load_blocks(&self, pool: &mut Self::KvPool, blocks: &[(u32, &[u8])]) -> Result<(), Error>;

    /// [`Ops::save_blocks`] of one.
    ///
    /// # Errors
    /// As there.
    fn save_block(&self, pool: &Self::KvPool, block: u32, bytes: &mut [u8]) -> Result<(), Error> {
        self.save_blocks(pool, &mut [(block, bytes)])
    }

    /// [`Ops::load_blocks`] of one.
    ///
    /// # Errors
    /// As there.
    fn load_block(&self, pool: &mut Self::KvPool, block: u32, bytes: &[u8]) -> Result<(), Error> {
        self.load_blocks(pool, &[(block, bytes)])
    }

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
    Error::Unsupported {
        operator,
        what: "a matrix of eight bits or less",
        found,
        supported: "bf16, f16 and f32",
    }
}

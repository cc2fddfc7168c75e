//! Where weights lie before they are taken, and how integers lie in them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::Dtype;

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
    /// The group of each input, `g_idx` (i32, `[cols]`); `None`: one group after the other.
    pub group_of: Option<WeightPart>,
}

/// How 4-bit integers lie in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Layout {
    /// AWQ's GEMM form: values `[cols, rows / 8]` and zero points `[cols / group, rows / 8]`, of eight outputs in the
    /// order 0 2 4 6 1 3 5 7 from the lowest bits on.
    Awq,
    /// GPTQ: values `[cols / 8, rows]`, eight elements of `in` in a word; zero points `[cols / group, rows / 8]` less
    /// one, taken by whole words: a zero point of 0 borrows from the next.
    Gptq,
    /// GPTQ's second version: the same, with zero points as they are.
    GptqV2,
}

/// A matrix `[rows, cols]` (`[out, in]`) of E4M3 numbers as a checkpoint stores it: a sign, four bits of exponent and
/// three of fraction, without infinities (arXiv 2209.05433). Each block of outputs and inputs has a factor.
#[derive(Clone, Debug)]
pub struct Fp8Source {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// The numbers, a byte each, row-major.
    pub elements: WeightPart,
    /// What a block's numbers are multiplied by: `[rows / block.0, cols / block.1]`, rounded up, row-major.
    pub scales: Vec<f32>,
    /// Outputs and inputs of a block: `(rows, cols)` is one for the matrix, `(1, cols)` one for each output. Inputs are
    /// a multiple of 8, or all.
    pub block: (usize, usize),
}

/// What [`crate::Ops::weight_rounded`] rounds to, ties to even.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// Eight bits, one scale for each output, zero point 0.
    Int8,
    /// Four bits, one f16 scale for each 128 elements of `in` of each output, zero point 8.
    Int4,
    /// E4M3, one scale for each output.
    Fp8,
}

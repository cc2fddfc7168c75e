//! What the operators around attention and products are asked.

use std::fmt;

use crate::Ops;

/// What a gated activation makes of its gate; `sigmoid(x) = 1 / (1 + exp(-x))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `x · sigmoid(x) · up` (SwiGLU, arXiv 2002.05202).
    Silu,
    /// GELU in its tanh form (arXiv 1606.08415), times `up`: Gemma.
    GeluTanh,
    /// GELU by the error function, times `up`.
    Gelu,
    /// `x · sigmoid(alpha · x) · (up + 1)`, with `x` cut at `limit` from above and `up` at both sides: gpt-oss, whose
    /// `alpha` is 1.702 and `limit` 7.
    SwigluOai {
        /// Factor inside the sigmoid.
        alpha: f32,
        /// Where gate and up are cut.
        limit: f32,
    },
}

impl Gate {
    /// Its name in errors.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu_mul",
            Self::GeluTanh => "gelu_mul",
            Self::Gelu => "gelu_erf_mul",
            Self::SwigluOai { .. } => "swiglu_oai",
        }
    }
}

/// What an RMSNorm multiplies by.
pub struct Norm<'a, O: Ops + ?Sized> {
    /// `[cols]`.
    pub weight: &'a O::Weight,
    /// Added to the mean of squares.
    pub eps: f32,
    /// The weights are kept less 1 (Gemma).
    pub gemma: bool,
}

impl<O: Ops + ?Sized> Norm<'_, O> {
    /// What is added to the weights.
    pub(crate) fn offset(&self) -> f32 {
        if self.gemma { 1.0 } else { 0.0 }
    }
}

impl<O: Ops + ?Sized> Clone for Norm<'_, O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O: Ops + ?Sized> Copy for Norm<'_, O> {}

impl<O: Ops + ?Sized> fmt::Debug for Norm<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Norm").field("eps", &self.eps).field("gemma", &self.gemma).finish_non_exhaustive()
    }
}

/// RMSNorm weights of the heads of q and of k (Qwen3).
pub struct HeadNorms<'a, O: Ops + ?Sized> {
    /// `[dim]`, for q.
    pub q: &'a O::Weight,
    /// `[dim]`, for k.
    pub k: &'a O::Weight,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl<O: Ops + ?Sized> Clone for HeadNorms<'_, O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O: Ops + ?Sized> Copy for HeadNorms<'_, O> {}

impl<O: Ops + ?Sized> fmt::Debug for HeadNorms<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeadNorms").field("eps", &self.eps).finish_non_exhaustive()
    }
}

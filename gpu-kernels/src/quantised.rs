//! Activations of one byte an element, and weights that are given so.

use crate::{Error, Norm, Ops};

/// How rows of one byte per element are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowStorage {
    /// E4M3; each row has a scale of its own, its largest element over 448.
    Fp8,
    /// E4M3, with one scale for all rows.
    Fp8Scaled(f32),
    /// Whole numbers; each row has a scale of its own, its largest element over 127.
    Int8,
    /// Whole numbers, with one scale for all rows.
    Int8Scaled(f32),
}

impl RowStorage {
    /// The scale of all rows, if there is one.
    pub(crate) fn scale(self) -> Option<f32> {
        match self {
            Self::Fp8Scaled(scale) | Self::Int8Scaled(scale) => Some(scale),
            Self::Fp8 | Self::Int8 => None,
        }
    }

    /// Whether elements are E4M3.
    pub(crate) fn e4m3(self) -> bool {
        matches!(self, Self::Fp8 | Self::Fp8Scaled(_))
    }
}

/// A matrix `[out, in]` of a quantised checkpoint, of one byte for an element. Those of four bits are
/// [`Int4Source`](crate::Int4Source)s.
#[derive(Clone, Copy, Debug)]
pub enum QuantSource<'a> {
    /// E4M3, `[out, in]`, and what it is multiplied by: one number, or one per output.
    Fp8 {
        /// One byte per element.
        elements: &'a [u8],
        /// `[1]` or `[out]`.
        scales: &'a [f32],
    },
    /// Whole numbers of -127..=127, `[out, in]`, and what they are multiplied by: one number, or one per output.
    Int8 {
        /// One byte per element.
        elements: &'a [i8],
        /// `[1]` or `[out]`.
        scales: &'a [f32],
    },
}

/// What products of eight-bit numbers start from.
pub trait Quantised: Ops {
    /// Activations `[rows, cols]` of one byte each, and what they are multiplied by: one number per row, or one.
    type QuantTensor;

    /// Room for rows of one byte per element.
    ///
    /// # Errors
    /// When a given scale is not finite and above 0, or the memory cannot be had.
    fn quant_tensor(
        &self,
        rows_max: usize,
        cols: usize,
        storage: RowStorage,
    ) -> Result<Self::QuantTensor, Error>;

    /// What a tensor holds: its bytes, and one scale per row or one.
    ///
    /// # Errors
    /// When they cannot be brought here.
    fn read_quant(&self, x: &Self::QuantTensor) -> Result<(Vec<u8>, Vec<f32>), Error>;

    /// RMSNorm to one byte per element, to nearest, ties to even, cut at the largest that is stored. A row of zeros has
    /// the scale 1.
    ///
    /// # Errors
    /// When widths or rows do not fit.
    fn rms_norm_quant(
        &self,
        x: &Self::Tensor,
        norm: Norm<'_, Self>,
        out: &mut Self::QuantTensor,
    ) -> Result<(), Error>;

    /// `residual += delta`, and its RMSNorm to one byte per element.
    ///
    /// # Errors
    /// When widths or rows do not fit.
    fn add_rms_norm_quant(
        &self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        norm: Norm<'_, Self>,
        out: &mut Self::QuantTensor,
    ) -> Result<(), Error>;

    /// A matrix `[rows, cols]` of one byte for an element, packed for products.
    ///
    /// # Errors
    /// When lengths disagree with the shape, an element or a scale is no number, or the memory cannot be had.
    fn weight_bytes(&self, rows: usize, cols: usize, source: QuantSource<'_>) -> Result<Self::Weight, Error>;
}

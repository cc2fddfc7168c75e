//! RMSNorm whose rows come in one byte per element.

use super::Cuda;
use super::elementwise::NormBy;
use super::memory::Memory;
use super::tensor::Tensor;
use crate::error::{at_most, same};
use crate::{Error, Norm};

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
    pub(super) fn per_row(self) -> bool {
        matches!(self, Self::Fp8 | Self::Int8)
    }

    pub(super) fn suffix(self) -> &'static str {
        if matches!(self, Self::Fp8 | Self::Fp8Scaled(_)) { "_e4m3" } else { "_i8" }
    }
}

/// Activations `[rows, cols]` of one byte each, and what they are multiplied by: one number per row, or one.
#[derive(Debug)]
pub struct QuantTensor {
    pub(super) elements: Memory,
    pub(super) scales: Memory,
    pub(super) storage: RowStorage,
    pub(super) cols: usize,
    rows: usize,
    rows_max: usize,
}

impl QuantTensor {
    /// Rows in use.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }
}

impl Cuda {
    /// Room for rows of one byte per element.
    ///
    /// # Errors
    /// When a given scale is not above 0, or the memory cannot be had.
    pub fn quant_tensor(
        &self,
        rows_max: usize,
        cols: usize,
        storage: RowStorage,
    ) -> Result<QuantTensor, Error> {
        let scales = match storage {
            RowStorage::Fp8Scaled(scale) | RowStorage::Int8Scaled(scale) => {
                if !(scale > 0.0 && scale.is_finite()) {
                    return Err(Error::Unsupported {
                        operator: "quant_tensor",
                        what: "a scale of",
                        found: scale.to_string(),
                        supported: "finite, above 0",
                    });
                }
                vec![scale]
            }
            _ => vec![0.0; rows_max],
        };
        let bytes = rows_max.checked_mul(cols);
        let bytes = bytes.ok_or(Error::Memory { operator: "quant_tensor", bytes: usize::MAX })?;
        Ok(QuantTensor {
            elements: Memory::new(&self.device, bytes)?,
            scales: Memory::of(&self.device, bytemuck::cast_slice(&scales))?,
            storage,
            cols,
            rows: 0,
            rows_max,
        })
    }

    /// What a tensor holds: its bytes, and one scale per row or one.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_quant(&self, x: &QuantTensor) -> Result<(Vec<u8>, Vec<f32>), Error> {
        let mut elements = vec![0; x.rows * x.cols];
        let mut scales = vec![0.0_f32; if x.storage.per_row() { x.rows } else { 1 }];
        if !elements.is_empty() {
            self.device.download(x.elements.address(), &mut elements)?;
        }
        if !scales.is_empty() {
            self.device.download(x.scales.address(), bytemuck::cast_slice_mut(&mut scales))?;
        }
        Ok((elements, scales))
    }

    /// RMSNorm to one byte per element: what a product of eight-bit numbers starts from, in one launch.
    ///
    /// # Errors
    /// When shapes disagree or the device fails.
    pub fn rms_norm_quant(
        &self,
        x: &Tensor,
        norm: Norm<'_, Self>,
        out: &mut QuantTensor,
    ) -> Result<(), Error> {
        let by = by(norm, x)?;
        check_bytes(x, out)?;
        out.rows = x.rows();
        self.norm_to_bytes(x, None, by, out)
    }

    /// `residual += delta`, and its RMSNorm to one byte per element.
    ///
    /// # Errors
    /// When shapes disagree or the device fails.
    pub fn add_rms_norm_quant(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_, Self>,
        out: &mut QuantTensor,
    ) -> Result<(), Error> {
        let by = by(norm, residual)?;
        check_delta(residual, delta)?;
        check_bytes(residual, out)?;
        out.rows = residual.rows();
        self.norm_to_bytes(residual, Some(delta), by, out)
    }
}

fn by(norm: Norm<'_, Cuda>, x: &Tensor) -> Result<NormBy, Error> {
    let weight = norm.weight.vector("rms_norm", x.cols())?;
    Ok(NormBy { weight, eps: norm.eps, offset: norm.offset() })
}

fn check_delta(residual: &Tensor, delta: &Tensor) -> Result<(), Error> {
    same("add_rms_norm", "width of delta", delta.cols(), residual.cols())?;
    same("add_rms_norm", "rows of delta", delta.rows(), residual.rows())
}

fn check_bytes(x: &Tensor, out: &QuantTensor) -> Result<(), Error> {
    same("rms_norm", "width of the output", out.cols, x.cols())?;
    at_most("rms_norm", "rows of the output", x.rows(), out.rows_max)
}

//! RMSNorm whose rows come in one byte per element, and weights given so.

use super::Cuda;
use super::elementwise::NormBy;
use super::memory::Memory;
use super::tensor::{Tensor, Weight};
use crate::door::{self, Rows};
use crate::{Error, Norm, QuantSource, Quantised, RowStorage};

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

    /// Its shape, for the door.
    fn shape(&self) -> Rows {
        Rows { rows: self.rows, cols: self.cols, rows_max: self.rows_max }
    }
}

impl Quantised for Cuda {
    type QuantTensor = QuantTensor;

    fn quant_tensor(&self, rows_max: usize, cols: usize, storage: RowStorage) -> Result<QuantTensor, Error> {
        door::quant_tensor(storage)?;
        let scales = storage.scale().map_or_else(|| vec![0.0; rows_max], |scale| vec![scale]);
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

    fn read_quant(&self, x: &QuantTensor) -> Result<(Vec<u8>, Vec<f32>), Error> {
        let mut elements = vec![0; x.rows * x.cols];
        let mut scales = vec![0.0_f32; if x.storage.scale().is_some() { 1 } else { x.rows }];
        if !elements.is_empty() {
            self.device.download(x.elements.address(), &mut elements)?;
        }
        if !scales.is_empty() {
            self.device.download(x.scales.address(), bytemuck::cast_slice_mut(&mut scales))?;
        }
        Ok((elements, scales))
    }

    /// In one launch.
    fn rms_norm_quant(&self, x: &Tensor, norm: Norm<'_, Self>, out: &mut QuantTensor) -> Result<(), Error> {
        let by = by("rms_norm", norm, x)?;
        door::rms_norm(x.shape(), out.shape())?;
        out.rows = x.rows();
        self.norm_to_bytes(x, None, by, out)
    }

    fn add_rms_norm_quant(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_, Self>,
        out: &mut QuantTensor,
    ) -> Result<(), Error> {
        let by = by("add_rms_norm", norm, residual)?;
        door::add_rms_norm(residual.shape(), delta.shape(), out.shape())?;
        out.rows = residual.rows();
        self.norm_to_bytes(residual, Some(delta), by, out)
    }

    fn weight_bytes(&self, rows: usize, cols: usize, source: QuantSource<'_>) -> Result<Weight, Error> {
        let (elements, scales) = door::weight_bytes((rows, cols), source)?;
        let e4m3 = matches!(source, QuantSource::Fp8 { .. });
        self.bytes((rows, cols), e4m3, elements, scales)
    }
}

fn by(operator: &'static str, norm: Norm<'_, Cuda>, x: &Tensor) -> Result<NormBy, Error> {
    let weight = norm.weight.vector(operator, x.cols())?;
    Ok(NormBy { weight, eps: norm.eps, offset: norm.offset() })
}

//! Rows of one byte an element, and weights given so.

use std::sync::PoisonError;

use super::eight_bits::{INT8_MOST, to_int8};
use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::norm::{self, RmsNorm, load};
use super::tensor::{Tensor, zeroed};
use super::{Cpu, SharedOut, Weight};
use crate::door::{self, Rows};
use crate::fp8;
use crate::{Error, Norm, QuantSource, Quantised, RowStorage};

/// Activations `[rows, cols]` of one byte each, and what they are multiplied by: one number per row, or one.
#[derive(Debug)]
pub struct QuantTensor {
    elements: Vec<u8>,
    /// `[rows_max]`, or one.
    scales: Vec<f32>,
    storage: RowStorage,
    rows: usize,
    rows_max: usize,
    cols: usize,
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

impl Quantised for Cpu {
    type QuantTensor = QuantTensor;

    fn quant_tensor(&self, rows_max: usize, cols: usize, storage: RowStorage) -> Result<QuantTensor, Error> {
        door::quant_tensor(storage)?;
        let (operator, bytes) = ("quant_tensor", rows_max.checked_mul(cols));
        let mut elements = Vec::new();
        let reserved = bytes.is_some_and(|bytes| elements.try_reserve_exact(bytes).is_ok());
        let bytes = bytes.filter(|_| reserved);
        elements.resize(bytes.ok_or(Error::Memory { operator, bytes: bytes.unwrap_or(usize::MAX) })?, 0);
        let scales = match storage.scale() {
            Some(scale) => vec![scale],
            None => zeroed(operator, Some(rows_max))?,
        };
        Ok(QuantTensor { elements, scales, storage, rows: 0, rows_max, cols })
    }

    fn read_quant(&self, x: &QuantTensor) -> Result<(Vec<u8>, Vec<f32>), Error> {
        let scales = if x.storage.scale().is_some() { 1 } else { x.rows };
        Ok((x.elements[..x.rows * x.cols].to_vec(), x.scales[..scales].to_vec()))
    }

    fn rms_norm_quant(&self, x: &Tensor, norm: Norm<'_, Self>, out: &mut QuantTensor) -> Result<(), Error> {
        let weight = norm.weight.vector("rms_norm", x.cols())?;
        door::rms_norm(x.shape(), out.shape())?;
        out.rows = x.rows();
        // The norm writes `x` only where there is something to add.
        self.norm_to_bytes((SharedOut::new_read(x.data()), None), (weight, &norm), out);
        Ok(())
    }

    fn add_rms_norm_quant(
        &self,
        residual: &mut Tensor,
        delta: &Tensor,
        norm: Norm<'_, Self>,
        out: &mut QuantTensor,
    ) -> Result<(), Error> {
        let weight = norm.weight.vector("add_rms_norm", residual.cols())?;
        door::add_rms_norm(residual.shape(), delta.shape(), out.shape())?;
        out.rows = residual.rows();
        let x = SharedOut::new(residual.data_mut());
        self.norm_to_bytes((x, Some(delta.data())), (weight, &norm), out);
        Ok(())
    }

    fn weight_bytes(&self, rows: usize, cols: usize, source: QuantSource<'_>) -> Result<Weight, Error> {
        let (elements, scales) = door::weight_bytes((rows, cols), source)?;
        let e4m3 = matches!(source, QuantSource::Fp8 { .. });
        Weight::of_bytes((&self.workers, self.isa, &self.arena), (rows, cols), e4m3, (elements, scales))
    }
}

impl Cpu {
    fn norm_to_bytes(
        &self,
        (x, add): (SharedOut, Option<&[f32]>),
        (weight, norm): (&[f32], &Norm<'_, Self>),
        out: &mut QuantTensor,
    ) {
        let (rows, cols) = (out.rows, out.cols);
        if rows * cols == 0 {
            return;
        }
        let mut memory = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let [normed] = memory.take([rows * cols]);
        let to = SharedOut::new(normed);
        let norm = RmsNorm { weight, offset: norm.offset(), eps: norm.eps, x, add, out: to };
        norm::rms_norm(&self.workers, self.isa, rows, norm);
        // A scale of its own for each row, or one that stays as it is.
        let mut all = vec![out.scales[0]; if out.storage.scale().is_some() { rows } else { 0 }];
        let scales = if all.is_empty() { &mut out.scales[..rows] } else { &mut all };
        let piece = rows.div_ceil(4 * self.workers.threads());
        let storage = out.storage;
        let mut pieces: Vec<_> = normed
            .chunks(piece * cols)
            .zip(out.elements.chunks_mut(piece * cols).zip(scales.chunks_mut(piece)))
            .map(|(from, (to, scales))| Narrow { from, to, scales, storage, cols })
            .collect();
        self.workers.each(&mut pieces, &mut Vec::<()>::new(), |piece, ()| dispatch(self.isa, piece));
    }
}

/// Some rows on their way into bytes.
struct Narrow<'a> {
    from: &'a [f32],
    to: &'a mut [u8],
    /// One of each row: written where rows have their own, else read.
    scales: &'a mut [f32],
    storage: RowStorage,
    cols: usize,
}

impl Kernel for &mut Narrow<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let rows = self.from.chunks(self.cols).zip(self.to.chunks_mut(self.cols));
        for ((from, to), scale) in rows.zip(self.scales.iter_mut()) {
            if self.storage.scale().is_none() {
                let size = largest(lanes, from);
                let most = if self.storage.e4m3() { fp8::MAX } else { INT8_MOST };
                *scale = if size > 0.0 { size / most } else { 1.0 };
            }
            let pairs = to.iter_mut().zip(from);
            if self.storage.e4m3() {
                pairs.for_each(|(to, &x)| *to = fp8::nearest(x / *scale));
            } else {
                pairs.for_each(|(to, &x)| *to = to_int8(x / *scale));
            }
        }
    }
}

/// The size of the largest element. Not specified where one is no number.
#[inline(always)]
fn largest<L: Lanes>(lanes: L, x: &[f32]) -> f32 {
    let zero = lanes.splat(0.0);
    let mut most = zero;
    for at in (0..x.len()).step_by(WIDTH) {
        // SAFETY: sixteen elements, or as many as are left.
        let x = unsafe { load(lanes, x.as_ptr().wrapping_add(at), at + WIDTH <= x.len(), x.len() - at) };
        most = lanes.max(most, lanes.max(x, lanes.sub(zero, x)));
    }
    lanes.largest(most)
}

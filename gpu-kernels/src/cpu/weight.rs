//! Weights, used in place.

use std::fmt;

use half::{bf16, f16};

use crate::error::same;
use crate::{Dtype, Error, WeightBytes, WeightSource};

/// A weight: a matrix `[out, in]` in place, or a vector `[n]` widened to f32 once.
pub struct Weight(Kind);

enum Kind {
    Matrix { bytes: WeightBytes, start: usize, dtype: Dtype, rows: usize, cols: usize },
    Vector(Vec<f32>),
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Matrix { dtype, rows, cols, .. } => write!(f, "Weight([{rows}, {cols}] {dtype})"),
            Kind::Vector(elements) => write!(f, "Weight([{}])", elements.len()),
        }
    }
}

/// A matrix as kernels see it: `[rows, cols]`, row-major, elements of `dtype` at any alignment.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) dtype: Dtype,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl<'a> Matrix<'a> {
    /// The bytes of one row.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        let stride = self.cols * self.dtype.bytes();
        &self.bytes[row * stride..(row + 1) * stride]
    }
}

impl Weight {
    pub(crate) fn new(source: WeightSource) -> Result<Self, Error> {
        let available = (*source.bytes).as_ref().len();
        let elements = source.shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
        let needed = elements.and_then(|n| n.checked_mul(source.dtype.bytes())).unwrap_or(usize::MAX);
        let (start, end) = (source.range.start, source.range.end);
        if start > end || end > available || end - start != needed {
            return Err(Error::WeightBytes {
                shape: source.shape,
                dtype: source.dtype,
                needed,
                start,
                end,
                available,
            });
        }
        match *source.shape.as_slice() {
            [_] => Ok(Self(Kind::Vector(widen(source.dtype, &(*source.bytes).as_ref()[start..end])))),
            [rows, cols] => {
                Ok(Self(Kind::Matrix { bytes: source.bytes, start, dtype: source.dtype, rows, cols }))
            }
            _ => Err(Error::Shape {
                operator: "weight",
                dimension: "number of dimensions",
                found: source.shape.len(),
                expected: 2,
            }),
        }
    }

    /// The matrix, or an error naming the operator that needed one.
    pub(crate) fn matrix(&self, operator: &'static str) -> Result<Matrix<'_>, Error> {
        match &self.0 {
            Kind::Matrix { bytes, start, dtype, rows, cols } => {
                let bytes = &(**bytes).as_ref()[*start..start + rows * cols * dtype.bytes()];
                Ok(Matrix { bytes, dtype: *dtype, rows: *rows, cols: *cols })
            }
            Kind::Vector(_) => {
                same(operator, "dimensions of the weight", 1, 2)?;
                unreachable!("1 is not 2")
            }
        }
    }

    /// The vector, or an error naming the operator that needed one of this length.
    pub(crate) fn vector(&self, operator: &'static str, len: usize) -> Result<&[f32], Error> {
        match &self.0 {
            Kind::Vector(elements) => {
                same(operator, "length of the weight", elements.len(), len)?;
                Ok(elements)
            }
            Kind::Matrix { .. } => {
                same(operator, "dimensions of the weight", 2, 1)?;
                unreachable!("2 is not 1")
            }
        }
    }

    /// Length of a vector; 0 for a matrix.
    pub(crate) fn vector_len(&self) -> usize {
        match &self.0 {
            Kind::Vector(elements) => elements.len(),
            Kind::Matrix { .. } => 0,
        }
    }
}

/// Elements as f32.
fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
        Dtype::Bf16 => bytes.as_chunks::<2>().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect(),
    }
}

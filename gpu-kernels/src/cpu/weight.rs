//! Weights: matrices packed for products, tables in place, vectors widened.

use std::fmt;

use half::{bf16, f16};

use super::Isa;
use super::arena::Arena;
use super::integers::Integers;
use super::lanes::WIDTH;
use super::panels::Panels;
use super::tiles::Word;
use super::workers::Workers;
use crate::error::{no_integers, same};
use crate::{Dtype, Error, Fp8Source, Int4Source, Rounding, WeightBytes, WeightSource};

/// A weight: a matrix `[out, in]` of floats or of small integers, packed for [`linear`](crate::Ops::linear); a table
/// whose rows are used where they lie; or a vector `[n]` widened to f32.
pub struct Weight(Kind);

enum Kind {
    Matrix(Panels),
    Integers(Integers),
    Table { bytes: WeightBytes, start: usize, dtype: Dtype, rows: usize, cols: usize },
    Vector(Vec<f32>),
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Matrix(Panels { dtype, rows, cols, .. }) | Kind::Table { dtype, rows, cols, .. } => {
                write!(f, "Weight([{rows}, {cols}] {dtype})")
            }
            Kind::Integers(integers) => write!(f, "Weight({integers:?})"),
            Kind::Vector(elements) => write!(f, "Weight([{}])", elements.len()),
        }
    }
}

/// What rows can be taken from, one at a time.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    Packed(&'a Panels),
    Integers(&'a Integers),
    InPlace(Table<'a>),
}

/// What products are made with.
#[derive(Clone, Copy)]
pub(crate) enum Matrix<'a> {
    Floats(&'a Panels),
    Integers(&'a Integers),
}

impl Matrix<'_> {
    /// Outputs and inputs.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Floats(panels) => (panels.rows, panels.cols),
            Self::Integers(integers) => (integers.rows, integers.cols),
        }
    }
}

impl Rows<'_> {
    /// Rows, and elements of each.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self {
            Self::Packed(panels) => (panels.rows, panels.cols),
            Self::Integers(integers) => (integers.rows, integers.cols),
            Self::InPlace(table) => (table.rows, table.cols),
        }
    }
}

/// A table in place: `[rows, cols]`, row-major, elements of `dtype` at any alignment.
#[derive(Clone, Copy)]
pub(crate) struct Table<'a> {
    bytes: &'a [u8],
    pub(crate) dtype: Dtype,
    rows: usize,
    pub(crate) cols: usize,
}

impl<'a> Table<'a> {
    /// The bytes of one row.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        let stride = self.cols * self.dtype.bytes();
        &self.bytes[row * stride..(row + 1) * stride]
    }
}

impl Weight {
    /// Bytes of memory that a product reads: fewer than a checkpoint has where bf16 takes twelve bits. Of a table,
    /// those of all its rows.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Kind::Matrix(panels) => panels.count() * panels.stride(),
            Kind::Integers(integers) => integers.rows.div_ceil(WIDTH) * integers.stride(),
            Kind::Table { dtype, rows, cols, .. } => rows * cols * dtype.bytes(),
            Kind::Vector(elements) => size_of_val(elements.as_slice()),
        }
    }

    /// A matrix, packed, or a vector.
    pub(crate) fn new(with: (&Workers, Isa, &Arena), source: &WeightSource) -> Result<Self, Error> {
        let bytes = checked(source)?;
        match *source.shape.as_slice() {
            [_] => Ok(Self(Kind::Vector(widen(source.dtype, bytes)))),
            [rows, cols] => {
                Panels::new(with, bytes, source.dtype, (rows, cols)).map(|panels| Self(Kind::Matrix(panels)))
            }
            _ => {
                same("weight", "number of dimensions", source.shape.len(), 2)?;
                unreachable!("neither one nor two dimensions")
            }
        }
    }

    /// A matrix of floats, rounded to eight bits or four; a vector is kept as it is.
    pub(crate) fn rounded(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        source: &WeightSource,
        rounding: Rounding,
    ) -> Result<Self, Error> {
        let bytes = checked(source)?;
        let [rows, cols] = *source.shape.as_slice() else { return Self::new((workers, isa, arena), source) };
        Integers::round((workers, Word::of(isa), arena), bytes, source.dtype, (rows, cols), rounding)
            .map(|integers| Self(Kind::Integers(integers)))
    }

    /// A matrix of integers of a checkpoint.
    pub(crate) fn int4(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        source: &Int4Source,
    ) -> Result<Self, Error> {
        Integers::int4((workers, Word::of(isa), arena), source).map(|integers| Self(Kind::Integers(integers)))
    }

    /// A matrix of E4M3 of a checkpoint.
    pub(crate) fn fp8(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        source: &Fp8Source,
    ) -> Result<Self, Error> {
        Integers::fp8((workers, Word::of(isa), arena), source).map(|numbers| Self(Kind::Integers(numbers)))
    }

    /// A matrix of one byte an element, which is checked; one scale, or one of each output.
    pub(crate) fn of_bytes(
        (workers, isa, arena): (&Workers, Isa, &Arena),
        shape: (usize, usize),
        e4m3: bool,
        source: (&[u8], &[f32]),
    ) -> Result<Self, Error> {
        Integers::bytes((workers, Word::of(isa), arena), shape, e4m3, source)
            .map(|numbers| Self(Kind::Integers(numbers)))
    }

    /// A table that stays where it lies.
    pub(crate) fn table(source: WeightSource) -> Result<Self, Error> {
        checked(&source)?;
        same("table", "number of dimensions", source.shape.len(), 2)?;
        let WeightSource { bytes, range, dtype, shape } = source;
        Ok(Self(Kind::Table { bytes, start: range.start, dtype, rows: shape[0], cols: shape[1] }))
    }

    /// The packed matrix, or an error naming the operator that needed one.
    pub(crate) fn matrix(&self, operator: &'static str) -> Result<Matrix<'_>, Error> {
        match &self.0 {
            Kind::Matrix(panels) => Ok(Matrix::Floats(panels)),
            Kind::Integers(integers) => Ok(Matrix::Integers(integers)),
            Kind::Table { .. } => {
                same(operator, "packed matrices (this one was made as a table)", 0, 1)?;
                unreachable!("0 is not 1")
            }
            Kind::Vector(_) => {
                same(operator, "dimensions of the weight", 1, 2)?;
                unreachable!("1 is not 2")
            }
        }
    }

    /// The packed matrix, which must not be of integers.
    pub(crate) fn floats(&self, operator: &'static str) -> Result<&Panels, Error> {
        match self.matrix(operator)? {
            Matrix::Floats(panels) => Ok(panels),
            Matrix::Integers(_) => Err(no_integers(operator)),
        }
    }

    /// The rows of a matrix or a table, or an error naming the operator that needed them.
    pub(crate) fn rows(&self, operator: &'static str) -> Result<Rows<'_>, Error> {
        match &self.0 {
            Kind::Table { bytes, start, dtype, rows, cols } => {
                let bytes = &(**bytes).as_ref()[*start..start + rows * cols * dtype.bytes()];
                Ok(Rows::InPlace(Table { bytes, dtype: *dtype, rows: *rows, cols: *cols }))
            }
            _ => self.matrix(operator).map(|matrix| match matrix {
                Matrix::Floats(panels) => Rows::Packed(panels),
                Matrix::Integers(integers) => Rows::Integers(integers),
            }),
        }
    }

    /// The vector, or an error naming the operator that needed one of this length.
    pub(crate) fn vector(&self, operator: &'static str, len: usize) -> Result<&[f32], Error> {
        match &self.0 {
            Kind::Vector(elements) => {
                same(operator, "length of the weight", elements.len(), len)?;
                Ok(elements)
            }
            _ => {
                same(operator, "dimensions of the weight", 2, 1)?;
                unreachable!("2 is not 1")
            }
        }
    }

    /// Length of a vector; 0 for a matrix.
    pub(crate) fn vector_len(&self) -> usize {
        match &self.0 {
            Kind::Vector(elements) => elements.len(),
            _ => 0,
        }
    }
}

/// The bytes of a weight, if its range holds exactly its elements.
fn checked(source: &WeightSource) -> Result<&[u8], Error> {
    let all = (*source.bytes).as_ref();
    let elements = source.shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
    let needed = elements.and_then(|n| n.checked_mul(source.dtype.bytes())).unwrap_or(usize::MAX);
    let (start, end) = (source.range.start, source.range.end);
    match all.get(start..end) {
        Some(bytes) if bytes.len() == needed => Ok(bytes),
        _ => Err(Error::WeightBytes {
            shape: source.shape.clone(),
            dtype: source.dtype,
            needed,
            start,
            end,
            available: all.len(),
        }),
    }
}

/// Elements as f32.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
        Dtype::Bf16 => bytes.as_chunks::<2>().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect(),
    }
}

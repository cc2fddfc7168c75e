//! Activations and weights in a device's memory.

use std::sync::Arc;

use half::{bf16, f16};

use super::device::Address;
use super::memory::{Keeper, Memory};
use super::quant::QuantWeight;
use crate::door::Rows;
use crate::error::{at_most, no_integers, same};
use crate::{Dtype, Error, WeightSource};

/// Elements of a row are padded to whole pieces of 16 bytes, so that a kernel moves eight at once.
const PIECE: usize = 8;

/// Activations `[rows, cols]` of two bytes each.
#[derive(Debug)]
pub struct Tensor {
    memory: Memory,
    rows: usize,
    rows_max: usize,
    cols: usize,
}

impl Tensor {
    pub(crate) fn new(device: &Arc<Keeper>, rows_max: usize, cols: usize) -> Result<Self, Error> {
        let bytes = rows_max
            .checked_mul(cols.next_multiple_of(PIECE))
            .and_then(|elements| elements.checked_mul(2))
            .ok_or(Error::Memory { operator: "tensor", bytes: usize::MAX })?;
        Ok(Self { memory: Memory::zeroed(device, bytes)?, rows: 0, rows_max, cols })
    }

    /// Rows in use.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Makes the tensor have so many rows, whatever they hold: those that a [`Graph`](super::Graph) writes, which the
    /// host does not see.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn resize(&mut self, rows: usize) -> Result<(), Error> {
        self.check_rows("resize", rows)?;
        self.set_rows(rows);
        Ok(())
    }

    pub(crate) fn set_rows(&mut self, rows: usize) {
        self.rows = rows;
    }

    /// Its shape, for the door.
    pub(crate) fn shape(&self) -> Rows {
        Rows { rows: self.rows(), cols: self.cols(), rows_max: self.rows_max }
    }

    pub(crate) fn check_rows(&self, operator: &'static str, rows: usize) -> Result<(), Error> {
        at_most(operator, "rows of the output", rows, self.rows_max)
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address()
    }

    /// Elements from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(PIECE)
    }

    pub(crate) fn read(&self, device: &Keeper, dtype: Dtype) -> Result<Vec<f32>, Error> {
        let mut bytes = vec![0; self.rows * self.stride() * 2];
        if !bytes.is_empty() {
            device.download(self.address(), &mut bytes)?;
        }
        let mut out = Vec::with_capacity(self.rows * self.cols);
        for row in bytes.chunks_exact(self.stride().max(1) * 2) {
            out.extend(row.as_chunks::<2>().0[..self.cols].iter().map(|&two| widen(dtype, two)));
        }
        Ok(out)
    }

    pub(crate) fn write(&self, device: &Keeper, dtype: Dtype, elements: &[f32]) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(elements.len() * 2);
        for row in elements.chunks_exact(self.cols.max(1)) {
            let start = bytes.len();
            bytes.extend(row.iter().flat_map(|&x| narrow(dtype, x)));
            bytes.resize(start + self.stride() * 2, 0);
        }
        if bytes.is_empty() { Ok(()) } else { device.upload(self.address(), &bytes) }
    }
}

/// A matrix `[rows, cols]` or a vector `[cols]` of the checkpoint, rounded to the activations' type; or a matrix of
/// small integers.
#[derive(Debug)]
pub struct Weight(Kind);

#[derive(Debug)]
enum Kind {
    Vector { memory: Memory, cols: usize },
    Floats(FloatMatrix),
    Integers(QuantWeight),
}

/// A matrix in the activations' type.
#[derive(Debug)]
pub(crate) struct FloatMatrix {
    memory: Memory,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl FloatMatrix {
    pub(crate) fn address(&self) -> Address {
        self.memory.address()
    }

    /// Elements from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(PIECE)
    }
}

/// What products are made with, and rows are taken from.
#[derive(Clone, Copy)]
pub(crate) enum Matrix<'a> {
    Floats(&'a FloatMatrix),
    Integers(&'a QuantWeight),
}

impl Matrix<'_> {
    /// Outputs and inputs.
    pub(crate) fn shape(self) -> (usize, usize) {
        match self {
            Self::Floats(floats) => (floats.rows, floats.cols),
            Self::Integers(integers) => (integers.rows, integers.cols),
        }
    }
}

/// Rows of a weight are brought over in parts of about this size.
const UPLOAD_BYTES: usize = 64 << 20;

impl Weight {
    pub(crate) fn new(device: &Arc<Keeper>, dtype: Dtype, source: &WeightSource) -> Result<Self, Error> {
        let (rows, cols) = match source.shape[..] {
            [cols] => (None, cols),
            [rows, cols] => (Some(rows), cols),
            _ => {
                let found = source.shape.len();
                return Err(Error::Shape { operator: "weight", dimension: "dimensions", found, expected: 2 });
            }
        };
        let bytes = weight_bytes(source)?;
        let stride = cols.next_multiple_of(PIECE) * 2;
        let all = rows.unwrap_or(1).checked_mul(stride);
        let memory =
            Memory::new(device, all.ok_or(Error::Memory { operator: "weight", bytes: usize::MAX })?)?;
        let mut to = memory.address();
        let row_bytes = cols * source.dtype.bytes();
        let together = (UPLOAD_BYTES / stride.max(1)).max(1);
        if row_bytes > 0 {
            for part in bytes.chunks(row_bytes * together) {
                let mut padded = Vec::with_capacity(part.len() / row_bytes * stride);
                for row in part.chunks_exact(row_bytes) {
                    let start = padded.len();
                    round_row(source.dtype, row, dtype, &mut padded);
                    padded.resize(start + stride, 0);
                }
                device.upload(to, &padded)?;
                to += padded.len() as u64;
            }
        }
        Ok(Self(match rows {
            Some(rows) => Kind::Floats(FloatMatrix { memory, rows, cols }),
            None => Kind::Vector { memory, cols },
        }))
    }

    pub(crate) fn of_integers(integers: QuantWeight) -> Self {
        Self(Kind::Integers(integers))
    }

    /// The matrix, or an error naming the operator that needed one.
    pub(crate) fn matrix(&self, operator: &'static str) -> Result<Matrix<'_>, Error> {
        let dimension = "dimensions of the weight";
        match &self.0 {
            Kind::Floats(floats) => Ok(Matrix::Floats(floats)),
            Kind::Integers(integers) => Ok(Matrix::Integers(integers)),
            Kind::Vector { .. } => Err(Error::Shape { operator, dimension, found: 1, expected: 2 }),
        }
    }

    /// The matrix, which must not be of integers.
    pub(crate) fn floats(&self, operator: &'static str) -> Result<&FloatMatrix, Error> {
        match self.matrix(operator)? {
            Matrix::Floats(floats) => Ok(floats),
            Matrix::Integers(_) => Err(no_integers(operator)),
        }
    }

    /// The address of a vector of this length.
    pub(crate) fn vector(&self, operator: &'static str, len: usize) -> Result<Address, Error> {
        match &self.0 {
            Kind::Vector { memory, cols } => {
                same(operator, "length of the weight", *cols, len)?;
                Ok(memory.address())
            }
            _ => Err(Error::Shape { operator, dimension: "dimensions of the weight", found: 2, expected: 1 }),
        }
    }

    /// Elements of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        match &self.0 {
            Kind::Vector { cols, .. } => *cols,
            Kind::Floats(floats) => floats.cols,
            Kind::Integers(integers) => integers.cols,
        }
    }
}

/// The bytes of a weight, which must be exactly its elements.
pub(crate) fn weight_bytes(source: &WeightSource) -> Result<&[u8], Error> {
    let elements = source.shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
    let needed = elements.and_then(|n| n.checked_mul(source.dtype.bytes())).unwrap_or(usize::MAX);
    let available = (*source.bytes).as_ref();
    match available.get(source.range.clone()) {
        Some(bytes) if bytes.len() == needed => Ok(bytes),
        _ => Err(Error::WeightBytes {
            shape: source.shape.clone(),
            dtype: source.dtype,
            needed,
            start: source.range.start,
            end: source.range.end,
            available: available.len(),
        }),
    }
}

/// A row of a checkpoint in f32.
pub(crate) fn widen_row(dtype: Dtype, row: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => row.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
        _ => row.as_chunks::<2>().0.iter().map(|&x| widen(dtype, x)).collect(),
    }
}

fn round_row(from: Dtype, row: &[u8], to: Dtype, out: &mut Vec<u8>) {
    match from {
        _ if from == to => out.extend_from_slice(row),
        Dtype::F32 => {
            out.extend(row.as_chunks::<4>().0.iter().flat_map(|&x| narrow(to, f32::from_le_bytes(x))));
        }
        _ => out.extend(row.as_chunks::<2>().0.iter().flat_map(|&x| narrow(to, widen(from, x)))),
    }
}

fn widen(dtype: Dtype, two: [u8; 2]) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_le_bytes(two).to_f32(),
        _ => bf16::from_le_bytes(two).to_f32(),
    }
}

fn narrow(dtype: Dtype, x: f32) -> [u8; 2] {
    match dtype {
        Dtype::F16 => f16::from_f32(x).to_le_bytes(),
        _ => bf16::from_f32(x).to_le_bytes(),
    }
}

//! Activations and weights in a device's memory.

use std::sync::Arc;

use half::{bf16, f16};

use super::device::Address;
use super::memory::{Keeper, Memory};
use crate::error::{at_most, same};
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
        for row in elements.chunks_exact(self.cols) {
            let start = bytes.len();
            bytes.extend(row.iter().flat_map(|&x| narrow(dtype, x)));
            bytes.resize(start + self.stride() * 2, 0);
        }
        if bytes.is_empty() { Ok(()) } else { device.upload(self.address(), &bytes) }
    }
}

/// A matrix `[rows, cols]` or a vector `[cols]` of the checkpoint, rounded to the activations' type.
#[derive(Debug)]
pub struct Weight {
    memory: Memory,
    /// Of a matrix.
    rows: Option<usize>,
    cols: usize,
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
        Ok(Self { memory, rows, cols })
    }

    pub(crate) fn address(&self) -> Address {
        self.memory.address()
    }

    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(PIECE)
    }

    /// `(rows, cols)` of a matrix.
    pub(crate) fn matrix(&self, operator: &'static str) -> Result<(usize, usize), Error> {
        let dimension = "dimensions of a weight";
        let rows = self.rows.ok_or(Error::Shape { operator, dimension, found: 1, expected: 2 })?;
        Ok((rows, self.cols))
    }

    /// The address of a vector of this length.
    pub(crate) fn vector(&self, operator: &'static str, len: usize) -> Result<Address, Error> {
        same(operator, "dimensions of a weight", 1 + usize::from(self.rows.is_some()), 1)?;
        same(operator, "length of a weight", self.cols, len)?;
        Ok(self.address())
    }

    /// Elements of a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// The bytes of a weight, which must be exactly its elements.
fn weight_bytes(source: &WeightSource) -> Result<&[u8], Error> {
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

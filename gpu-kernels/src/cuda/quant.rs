//! Weights of four and eight bits: `kernels/quant_gemm.cu`.
//!
//! A weight is read in the form of its checkpoint (GPTQ, AWQ, or one byte per element), or rounded, and packed once for
//! the kernel.

use std::sync::Arc;

use half::f16;

use super::device::Address;
use super::gemm::Matrix;
use super::memory::Memory;
use super::tensor::{Tensor, Weight, weight_bytes, widen_row};
use super::{Cuda, count, divide};
use crate::error::{multiple, same};
use crate::fp8;
use crate::rounding::{GROUP, round_eight, round_four, round_fp8};
use crate::stored::Stored;
use crate::{Dtype, Error, Fp8Source, Int4Source, Ops, Rounding, WeightSource};

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

/// A quantised matrix in a device's memory.
#[derive(Debug)]
pub(crate) struct QuantWeight {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    format: Format,
    packed: Memory,
    /// Four bits: f16 scales and zeros of one byte, `[groups, rows padded]`. Eight: f32 scales, and nothing.
    scales: Memory,
    zeros: Memory,
    /// Each output has a scale of its own.
    scale_each: bool,
    group: usize,
    /// Which input each column is, when it is not its own number.
    order: Option<Memory>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Four,
    Int8,
    Fp8,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct QuantGemmArgument {
    x: Address,
    weight: Address,
    group_scales: Address,
    group_zeros: Address,
    scales: Address,
    bias: Address,
    out: Address,
    which: Address,
    x_stride: u64,
    out_stride: u64,
    rows: u32,
    in_cols: u32,
    out_cols: u32,
    out_padded: u32,
    group: u32,
    scale_stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PermuteArgument {
    x: Address,
    order: Address,
    out: Address,
    x_stride: u64,
    out_stride: u64,
    rows: u32,
    cols: u32,
}

/// As the kernel's: rows of weight and of x that a block takes, numbers of a row's block, and threads.
const TILE: usize = 16;
const PART: usize = 128;
const THREADS: usize = 256;
/// Rows up to which the weight is read again for every 16 rows, and not written out whole.
const FLAT_ROWS: usize = 64;

/// The places that lane 0 to 3 has in sixteen numbers.
fn places(lane: usize) -> [usize; 4] {
    [2 * lane, 2 * lane + 1, 2 * lane + 8, 2 * lane + 9]
}

/// Packs rows for the kernel, `width` bits each; `number(row, column)` within the matrix.
fn pack(rows: usize, cols: usize, width: usize, number: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let (blocks, padded) = (cols.div_ceil(PART), rows.next_multiple_of(TILE));
    // Steps of sixteen numbers that fill 16 bytes of a lane.
    let steps = 16 * 8 / (4 * width);
    let mut packed = Vec::with_capacity(padded * blocks * PART * width / 8);
    for row in 0..padded {
        for piece in 0..blocks * PART / (16 * steps) {
            for lane in 0..4 {
                let columns = (0..steps)
                    .flat_map(|step| places(lane).map(|place| (piece * steps + step) * 16 + place))
                    .map(|column| if row < rows && column < cols { number(row, column) } else { 0 });
                let numbers: Vec<u8> = columns.collect();
                match width {
                    4 => packed.extend(numbers.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4)),
                    _ => packed.extend(numbers),
                }
            }
        }
    }
    packed
}

impl QuantWeight {
    /// What a kernel reads of it.
    fn argument(&self, operator: &'static str) -> Result<QuantGemmArgument, Error> {
        let (scales, four) = (self.scales.address(), self.format == Format::Four);
        Ok(QuantGemmArgument {
            weight: self.packed.address(),
            group_scales: if four { scales } else { 0 },
            group_zeros: self.zeros.address(),
            scales: if four { 0 } else { scales },
            in_cols: count(operator, "in of the weight", self.cols)?,
            out_cols: count(operator, "out of the weight", self.rows)?,
            out_padded: count(operator, "out of the weight", self.rows.next_multiple_of(TILE))?,
            group: count(operator, "group", self.group)?,
            scale_stride: u32::from(self.scale_each),
            ..bytemuck::Zeroable::zeroed()
        })
    }
}

impl Cuda {
    /// A matrix `[rows, cols]` of one byte for an element, packed and brought to the device.
    ///
    /// # Errors
    /// When lengths disagree with the shape, or the memory cannot be had.
    pub fn weight_bytes(&self, rows: usize, cols: usize, source: QuantSource<'_>) -> Result<Weight, Error> {
        let operator = "weight_bytes";
        multiple(operator, "out", rows, 1)?;
        multiple(operator, "in", cols, 1)?;
        let (format, elements, scales) = match source {
            QuantSource::Fp8 { elements, scales } => (Format::Fp8, elements, scales),
            QuantSource::Int8 { elements, scales } => (Format::Int8, bytemuck::cast_slice(elements), scales),
        };
        same(operator, "elements", elements.len(), rows.saturating_mul(cols))?;
        if scales.len() != 1 {
            same(operator, "scales", scales.len(), rows)?;
        }
        self.eight(format, (rows, cols), elements, scales).map(Weight::of_integers)
    }

    /// A matrix of four bits of a checkpoint.
    pub(super) fn stored(&self, source: &Int4Source) -> Result<QuantWeight, Error> {
        let stored = Stored::new(source, 16)?;
        let order = stored.order()?;
        let input = |column: usize| order.as_ref().map_or(column, |order| order[column] as usize);
        self.four(
            (source.rows, source.cols, source.group),
            |row, column| stored.value(row, input(column)),
            |row, group| (stored.scale(row, group), stored.zero(row, group)),
            order.as_deref(),
        )
    }

    /// A matrix of E4M3 of a checkpoint. The kernels know one scale for an output: with several for a row, it is kept
    /// in the activations' type.
    pub(super) fn fp8(&self, source: &Fp8Source) -> Result<Weight, Error> {
        let elements = fp8::checked(source)?;
        let &Fp8Source { rows, cols, block, .. } = source;
        let groups = cols.div_ceil(block.1);
        let scale = |row: usize, col: usize| source.scales[row / block.0 * groups + col / block.1];
        if groups == 1 {
            let outputs = if block.0 < rows { rows } else { 1 };
            let scales: Vec<f32> = (0..outputs).map(|row| scale(row, 0)).collect();
            return self.eight(Format::Fp8, (rows, cols), elements, &scales).map(Weight::of_integers);
        }
        let worth = |(at, &code): (usize, &u8)| fp8::small(code) * (scale(at / cols, at % cols) * fp8::SCALE);
        let floats: Vec<u8> = elements.iter().enumerate().flat_map(|at| worth(at).to_le_bytes()).collect();
        self.weight(WeightSource {
            range: 0..floats.len(),
            bytes: Arc::new(floats),
            dtype: Dtype::F32,
            shape: vec![rows, cols],
        })
    }

    /// A matrix of floats, rounded. Cost: one pass over the bytes.
    pub(super) fn rounded(&self, source: &WeightSource, rounding: Rounding) -> Result<QuantWeight, Error> {
        let bytes = weight_bytes(source)?;
        let [rows, cols] = source.shape[..] else { unreachable!("a matrix") };
        multiple("weight_rounded", "out", rows, 1)?;
        multiple("weight_rounded", "in", cols, 1)?;
        let group = if rounding == Rounding::Int4 { GROUP } else { cols };
        let groups = cols.div_ceil(group);
        let (mut values, mut eight, mut four) = (vec![0_i8; rows * cols], Vec::new(), Vec::new());
        for (row, to) in bytes.chunks(cols * source.dtype.bytes()).zip(values.chunks_mut(cols)) {
            let row = widen_row(source.dtype, row);
            for (from, to) in row.chunks(group).zip(to.chunks_mut(group)) {
                match rounding {
                    Rounding::Int8 => eight.push(round_eight(from, to)),
                    Rounding::Int4 => four.push(round_four(from, to)),
                    Rounding::Fp8 => eight.push(round_fp8(from, to)),
                }
            }
        }
        match rounding {
            Rounding::Int8 => self.eight(Format::Int8, (rows, cols), bytemuck::cast_slice(&values), &eight),
            Rounding::Fp8 => self.eight(Format::Fp8, (rows, cols), bytemuck::cast_slice(&values), &eight),
            Rounding::Int4 => self.four(
                (rows, cols, group),
                |row, column| (values[row * cols + column] + 8).cast_unsigned(),
                |row, index| (four[row * groups + index], 8),
                None,
            ),
        }
    }

    /// Packs numbers of four bits by what they, and the scale and zero of a row and group, are.
    fn four(
        &self,
        (rows, cols, group): (usize, usize, usize),
        number: impl Fn(usize, usize) -> u8,
        scale_and_zero: impl Fn(usize, usize) -> (f16, u8),
        order: Option<&[u32]>,
    ) -> Result<QuantWeight, Error> {
        let packed = pack(rows, cols, 4, number);
        let padded = rows.next_multiple_of(TILE);
        let places = (0..cols.div_ceil(group)).flat_map(|group| (0..padded).map(move |row| (group, row)));
        let of = |(group, row)| if row < rows { scale_and_zero(row, group) } else { (f16::ZERO, 0) };
        let (scales, zeros): (Vec<f16>, Vec<u8>) = places.map(of).unzip();
        let device = &self.device;
        let order = order.map(|order| Memory::of(device, bytemuck::cast_slice(order))).transpose()?;
        Ok(QuantWeight {
            rows,
            cols,
            format: Format::Four,
            packed: Memory::of(device, &packed)?,
            scales: Memory::of(device, bytemuck::cast_slice(&scales))?,
            zeros: Memory::of(device, &zeros)?,
            scale_each: false,
            group,
            order,
        })
    }

    fn eight(
        &self,
        format: Format,
        (rows, cols): (usize, usize),
        elements: &[u8],
        scales: &[f32],
    ) -> Result<QuantWeight, Error> {
        let packed = pack(rows, cols, 8, |row, column| elements[row * cols + column]);
        let device = &self.device;
        Ok(QuantWeight {
            rows,
            cols,
            format,
            packed: Memory::of(device, &packed)?,
            scales: Memory::of(device, bytemuck::cast_slice(scales))?,
            zeros: Memory::new(device, 0)?,
            scale_each: scales.len() > 1,
            group: cols,
            order: None,
        })
    }

    /// `out = x · weightᵀ + bias`, all shapes checked. Four-bit numbers are rounded to the activations' type once they
    /// are multiplied by their scale; eight-bit ones are exact in it, and sums are multiplied. A row's bits do not
    /// depend on the other rows.
    pub(super) fn multiply_integers(
        &self,
        x: &Tensor,
        weight: &QuantWeight,
        bias: Address,
        out: &Tensor,
    ) -> Result<(), Error> {
        let operator = "linear";
        if x.rows() == 0 {
            return Ok(());
        }
        let mut permuted = Tensor::new(&self.device, 0, x.cols())?;
        if let Some(order) = &weight.order {
            permuted = Tensor::new(&self.device, x.rows(), x.cols())?;
            permuted.set_rows(x.rows());
            self.permute(x, order, &permuted)?;
        }
        let x = if weight.order.is_some() { &permuted } else { x };
        let argument = QuantGemmArgument {
            x: x.address(),
            bias,
            out: out.address(),
            x_stride: x.stride() as u64,
            out_stride: out.stride() as u64,
            rows: count(operator, "rows", x.rows())?,
            ..weight.argument(operator)?
        };
        // 8 warps with 2 stages of 16 rows of 128 numbers, and 16 x 16 sums of each slab of 512.
        let flat_bytes = 8 * 2 * TILE * PART * 2 + weight.cols.div_ceil(512) * TILE * TILE * 4;
        if x.rows() <= FLAT_ROWS && flat_bytes <= self.device.shared_bytes_max() as usize {
            let blocks = divide(operator, x.rows().div_ceil(TILE) * weight.rows.div_ceil(TILE), 1)?;
            let kernel = self.quant_kernel("quant_gemm", weight);
            return self.start("quant_gemm", &kernel, blocks, THREADS, flat_bytes, &argument);
        }
        let stride = weight.cols.next_multiple_of(8);
        let whole = self.workspace(weight.rows * stride * 2)?;
        let argument = QuantGemmArgument { out: whole.address(), out_stride: stride as u64, ..argument };
        self.dequantise(weight, weight.rows, &argument)?;
        let scales = (weight.format != Format::Four).then(|| (weight.scales.address(), weight.scale_each));
        let matrix =
            Matrix { address: whole.address(), stride, rows: weight.rows, cols: weight.cols, scales };
        self.multiply(x, matrix, bias, out)
    }

    /// `out[i] = weight[rows[i]]`, all checked, rounded to the activations' type.
    pub(super) fn gather_integers(
        &self,
        weight: &QuantWeight,
        rows: &[u32],
        out: &mut Tensor,
    ) -> Result<(), Error> {
        out.set_rows(rows.len());
        if rows.is_empty() {
            return Ok(());
        }
        let which = Memory::of(&self.device, bytemuck::cast_slice(rows))?;
        let argument = QuantGemmArgument {
            out: out.address(),
            out_stride: out.stride() as u64,
            which: which.address(),
            out_cols: count("embed", "rows", rows.len())?,
            ..weight.argument("embed")?
        };
        self.dequantise(weight, rows.len(), &argument)
    }

    fn dequantise(
        &self,
        weight: &QuantWeight,
        rows: usize,
        argument: &QuantGemmArgument,
    ) -> Result<(), Error> {
        let blocks = divide("dequantise", rows * weight.cols.div_ceil(PART), THREADS / 4)?;
        let kernel = self.quant_kernel("dequantise", weight);
        self.start("quant_gemm", &kernel, blocks, THREADS, 0, argument)
    }

    fn quant_kernel(&self, kernel: &str, weight: &QuantWeight) -> String {
        let format = match weight.format {
            Format::Four => "u4",
            Format::Int8 => "i8",
            Format::Fp8 => "e4m3",
        };
        let activations = if self.dtype == Dtype::F16 { "f16" } else { "bf16" };
        format!("{kernel}_{format}_{activations}")
    }

    fn permute(&self, x: &Tensor, order: &Memory, out: &Tensor) -> Result<(), Error> {
        let argument = PermuteArgument {
            x: x.address(),
            order: order.address(),
            out: out.address(),
            x_stride: x.stride() as u64,
            out_stride: out.stride() as u64,
            rows: count("quant_linear", "rows", x.rows())?,
            cols: count("quant_linear", "in of the weight", x.cols())?,
        };
        let blocks = divide("quant_linear", x.rows() * x.cols(), THREADS)?;
        self.start("quant_gemm", "permute_columns", blocks, THREADS, 0, &argument)
    }
}

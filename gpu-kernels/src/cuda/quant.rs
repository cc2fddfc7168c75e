//! Weights of four and eight bits: `kernels/quant_gemm.cu`.
//!
//! A weight is read in the form of its checkpoint (GPTQ, AWQ, or one byte per element) and packed once for the
//! kernel.

use half::f16;

use super::device::Address;
use super::gemm::Matrix;
use super::memory::Memory;
use super::tensor::{Tensor, Weight};
use super::{Cuda, count, divide};
use crate::error::{at_most, below, multiple, same};
use crate::{Dtype, Error};

/// A matrix `[out, in]` of a quantised checkpoint.
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
    /// GPTQ (arXiv 2210.17323), four bits: `(q - zero - 1) · scale`.
    Gptq {
        /// `[in / 8, out]`, eight consecutive inputs in a word, lowest bits first.
        words: &'a [u32],
        /// `[groups, out / 8]`, eight consecutive outputs in a word, each 1 less than what stands for zero.
        zeros: &'a [u32],
        /// `[groups, out]`.
        scales: &'a [f16],
        /// The group of each input (act-order); `None`: `group` after `group`.
        group_of: Option<&'a [u32]>,
        /// Inputs of a group: a multiple of 16, or all.
        group: usize,
    },
    /// AWQ (arXiv 2306.00978), four bits: `(q - zero) · scale`.
    Awq {
        /// `[in, out / 8]`, eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits.
        words: &'a [u32],
        /// `[groups, out / 8]`, in the same order.
        zeros: &'a [u32],
        /// `[groups, out]`.
        scales: &'a [f16],
        /// Inputs of a group: a multiple of 16, or all.
        group: usize,
    },
}

/// A quantised matrix in a device's memory.
#[derive(Debug)]
pub struct QuantWeight {
    rows: usize,
    cols: usize,
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

/// One of eight four-bit numbers of a word.
fn nibble(word: u32, which: usize) -> u8 {
    (word >> (4 * which) & 15) as u8
}

/// The place of each of eight outputs in AWQ's words.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Four-bit numbers, scales and zeros in the kernel's order.
struct Four {
    packed: Vec<u8>,
    scales: Vec<f16>,
    zeros: Vec<u8>,
    order: Option<Vec<u32>>,
}

/// Reads a four-bit matrix by what its word holds for a row and column, and a row and group.
fn four(
    (rows, cols): (usize, usize),
    group: usize,
    scales: &[f16],
    order: Option<Vec<u32>>,
    number: impl Fn(usize, usize) -> u8,
    zero: impl Fn(usize, usize) -> u8,
) -> Four {
    let source = |column: usize| order.as_ref().map_or(column, |order| order[column] as usize);
    let packed = pack(rows, cols, 4, |row, column| number(row, source(column)));
    let padded = rows.next_multiple_of(TILE);
    let places = || (0..cols.div_ceil(group)).flat_map(move |g| (0..padded).map(move |row| (g, row)));
    let scale = |(g, row): (usize, usize)| if row < rows { scales[g * rows + row] } else { f16::ZERO };
    let zero = |(g, row): (usize, usize)| if row < rows { zero(row, g) } else { 0 };
    let (scales, zeros) = (places().map(scale).collect(), places().map(zero).collect());
    Four { packed, scales, zeros, order }
}

/// Inputs by their group, in their order within one: each group must have as many as the others.
fn order_of(group_of: &[u32], groups: usize, group: usize) -> Result<Option<Vec<u32>>, Error> {
    let mut order = Vec::with_capacity(group_of.len());
    for &g in group_of {
        below("quant_weight", "group of an input", g as usize, groups)?;
    }
    for g in 0..groups {
        let members = (0..).zip(group_of).filter(|(_, of)| **of as usize == g).map(|(input, _)| input);
        let before = order.len();
        order.extend(members);
        let expected = group.min(group_of.len() - g * group);
        same("quant_weight", "inputs of a group", order.len() - before, expected)?;
    }
    let unchanged = order.is_sorted();
    Ok((!unchanged).then_some(order))
}

impl Cuda {
    /// A quantised matrix `[rows, cols]` of a checkpoint, packed and brought to the device.
    ///
    /// # Errors
    /// When lengths disagree with the shape, a group is no multiple of 16, or the memory cannot be had.
    pub fn quant_weight(
        &self,
        rows: usize,
        cols: usize,
        source: QuantSource<'_>,
    ) -> Result<QuantWeight, Error> {
        let operator = "quant_weight";
        multiple(operator, "out", rows, 1)?;
        multiple(operator, "in", cols, 1)?;
        let shape = (rows, cols);
        let four = match source {
            QuantSource::Fp8 { elements, scales } => {
                return self.eight(Format::Fp8, shape, elements, scales);
            }
            QuantSource::Int8 { elements, scales } => {
                return self.eight(Format::Int8, shape, bytemuck::cast_slice(elements), scales);
            }
            QuantSource::Gptq { words, zeros, scales, group_of, group } => {
                let groups = self.check_four(shape, group, words, zeros, scales)?;
                multiple(operator, "in", cols, 8)?;
                let order = match group_of {
                    Some(group_of) => {
                        same(operator, "inputs that have a group", group_of.len(), cols)?;
                        order_of(group_of, groups, group)?
                    }
                    None => None,
                };
                let number = |row, column: usize| nibble(words[column / 8 * rows + row], column % 8);
                let zero = |row: usize, g| nibble(zeros[g * (rows / 8) + row / 8], row % 8) + 1;
                four(shape, group, scales, order, number, zero)
            }
            QuantSource::Awq { words, zeros, scales, group } => {
                self.check_four(shape, group, words, zeros, scales)?;
                let of = |words: &[u32], line: usize, row: usize| {
                    nibble(words[line * (rows / 8) + row / 8], AWQ_PLACES[row % 8])
                };
                let number = |row, column| of(words, column, row);
                four(shape, group, scales, None, number, |row, g| of(zeros, g, row))
            }
        };
        let group = match source {
            QuantSource::Gptq { group, .. } | QuantSource::Awq { group, .. } => group,
            _ => cols,
        };
        let device = &self.device;
        let order = four.order.map(|order| Memory::of(device, bytemuck::cast_slice(&order))).transpose()?;
        Ok(QuantWeight {
            rows,
            cols,
            format: Format::Four,
            packed: Memory::of(device, &four.packed)?,
            scales: Memory::of(device, bytemuck::cast_slice(&four.scales))?,
            zeros: Memory::of(device, &four.zeros)?,
            scale_each: false,
            group,
            order,
        })
    }

    /// The number of groups of a four-bit matrix whose parts have the lengths of its shape.
    fn check_four(
        &self,
        (rows, cols): (usize, usize),
        group: usize,
        words: &[u32],
        zeros: &[u32],
        scales: &[f16],
    ) -> Result<usize, Error> {
        let operator = "quant_weight";
        multiple(operator, "out", rows, 8)?;
        if group != cols {
            multiple(operator, "group", group, 16)?;
        }
        at_most(operator, "group", group, cols)?;
        let groups = cols.div_ceil(group);
        same(operator, "words", words.len(), (rows * cols).div_ceil(8))?;
        same(operator, "words of zeros", zeros.len(), groups * (rows / 8))?;
        same(operator, "scales", scales.len(), groups * rows)?;
        Ok(groups)
    }

    fn eight(
        &self,
        format: Format,
        (rows, cols): (usize, usize),
        elements: &[u8],
        scales: &[f32],
    ) -> Result<QuantWeight, Error> {
        same("quant_weight", "elements", elements.len(), rows.saturating_mul(cols))?;
        if scales.len() != 1 {
            same("quant_weight", "scales", scales.len(), rows)?;
        }
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

    /// `out = x · weightᵀ + bias` with a quantised weight. Four-bit numbers are rounded to the activations' type
    /// once they are multiplied by their scale; eight-bit ones are exact in it, and sums are multiplied. A row's
    /// bits do not depend on the other rows.
    ///
    /// # Errors
    /// When shapes disagree or the device fails.
    pub fn quant_linear(
        &self,
        x: &Tensor,
        weight: &QuantWeight,
        bias: Option<&Weight>,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "quant_linear";
        same(operator, "in of the weight", weight.cols, x.cols())?;
        same(operator, "width of the output", out.cols(), weight.rows)?;
        out.check_rows(operator, x.rows())?;
        let bias = bias.map_or(Ok(0), |bias| bias.vector(operator, weight.rows))?;
        out.set_rows(x.rows());
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
        let scales = (weight.format != Format::Four).then(|| (weight.scales.address(), weight.scale_each));
        let argument = QuantGemmArgument {
            x: x.address(),
            weight: weight.packed.address(),
            group_scales: if scales.is_none() { weight.scales.address() } else { 0 },
            group_zeros: weight.zeros.address(),
            scales: scales.map_or(0, |(scales, _)| scales),
            bias,
            out: out.address(),
            x_stride: x.stride() as u64,
            out_stride: out.stride() as u64,
            rows: count(operator, "rows", x.rows())?,
            in_cols: count(operator, "in of the weight", weight.cols)?,
            out_cols: count(operator, "out of the weight", weight.rows)?,
            out_padded: count(operator, "out of the weight", weight.rows.next_multiple_of(TILE))?,
            group: count(operator, "group", weight.group)?,
            scale_stride: u32::from(weight.scale_each),
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
        let blocks = divide(operator, weight.rows * weight.cols.div_ceil(PART), THREADS / 4)?;
        let kernel = self.quant_kernel("dequantise", weight);
        self.start("quant_gemm", &kernel, blocks, THREADS, 0, &argument)?;
        let matrix =
            Matrix { address: whole.address(), stride, rows: weight.rows, cols: weight.cols, scales };
        self.multiply(x, matrix, bias, out)
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

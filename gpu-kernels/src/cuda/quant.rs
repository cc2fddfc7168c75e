//! Products with weights of four and eight bits: `kernels/quant_gemm.cu`. How they get there is `packing.rs`.

use super::device::Address;
use super::gemm::Matrix;
use super::memory::Memory;
use super::tensor::Tensor;
use super::{Cuda, count, divide};
use crate::{Dtype, Error};

/// A quantised matrix in a device's memory.
#[derive(Debug)]
pub(crate) struct QuantWeight {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(super) format: Format,
    pub(super) packed: Memory,
    /// Four bits: f16 scales and zeros of one byte, `[groups, rows padded]`. Eight: f32 scales, and nothing;
    /// of blocks `[rows padded / rows of a block, groups]`.
    pub(super) scales: Memory,
    pub(super) zeros: Memory,
    /// Each output has a scale of its own.
    pub(super) scale_each: bool,
    /// Inputs and outputs with one scale.
    pub(super) group: usize,
    pub(super) block_rows: usize,
    /// Which input each column is, when it is not its own number.
    pub(super) order: Option<Memory>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Four,
    Int8,
    Fp8,
    /// E4M3 with several scales for an output.
    Fp8Blocks,
}

impl Format {
    /// Sums are multiplied by scales, not the numbers before they are rounded.
    fn scales_sums(self) -> bool {
        matches!(self, Self::Int8 | Self::Fp8)
    }
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct QuantGemmArgument {
    x: Address,
    weight: Address,
    group_scales: Address,
    group_zeros: Address,
    block_scales: Address,
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
    block_rows: u32,
    unused: u32,
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
pub(super) const TILE: usize = 16;
pub(super) const PART: usize = 128;
const THREADS: usize = 256;
/// Rows up to which the weight is read again for every 16 rows, and not written out whole.
const FLAT_ROWS: usize = 64;

impl QuantWeight {
    /// What a kernel reads of it.
    fn argument(&self, operator: &'static str) -> Result<QuantGemmArgument, Error> {
        let of = |formats: &[Format]| if formats.contains(&self.format) { self.scales.address() } else { 0 };
        Ok(QuantGemmArgument {
            weight: self.packed.address(),
            group_scales: of(&[Format::Four]),
            group_zeros: self.zeros.address(),
            block_scales: of(&[Format::Fp8Blocks]),
            scales: of(&[Format::Int8, Format::Fp8]),
            in_cols: count(operator, "in of the weight", self.cols)?,
            out_cols: count(operator, "out of the weight", self.rows)?,
            out_padded: count(operator, "out of the weight", self.rows.next_multiple_of(TILE))?,
            group: count(operator, "group", self.group)?,
            scale_stride: u32::from(self.scale_each),
            block_rows: count(operator, "outputs of a block", self.block_rows)?,
            ..bytemuck::Zeroable::zeroed()
        })
    }
}

impl Cuda {
    /// `out = x · weightᵀ + bias`, all shapes checked. Numbers with several scales for an output are rounded to the
    /// activations' type once they are multiplied by theirs; others of eight bits are exact in it, and sums are
    /// multiplied. A row's bits do not depend on the other rows.
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
        let scales = weight.format.scales_sums().then(|| (weight.scales.address(), weight.scale_each));
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
            Format::Fp8Blocks => "e4m3_blocks",
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

//! Operators whose limit is bytes: `kernels/norm.cu`, `activation.cu` and `gather.cu`.

use super::device::Address;
use super::memory::Memory;
use super::norm::QuantTensor;
use super::tensor::Tensor;
use super::{Cuda, count, divide};
use crate::{Error, Gate};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct NormArgument {
    x: Address,
    delta: Address,
    weight: Address,
    out: Address,
    scales: Address,
    x_stride: u64,
    delta_stride: u64,
    out_stride: u64,
    rows: u32,
    cols: u32,
    heads: u32,
    eps: f32,
    offset: f32,
    aligned: u32,
    scale_each: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GatedArgument {
    gate: Address,
    up: Address,
    out: Address,
    gate_stride: u64,
    up_stride: u64,
    out_stride: u64,
    rows: u32,
    cols: u32,
    alpha: f32,
    limit: f32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GatherArgument {
    from: Address,
    rows: Address,
    out: Address,
    from_stride: u64,
    out_stride: u64,
    count: u32,
    cols: u32,
}

/// Threads of a block of these kernels.
const BLOCK: usize = 256;
/// Rows up to this length are a warp's work, longer ones a block's.
const SHORT: usize = 1024;

/// What an RMSNorm multiplies by, checked.
#[derive(Clone, Copy)]
pub(super) struct NormBy {
    pub(super) weight: Address,
    pub(super) eps: f32,
    /// Added to the weights.
    pub(super) offset: f32,
}

/// A norm of `x`, still without where it goes.
fn norm_argument(x: &Tensor, delta: Option<&Tensor>, by: NormBy) -> Result<NormArgument, Error> {
    Ok(NormArgument {
        x: x.address(),
        delta: delta.map_or(0, Tensor::address),
        weight: by.weight,
        x_stride: x.stride() as u64,
        delta_stride: delta.map_or(0, Tensor::stride) as u64,
        rows: count("rms_norm", "rows", x.rows())?,
        cols: count("rms_norm", "width of x", x.cols())?,
        heads: 1,
        eps: by.eps,
        offset: by.offset,
        aligned: u32::from(x.cols().is_multiple_of(8)),
        ..bytemuck::Zeroable::zeroed()
    })
}

impl Cuda {
    /// RMSNorm of rows, after an addition if there is one; `out` has its rows.
    pub(super) fn norm(
        &self,
        x: &Tensor,
        delta: Option<&Tensor>,
        by: NormBy,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let argument = NormArgument {
            out: out.address(),
            out_stride: out.stride() as u64,
            ..norm_argument(x, delta, by)?
        };
        self.launch_norm("", &argument, x.rows(), x.cols())
    }

    /// The same, to rows of one byte per element.
    pub(super) fn norm_to_bytes(
        &self,
        x: &Tensor,
        delta: Option<&Tensor>,
        by: NormBy,
        out: &QuantTensor,
    ) -> Result<(), Error> {
        let argument = NormArgument {
            out: out.elements.address(),
            out_stride: out.cols as u64,
            scales: out.scales.address(),
            scale_each: u32::from(out.storage.scale().is_none()),
            ..norm_argument(x, delta, by)?
        };
        self.launch_norm(if out.storage.e4m3() { "_e4m3" } else { "_i8" }, &argument, x.rows(), x.cols())
    }

    /// RMSNorm of every head on its own, in place.
    pub(super) fn norm_heads(
        &self,
        x: &mut Tensor,
        dim: usize,
        weight: Address,
        eps: f32,
    ) -> Result<(), Error> {
        let heads = x.cols() / dim;
        let argument = NormArgument {
            x: x.address(),
            delta: 0,
            weight,
            out: x.address(),
            scales: 0,
            x_stride: x.stride() as u64,
            delta_stride: 0,
            out_stride: x.stride() as u64,
            rows: count("head_norm", "rows", x.rows() * heads)?,
            cols: count("head_norm", "head size", dim)?,
            heads: count("head_norm", "heads", heads)?,
            eps,
            offset: 0.0,
            aligned: u32::from(dim.is_multiple_of(8)),
            scale_each: 0,
            unused: 0,
        };
        self.launch_norm("", &argument, x.rows() * heads, dim)
    }

    fn launch_norm(
        &self,
        suffix: &str,
        argument: &NormArgument,
        rows: usize,
        cols: usize,
    ) -> Result<(), Error> {
        if cols == 0 {
            return Ok(());
        }
        let (length, rows_per_block) = if cols <= SHORT { ("short", BLOCK / 32) } else { ("long", 1) };
        let blocks = divide("rms_norm", rows, rows_per_block)?;
        let kernel = format!("rms_norm_{length}_{}{suffix}", self.dtype);
        self.start("norm", &kernel, blocks, BLOCK, BLOCK / 32 * 4, argument)
    }

    /// A gated activation, whose kernel has its name.
    pub(super) fn gate(&self, act: Gate, gate: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<(), Error> {
        out.set_rows(gate.rows());
        let operator = act.name();
        let (alpha, limit) = match act {
            Gate::SwigluOai { alpha, limit } => (alpha, limit),
            Gate::Silu | Gate::GeluTanh | Gate::Gelu => (0.0, 0.0),
        };
        let argument = GatedArgument {
            gate: gate.address(),
            up: up.address(),
            out: out.address(),
            gate_stride: gate.stride() as u64,
            up_stride: up.stride() as u64,
            out_stride: out.stride() as u64,
            rows: count(operator, "rows", gate.rows())?,
            cols: count(operator, "width of gate", gate.cols())?,
            alpha,
            limit,
        };
        let blocks = divide(operator, gate.rows() * gate.cols().div_ceil(8), BLOCK)?;
        self.launch("activation", operator, blocks, BLOCK, 0, &argument)
    }

    /// `out[i] = from[rows[i]]`, all rows checked.
    pub(super) fn gather(
        &self,
        (from, stride): (Address, usize),
        rows: &[u32],
        out: &mut Tensor,
    ) -> Result<(), Error> {
        out.set_rows(rows.len());
        let indices = Memory::of(&self.device, bytemuck::cast_slice(rows))?;
        let argument = GatherArgument {
            from,
            rows: indices.address(),
            out: out.address(),
            from_stride: stride as u64,
            out_stride: out.stride() as u64,
            count: count("gather_rows", "rows", rows.len())?,
            cols: count("gather_rows", "width of x", out.cols())?,
        };
        let blocks = divide("gather_rows", rows.len() * out.cols().div_ceil(8), BLOCK)?;
        self.start("gather", "gather", blocks, BLOCK, 0, &argument)
    }
}

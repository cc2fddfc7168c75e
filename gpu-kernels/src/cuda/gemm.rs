//! Matrix products: `kernels/gemm.cu`.

use super::device::Address;
use super::tensor::Tensor;
use super::{Cuda, count, divide};
use crate::{Error, Projection};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GemmArgument {
    x: Address,
    weight: Address,
    bias: Address,
    out: Address,
    x_stride: u64,
    weight_stride: u64,
    out_stride: u64,
    rows: u32,
    in_cols: u32,
    out_cols: u32,
    unused: u32,
}

/// Rows up to which reading the weight is what takes time.
const FLAT_ROWS: usize = 16;

impl Cuda {
    /// `out = x · weightᵀ + bias`, all shapes checked.
    pub(super) fn gemm(&self, x: &Tensor, projection: &mut Projection<'_, Self>) -> Result<(), Error> {
        let (out_cols, in_cols) = projection.weight.matrix("linear")?;
        let bias = projection.bias.map_or(Ok(0), |bias| bias.vector("linear", out_cols))?;
        let argument = GemmArgument {
            x: x.address(),
            weight: projection.weight.address(),
            bias,
            out: projection.out.address(),
            x_stride: x.stride() as u64,
            weight_stride: projection.weight.stride() as u64,
            out_stride: projection.out.stride() as u64,
            rows: count("linear", "rows", x.rows())?,
            in_cols: count("linear", "in of the weight", in_cols)?,
            out_cols: count("linear", "out of the weight", out_cols)?,
            unused: 0,
        };
        // 8 warps with 2 stages of 32 rows of 64 numbers, and 16 x 16 sums of each slab of 512.
        let flat_bytes = 8 * 2 * 32 * 64 * 2 + in_cols.div_ceil(512) * 16 * 16 * 4;
        let flat = x.rows() <= FLAT_ROWS && flat_bytes <= self.device.shared_bytes_max() as usize;
        if x.rows() == 0 || out_cols == 0 {
            Ok(())
        } else if flat {
            let blocks = divide("linear", out_cols, 16)?;
            self.launch("gemm", "gemm_flat", blocks, 256, flat_bytes, &argument)
        } else {
            let blocks = divide("linear", x.rows().div_ceil(64) * out_cols.div_ceil(128), 1)?;
            self.launch("gemm", "gemm_tall", blocks, 128, 3 * (64 + 128) * 64 * 2, &argument)
        }
    }
}

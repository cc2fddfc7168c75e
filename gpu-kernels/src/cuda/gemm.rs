//! Matrix products: `kernels/gemm.cu`.

use super::device::Address;
#[cfg(feature = "cuda")]
use super::products::{Product, ProductShape};
use super::tensor::{self, FloatMatrix, Tensor};
use super::{Cuda, count, divide};
use crate::{Error, Projection};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct GemmArgument {
    pub(super) x: Address,
    pub(super) weight: Address,
    pub(super) bias: Address,
    pub(super) scales: Address,
    pub(super) out: Address,
    pub(super) x_stride: u64,
    pub(super) weight_stride: u64,
    pub(super) out_stride: u64,
    pub(super) rows: u32,
    pub(super) in_cols: u32,
    pub(super) out_cols: u32,
    pub(super) scale_stride: u32,
}

/// Rows up to which reading the weight is what takes time.
const FLAT_ROWS: usize = 16;

/// What `x` is multiplied by, in a device's memory.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) address: Address,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// What sums are multiplied by, and whether each output has its own.
    pub(super) scales: Option<(Address, bool)>,
}

impl Cuda {
    /// `out = x · weightᵀ + bias`, all shapes checked.
    pub(super) fn gemm(&self, x: &Tensor, projection: &mut Projection<'_, Self>) -> Result<(), Error> {
        let weight = projection.weight.matrix("linear")?;
        let bias = projection.bias.map_or(Ok(0), |bias| bias.vector("linear", weight.shape().0))?;
        match weight {
            tensor::Matrix::Floats(floats) => {
                let &FloatMatrix { rows, cols, .. } = floats;
                let (address, stride) = (floats.address(), floats.stride());
                self.multiply(x, Matrix { address, stride, rows, cols, scales: None }, bias, projection.out)
            }
            tensor::Matrix::Integers(integers) => self.multiply_integers(x, integers, bias, projection.out),
        }
    }

    /// `out = x · matrixᵀ · scale + bias`, all shapes checked.
    pub(super) fn multiply(
        &self,
        x: &Tensor,
        matrix: Matrix,
        bias: Address,
        out: &Tensor,
    ) -> Result<(), Error> {
        let Matrix { address, stride, rows: out_cols, cols: in_cols, scales } = matrix;
        let argument = GemmArgument {
            x: x.address(),
            weight: address,
            bias,
            scales: scales.map_or(0, |(scales, _)| scales),
            out: out.address(),
            x_stride: x.stride() as u64,
            weight_stride: stride as u64,
            out_stride: out.stride() as u64,
            rows: count("linear", "rows", x.rows())?,
            in_cols: count("linear", "in of the weight", in_cols)?,
            out_cols: count("linear", "out of the weight", out_cols)?,
            scale_stride: u32::from(scales.is_some_and(|(_, each)| each)),
        };
        // 8 warps with 2 stages of 32 rows of 64 numbers, and 16 x 16 sums of each slab of 512.
        let flat_bytes = 8 * 2 * 32 * 64 * 2 + in_cols.div_ceil(512) * 16 * 16 * 4;
        let flat = x.rows() <= FLAT_ROWS && flat_bytes <= self.device.shared_bytes_max() as usize;
        let nothing = x.rows() == 0 || out_cols == 0;
        if nothing || (!flat && scales.is_none() && self.multiplied_by_library(&argument)?) {
            Ok(())
        } else if flat {
            let blocks = divide("linear", out_cols, 16)?;
            self.launch("gemm", "gemm_flat", blocks, 256, flat_bytes, &argument)
        } else if self.takes_hopper(&argument) {
            self.launch_hopper_product(argument)
        } else {
            let blocks = divide("linear", x.rows().div_ceil(64) * out_cols.div_ceil(128), 1)?;
            self.launch("gemm", "gemm_tall", blocks, 128, 3 * (64 + 128) * 64 * 2, &argument)
        }
    }

    /// Whether a library that the caller asked for has done it.
    #[cfg(feature = "cuda")]
    fn multiplied_by_library(&self, argument: &GemmArgument) -> Result<bool, Error> {
        let &GemmArgument { x, weight, bias, out, .. } = argument;
        let shape = ProductShape {
            rows: argument.rows.into(),
            in_cols: argument.in_cols.into(),
            out_cols: argument.out_cols.into(),
            x_stride: argument.x_stride,
            weight_stride: argument.weight_stride,
            out_stride: argument.out_stride,
            has_bias: bias != 0,
        };
        let product = Product { x, weight, bias, out, shape };
        self.products.as_ref().map_or(Ok(false), |products| products.multiply(product))
    }

    #[cfg(not(feature = "cuda"))]
    fn multiplied_by_library(&self, _: &GemmArgument) -> Result<bool, Error> {
        Ok(false)
    }
}

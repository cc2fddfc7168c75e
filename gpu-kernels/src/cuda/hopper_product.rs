//! Products of many rows on Hopper: `kernels/hopper_gemm.cu`.

use super::Cuda;
use super::device::{Address, TileElement, TileMap};
use super::divide;
use super::gemm::GemmArgument;
use crate::{Dtype, Error};

/// Rows and columns of a tile, and what a block takes of `in` at once: a panel of 128 bytes.
const ROWS: u32 = 128;
const COLUMNS: u32 = 256;
const STEP: u32 = 64;
/// A warp group that asks and two that multiply.
const THREADS: usize = 384;
/// Sums are written in panels of so many rows and columns.
const PANEL: u32 = 64;
/// Four stages of a tile of both, and two barriers of each; and four panels of sums.
const SHARED_BYTES: usize = 4 * ((ROWS + COLUMNS) * STEP * 2 + 2 * 8 + PANEL * PANEL * 2) as usize;

#[repr(C, align(128))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct HopperGemm {
    x: [u8; 128],
    weight: [u8; 128],
    out: [u8; 128],
    product: GemmArgument,
    unused: [u32; 12],
}

impl Cuda {
    /// Whether the kernel for Hopper computes it: more rows than the tiles of the other have, and enough of its own,
    /// larger ones to keep half of the machine busy.
    pub(super) fn takes_hopper(&self, product: &GemmArgument) -> bool {
        let tiles = u64::from(product.rows.div_ceil(ROWS)) * u64::from(product.out_cols.div_ceil(COLUMNS));
        self.fast_prompts
            && self.device.is_hopper()
            && product.rows > 64
            && product.in_cols > 0
            && product.scales == 0
            && 2 * tiles >= u64::from(self.device.multiprocessors())
    }

    pub(super) fn launch_hopper_product(&self, product: GemmArgument) -> Result<(), Error> {
        let GemmArgument { rows, in_cols, out_cols, .. } = product;
        let map = |start: Address, [cols, lines]: [u32; 2], stride: u64, box_lines: u32| TileMap {
            start,
            element: if self.dtype == Dtype::Bf16 { TileElement::Bf16 } else { TileElement::F16 },
            sizes: [cols.into(), lines.into(), 1, 1],
            // Nothing follows along the last two.
            strides: [stride * 2; 3],
            box_sizes: [STEP, box_lines, 1, 1],
        };
        let argument = HopperGemm {
            x: self.device.encode(&map(product.x, [in_cols, rows], product.x_stride, ROWS))?,
            weight: self.device.encode(&map(
                product.weight,
                [in_cols, out_cols],
                product.weight_stride,
                COLUMNS,
            ))?,
            out: self.device.encode(&map(product.out, [out_cols, rows], product.out_stride, PANEL))?,
            product,
            unused: [0; 12],
        };
        let tiles = rows.div_ceil(ROWS) as usize * out_cols.div_ceil(COLUMNS) as usize;
        // Each goes from tile to tile.
        let blocks = divide("linear", tiles, 1)?.min(self.device.multiprocessors());
        self.launch("hopper_gemm", "hopper_gemm", blocks, THREADS, SHARED_BYTES, &argument)
    }
}

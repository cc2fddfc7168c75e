//! Attention of prompts on Hopper: `kernels/hopper_attention.cuh`.

use super::attention::{AttentionArgument, Call};
use super::device::{Address, TileElement, TileMap};
use super::merge::Partials;
use super::plan::Cut;
use super::{count, divide};
use crate::{Dtype, Error, KvStorage};

/// Rows of a block, and positions of a tile.
const ROWS: u32 = 128;
const TILE: usize = 128;
/// Positions that are added up together, unless somebody asks for others ([`Cuda::with_hopper_chunk`](super::Cuda)):
/// after each a block brings the totals of its 128 rows to memory and back, or several blocks and a merge do.
///
/// With heads of 128 a chunk is 4 · 128 · 8192 · 128 = 537 MFLOP, at 650 TFLOP/s (arXiv 2407.08608) of 132
/// multiprocessors 109 µs; its result is 128 · (128 + 2) · 4 bytes, 67 KB, out and back in 5 µs at a 132nd of 3.35 TB/s
/// if none of it stays in the cache: 5 %. Half as long a chunk would cost 10 %, and one twice as long would cut 128 k
/// into 8, too few for the last tile of a prompt with 8 kv heads to occupy the machine.
pub(super) const CHUNK: u32 = 8192;
/// Elements of a panel's row.
const PANEL: usize = 64;
/// A warp group that asks and two that multiply.
const THREADS: usize = 384;

#[repr(C, align(128))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct HopperArgument {
    keys: [u8; 128],
    values: [u8; 128],
    attention: AttentionArgument,
    totals: Address,
    chunk: u32,
    box_rows: u32,
}

impl Call<'_> {
    /// Whether a kernel for Hopper computes this: heads to 128, pages that a tile is made of or a part of, strides
    /// that the memory unit takes, and scores without slopes and masks. Any cache will do, but of latents.
    pub(super) fn takes_hopper(&self) -> bool {
        let (dim, block_size) = (self.attention.heads.dim, self.pool.shape.block_size);
        let pages = block_size.is_multiple_of(8)
            && (TILE.is_multiple_of(block_size) || block_size.is_multiple_of(TILE));
        let scores = self.scores.slopes.is_none() && self.scores.mask.is_none();
        self.cuda.fast_prompts
            && self.cuda.device.is_hopper()
            && self.q_rope.is_none()
            && dim.is_multiple_of(8)
            && dim <= 2 * PANEL
            && pages
            && self.pool.layout.fits_maps()
            && scores
    }

    /// The spans of many rows.
    pub(super) fn launch_hopper(
        &self,
        layer: usize,
        argument: AttentionArgument,
        cut: Cut,
    ) -> Result<(), Error> {
        let device = &self.cuda.device;
        // A block fills a multiprocessor.
        let (chunk, slots) = (self.cuda.hopper_chunk, device.multiprocessors());
        let work = self.batch.plan(device, Cut { rows_many: ROWS, chunk, slots, ..cut })?.many();
        if work.items_len == 0 {
            return Ok(());
        }
        let (shape, strides) = (self.pool.shape, self.pool.layout.strides);
        let (panels, box_rows) = (self.attention.heads.dim.div_ceil(PANEL), shape.block_size.min(TILE));
        let (element, bytes, box_columns) = match (self.pool.storage, shape.dtype) {
            (KvStorage::Same, Dtype::Bf16) => (TileElement::Bf16, 2, PANEL),
            (KvStorage::Same, _) => (TileElement::F16, 2, PANEL),
            _ => (TileElement::Byte, 1, panels * PANEL),
        };
        let map = |which| TileMap {
            start: self.pool.plane(layer, which),
            element,
            sizes: [shape.head_dim, shape.block_size, shape.kv_heads, shape.blocks].map(|n| n as u64),
            strides: [strides.token, strides.head, strides.page].map(|elements| elements as u64 * bytes),
            #[expect(clippy::cast_possible_truncation, reason = "at most 128")]
            box_sizes: [box_columns as u32, box_rows as u32, 1, 1],
        };
        let (keys, values) = (device.encode(&map(0))?, device.encode(&map(1))?);
        // Queries, two stages of K and of V, and six barriers.
        let mut shared = panels * 128 * TILE * (1 + 4) + 6 * 8;
        if element == TileElement::Byte {
            // The stages as stored, their scales, and four more barriers.
            shared += 4 * TILE * (panels * PANEL + 4) + 4 * 8;
        }
        let suffix = self.pool.suffix();
        let file = match suffix {
            "bf16" => "hopper_attention_bf16",
            "f16" => "hopper_attention_f16",
            "bf16_e4m3" => "hopper_attention_bf16_e4m3",
            "f16_e4m3" => "hopper_attention_f16_e4m3",
            "bf16_i8" => "hopper_attention_bf16_i8",
            _ => "hopper_attention_f16_i8",
        };
        let kernel = format!("hopper_attention_{}_{suffix}", panels * PANEL);
        let blocks = divide("attention", work.items_len * self.attention.heads.kv, 1)?;
        let (rows, dim) = (ROWS as usize, panels * PANEL);
        let one_scale = matches!(self.pool.storage, KvStorage::Fp8 { .. });
        let value_scale = if one_scale { argument.value_scale } else { 0 };
        // An f32 for each element of a tile's output, whatever the length of its context.
        let totals_bytes = work.items_long * self.attention.heads.kv * rows * dim * 4;
        let box_rows = count("attention", "rows of a box", box_rows)?;
        let partials = Partials { rows, dim, value_scale };
        self.cuda.with_partials(argument, (work, partials), totals_bytes, |&attention, totals| {
            let argument = HopperArgument { keys, values, attention, totals, chunk, box_rows };
            self.cuda.start(file, &kernel, blocks, THREADS, shared, &argument)
        })
    }
}

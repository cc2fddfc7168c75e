//! Partial results of attention become one, and so do two attentions over parts of contexts: `kernels/merge.cu`.

use super::attention::{AttentionArgument, Floats};
use super::batch::DeviceWork;
use super::device::Address;
use super::tensor::Tensor;
use super::{Cuda, count, divide};
use crate::Error;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct MergeArgument {
    tiles: Address,
    values: Address,
    states: Address,
    out: Address,
    lse: Address,
    sinks: Address,
    value_scale: Address,
    out_stride: u64,
    kv_heads: u32,
    group: u32,
    dim: u32,
    padded: u32,
    tile_rows: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct MergeStatesArgument {
    a: Address,
    lse_a: Address,
    b: Address,
    lse_b: Address,
    a_stride: u64,
    b_stride: u64,
    tokens: u32,
    heads: u32,
    dim: u32,
    unused: u32,
}

/// What the items of a block shape leave of a tile that was cut.
#[derive(Clone, Copy)]
pub(super) struct Partials {
    /// Rows of a tile, and elements of a row.
    pub(super) rows: usize,
    pub(super) dim: usize,
    /// What all values are still to be multiplied by, where that is one number: its address; or 0.
    pub(super) value_scale: Address,
}

/// Rows of a block.
const ROWS: usize = 4;

impl Cuda {
    /// Launches the items of some work, with room for what they leave and for `bytes` of their own behind it, and adds
    /// up what they left.
    pub(super) fn with_partials(
        &self,
        argument: AttentionArgument,
        (work, partials): (DeviceWork, Partials),
        bytes: usize,
        launch: impl FnOnce(&AttentionArgument, Address) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let rows = work.partials * argument.kv_heads as usize * partials.rows;
        let values_bytes = rows * partials.dim * 4;
        let workspace = self.workspace(values_bytes + rows * 8 + bytes)?;
        let partial_states = workspace.address() + values_bytes as u64;
        let argument = AttentionArgument {
            items: work.items,
            partial_values: workspace.address(),
            partial_states,
            ..argument
        };
        launch(&argument, partial_states + rows as u64 * 8)?;
        if work.merges_len > 0 { self.merge_partials(&argument, work, partials) } else { Ok(()) }
    }

    fn merge_partials(
        &self,
        argument: &AttentionArgument,
        work: DeviceWork,
        partials: Partials,
    ) -> Result<(), Error> {
        let merge = MergeArgument {
            tiles: work.merges,
            values: argument.partial_values,
            states: argument.partial_states,
            out: argument.out,
            lse: argument.lse,
            sinks: argument.sinks,
            value_scale: partials.value_scale,
            out_stride: argument.out_stride,
            kv_heads: argument.kv_heads,
            group: argument.group,
            dim: argument.value_dim,
            padded: count("attention", "head size", partials.dim)?,
            tile_rows: count("attention", "rows", partials.rows)?,
            unused: 0,
        };
        let heads = work.merges_len * argument.kv_heads as usize;
        let blocks = divide("attention", heads * partials.rows, ROWS)?;
        let kernel = if partials.dim > 256 { "merge_partials_latent" } else { "merge_partials" };
        self.launch("merge", kernel, blocks, 32 * ROWS, 0, &merge)
    }

    /// Two attentions over parts of the same contexts, checked.
    pub(super) fn merge(
        &self,
        (a, lse_a): (&mut Tensor, &mut Floats),
        (b, lse_b): (&Tensor, &Floats),
        heads: usize,
    ) -> Result<(), Error> {
        let argument = MergeStatesArgument {
            a: a.address(),
            lse_a: lse_a.memory.address(),
            b: b.address(),
            lse_b: lse_b.memory.address(),
            a_stride: a.stride() as u64,
            b_stride: b.stride() as u64,
            tokens: count("merge_states", "rows", a.rows())?,
            heads: count("merge_states", "heads", heads)?,
            dim: count("merge_states", "head size", a.cols() / heads)?,
            unused: 0,
        };
        let blocks = divide("merge_states", a.rows() * heads, ROWS)?;
        self.launch("merge", "merge_states", blocks, 32 * ROWS, 0, &argument)
    }
}

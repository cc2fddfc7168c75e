//! Mixtures of experts and adapters: `kernels/moe.cu` and `kernels/grouped.cu`.

use super::attention::Floats;
use super::device::Address;
use super::gemm::GemmArgument;
use super::memory::Memory;
use super::tensor::{FloatMatrix, Tensor, Weight};
use super::{Cuda, count, divide};
use crate::door::{self, Routed};
use crate::grouped::by_weight;
use crate::{Error, Grouped, Router};

/// Which experts each token goes to, on the device, and the lists that products need.
#[derive(Debug)]
pub struct Routing {
    experts: Memory,
    weights: Memory,
    pairs_sorted: Memory,
    tokens_sorted: Memory,
    tiles: Memory,
    tiles_max: usize,
    of: Routed,
}

/// Rows of a tile, as `TALL_ROWS` of the kernel.
pub(super) const TILE_ROWS: usize = 64;
/// `TALL_COLUMNS`, and three stages of both.
pub(super) const TILE_COLUMNS: usize = 128;
pub(super) const TILE_BYTES: usize = 3 * (TILE_ROWS + TILE_COLUMNS) * 64 * 2;
/// Threads of a block of the other kernels.
const BLOCK: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct RouteArgument {
    logits: Address,
    bias: Address,
    experts: Address,
    weights: Address,
    stride: u64,
    tokens: u32,
    expert_count: u32,
    chosen: u32,
    groups: u32,
    groups_chosen: u32,
    sigmoid: u32,
    renormalise: u32,
    factor: f32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct SortArgument {
    experts: Address,
    counts: Address,
    pairs_sorted: Address,
    tokens_sorted: Address,
    tiles: Address,
    pairs: u32,
    expert_count: u32,
    chosen: u32,
    tile_rows: u32,
    tiles_max: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct CombineArgument {
    parts: Address,
    weights: Address,
    out: Address,
    parts_stride: u64,
    out_stride: u64,
    tokens: u32,
    chosen: u32,
    cols: u32,
    accumulate: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GroupTile {
    weight: u32,
    first: u32,
    last: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct GroupedArgument {
    gemm: GemmArgument,
    tiles: Address,
    from: Address,
    to: Address,
    factors: Address,
    weight_size: u64,
    accumulate: u32,
    unused: u32,
}

/// Lists of rows for [`Cuda::grouped`].
struct Lists {
    tiles: Address,
    tiles_len: usize,
    from: Address,
    to: Address,
}

impl Grouped for Cuda {
    type Routing = Routing;

    fn route(&self, logits: &Tensor, router: Router<'_, Self>) -> Result<Routing, Error> {
        let operator = "route";
        let of = door::route(logits.shape(), router, router.bias.map(|bias| bias.len))?;
        let (device, pairs) = (&self.device, of.pairs());
        let tiles_max = pairs.div_ceil(TILE_ROWS) + of.experts.min(pairs);
        let routing = Routing {
            experts: Memory::new(device, pairs * 4)?,
            weights: Memory::new(device, pairs * 4)?,
            pairs_sorted: Memory::new(device, pairs * 4)?,
            tokens_sorted: Memory::new(device, pairs * 4)?,
            tiles: Memory::new(device, tiles_max * 12)?,
            tiles_max,
            of,
        };
        if of.tokens == 0 {
            return Ok(routing);
        }
        let argument = RouteArgument {
            logits: logits.address(),
            bias: router.bias.map_or(0, |bias| bias.memory.address()),
            experts: routing.experts.address(),
            weights: routing.weights.address(),
            stride: logits.stride() as u64,
            tokens: count(operator, "tokens", of.tokens)?,
            expert_count: count(operator, "experts", of.experts)?,
            chosen: count(operator, "experts of a token", of.chosen)?,
            groups: count(operator, "groups", router.groups)?,
            groups_chosen: count(operator, "groups chosen", router.groups_chosen)?,
            sigmoid: u32::from(router.sigmoid),
            renormalise: u32::from(router.renormalise),
            factor: router.factor,
        };
        let shared = (2 * of.experts + router.groups.next_multiple_of(2)) * 4 + BLOCK / 32 * 8;
        self.launch("moe", "route", argument.tokens, BLOCK, shared, &argument)?;
        self.sort(&routing)?;
        Ok(routing)
    }

    fn read_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let pairs = routing.of.pairs();
        let (mut experts, mut weights) = (vec![0_u32; pairs], vec![0.0_f32; pairs]);
        if pairs > 0 {
            self.device.download(routing.experts.address(), bytemuck::cast_slice_mut(&mut experts))?;
            self.device.download(routing.weights.address(), bytemuck::cast_slice_mut(&mut weights))?;
        }
        Ok((experts, weights))
    }

    fn expert_linear(
        &self,
        x: &Tensor,
        routing: &Routing,
        weights: &Weight,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "expert_linear";
        let (pairs, weights) = (routing.of.pairs(), weights.floats(operator)?);
        door::expert_linear(x.shape(), routing.of, (weights.rows, weights.cols), out.shape())?;
        out.set_rows(pairs);
        let from = if x.rows() == pairs { &routing.pairs_sorted } else { &routing.tokens_sorted };
        let lists = Lists {
            tiles: routing.tiles.address(),
            tiles_len: routing.tiles_max,
            from: from.address(),
            to: routing.pairs_sorted.address(),
        };
        self.grouped(operator, x, weights, lists, None, false, out)
    }

    fn combine(
        &self,
        parts: &Tensor,
        routing: &Routing,
        accumulate: bool,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "combine";
        door::combine(parts.shape(), routing.of, accumulate, out.shape())?;
        let Routed { tokens, chosen, .. } = routing.of;
        out.set_rows(tokens);
        let argument = CombineArgument {
            parts: parts.address(),
            weights: routing.weights.address(),
            out: out.address(),
            parts_stride: parts.stride() as u64,
            out_stride: out.stride() as u64,
            tokens: count(operator, "tokens", tokens)?,
            chosen: count(operator, "experts of a token", chosen)?,
            cols: count(operator, "width of the parts", parts.cols())?,
            accumulate: u32::from(accumulate),
        };
        let blocks = divide(operator, tokens * parts.cols(), BLOCK)?;
        self.launch("moe", "combine", blocks, BLOCK, 0, &argument)
    }

    fn lora(
        &self,
        x: &Tensor,
        adapter_of: &[Option<u32>],
        (a, b): (&Weight, &Weight),
        factors: &Floats,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "lora";
        let (a, b) = (a.floats(operator)?, b.floats(operator)?);
        let shapes = ((a.rows, a.cols), (b.rows, b.cols));
        door::lora(x.shape(), adapter_of, shapes, factors.len, out.shape())?;
        let (rows, tiles) = by_adapter(adapter_of)?;
        let rows = Memory::of(&self.device, bytemuck::cast_slice(&rows))?;
        let on_device = Memory::of(&self.device, bytemuck::cast_slice(&tiles))?;
        let lists = || Lists {
            tiles: on_device.address(),
            tiles_len: tiles.len(),
            from: rows.address(),
            to: rows.address(),
        };
        let mut between = Tensor::new(&self.device, x.rows(), b.cols)?;
        between.set_rows(x.rows());
        self.grouped(operator, x, a, lists(), None, false, &between)?;
        self.grouped(operator, &between, b, lists(), Some(factors), true, out)
    }
}

impl Cuda {
    /// The lists of a routing whose experts are chosen.
    fn sort(&self, routing: &Routing) -> Result<(), Error> {
        let operator = "route";
        let counts = Memory::new(&self.device, routing.of.experts * 4)?;
        let argument = SortArgument {
            experts: routing.experts.address(),
            counts: counts.address(),
            pairs_sorted: routing.pairs_sorted.address(),
            tokens_sorted: routing.tokens_sorted.address(),
            tiles: routing.tiles.address(),
            pairs: count(operator, "tokens and their experts", routing.of.pairs())?,
            expert_count: count(operator, "experts", routing.of.experts)?,
            chosen: count(operator, "experts of a token", routing.of.chosen)?,
            tile_rows: count(operator, "rows of a tile", TILE_ROWS)?,
            tiles_max: count(operator, "tiles", routing.tiles_max)?,
            unused: 0,
        };
        self.start("moe", "moe_count", argument.expert_count, BLOCK, BLOCK * 4, &argument)?;
        self.start("moe", "moe_sort", argument.expert_count, BLOCK, BLOCK * 4, &argument)
    }

    /// The products of a list of rows, all shapes checked.
    #[expect(clippy::too_many_arguments, reason = "a kernel's: what is read, how, and what is written")]
    fn grouped(
        &self,
        operator: &'static str,
        x: &Tensor,
        weights: &FloatMatrix,
        lists: Lists,
        factors: Option<&Floats>,
        accumulate: bool,
        out: &Tensor,
    ) -> Result<(), Error> {
        let argument = GroupedArgument {
            gemm: GemmArgument {
                x: x.address(),
                weight: weights.address(),
                out: out.address(),
                x_stride: x.stride() as u64,
                weight_stride: weights.stride() as u64,
                out_stride: out.stride() as u64,
                in_cols: count(operator, "width of x", x.cols())?,
                out_cols: count(operator, "width of the output", out.cols())?,
                ..bytemuck::Zeroable::zeroed()
            },
            tiles: lists.tiles,
            from: lists.from,
            to: lists.to,
            factors: factors.map_or(0, |factors| factors.memory.address()),
            weight_size: (out.cols() * weights.stride()) as u64,
            accumulate: u32::from(accumulate),
            unused: 0,
        };
        let blocks = divide(operator, lists.tiles_len * out.cols().div_ceil(TILE_COLUMNS), 1)?;
        self.launch("grouped", "grouped", blocks, BLOCK, TILE_BYTES, &argument)
    }
}

/// Rows in the order of their adapters, and tiles of them.
fn by_adapter(adapter_of: &[Option<u32>]) -> Result<(Vec<u32>, Vec<GroupTile>), Error> {
    let rows = by_weight((0..).zip(adapter_of).filter_map(|(row, of)| of.map(|adapter| (adapter, row))));
    let mut tiles = Vec::new();
    let mut start = 0;
    for group in rows.chunk_by(|a, b| a.0 == b.0) {
        for tile in group.chunks(TILE_ROWS) {
            let (first, last) = (start, start + tile.len());
            let numbered = |n| count("lora", "rows", n);
            tiles.push(GroupTile { weight: group[0].0, first: numbered(first)?, last: numbered(last)? });
            start = last;
        }
    }
    Ok((rows.into_iter().map(|(_, row)| row).collect(), tiles))
}

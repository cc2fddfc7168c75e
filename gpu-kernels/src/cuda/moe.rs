//! Mixtures of experts and adapters: `kernels/moe.cu` and `kernels/grouped.cu`.

use super::attention::Floats;
use super::device::Address;
use super::gemm::GemmArgument;
use super::memory::Memory;
use super::tensor::{FloatMatrix, Tensor, Weight};
use super::{Cuda, count, divide};
use crate::Error;
use crate::error::{at_most, below, multiple, same};

/// How a token's experts are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    /// Experts of a token.
    pub chosen: usize,
    /// Scores are sigmoids of the logits (DeepSeek-V3, arXiv 2412.19437), not a softmax over all experts.
    pub sigmoid: bool,
    /// Added to scores for the choice alone; one per expert.
    pub bias: Option<&'a Floats>,
    /// Experts are in this many equal groups; 1 is none.
    pub groups: usize,
    /// The best of the groups, from which experts are chosen.
    pub groups_chosen: usize,
    /// The weights of a token's experts are made to sum to 1.
    pub renormalise: bool,
    /// Multiplies the weights.
    pub factor: f32,
}

impl Default for Router<'_> {
    fn default() -> Self {
        Self {
            chosen: 1,
            sigmoid: false,
            bias: None,
            groups: 1,
            groups_chosen: 1,
            renormalise: true,
            factor: 1.0,
        }
    }
}

/// Which experts each token goes to, on the device, and the lists that products need.
#[derive(Debug)]
pub struct Routing {
    experts: Memory,
    weights: Memory,
    pairs_sorted: Memory,
    tokens_sorted: Memory,
    tiles: Memory,
    tiles_max: usize,
    tokens: usize,
    chosen: usize,
    expert_count: usize,
}

/// Rows of a tile, as `TALL_ROWS` of the kernel.
const TILE_ROWS: usize = 64;
/// `TALL_COLUMNS`, and three stages of both.
const TILE_COLUMNS: usize = 128;
const TILE_BYTES: usize = 3 * (TILE_ROWS + TILE_COLUMNS) * 64 * 2;
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

impl Cuda {
    /// Chooses experts for each token from logits `[tokens, experts]`: the best by score, of equal ones the first.
    ///
    /// # Errors
    /// When numbers of experts and groups do not fit, or the device fails.
    pub fn route(&self, logits: &Tensor, router: Router<'_>) -> Result<Routing, Error> {
        let operator = "route";
        let (tokens, expert_count) = (logits.rows(), logits.cols());
        multiple(operator, "experts of a token", router.chosen, 1)?;
        multiple(operator, "experts", expert_count, router.groups)?;
        multiple(operator, "groups chosen", router.groups_chosen, 1)?;
        at_most(operator, "groups chosen", router.groups_chosen, router.groups)?;
        let eligible = expert_count / router.groups * router.groups_chosen;
        at_most(operator, "experts of a token", router.chosen, eligible)?;
        if let Some(bias) = router.bias {
            same(operator, "biases", bias.len, expert_count)?;
        }
        let device = &self.device;
        let pairs = tokens * router.chosen;
        let tiles_max = pairs.div_ceil(TILE_ROWS) + expert_count.min(pairs);
        let routing = Routing {
            experts: Memory::new(device, pairs * 4)?,
            weights: Memory::new(device, pairs * 4)?,
            pairs_sorted: Memory::new(device, pairs * 4)?,
            tokens_sorted: Memory::new(device, pairs * 4)?,
            tiles: Memory::new(device, tiles_max * 12)?,
            tiles_max,
            tokens,
            chosen: router.chosen,
            expert_count,
        };
        if tokens == 0 {
            return Ok(routing);
        }
        let argument = RouteArgument {
            logits: logits.address(),
            bias: router.bias.map_or(0, |bias| bias.memory.address()),
            experts: routing.experts.address(),
            weights: routing.weights.address(),
            stride: logits.stride() as u64,
            tokens: count(operator, "tokens", tokens)?,
            expert_count: count(operator, "experts", expert_count)?,
            chosen: count(operator, "experts of a token", router.chosen)?,
            groups: count(operator, "groups", router.groups)?,
            groups_chosen: count(operator, "groups chosen", router.groups_chosen)?,
            sigmoid: u32::from(router.sigmoid),
            renormalise: u32::from(router.renormalise),
            factor: router.factor,
        };
        let shared = (2 * expert_count + router.groups.next_multiple_of(2)) * 4 + BLOCK / 32 * 8;
        self.launch("moe", "route", argument.tokens, BLOCK, shared, &argument)?;
        self.sort(&routing)?;
        Ok(routing)
    }

    /// The lists of a routing whose experts are chosen.
    fn sort(&self, routing: &Routing) -> Result<(), Error> {
        let operator = "route";
        let counts = Memory::new(&self.device, routing.expert_count * 4)?;
        let argument = SortArgument {
            experts: routing.experts.address(),
            counts: counts.address(),
            pairs_sorted: routing.pairs_sorted.address(),
            tokens_sorted: routing.tokens_sorted.address(),
            tiles: routing.tiles.address(),
            pairs: count(operator, "tokens and their experts", routing.tokens * routing.chosen)?,
            expert_count: count(operator, "experts", routing.expert_count)?,
            chosen: count(operator, "experts of a token", routing.chosen)?,
            tile_rows: count(operator, "rows of a tile", TILE_ROWS)?,
            tiles_max: count(operator, "tiles", routing.tiles_max)?,
            unused: 0,
        };
        self.start("moe", "moe_count", argument.expert_count, BLOCK, BLOCK * 4, &argument)?;
        self.start("moe", "moe_sort", argument.expert_count, BLOCK, BLOCK * 4, &argument)
    }

    /// Each token's experts and their weights, `[tokens, chosen]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_routing(&self, routing: &Routing) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let pairs = routing.tokens * routing.chosen;
        let (mut experts, mut weights) = (vec![0_u32; pairs], vec![0.0_f32; pairs]);
        if pairs > 0 {
            self.device.download(routing.experts.address(), bytemuck::cast_slice_mut(&mut experts))?;
            self.device.download(routing.weights.address(), bytemuck::cast_slice_mut(&mut weights))?;
        }
        Ok((experts, weights))
    }

    /// Each pair of a token and one of its experts times that expert's weight: `out` `[tokens · chosen, out]`,
    /// from `x` `[tokens, in]` or `[tokens · chosen, in]`. The experts' weights are one matrix `[experts · out,
    /// in]`. A row has the bits that `linear` gives it.
    ///
    /// # Errors
    /// When shapes disagree or the device fails.
    pub fn expert_linear(
        &self,
        x: &Tensor,
        routing: &Routing,
        weights: &Weight,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "expert_linear";
        let pairs = routing.tokens * routing.chosen;
        let weights = weights.floats(operator)?;
        same(operator, "in of the weights", weights.cols, x.cols())?;
        same(operator, "out of the weights of all experts", weights.rows, routing.expert_count * out.cols())?;
        if x.rows() != pairs {
            same(operator, "rows of x", x.rows(), routing.tokens)?;
        }
        out.check_rows(operator, pairs)?;
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

    /// Sums what the experts of each token gave, `[tokens · chosen, cols]`, by their weights: `out` `[tokens,
    /// cols]`, on top of what is there (a shared expert's) if `accumulate`.
    ///
    /// # Errors
    /// When shapes disagree or the device fails.
    pub fn combine(
        &self,
        parts: &Tensor,
        routing: &Routing,
        accumulate: bool,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "combine";
        same(operator, "rows of the parts", parts.rows(), routing.tokens * routing.chosen)?;
        same(operator, "width of the output", out.cols(), parts.cols())?;
        if accumulate {
            same(operator, "rows of the output", out.rows(), routing.tokens)?;
        }
        out.check_rows(operator, routing.tokens)?;
        out.set_rows(routing.tokens);
        let argument = CombineArgument {
            parts: parts.address(),
            weights: routing.weights.address(),
            out: out.address(),
            parts_stride: parts.stride() as u64,
            out_stride: out.stride() as u64,
            tokens: count(operator, "tokens", routing.tokens)?,
            chosen: count(operator, "experts of a token", routing.chosen)?,
            cols: count(operator, "width of the parts", parts.cols())?,
            accumulate: u32::from(accumulate),
        };
        let blocks = divide(operator, routing.tokens * parts.cols(), BLOCK)?;
        self.launch("moe", "combine", blocks, BLOCK, 0, &argument)
    }

    /// `out += factor · (x · Aᵀ) · Bᵀ` for each row that has an adapter (LoRA, arXiv 2106.09685), all adapters at
    /// once. `a` is `[adapters · rank, in]`, `b` `[adapters · out, rank]`, `factors` has one number per adapter;
    /// an adapter of a smaller rank is filled up with zeros. Rows without one stay as they are. What lies between
    /// the two products is rounded to the activations' type.
    ///
    /// # Errors
    /// When shapes disagree, or an adapter is not there, or the device fails.
    pub fn lora(
        &self,
        x: &Tensor,
        adapter_of: &[Option<u32>],
        (a, b): (&Weight, &Weight),
        factors: &Floats,
        out: &mut Tensor,
    ) -> Result<(), Error> {
        let operator = "lora";
        let (adapters, a, b) = (factors.len, a.floats(operator)?, b.floats(operator)?);
        multiple(operator, "rows of a", a.rows, adapters)?;
        same(operator, "rank of b", b.cols, a.rows / adapters)?;
        same(operator, "in of a", a.cols, x.cols())?;
        same(operator, "out of b of all adapters", b.rows, adapters * out.cols())?;
        same(operator, "rows that have an adapter or none", adapter_of.len(), x.rows())?;
        same(operator, "rows of the output", out.rows(), x.rows())?;
        for &adapter in adapter_of.iter().flatten() {
            below(operator, "adapter", adapter as usize, adapters)?;
        }
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
    let mut rows: Vec<(u32, u32)> =
        (0..).zip(adapter_of).filter_map(|(row, of)| of.map(|adapter| (adapter, row))).collect();
    rows.sort_unstable();
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

//! Products on matrix tiles (Intel AMX), with weights of bf16 and of what is exact in it: eight bits and four.
//!
//! A tile is sixteen rows of 64 bytes. One instruction multiplies a tile of 16 x 32 bf16 with one of 32 x 16,
//! stored in pairs, and adds to a tile of 16 x 16 f32. Sixteen lines of a panel (see [`super::panels`]) are such a
//! second tile, and smaller numbers are widened to some ([`columns`]); the first is `x`, which is small and ours,
//! rounded to bf16 ([`rows`]).
//!
//! Every output is summed over a group of `in` that has one scale, 32 elements an instruction, in ascending order,
//! then over the groups, whatever the number of rows. All such products of a machine with tiles go this way, one row
//! too, so bits do not depend on the batch; they differ from those of other machines, because `x` is rounded.
//!
//! Why there is no other path for few rows: it would need the bits of this one, and would gain little. Counting
//! instructions, to widen the 512 weights of a tile takes some 48 cycles from eight bits and 16 from four, to multiply
//! them with up to sixteen rows 16: either way 8 bytes a cycle, where a thread reads 4 to 6 from memory. With many
//! rows, eight bits are as dear to widen as 48 rows are to multiply, so up to 512 share it ([`ROWS`]). Nobody has
//! measured that.
//!
//! The blocking is written over [`TileUnit`]. [`Hardware`] is the instructions; [`Emulated`] is the same arithmetic in
//! plain loops, and lets every machine test the rest. Machines without tiles test the instructions too: they execute
//! them one at a time in a signal handler (`trap.rs`).

mod columns;
mod emulated;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware;
mod rows;
#[cfg(test)]
mod tests;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod trap;

pub(crate) use columns::Columns;
pub(crate) use emulated::Emulated;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use hardware::{Hardware, available};

use std::ops::Range;

use super::Isa;
use super::group_sums::group_sums;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch_pairs};
use super::norm::{load, store};
use super::scratch::Scratch;
use super::tasks::Product;
use super::workers::Workers;
use rows::Rows;

/// Rows of a tile, and columns of an f32 tile.
const SIDE: usize = 16;
/// Elements of `in` that one instruction consumes.
const STEP: usize = 32;
/// u16 of one tile of bf16.
const TILE: usize = SIDE * STEP;
/// f32 of one tile of sums.
pub(crate) const SUMS: usize = SIDE * SIDE;

/// Steps that sums stay in registers for at most: two panels of as many are 32 KB, in the first-level cache.
const DEPTH: usize = 16;
/// Tiles of `x` that pass over panels at most: of as many steps 512 KB, in the second-level cache.
const ROWS: usize = 32;
/// Panels that `x` passes over before it goes on to the next steps. Their sums wait meanwhile, 256 KB.
const PANELS: usize = 8;

/// What multiplies tiles.
pub(crate) trait TileUnit: Copy + Send + Sync {
    /// Prepares this thread.
    fn open(self);

    /// Ends what `open` began.
    fn close(self);

    /// `c[i][j] += Σ a[i] · b[j]` over `steps` steps, for one or two `a` (`pair`) and two `b`.
    ///
    /// # Safety
    /// Between `open` and `close`. Each `a` and each `b` has `steps` readable tiles of 1024 bytes; `c` is
    /// `[2][2][16][16]`.
    unsafe fn block(self, a: [*const u16; 2], b: [*const u8; 2], pair: bool, steps: usize, c: &mut [f32]);
}

/// `x` is `[rows, cols]`; every product's weight has `cols` columns in groups of one size. `packed` is memory to work
/// in.
pub(crate) fn linear<U: TileUnit, W: Columns>(
    unit: U,
    (workers, isa): (&Workers, Isa),
    packed: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_, W>],
) {
    let Some(Product { weight, .. }) = products.first().filter(|_| rows > 0) else { return };
    assert!(products.iter().all(|product| product.weight.fit()), "others are multiplied elsewhere");
    let ((_, cols), group) = (weight.shape(), weight.group());
    let zeros = products.iter().any(|product| product.weight.has_zeros());
    let x_sums = group_sums((workers, isa), x, (if zeros { rows } else { 0 }, cols), group);
    let x = Rows::new((workers, isa), packed, x, (rows, cols), group);
    let call = Call { isa, x, runs: &Run::all(cols, group), x_sums: &x_sums, rows };

    let block = x.tiles.div_ceil(x.tiles.div_ceil(ROWS).max(1)).next_multiple_of(2);
    let panels: usize = products.iter().map(|product| product.weight.count()).sum();
    let step = 2 * panels.div_ceil(16 * workers.threads()).clamp(1, 16);
    let mut pieces = Vec::new();
    for product in products {
        let panels = product.weight.count();
        for panel in (0..panels).step_by(step) {
            for tile in (0..x.tiles).step_by(block) {
                let (panels, tiles) = (panel..panels.min(panel + step), tile..x.tiles.min(tile + block));
                pieces.push(Piece { call, product, panels, tiles });
            }
        }
    }
    workers.run(pieces.len(), &|index, scratch| {
        unit.open();
        pieces[index].run(unit, scratch);
        unit.close();
    });
}

/// Steps of a group.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    group: usize,
    /// The first of them, in the group and in the row.
    from: usize,
    at: usize,
    steps: usize,
    /// Whether they are the group's last, and the row's.
    ends: bool,
    ends_row: bool,
}

impl Run {
    /// Those of a row of `cols` elements, at least one.
    fn all(cols: usize, group: usize) -> Vec<Self> {
        let (groups, of_group) = (cols.div_ceil(group).max(1), group.div_ceil(STEP));
        let of = |index: usize| {
            let steps = group.min(cols - index * group).div_ceil(STEP);
            (0..steps.max(1)).step_by(DEPTH).map(move |from| {
                let ends = from + DEPTH >= steps;
                Self {
                    group: index,
                    from,
                    at: index * of_group + from,
                    steps: DEPTH.min(steps - from),
                    ends,
                    ends_row: ends && index + 1 == groups,
                }
            })
        };
        (0..groups).flat_map(of).collect()
    }

    /// Whether they are their whole group.
    fn whole(self) -> bool {
        self.from == 0 && self.ends
    }
}

/// What the pieces of a call share.
#[derive(Clone, Copy)]
struct Call<'a> {
    isa: Isa,
    x: Rows<'a>,
    runs: &'a [Run],
    /// `[rows][groups]`, or nothing where no weight needs it.
    x_sums: &'a [f32],
    rows: usize,
}

/// Some panels of one product against some tiles of `x`.
struct Piece<'a, W> {
    call: Call<'a>,
    product: &'a Product<'a, W>,
    panels: Range<usize>,
    tiles: Range<usize>,
}

impl<W: Columns> Piece<'_, W> {
    fn run<U: TileUnit>(&self, unit: U, scratch: &mut Scratch) {
        let Self { call: Call { isa, x, runs, .. }, product: Product { weight, .. }, panels, tiles } = self;
        let pairs = tiles.len().div_ceil(2);
        // A single pair of tiles needs its panels once: it walks them from end to end, as they lie in memory.
        let together = if pairs == 1 { 2 } else { PANELS };
        let kept = together / 2 * pairs * 4 * SUMS;
        let [first, second, sums, totals] = scratch.take([DEPTH * TILE / 2, DEPTH * TILE / 2, kept, kept]);
        for from in panels.clone().step_by(together) {
            for run in *runs {
                for panel in (from..panels.end.min(from + together)).step_by(2) {
                    let b0 = weight.tiles(*isa, panel, *run, first);
                    // Where there is no second panel, the first stands in and the sums are thrown away.
                    let there = panel + 1 < weight.count();
                    let b1 = if there { weight.tiles(*isa, panel + 1, *run, second) } else { b0 };
                    for tile in tiles.clone().step_by(2) {
                        let place = ((panel - from) / 2 * pairs + (tile - tiles.start) / 2) * 4 * SUMS;
                        let sums = &mut sums[if run.whole() { 0 } else { place }..][..4 * SUMS];
                        if run.from == 0 {
                            sums.fill(0.0);
                        }
                        let pair = tile + 1 < tiles.end;
                        let a = [tile, tile + usize::from(pair)].map(|tile| x.tile(tile, *run));
                        // SAFETY: opened by the caller. The tiles of `x` and of both panels have these steps.
                        unsafe { unit.block(a, [b0, b1], pair, run.steps, sums) };
                        if run.ends {
                            let totals = &mut totals[place..][..4 * SUMS];
                            dispatch_pairs(
                                *isa,
                                Finish { piece: self, run: *run, panel, tile, sums, totals },
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Adds the sums of a group, `[2 tiles of rows][2 panels][16 rows][16 outputs]`, times its scales to what the groups
/// before it have; the last group's go to `out`, where there are such rows and outputs.
struct Finish<'a, W> {
    piece: &'a Piece<'a, W>,
    run: Run,
    panel: usize,
    tile: usize,
    sums: &'a [f32],
    totals: &'a mut [f32],
}

impl<W: Columns> Kernel for Finish<'_, W> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { piece: Piece { call, product, .. }, run, panel, tile, sums, totals } = self;
        let (weight, (outputs, cols)) = (product.weight, product.weight.shape());
        let groups = cols.div_ceil(weight.group());
        let tiles = sums.chunks_exact(SUMS).zip(totals.chunks_exact_mut(SUMS));
        for (index, (sums, totals)) in tiles.enumerate() {
            let (first, panel) = ((tile + index / 2) * SIDE, panel + index % 2);
            if panel >= weight.count() {
                continue;
            }
            let (scales, zeros) = weight.scales(lanes, panel, run.group);
            let column = panel * WIDTH;
            let (whole, rest) = (column + WIDTH <= outputs, outputs - column);
            let of_rows = sums.chunks_exact(SIDE).zip(totals.chunks_exact_mut(SIDE));
            for (row, (sums, total)) in (first..call.rows).zip(of_rows) {
                // SAFETY: sixteen sums.
                let mut sum = unsafe { lanes.load(sums.as_ptr()) };
                if let Some(zeros) = zeros {
                    let x = lanes.splat(call.x_sums[row * groups + run.group]);
                    sum = lanes.sub(sum, lanes.mul(zeros, x));
                }
                let mut before = lanes.splat(0.0);
                if run.group > 0 {
                    // SAFETY: sixteen totals.
                    before = unsafe { lanes.load(total.as_ptr()) };
                }
                sum = lanes.fma(sum, scales, before);
                if !run.ends_row {
                    // SAFETY: as above.
                    unsafe { lanes.store(total.as_mut_ptr(), sum) };
                    continue;
                }
                if let Some(bias) = product.bias {
                    // SAFETY: the bias has as many elements as there are outputs.
                    sum = lanes.add(sum, unsafe { load(lanes, bias[column..].as_ptr(), whole, rest) });
                }
                let at = product.out.row(row, outputs).wrapping_add(column);
                // SAFETY: inside `out`, and only this piece writes these elements.
                unsafe { store(lanes, at, sum, whole, rest) };
            }
        }
    }
}

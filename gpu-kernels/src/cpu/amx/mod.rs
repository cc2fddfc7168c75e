//! Products with bf16 weights on matrix tiles (Intel AMX).
//!
//! A tile is sixteen rows of 64 bytes. One instruction multiplies a tile of 16 x 32 bf16 with one of 32 x 16,
//! stored in pairs, and adds to a tile of 16 x 16 f32. Sixteen lines of a panel (see [`super::panels`]) are such a
//! second tile; the first is `x`, which is small and ours, rounded to bf16: `[16 rows of x][in / 32][16 rows][32]`.
//!
//! Every output is summed over `in`, 32 elements an instruction, in ascending order, whatever the number of rows. All
//! bf16 products of a machine with tiles go this way, one row too, so bits do not depend on the batch; they differ from
//! those of other machines, because `x` is rounded.
//!
//! The blocking is written over [`TileUnit`]. [`Hardware`] is the instructions; [`Emulated`] is the same arithmetic in
//! plain loops, and lets every machine test the rest. Machines without tiles test the instructions too: they execute
//! them one at a time in a signal handler (`trap.rs`).

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware;
#[cfg(test)]
mod tests;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod trap;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use hardware::{Hardware, available};

use super::Isa;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch, round_bf16};
use super::matmul::Product;
use super::norm::{load, store};
use super::scratch::Scratch;
use super::workers::Workers;

/// Rows of a tile, and columns of an f32 tile.
const SIDE: usize = 16;
/// Elements of `in` that one instruction consumes.
const STEP: usize = 32;
/// u16 of one packed tile of `x`.
const TILE: usize = SIDE * STEP;
/// f32 of one tile of sums.
pub(crate) const SUMS: usize = SIDE * SIDE;
/// Bytes of packed `x` that should stay in the second-level cache while weights pass.
const BLOCK_BYTES: usize = 512 << 10;

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

/// `x` is `[rows, cols]`; every product's weight is bf16 with `cols` columns. `packed` is memory to work in.
pub(crate) fn linear<U: TileUnit>(
    unit: U,
    (workers, isa): (&Workers, Isa),
    packed: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_>],
) {
    let Some(cols) = products.first().map(|product| product.weight.cols) else { return };
    let (tiles, steps) = (rows.div_ceil(SIDE), cols.div_ceil(STEP));
    let [packed] = packed.take([tiles * steps * TILE / 2]);
    let packed: &mut [u16] = bytemuck::cast_slice_mut(packed);
    pack(workers, isa, x, (rows, cols), packed);
    let packed = &*packed;

    let block = tiles.div_ceil((tiles * steps * TILE * 2).div_ceil(BLOCK_BYTES).max(1)).next_multiple_of(2);
    let mut pieces = Vec::new();
    let panels: usize = products.iter().map(|product| product.weight.count()).sum();
    let step = 2 * panels.div_ceil(16 * workers.threads()).clamp(1, 16);
    for product in products {
        for from in (0..product.weight.count()).step_by(step) {
            for tile in (0..tiles).step_by(block) {
                let to = (from + step).min(product.weight.count());
                pieces.push(Piece { product, from, to, tile, tiles: block.min(tiles - tile), rows });
            }
        }
    }
    workers.run(pieces.len(), &|index, scratch| {
        unit.open();
        pieces[index].run(unit, isa, packed, scratch);
        unit.close();
    });
}

/// Rounds and rearranges `x`; rows and elements that are not there are zeros.
fn pack(workers: &Workers, isa: Isa, x: &[f32], (rows, cols): (usize, usize), packed: &mut [u16]) {
    let steps = cols.div_ceil(STEP);
    let start = SharedPacked(packed.as_mut_ptr());
    workers.rows(rows.div_ceil(SIDE), SIDE * steps * STEP, &|from, to| {
        let len = (to - from) * steps * TILE;
        // SAFETY: tiles `from..to` are inside `packed`, and only this piece writes them.
        let packed = unsafe { std::slice::from_raw_parts_mut(start.at(from * steps * TILE), len) };
        dispatch(isa, Pack { x, rows, cols, tile: from, packed });
    });
}

#[derive(Clone, Copy)]
struct SharedPacked(*mut u16);

// SAFETY: pieces write different tiles.
unsafe impl Send for SharedPacked {}
// SAFETY: as above.
unsafe impl Sync for SharedPacked {}

impl SharedPacked {
    fn at(self, index: usize) -> *mut u16 {
        self.0.wrapping_add(index)
    }
}

struct Pack<'a> {
    x: &'a [f32],
    rows: usize,
    cols: usize,
    /// Number of the first tile in `packed`.
    tile: usize,
    packed: &'a mut [u16],
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let steps = self.cols.div_ceil(STEP);
        self.packed.fill(0);
        for (index, tile) in self.packed.chunks_exact_mut(steps * TILE).enumerate() {
            let first = (self.tile + index) * SIDE;
            for row in first..self.rows.min(first + SIDE) {
                let x = &self.x[row * self.cols..(row + 1) * self.cols];
                for (step, x) in x.chunks(STEP).enumerate() {
                    let to = &mut tile[step * TILE + (row - first) * STEP..];
                    for (to, &x) in to.iter_mut().zip(x) {
                        *to = round_bf16(x);
                    }
                }
            }
        }
    }
}

/// Panels `from..to` of one product against some tiles of `x`.
struct Piece<'a> {
    product: &'a Product<'a>,
    from: usize,
    to: usize,
    tile: usize,
    tiles: usize,
    rows: usize,
}

impl Piece<'_> {
    fn run<U: TileUnit>(&self, unit: U, isa: Isa, packed: &[u16], scratch: &mut Scratch) {
        let weight = self.product.weight;
        let steps = weight.cols.div_ceil(STEP);
        let [sums] = scratch.take([4 * SUMS]);
        for panel in (self.from..self.to).step_by(2) {
            // Where there is no second panel, the first stands in and the sums are thrown away.
            let b = [panel, (panel + 1).min(weight.count() - 1)].map(|panel| weight.panel(panel));
            for tile in (self.tile..self.tile + self.tiles).step_by(2) {
                let pair = tile + 1 < self.tile + self.tiles;
                let a = packed[tile * steps * TILE..].as_ptr();
                let a = [a, if pair { a.wrapping_add(steps * TILE) } else { a }];
                sums.fill(0.0);
                // SAFETY: opened by the caller. `tile` and, if `pair`, the next one are inside `packed`; a panel is
                // padded to whole tiles.
                unsafe { unit.block(a, b, pair, steps, sums) };
                dispatch(
                    isa,
                    Finish { product: self.product, sums, panel, row: tile * SIDE, rows: self.rows },
                );
            }
        }
    }
}

/// Writes tiles of sums `[2 tiles of rows][2 panels][16 rows][16 outputs]`, where there are such rows and outputs.
struct Finish<'a> {
    product: &'a Product<'a>,
    sums: &'a [f32],
    panel: usize,
    row: usize,
    rows: usize,
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let n = self.product.weight.rows;
        for (index, tile) in self.sums.chunks_exact(SUMS).enumerate() {
            let (first, column) = (self.row + index / 2 * SIDE, (self.panel + index % 2) * SIDE);
            if column >= n {
                continue;
            }
            let (whole, rest) = (column + WIDTH <= n, n - column);
            for (row, sums) in (first..self.rows).zip(tile.chunks_exact(SIDE)) {
                // SAFETY: sixteen sums.
                let mut sums = unsafe { lanes.load(sums.as_ptr()) };
                if let Some(bias) = self.product.bias {
                    // SAFETY: the bias has as many elements as there are outputs.
                    sums = lanes.add(sums, unsafe { load(lanes, bias[column..].as_ptr(), whole, rest) });
                }
                let at = self.product.out.row(row, n).wrapping_add(column);
                // SAFETY: inside `out`, and only this piece writes these elements.
                unsafe { store(lanes, at, sums, whole, rest) };
            }
        }
    }
}

/// Tiles in plain loops: bf16 pairs, sums of even and of odd elements apart, in f32 without denormals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Emulated;

impl TileUnit for Emulated {
    fn open(self) {}
    fn close(self) {}

    unsafe fn block(self, a: [*const u16; 2], b: [*const u8; 2], pair: bool, steps: usize, c: &mut [f32]) {
        for (index, tile) in c.chunks_exact_mut(SUMS).enumerate().filter(|(index, _)| pair || index / 2 == 0)
        {
            for step in 0..steps {
                let at = a[index / 2].wrapping_add(step * TILE);
                // SAFETY: the caller's promise.
                let a = unsafe { at.cast::<[[[u16; 2]; SIDE]; SIDE]>().read_unaligned() };
                let at = b[index % 2].wrapping_add(step * TILE * 2);
                // SAFETY: the caller's promise.
                let b = unsafe { at.cast::<[[[u16; 2]; SIDE]; SIDE]>().read_unaligned() };
                multiply(&a, &b, tile);
            }
        }
    }
}

/// What one instruction does: `sums[i][j] += Σ a[i][k] · b[k][j]`, with `a` and `b` in pairs of `k`.
fn multiply(a: &[[[u16; 2]; SIDE]; SIDE], b: &[[[u16; 2]; SIDE]; SIDE], sums: &mut [f32]) {
    let wide = |bits: u16| flush(f32::from_bits(u32::from(bits) << 16));
    for (a, sums) in a.iter().zip(sums.chunks_exact_mut(SIDE)) {
        for (column, sum) in sums.iter_mut().enumerate() {
            let (mut even, mut odd) = (0.0, 0.0);
            for (a, b) in a.iter().zip(b) {
                even = flush(even + wide(a[0]) * wide(b[column][0]));
                odd = flush(odd + wide(a[1]) * wide(b[column][1]));
            }
            *sum = flush(*sum + flush(even + odd));
        }
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0 } else { x }
}

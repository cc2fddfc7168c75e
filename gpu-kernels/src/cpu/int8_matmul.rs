//! `out = x · wᵀ + bias`, with `w` in eight bits.
//!
//! As in [`super::matmul`], lanes run along outputs, and no sum knows how many rows there are. An output is one chain
//! of multiply-adds of activations and integers, which are exact in f32, times its scale. Integers are widened in
//! registers, by two instructions.

#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use super::Isa;
use super::integers::{Form, LINE, Product, STEP};
use super::lanes::{Kernel, Lanes, Registers, WIDTH, dispatch};
use super::scratch::Scratch;
use super::tiles::{Asks, Group, Tiles, X_AHEAD, groups, place, store_sums};
use super::workers::{Turn, Workers};

/// Most vectors of sums in a tile.
const SUMS_MAX: usize = 24;

/// `x` is `[rows, cols]`; every product's weight has `cols` columns and its `out` has `rows` rows. `packed` is
/// memory to work in.
pub(crate) fn linear(
    (workers, isa): (&Workers, Isa),
    packed: &mut Scratch,
    x: &[f32],
    rows: usize,
    products: &[Product<'_>],
) {
    let Some(cols) = products.first().map(|product| product.weight.cols) else { return };
    if rows == 0 {
        return;
    }
    let registers = Registers::of(isa);
    let (tile, group) = shape(registers, rows.div_ceil(rows.div_ceil(registers.rows_max())));
    let tiles = Tiles::new((workers, isa), packed, x, (rows, cols), (tile, STEP));
    let panels = products.iter().map(|product| product.weight.count());
    let groups = groups(group, workers.threads(), panels);
    workers.run_in_sight(groups.len(), &|Turn { index, first, next }, scratch| {
        let group = groups[index];
        let product = products[group.product];
        let next = next.map(|next| products[groups[next].product].weight.panel(groups[next].from));
        let of = Multiply { tiles, product, group, first, next, rows };
        dispatch(isa, Run { of, scratch });
    });
}

/// Rows of a tile for at least so many, and the panels whose sums fit beside each other: the kernels of [`Run`].
fn shape(registers: Registers, rows: usize) -> (usize, usize) {
    match (registers, rows) {
        (Registers::Many, 1) => (1, 8),
        (Registers::Many, 2) => (2, 8),
        (Registers::Many, ..=4) => (4, 4),
        (Registers::Many, _) => (8, 3),
        (Registers::Few, 1) => (1, 4),
        (Registers::Few, ..=3) => (3, 2),
        (Registers::Few, _) => (6, 1),
        (Registers::Quarters, 1) => (1, 2),
        (Registers::Quarters, _) => (3, 1),
    }
}

/// A group of panels.
struct Multiply<'a> {
    tiles: Tiles<'a>,
    product: Product<'a>,
    group: Group,
    /// It is the thread's first one.
    first: bool,
    /// The first panel of the thread's next group.
    next: Option<*const u8>,
    /// Rows of `out`.
    rows: usize,
}

/// The kernel: what [`shape`] says, as constants.
struct Run<'a> {
    of: Multiply<'a>,
    scratch: &'a mut Scratch,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of, scratch } = self;
        // Constants decide first: shapes that other lanes have are not compiled for these.
        if L::WIDE {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<1, 8> { of, scratch }),
                2 => lanes.apart(Shape::<2, 8> { of, scratch }),
                4 => lanes.apart(Shape::<4, 4> { of, scratch }),
                8 => lanes.apart(Shape::<8, 3> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else if L::FEW {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<1, 4> { of, scratch }),
                3 => lanes.apart(Shape::<3, 2> { of, scratch }),
                6 => lanes.apart(Shape::<6, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<1, 2> { of, scratch }),
                3 => lanes.apart(Shape::<3, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        }
    }
}

/// Tiles of R rows against N panels at a time.
struct Shape<'a, const R: usize, const N: usize> {
    of: Multiply<'a>,
    scratch: &'a mut Scratch,
}

impl<const R: usize, const N: usize> Kernel for Shape<'_, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [memory] = self.scratch.take([SUMS_MAX * WIDTH]);
        self.of.group::<L, R, N>(lanes, memory);
    }
}

impl Multiply<'_> {
    /// The panels of the group: N at a time, or in pairs where they are fewer.
    #[inline(always)]
    fn group<L: Lanes, const R: usize, const N: usize>(&self, lanes: L, memory: &mut [f32]) {
        let Group { from, to, .. } = self.group;
        let mut panel = from;
        while panel < to {
            let count = if to - panel >= N { N } else { (to - panel).min(2) };
            let next =
                if panel + count < to { Some(self.product.weight.panel(panel + count)) } else { self.next };
            match count {
                1 => self.panels::<L, R, 1>(lanes, memory, panel, next),
                2 => self.panels::<L, R, 2>(lanes, memory, panel, next),
                _ => self.panels::<L, R, N>(lanes, memory, panel, next),
            }
            panel += count;
        }
    }

    /// All tiles against N panels from `panel` on.
    #[inline(always)]
    fn panels<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        memory: &mut [f32],
        panel: usize,
        next: Option<*const u8>,
    ) {
        let weight = self.product.weight;
        let (here, tiles) = (weight.panel(panel), self.tiles.count);
        for tile in 0..tiles {
            let cold = self.first && tiles > 1 && panel == self.group.from;
            let lines = (here, weight.stride() / LINE, LINE);
            let asks = Asks::new((tile, tiles), lines, (next, LINE), cold);
            let memory = &mut memory[..R * N * WIDTH];
            self.tile::<L, R, N>(lanes, memory, here, asks, (tile, panel));
            let (out, bias) = ((self.product.out, weight.rows), self.product.bias);
            store_sums::<L, R, N>(lanes, memory, bias, out, (self.rows, tile * R, panel));
        }
    }

    /// One tile times N panels, to `memory`.
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        memory: &mut [f32],
        here: *const u8,
        mut asks: Asks,
        (tile, panel): (usize, usize),
    ) {
        let (weight, stride) = (self.product.weight, self.product.weight.stride());
        let (mut x, mut row) = (self.tiles.tile(tile).as_ptr(), 0);
        let mut sums = [[lanes.splat(0.0); N]; R];
        asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
        for line in 1..=weight.lines(0) {
            asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
            if row < R {
                // Lines that another core has written last are on their way here while there is time.
                for j in 0..N {
                    let out = (self.product.out, weight.rows);
                    lanes.prefetch_write(place(out, tile * R + row, panel + j).0);
                }
                row += 1;
            }
            for element in 0..Form::Eight.elements() {
                if const { L::REGISTERS.one_of_several(R) } && element % 2 == 0 {
                    lanes.prefetch(x.wrapping_add(X_AHEAD).cast());
                }
                let at = here.wrapping_add(line * LINE + element * WIDTH);
                // SAFETY: `x` has R numbers for each element of a line, and N panels have the line.
                unsafe { multiply::<L, R, N>(lanes, x, at, stride, &mut sums) };
                x = x.wrapping_add(R);
            }
        }
        for j in 0..N {
            // SAFETY: every panel begins with a line of scales.
            let scale = unsafe { lanes.load(here.wrapping_add(j * stride).cast()) };
            for i in 0..R {
                let total = memory[(i * N + j) * WIDTH..][..WIDTH].as_mut_ptr();
                // SAFETY: sixteen sums.
                unsafe { lanes.store(total, lanes.mul(sums[i][j], scale)) };
            }
        }
    }
}

/// One element of a line: `sums[i][j] += x[i] · value[j]`.
///
/// # Safety
/// `x` has R elements, and at `values` and each of the N - 1 places `stride` apart behind it there are sixteen bytes.
#[inline(always)]
unsafe fn multiply<L: Lanes, const R: usize, const N: usize>(
    lanes: L,
    x: *const f32,
    values: *const u8,
    stride: usize,
    sums: &mut [[L::F; N]; R],
) {
    let mut w = [lanes.splat(0.0); N];
    for j in 0..N {
        // SAFETY: the caller's promise.
        w[j] = unsafe { lanes.load_i8(values.wrapping_add(j * stride)) };
    }
    for i in 0..R {
        // SAFETY: the caller's promise.
        let x = lanes.splat(unsafe { x.wrapping_add(i).read() });
        for j in 0..N {
            sums[i][j] = lanes.fma(x, w[j], sums[i][j]);
        }
    }
}

//! `out = x · wᵀ + bias`, with `w` in eight bits.
//!
//! As in [`super::matmul`], lanes run along outputs, and no sum knows how many rows there are. An output is one chain
//! of multiply-adds of activations and numbers of eight bits, which are exact in f32, times its scale; where inputs
//! fall into groups, a second chain adds these in ascending order. Numbers are widened in registers, integers by two
//! instructions, E4M3 by four.

#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::Isa;
use super::integers::{Form, LINE, Product, STEP};
use super::lanes::{Kernel, Lanes, Registers, WIDTH, dispatch};
use super::scratch::Scratch;
use super::tiles::{Asks, Group, Tiles, Word, X_AHEAD, groups, place, store_sums};
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
    let tiles = Tiles::new((workers, isa), packed, x, (rows, cols), (tile, STEP, Word::Number));
    let panels = products.iter().map(|product| product.weight.count());
    let groups = groups(group, workers.threads(), panels);
    workers.run_in_sight(groups.len(), &|Turn { index, first, next }, scratch| {
        let group = groups[index];
        let product = products[group.product];
        let next = next.map(|next| products[groups[next].product].weight.panel(groups[next].from));
        let of = Multiply { tiles, product, group, first, next, rows };
        match product.weight.form {
            Form::E4m3 => dispatch(isa, Run::<E4m3> { of, scratch, number: PhantomData }),
            _ => dispatch(isa, Run::<Whole> { of, scratch, number: PhantomData }),
        }
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
struct Run<'a, T> {
    of: Multiply<'a>,
    scratch: &'a mut Scratch,
    number: PhantomData<T>,
}

impl<T: Number> Kernel for Run<'_, T> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of, scratch, number } = self;
        // Constants decide first: shapes that other lanes have are not compiled for these.
        if L::WIDE {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<T, 1, 8> { of, scratch, number }),
                2 => lanes.apart(Shape::<T, 2, 8> { of, scratch, number }),
                4 => lanes.apart(Shape::<T, 4, 4> { of, scratch, number }),
                8 => lanes.apart(Shape::<T, 8, 3> { of, scratch, number }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else if L::FEW {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<T, 1, 4> { of, scratch, number }),
                3 => lanes.apart(Shape::<T, 3, 2> { of, scratch, number }),
                6 => lanes.apart(Shape::<T, 6, 1> { of, scratch, number }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<T, 1, 2> { of, scratch, number }),
                3 => lanes.apart(Shape::<T, 3, 1> { of, scratch, number }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        }
    }
}

/// Tiles of R rows against N panels at a time.
struct Shape<'a, T, const R: usize, const N: usize> {
    of: Multiply<'a>,
    scratch: &'a mut Scratch,
    number: PhantomData<T>,
}

impl<T: Number, const R: usize, const N: usize> Kernel for Shape<'_, T, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [memory] = self.scratch.take([SUMS_MAX * WIDTH]);
        self.of.group::<L, T, R, N>(lanes, memory);
    }
}

impl Multiply<'_> {
    /// The panels of the group: N at a time, or in pairs where they are fewer.
    #[inline(always)]
    fn group<L: Lanes, T: Number, const R: usize, const N: usize>(&self, lanes: L, memory: &mut [f32]) {
        let Group { from, to, .. } = self.group;
        let mut panel = from;
        while panel < to {
            let count = if to - panel >= N { N } else { (to - panel).min(2) };
            let next =
                if panel + count < to { Some(self.product.weight.panel(panel + count)) } else { self.next };
            match count {
                1 => self.panels::<L, T, R, 1>(lanes, memory, panel, next),
                2 => self.panels::<L, T, R, 2>(lanes, memory, panel, next),
                _ => self.panels::<L, T, R, N>(lanes, memory, panel, next),
            }
            panel += count;
        }
    }

    /// All tiles against N panels from `panel` on.
    #[inline(always)]
    fn panels<L: Lanes, T: Number, const R: usize, const N: usize>(
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
            self.tile::<L, T, R, N>(lanes, memory, here, asks, (tile, panel));
            let (out, bias) = ((self.product.out, weight.rows), self.product.bias);
            store_sums::<L, R, N>(lanes, memory, bias, out, (self.rows, tile * R, panel));
        }
    }

    /// One tile times N panels, to `memory`.
    #[inline(always)]
    fn tile<L: Lanes, T: Number, const R: usize, const N: usize>(
        &self,
        lanes: L,
        memory: &mut [f32],
        here: *const u8,
        mut asks: Asks,
        (tile, panel): (usize, usize),
    ) {
        let (weight, stride) = (self.product.weight, self.product.weight.stride());
        let (mut x, mut row) = (self.tiles.tile(tile).as_ptr(), 0);
        memory.fill(0.0);
        for group in 0..weight.groups() {
            let start = here.wrapping_add(group * weight.group_bytes());
            let mut sums = [[lanes.splat(0.0); N]; R];
            asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
            for line in 1..=weight.lines(group) {
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
                    let at = start.wrapping_add(line * LINE + element * WIDTH);
                    // SAFETY: `x` has R numbers for each element of a line, and N panels have the line.
                    unsafe { multiply::<L, T, R, N>(lanes, x, at, stride, &mut sums) };
                    x = x.wrapping_add(R);
                }
            }
            for j in 0..N {
                // SAFETY: every group begins with a line of scales.
                let scale = unsafe { lanes.load(start.wrapping_add(j * stride).cast()) };
                for i in 0..R {
                    let total = memory[(i * N + j) * WIDTH..][..WIDTH].as_mut_ptr();
                    // SAFETY: sixteen sums.
                    let before = unsafe { lanes.load(total) };
                    // SAFETY: as above.
                    unsafe { lanes.store(total, lanes.fma(sums[i][j], scale, before)) };
                }
            }
        }
    }
}

/// One element of a line: `sums[i][j] += x[i] · value[j]`.
///
/// # Safety
/// `x` has R elements, and at `values` and each of the N - 1 places `stride` apart behind it there are sixteen bytes.
#[inline(always)]
unsafe fn multiply<L: Lanes, T: Number, const R: usize, const N: usize>(
    lanes: L,
    x: *const f32,
    values: *const u8,
    stride: usize,
    sums: &mut [[L::F; N]; R],
) {
    let mut w = [lanes.splat(0.0); N];
    for j in 0..N {
        // SAFETY: the caller's promise.
        w[j] = unsafe { T::load(lanes, values.wrapping_add(j * stride)) };
    }
    for i in 0..R {
        // SAFETY: the caller's promise.
        let x = lanes.splat(unsafe { x.wrapping_add(i).read() });
        for j in 0..N {
            sums[i][j] = lanes.fma(x, w[j], sums[i][j]);
        }
    }
}

/// How a byte is a number.
trait Number {
    /// # Safety
    /// 16 bytes are readable at `at`.
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F;
}

struct Whole;
struct E4m3;

impl Number for Whole {
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_i8(at) }
    }
}

impl Number for E4m3 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_e4m3(at) }
    }
}

//! `out = x · wᵀ + bias`, with `w` of small integers.
//!
//! As in [`super::matmul`], lanes run along outputs, and no sum knows how many rows there are. Within a group an
//! output is one chain of multiply-adds of activations and integers, which are exact in f32; a second chain adds the
//! groups, each times its scale, in ascending order. Integers are widened in registers: eight bits by two
//! instructions, four by a shift and a table of sixteen numbers.

#![expect(clippy::needless_range_loop, reason = "indices over rows and columns of sums, as in the formulas")]

use std::marker::PhantomData;

use super::Isa;
use super::integers::{Form, Integers, LINE, STEP};
use super::lanes::{Kernel, Lanes, Registers, WIDTH, dispatch};
use super::out::SharedOut;
use super::scratch::Scratch;
use super::tiles::{Asks, Group, Tiles, X_AHEAD, groups, place, store_sums};
use super::workers::{Turn, Workers};

/// Most vectors of sums in a tile.
const SUMS_MAX: usize = 24;

/// One product of a [`linear`] call.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) weight: &'a Integers,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, weight.rows]`.
    pub(crate) out: SharedOut,
}

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
        match product.weight.form {
            Form::Four if tile == 1 => {
                let of = Multiply::<Four> { tiles, product, group, first, next, rows, integer: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
            // With several rows a zero point that is none costs next to nothing, and changes no bit.
            Form::Four | Form::FourZeros => {
                let of =
                    Multiply::<FourZeros> { tiles, product, group, first, next, rows, integer: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
            Form::Eight => {
                let of = Multiply::<Eight> { tiles, product, group, first, next, rows, integer: PhantomData };
                dispatch(isa, Run { of, scratch });
            }
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

/// A group of panels for one form of integers.
struct Multiply<'a, I> {
    tiles: Tiles<'a>,
    product: Product<'a>,
    group: Group,
    /// It is the thread's first one.
    first: bool,
    /// The first panel of the thread's next group.
    next: Option<*const u8>,
    /// Rows of `out`.
    rows: usize,
    integer: PhantomData<I>,
}

/// The kernel: what [`shape`] says, as constants.
struct Run<'a, I> {
    of: Multiply<'a, I>,
    scratch: &'a mut Scratch,
}

impl<I: Integer> Kernel for Run<'_, I> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Self { of, scratch } = self;
        // Constants decide first: shapes that other lanes have are not compiled for these.
        if L::WIDE {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<I, 1, 8> { of, scratch }),
                2 if !I::ALONE => lanes.apart(Shape::<I, 2, 8> { of, scratch }),
                4 if !I::ALONE => lanes.apart(Shape::<I, 4, 4> { of, scratch }),
                8 if !I::ALONE => lanes.apart(Shape::<I, 8, 3> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else if L::FEW {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<I, 1, 4> { of, scratch }),
                3 if !I::ALONE => lanes.apart(Shape::<I, 3, 2> { of, scratch }),
                6 if !I::ALONE => lanes.apart(Shape::<I, 6, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        } else {
            match of.tiles.rows {
                1 => lanes.apart(Shape::<I, 1, 2> { of, scratch }),
                3 if !I::ALONE => lanes.apart(Shape::<I, 3, 1> { of, scratch }),
                rows => unreachable!("{rows} rows in a tile"),
            }
        }
    }
}

/// Tiles of R rows against N panels at a time.
struct Shape<'a, I, const R: usize, const N: usize> {
    of: Multiply<'a, I>,
    scratch: &'a mut Scratch,
}

impl<I: Integer, const R: usize, const N: usize> Kernel for Shape<'_, I, R, N> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let [memory] = self.scratch.take([SUMS_MAX * WIDTH]);
        self.of.group::<L, R, N>(lanes, memory);
    }
}

impl<I: Integer> Multiply<'_, I> {
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
            memory.fill(0.0);
            self.tile::<L, R, N>(lanes, memory, here, asks, (tile, panel));
            let (out, bias) = ((self.product.out, weight.rows), self.product.bias);
            store_sums::<L, R, N>(lanes, memory, bias, out, (self.rows, tile * R, panel));
        }
    }

    /// Adds one tile times N panels to the sums in `memory`.
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
        for group in 0..weight.groups() {
            let start = group * weight.group_bytes();
            let mut sums = [[lanes.splat(0.0); N]; R];
            let mut zeros = [lanes.splat(0.0); N];
            asks.ask::<L, R, N>(lanes, LINE, (stride, stride));
            for j in 0..N {
                // SAFETY: every panel has a line with the scales of its group.
                zeros[j] = unsafe { I::zero(lanes, here.wrapping_add(j * stride + start)) };
            }
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
                let at = here.wrapping_add(start + line * LINE);
                macro_rules! elements {
                    ($($index:literal)*) => {$(
                        if const { L::REGISTERS.one_of_several(R) && $index % 2 == 0 } {
                            lanes.prefetch(x.wrapping_add(X_AHEAD).cast());
                        }
                        // SAFETY: `x` has R numbers for each element of a line, and N panels have the line.
                        unsafe { multiply::<L, I, R, N, $index>(lanes, x, at, stride, &zeros, &mut sums) };
                        x = x.wrapping_add(R);
                    )*};
                }
                elements!(0 1 2 3);
                if const { I::ELEMENTS == 8 } {
                    elements!(4 5 6 7);
                }
            }
            for j in 0..N {
                // SAFETY: every panel has a line with the scales of its group.
                let scale = unsafe { I::scale(lanes, here.wrapping_add(j * stride + start)) };
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

/// Element INDEX of a line: `sums[i][j] += x[i] · (value[j] - zero[j])`.
///
/// # Safety
/// `x` has R elements, and at `line` and each of the N - 1 places `stride` apart behind it there is a line.
#[inline(always)]
unsafe fn multiply<L: Lanes, I: Integer, const R: usize, const N: usize, const INDEX: usize>(
    lanes: L,
    x: *const f32,
    line: *const u8,
    stride: usize,
    zeros: &[L::F; N],
    sums: &mut [[L::F; N]; R],
) {
    let mut w = [lanes.splat(0.0); N];
    for j in 0..N {
        // SAFETY: the caller's promise.
        let value = unsafe { I::value::<L, INDEX>(lanes, line.wrapping_add(j * stride)) };
        w[j] = if I::ZEROS { lanes.sub(value, zeros[j]) } else { value };
    }
    for i in 0..R {
        // SAFETY: the caller's promise.
        let x = lanes.splat(unsafe { x.wrapping_add(i).read() });
        for j in 0..N {
            sums[i][j] = lanes.fma(x, w[j], sums[i][j]);
        }
    }
}

/// How the integers of a panel are stored (see [`super::integers`]).
trait Integer: Copy {
    /// Elements of `in` in a line.
    const ELEMENTS: usize;
    /// Whether there is a zero point to take away.
    const ZEROS: bool;
    /// Whether it is for a row alone.
    const ALONE: bool = false;

    /// Element INDEX of a line, for the sixteen outputs.
    /// # Safety
    /// A line is readable at `line`, and INDEX is less than the elements of one.
    unsafe fn value<L: Lanes, const INDEX: usize>(lanes: L, line: *const u8) -> L::F;
    /// # Safety
    /// The first line of a group is readable at `header`.
    unsafe fn scale<L: Lanes>(lanes: L, header: *const u8) -> L::F;
    /// # Safety
    /// The first line of a group is readable at `header`.
    #[inline(always)]
    unsafe fn zero<L: Lanes>(lanes: L, _header: *const u8) -> L::F {
        lanes.splat(0.0)
    }
}

#[derive(Clone, Copy)]
struct Four;
#[derive(Clone, Copy)]
struct FourZeros;
#[derive(Clone, Copy)]
struct Eight;

impl Integer for Four {
    const ELEMENTS: usize = 8;
    const ZEROS: bool = false;
    const ALONE: bool = true;

    #[inline(always)]
    unsafe fn value<L: Lanes, const INDEX: usize>(lanes: L, line: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_nibbles::<INDEX>(line) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(lanes: L, header: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_f16(header) }
    }
}

impl Integer for FourZeros {
    const ELEMENTS: usize = 8;
    const ZEROS: bool = true;

    #[inline(always)]
    unsafe fn value<L: Lanes, const INDEX: usize>(lanes: L, line: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { Four::value::<L, INDEX>(lanes, line) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(lanes: L, header: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { Four::scale(lanes, header) }
    }
    #[inline(always)]
    unsafe fn zero<L: Lanes>(lanes: L, header: *const u8) -> L::F {
        // SAFETY: the caller's promise: sixteen bytes behind sixteen scales.
        unsafe { lanes.load_i8(header.wrapping_add(2 * WIDTH)) }
    }
}

impl Integer for Eight {
    const ELEMENTS: usize = 4;
    const ZEROS: bool = false;

    #[inline(always)]
    unsafe fn value<L: Lanes, const INDEX: usize>(lanes: L, line: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_i8(line.wrapping_add(INDEX * WIDTH)) }
    }
    #[inline(always)]
    unsafe fn scale<L: Lanes>(lanes: L, header: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load(header.cast()) }
    }
}

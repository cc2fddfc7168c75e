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
//! plain loops, and lets every machine test the rest.

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
const SUMS: usize = SIDE * SIDE;
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
        let wide = |bits: u16| flush(f32::from_bits(u32::from(bits) << 16));
        for (index, tile) in c.chunks_exact_mut(SUMS).enumerate().filter(|(index, _)| pair || index / 2 == 0)
        {
            for step in 0..steps {
                let at = a[index / 2].wrapping_add(step * TILE);
                // SAFETY: the caller's promise.
                let a = unsafe { at.cast::<[[[u16; 2]; SIDE]; SIDE]>().read_unaligned() };
                let at = b[index % 2].wrapping_add(step * TILE * 2);
                // SAFETY: the caller's promise.
                let b = unsafe { at.cast::<[[[u16; 2]; SIDE]; SIDE]>().read_unaligned() };
                for (row, sums) in tile.chunks_exact_mut(SIDE).enumerate() {
                    for (column, sum) in sums.iter_mut().enumerate() {
                        let (mut even, mut odd) = (0.0, 0.0);
                        for (a, b) in a[row].iter().zip(&b) {
                            even = flush(even + wide(a[0]) * wide(b[column][0]));
                            odd = flush(odd + wide(a[1]) * wide(b[column][1]));
                        }
                        *sum = flush(*sum + flush(even + odd));
                    }
                }
            }
        }
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0 } else { x }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use hardware::{Hardware, available};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod hardware {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use std::sync::LazyLock;

    use super::{Emulated, SUMS, TILE, TileUnit};

    /// The instructions themselves. Exists only where [`available`] said yes.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Hardware(());

    impl Hardware {
        /// The unit, if this machine has one that works.
        pub(crate) fn get() -> Option<Self> {
            available().then_some(Self(()))
        }
    }

    /// What each of the eight tile registers holds: 16 rows of 64 bytes (palette 1).
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    impl TileUnit for Hardware {
        #[inline]
        fn open(self) {
            // SAFETY: the machine has tiles and the kernel lets us use them: `available` asked both. The
            // compiler itself never uses tile registers, so nothing is lost, and nothing of ours is lost
            // between two blocks of asm.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(readonly, nostack)) };
        }

        #[inline]
        fn close(self) {
            // SAFETY: as above.
            unsafe { asm!("tilerelease", options(nomem, nostack)) };
        }

        #[inline]
        unsafe fn block(
            self,
            a: [*const u16; 2],
            b: [*const u8; 2],
            pair: bool,
            steps: usize,
            c: &mut [f32],
        ) {
            assert!(c.len() >= 4 * SUMS, "four tiles of sums");
            if steps == 0 {
                return;
            }
            if pair {
                // SAFETY: the caller's promise: two runs of tiles of `a` and two of `b` are readable at every step,
                // and `c` holds four tiles. The registers were configured by `open`.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{c} + {row}*1]",
                        "tileloadd tmm1, [{c} + {row}*1 + 1024]",
                        "tileloadd tmm2, [{c} + {row}*1 + 2048]",
                        "tileloadd tmm3, [{c} + {row}*1 + 3072]",
                        "2:",
                        "tileloadd tmm6, [{b0} + {row}*1]",
                        "tileloadd tmm4, [{a0} + {row}*1]",
                        "tileloadd tmm5, [{a1} + {row}*1]",
                        "tileloadd tmm7, [{b1} + {row}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        "add {a0}, 1024",
                        "add {a1}, 1024",
                        "add {b0}, 1024",
                        "add {b1}, 1024",
                        "dec {steps}",
                        "jnz 2b",
                        "tilestored [{c} + {row}*1], tmm0",
                        "tilestored [{c} + {row}*1 + 1024], tmm1",
                        "tilestored [{c} + {row}*1 + 2048], tmm2",
                        "tilestored [{c} + {row}*1 + 3072], tmm3",
                        a0 = inout(reg) a[0] => _,
                        a1 = inout(reg) a[1] => _,
                        b0 = inout(reg) b[0] => _,
                        b1 = inout(reg) b[1] => _,
                        steps = inout(reg) steps => _,
                        c = in(reg) c.as_mut_ptr(),
                        row = in(reg) 64_usize,
                        options(nostack),
                    );
                }
            } else {
                // SAFETY: as above with one run of tiles of `a`; sums 2 and 3 stay as they are.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{c} + {row}*1]",
                        "tileloadd tmm1, [{c} + {row}*1 + 1024]",
                        "2:",
                        "tileloadd tmm4, [{a0} + {row}*1]",
                        "tileloadd tmm6, [{b0} + {row}*1]",
                        "tileloadd tmm7, [{b1} + {row}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "add {a0}, 1024",
                        "add {b0}, 1024",
                        "add {b1}, 1024",
                        "dec {steps}",
                        "jnz 2b",
                        "tilestored [{c} + {row}*1], tmm0",
                        "tilestored [{c} + {row}*1 + 1024], tmm1",
                        a0 = inout(reg) a[0] => _,
                        b0 = inout(reg) b[0] => _,
                        b1 = inout(reg) b[1] => _,
                        steps = inout(reg) steps => _,
                        c = in(reg) c.as_mut_ptr(),
                        row = in(reg) 64_usize,
                        options(nostack),
                    );
                }
            }
        }
    }

    /// Whether the processor has bf16 tiles, the operating system lets us use them, and they compute what they should.
    pub(crate) fn available() -> bool {
        static AVAILABLE: LazyLock<bool> = LazyLock::new(|| present() && permitted() && right(Hardware(())));
        *AVAILABLE
    }

    /// The processor names AMX-TILE and AMX-BF16, and the system saves the registers (XCR0 bits 17 and 18).
    fn present() -> bool {
        const OSXSAVE: u32 = 1 << 27;
        const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
        const SAVED: u64 = 0b11 << 17;
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
            return false;
        }
        // SAFETY: OSXSAVE says that the instruction exists.
        let saved = unsafe { _xgetbv(0) };
        __cpuid_count(7, 0).edx & TILE_AND_BF16 == TILE_AND_BF16 && saved & SAVED == SAVED
    }

    /// Asks Linux for the permission to use tile data (since 5.16).
    fn permitted() -> bool {
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILEDATA: usize = 18;
        let answer: isize;
        // SAFETY: a system call that reads no memory; it clobbers what is named.
        unsafe {
            asm!(
                "syscall",
                inout("rax") ARCH_PRCTL => answer,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        answer == 0
    }

    /// Small whole numbers, whose products and sums are exact in any order: the unit must agree with the loops.
    pub(super) fn right<U: TileUnit>(unit: U) -> bool {
        const STEPS: usize = 3;
        let number = |i: usize| (((i * 7 + i / 5) % 9) as f32 - 4.0).to_bits() >> 16;
        #[expect(clippy::cast_possible_truncation, reason = "shifted right by 16")]
        let bits = |i: usize| number(i) as u16;
        let a: Vec<u16> = (0..2 * STEPS * TILE).map(bits).collect();
        let b: Vec<u16> = (0..2 * STEPS * TILE).map(|i| bits(i + 3)).collect();
        let tiles = [a.as_ptr(), a.as_ptr().wrapping_add(STEPS * TILE)];
        let panels = [b.as_ptr(), b.as_ptr().wrapping_add(STEPS * TILE)].map(<*const u16>::cast);
        [true, false].into_iter().all(|pair| {
            let (mut found, mut expected) = (vec![1.0; 4 * SUMS], vec![1.0; 4 * SUMS]);
            unit.open();
            // SAFETY: opened; `a` and `b` are two runs of STEPS tiles each.
            unsafe { unit.block(tiles, panels, pair, STEPS, &mut found) };
            unit.close();
            // SAFETY: as above.
            unsafe { Emulated.block(tiles, panels, pair, STEPS, &mut expected) };
            found == expected
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_tile_configuration_is_64_bytes() {
            assert_eq!(std::mem::size_of::<Config>(), 64);
        }

        #[test]
        fn the_loops_pass_their_own_check() {
            assert!(right(Emulated));
        }

        #[test]
        fn the_instructions_pass_where_they_exist() {
            match Hardware::get() {
                Some(unit) => assert!(right(unit)),
                None => eprintln!("skipped: this machine has no matrix tiles"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use half::bf16;

    use super::super::arena::Arena;
    use super::super::out::SharedOut;
    use super::super::panels::Panels;
    use super::*;
    use crate::Dtype;

    /// Whole numbers and halves, exact in bf16.
    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 7) % 33).map(|x| x as f32 / 2.0 - 8.0).collect()
    }

    fn emulated(x: &[f32], (rows, cols): (usize, usize), w: &[u8], n: usize, threads: usize) -> Vec<f32> {
        let workers = Workers::new(NonZeroUsize::new(threads).unwrap()).unwrap();
        let mut out = vec![f32::NAN; rows * n];
        let with = (&workers, Isa::best(), &Arena::default());
        let weight = Panels::new(with, w, Dtype::Bf16, (n, cols)).unwrap();
        let bias = vec![1.0; n];
        let products = [Product { weight: &weight, bias: Some(&bias), out: SharedOut::new(&mut out) }];
        linear(Emulated, (&workers, Isa::best()), &mut Scratch::default(), x, rows, &products);
        out
    }

    #[test]
    fn blocking_is_right_at_every_edge_and_does_not_change_bits() {
        for (m, k, n) in [
            (1, 1, 1),
            (1, 32, 32),
            (2, 33, 17),
            (15, 64, 31),
            (16, 31, 16),
            (17, 96, 48),
            (33, 100, 65),
            (70, 64, 130),
        ] {
            let (x, w) = (numbers(m * k, 1), numbers(n * k, 5));
            let mut bytes = vec![0]; // odd addresses
            bytes.extend(w.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
            let out = emulated(&x, (m, k), &bytes[1..], n, 2);
            for row in 0..m {
                for column in 0..n {
                    let exact: f32 = (0..k).map(|i| x[row * k + i] * w[column * k + i]).sum();
                    assert_eq!(
                        out[row * n + column],
                        exact + 1.0,
                        "[{m}, {k}] x [{n}, {k}] at {row}, {column}"
                    );
                }
            }
            let noise: Vec<f32> = x.iter().enumerate().map(|(i, x)| x * 1.017 + i as f32 * 0.001).collect();
            let together = emulated(&noise, (m, k), &bytes[1..], n, 3);
            for row in [0, m / 2, m - 1] {
                let alone = emulated(&noise[row * k..(row + 1) * k], (1, k), &bytes[1..], n, 1);
                assert_eq!(alone, &together[row * n..(row + 1) * n], "[{m}, {k}] x [{n}, {k}] row {row}");
            }
        }
    }
}

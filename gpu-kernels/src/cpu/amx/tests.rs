mod narrow;

use std::num::NonZeroUsize;

use half::bf16;

use super::super::arena::Arena;
use super::super::out::SharedOut;
use super::super::panels::Panels;
use super::super::tasks::Product;
use super::*;
use crate::Dtype;

/// Whole numbers and halves, exact in bf16.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 7) % 33).map(|x| x as f32 / 2.0 - 8.0).collect()
}

fn product<U: TileUnit>(
    (unit, isa): (U, Isa),
    x: &[f32],
    (rows, cols): (usize, usize),
    w: &[u8],
    (n, threads): (usize, usize),
) -> Vec<f32> {
    let workers = Workers::new(NonZeroUsize::new(threads)).unwrap();
    let mut out = vec![f32::NAN; rows * n];
    let with = (&workers, isa, &Arena::default());
    let weight = Panels::whole(with, w, Dtype::Bf16, (n, cols)).unwrap();
    let bias = vec![1.0; n];
    let products = [Product { weight: &weight, bias: Some(&bias), out: SharedOut::new(&mut out) }];
    linear(unit, (&workers, isa), &mut Scratch::default(), x, rows, &products);
    out
}

/// Right at every edge of blocks, and with bits that do not depend on the number of rows; answers those bits.
fn check<U: TileUnit>(unit: U, isa: Isa) -> Vec<Vec<f32>> {
    let unit = (unit, isa);
    let shapes = [
        (1, 1, 1),
        (1, 32, 32),
        (2, 33, 17),
        (15, 64, 31),
        (16, 31, 16),
        (17, 96, 48),
        (33, 100, 65),
        (70, 64, 130),
        (3, 1060, 40),
        (530, 40, 20),
    ];
    let of_shape = |(m, k, n)| {
        let (x, w) = (numbers(m * k, 1), numbers(n * k, 5));
        let mut bytes = vec![0]; // odd addresses
        bytes.extend(w.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()));
        let out = product(unit, &x, (m, k), &bytes[1..], (n, 2));
        for row in 0..m {
            for column in 0..n {
                let exact: f32 = (0..k).map(|i| x[row * k + i] * w[column * k + i]).sum();
                assert_eq!(out[row * n + column], exact + 1.0, "[{m}, {k}] x [{n}, {k}] at {row}, {column}");
            }
        }
        let noise: Vec<f32> = x.iter().enumerate().map(|(i, x)| x * 1.017 + i as f32 * 0.001).collect();
        let together = product(unit, &noise, (m, k), &bytes[1..], (n, 3));
        for row in [0, m / 2, m - 1] {
            let alone = product(unit, &noise[row * k..(row + 1) * k], (1, k), &bytes[1..], (n, 1));
            assert_eq!(alone, &together[row * n..(row + 1) * n], "[{m}, {k}] x [{n}, {k}] row {row}");
        }
        together
    };
    shapes.map(of_shape).to_vec()
}

#[test]
fn the_loops_are_right() {
    let all: Vec<_> = Isa::in_pairs().map(|isa| check(Emulated, isa)).collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "instruction sets differ");
}

#[test]
fn no_rows_have_no_products() {
    let found = product((Emulated, Isa::Portable), &[], (0, 40), &[0; 2 * 40 * 20], (20, 2));
    assert_eq!(found, []);
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod instructions {
    use super::super::hardware::right;
    use super::super::trap;
    use super::*;

    #[test]
    fn they_have_the_bits_of_the_loops() {
        let unit = Hardware::or_trapped();
        for isa in Isa::in_pairs() {
            assert_eq!(check(unit, isa), check(Emulated, isa));
        }
        assert!(available() || trap::install() > 0, "instructions that nobody executed");
    }

    #[test]
    fn numbers_that_are_none_and_numbers_near_zero_are_as_in_the_loops() {
        let unit = Hardware::or_trapped();
        let bits =
            [0x0000, 0x8000, 0x0001, 0x8001, 0x007f, 0x0080, 0x1f80, 0x3f80, 0xbf80, 0x7f7f, 0x7f80, 0xff80];
        let tile = |seed: usize| -> Vec<u16> {
            (0..2 * TILE)
                .map(|i| bits[(i + seed).wrapping_mul(2_654_435_761) % 4_294_967_291 % bits.len()])
                .collect()
        };
        for seed in 0..20 {
            let (a, b) = (tile(seed), tile(seed + 1000));
            let (mut found, mut expected) = (vec![1.0; 4 * SUMS], vec![1.0; 4 * SUMS]);
            let (a, b) = ([a.as_ptr(); 2], [b.as_ptr().cast(); 2]);
            unit.open();
            // SAFETY: opened; `a` and `b` are runs of two tiles.
            unsafe { unit.block(a, b, true, 2, &mut found) };
            unit.close();
            // SAFETY: as above.
            unsafe { Emulated.block(a, b, true, 2, &mut expected) };
            let bits = |sums: &[f32]| -> Vec<u32> {
                // Whose payload a NaN carries is not part of the arithmetic.
                sums.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
            };
            assert_eq!(bits(&found), bits(&expected), "seed {seed}");
        }
    }

    #[test]
    fn the_check_before_first_use_tells_right_from_wrong() {
        #[derive(Clone, Copy)]
        struct Forgetful;
        impl TileUnit for Forgetful {
            fn open(self) {}
            fn close(self) {}
            unsafe fn block(
                self,
                a: [*const u16; 2],
                b: [*const u8; 2],
                pair: bool,
                steps: usize,
                c: &mut [f32],
            ) {
                // SAFETY: the caller's promise.
                unsafe { Emulated.block(a, b, pair, steps - 1, c) };
            }
        }
        assert!(right(Emulated));
        assert!(right(Hardware::or_trapped()));
        assert!(!right(Forgetful));
    }
}

//! Products of pairs, which few machines have an instruction for, on all others by the portable lanes.

use std::num::NonZeroUsize;

use half::bf16;

use super::super::SharedOut;
use super::super::arena::Arena;
use super::*;

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 7) % 2003).map(|x| x as f32 / 1000.0 - 1.0).collect()
}

/// How panels are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packed {
    Whole,
    InTwelve,
}

fn product((isa, how): (Isa, Packed), (x, cols): (&[f32], usize), w: &[bf16], threads: usize) -> Vec<f32> {
    let (rows, n) = (x.len() / cols, w.len() / cols);
    let workers = Workers::new(NonZeroUsize::new(threads)).expect("threads start");
    let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
    let arena = Arena::default();
    let with = (&workers, isa, &arena);
    let (weight, kind) = match how {
        Packed::Whole => (Panels::whole(with, &bytes, Dtype::Bf16, (n, cols)).unwrap(), Of::Pairs),
        Packed::InTwelve => {
            (Panels::in_twelve(with, &bytes, (n, cols)).unwrap().expect("they are short"), Of::Twelve)
        }
    };
    let mut out = vec![f32::NAN; rows * n];
    let products = [Product { weight: &weight, bias: None, out: SharedOut::new(&mut out) }];
    of_kind((&workers, isa), &mut Scratch::default(), (x, kind), rows, &products);
    out
}

#[test]
fn products_of_pairs_are_right_and_know_nothing_of_other_rows() {
    let rounded = |x: f32| f64::from(bf16::from_f32(x).to_f32());
    let shapes =
        [(1, 1, 1), (1, 2, 17), (2, 33, 16), (3, 31, 130), (8, 64, 48), (13, 100, 65), (40, 2100, 40)];
    for (rows, cols, n) in shapes {
        let x = numbers(rows * cols, 1);
        let mut w: Vec<bf16> = numbers(n * cols, 5).into_iter().map(bf16::from_f32).collect();
        // Some whose exponents are far from the others', one of them in each half of a pair.
        for at in (700..w.len()).step_by(1401) {
            w[at] = bf16::from_f32(if at % 2 == 0 { 3e-8 } else { -7e5 });
        }
        for (isa, how) in Isa::in_pairs().flat_map(|isa| [(isa, Packed::Whole), (isa, Packed::InTwelve)]) {
            let out = product((isa, how), (&x, cols), &w, 3);
            for (index, &found) in out.iter().enumerate() {
                let (row, column) = (index / n, index % n);
                let weights = w[column * cols..][..cols].iter().map(|w| f64::from(w.to_f32()));
                let terms =
                    x[row * cols..][..cols].iter().map(|&x| rounded(x)).zip(weights).map(|(x, w)| x * w);
                let size: f64 = terms.clone().map(f64::abs).sum();
                let error = (f64::from(found) - terms.sum::<f64>()).abs();
                // As many roundings as there are products and sums, each at most of half a unit of all that is added.
                let allowed = (2 * cols) as f64 * size * 2.0_f64.powi(-24);
                assert!(
                    error <= allowed,
                    "{isa} {how:?}: [{rows}, {cols}] x [{n}, {cols}] at {row}, {column}: {error:e}"
                );
            }
            for row in [0, rows / 2, rows - 1] {
                let alone = product((isa, how), (&x[row * cols..][..cols], cols), &w, 1);
                let row_of = &out[row * n..][..n];
                assert_eq!(alone, row_of, "{isa} {how:?}: [{rows}, {cols}] x [{n}, {cols}], row {row}");
            }
        }
    }
}

#[test]
fn numbers_of_twelve_bits_make_the_sums_of_those_of_sixteen() {
    let (rows, cols, n) = (19, 2090, 70);
    let x = numbers(rows * cols, 3);
    // Fifteen exponents and zeros: none lies apart, so sums run in the same order.
    let w = numbers(n * cols, 7)
        .into_iter()
        .enumerate()
        .map(|(i, w)| w / (1 << (i % 14)) as f32 * (i % 5) as f32);
    let w: Vec<bf16> = w.map(|w| bf16::from_f32(if w.abs() < 3e-4 { 0.0 } else { w })).collect();
    for isa in Isa::in_pairs() {
        let [whole, short] =
            [Packed::Whole, Packed::InTwelve].map(|how| product((isa, how), (&x, cols), &w, 2));
        assert_eq!(whole, short, "{isa}");
    }
}

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

/// A matrix of which some numbers lie apart, if it is not too small.
fn spread(n: usize, cols: usize) -> Vec<bf16> {
    let mut w: Vec<bf16> = numbers(n * cols, 5).into_iter().map(bf16::from_f32).collect();
    // In both halves of pairs.
    for at in (700..w.len()).step_by(1401) {
        w[at] = bf16::from_f32(if at % 2 == 0 { 3e-8 } else { -7e5 });
    }
    w
}

fn panels((isa, how): (Isa, Packed), w: &[bf16], cols: usize) -> Panels {
    let workers = Workers::new(NonZeroUsize::new(2)).expect("threads start");
    let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
    let (arena, shape) = (Arena::default(), (w.len() / cols, cols));
    match how {
        Packed::Whole => Panels::whole((&workers, isa, &arena), &bytes, Dtype::Bf16, shape).unwrap(),
        Packed::InTwelve => {
            let panels = Panels::in_twelve((&workers, isa, &arena), &bytes, shape).unwrap();
            panels.expect("they are short")
        }
    }
}

fn product(isa: Isa, x: &[f32], weight: &Panels, threads: usize) -> Vec<f32> {
    let rows = x.len() / weight.cols;
    let workers = Workers::new(NonZeroUsize::new(threads)).expect("threads start");
    let kind = if weight.exponents.is_some() { Kind::Twelve } else { Kind::Pairs };
    let mut out = vec![f32::NAN; rows * weight.rows];
    let products = [Product { weight, bias: None, out: SharedOut::new(&mut out) }];
    of_kind((&workers, isa), &mut Scratch::default(), (x, kind), rows, &products);
    out
}

#[test]
fn products_of_pairs_are_right_and_know_nothing_of_other_rows() {
    let rounded = |x: f32| f64::from(bf16::from_f32(x).to_f32());
    let shapes =
        [(1, 1, 1), (1, 2, 17), (2, 33, 16), (3, 31, 130), (8, 64, 48), (13, 100, 65), (40, 2100, 40)];
    for (rows, cols, n) in shapes {
        let (x, w) = (numbers(rows * cols, 1), spread(n, cols));
        for (isa, how) in Isa::in_pairs().flat_map(|isa| [(isa, Packed::Whole), (isa, Packed::InTwelve)]) {
            let weight = panels((isa, how), &w, cols);
            let out = product(isa, &x, &weight, 3);
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
                let alone = product(isa, &x[row * cols..][..cols], &weight, 1);
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
            [Packed::Whole, Packed::InTwelve].map(|how| product(isa, &x, &panels((isa, how), &w, cols), 2));
        assert_eq!(whole, short, "{isa}");
    }
}

#[test]
fn a_part_has_the_sums_of_its_outputs() {
    let (rows, cols, n) = (3, 2100, 90);
    let x = numbers(rows * cols, 2);
    for (isa, how) in Isa::in_pairs().flat_map(|isa| [(isa, Packed::Whole), (isa, Packed::InTwelve)]) {
        let weight = panels((isa, how), &spread(n, cols), cols);
        let (all, (part, before)) = (product(isa, &x, &weight, 1), weight.part(37..70));
        let (of_part, (again, less)) = (product(isa, &x, &part, 1), part.part(before + 16..before + 33));
        let of_again = product(isa, &x, &again, 1);
        for row in 0..rows {
            let expected = &all[row * n..][37..70];
            assert_eq!(
                &of_part[row * part.rows..][before..before + 33],
                expected,
                "{isa} {how:?}, row {row}"
            );
            assert_eq!(
                &of_again[row * again.rows..][less..less + 17],
                &expected[16..],
                "{isa} {how:?}, row {row}"
            );
        }
    }
}

//! Products of pairs, which few machines have an instruction for, on all others by the portable lanes.

use std::num::NonZeroUsize;

use half::bf16;

use super::super::SharedOut;
use super::super::arena::Arena;
use super::*;

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 7) % 2003).map(|x| x as f32 / 1000.0 - 1.0).collect()
}

fn product(isa: Isa, (x, cols): (&[f32], usize), w: &[f32], threads: usize) -> Vec<f32> {
    let (rows, n) = (x.len() / cols, w.len() / cols);
    let workers = Workers::new(NonZeroUsize::new(threads)).expect("threads start");
    let bytes: Vec<u8> = w.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect();
    let weight = Panels::new((&workers, isa, &Arena::default()), &bytes, Dtype::Bf16, (n, cols));
    let weight = weight.expect("there is memory");
    let mut out = vec![f32::NAN; rows * n];
    let products = [Product { weight: &weight, bias: None, out: SharedOut::new(&mut out) }];
    of_words((&workers, isa), &mut Scratch::default(), (x, Word::Pair), rows, &products);
    out
}

#[test]
fn products_of_pairs_are_right_and_know_nothing_of_other_rows() {
    let rounded = |x: f32| f64::from(bf16::from_f32(x).to_f32());
    let shapes =
        [(1, 1, 1), (1, 2, 17), (2, 33, 16), (3, 31, 130), (8, 64, 48), (13, 100, 65), (40, 2100, 40)];
    for (rows, cols, n) in shapes {
        let (x, w) = (numbers(rows * cols, 1), numbers(n * cols, 5));
        for isa in Isa::in_pairs() {
            let out = product(isa, (&x, cols), &w, 3);
            for (index, &found) in out.iter().enumerate() {
                let (row, column) = (index / n, index % n);
                let terms = (0..cols).map(|i| rounded(x[row * cols + i]) * rounded(w[column * cols + i]));
                let size: f64 = terms.clone().map(f64::abs).sum();
                let error = (f64::from(found) - terms.sum::<f64>()).abs();
                // As many roundings as there are products and sums, each at most of half a unit of all that is added.
                let allowed = (2 * cols) as f64 * size * 2.0_f64.powi(-24);
                assert!(
                    error <= allowed,
                    "{isa}: [{rows}, {cols}] x [{n}, {cols}] at {row}, {column}: {error:e}"
                );
            }
            for row in [0, rows / 2, rows - 1] {
                let alone = product(isa, (&x[row * cols..][..cols], cols), &w, 1);
                assert_eq!(alone, &out[row * n..][..n], "{isa}: [{rows}, {cols}] x [{n}, {cols}], row {row}");
            }
        }
    }
}

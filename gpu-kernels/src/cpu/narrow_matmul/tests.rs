//! Products of pairs with small numbers, which few machines have instructions for, on all others by the portable lanes.

use std::num::NonZeroUsize;

use half::bf16;

use super::super::SharedOut;
use super::super::arena::Arena;
use super::super::integers::Integers;
use super::*;
use crate::{Dtype, Rounding};

fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 7) % 2003).map(|x| x as f32 / 1000.0 - 1.0).collect()
}

fn product(isa: Isa, weight: &Integers, x: &[f32], threads: usize) -> Vec<f32> {
    let rows = x.len() / weight.cols;
    let workers = Workers::new(NonZeroUsize::new(threads)).expect("threads start");
    let mut out = vec![f32::NAN; rows * weight.rows];
    let products = [Product { weight, bias: None, out: SharedOut::new(&mut out) }];
    linear((&workers, isa), &mut Scratch::default(), x, rows, &products);
    out
}

#[test]
fn products_of_pairs_are_right_and_know_nothing_of_other_rows() {
    let shapes = [(1, 1, 1), (2, 33, 16), (3, 31, 130), (8, 264, 48), (13, 100, 65), (40, 1100, 40)];
    for ((rows, cols, n), rounding) in shapes
        .into_iter()
        .flat_map(|shape| [Rounding::Int8, Rounding::Fp8, Rounding::Int4].map(|rounding| (shape, rounding)))
    {
        let (x, w) = (numbers(rows * cols, 1), numbers(n * cols, 5));
        let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
        let workers = Workers::new(NonZeroUsize::new(1)).expect("no thread to start");
        let arena = Arena::default();
        let weight = Integers::round((&workers, Word::Pair, &arena), &bytes, Dtype::F32, (n, cols), rounding);
        let weight = weight.expect("there is memory");
        let mut worth = vec![0.0; n * cols];
        worth.chunks_mut(cols).enumerate().for_each(|(row, worth)| weight.read_row(row, worth));
        for isa in Isa::in_pairs() {
            let what = format!("{isa}: [{rows}, {cols}] x [{n}, {cols}] {rounding:?}");
            let out = product(isa, &weight, &x, 3);
            for (index, &found) in out.iter().enumerate() {
                let (row, column) = (index / n, index % n);
                let x = |i| f64::from(bf16::from_f32(x[row * cols + i]).to_f32());
                let terms = (0..cols).map(|i| x(i) * f64::from(worth[column * cols + i]));
                let size: f64 = terms.clone().map(f64::abs).sum();
                let error = (f64::from(found) - terms.sum::<f64>()).abs();
                // As many roundings as there are products and sums, each at most of half a unit of all that is added.
                let allowed = (2 * cols) as f64 * size * 2.0_f64.powi(-24);
                assert!(error <= allowed, "{what} at {row}, {column}: {error:e}");
            }
            for row in [0, rows / 2, rows - 1] {
                let alone = product(isa, &weight, &x[row * cols..][..cols], 1);
                assert_eq!(alone, &out[row * n..][..n], "{what}, row {row}");
            }
        }
    }
}

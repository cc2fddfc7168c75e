//! `out = x · wᵀ + bias`.

use super::weight::{Matrix, widen_into};

/// `x` is `[rows, w.cols]`, `out` is `[rows, w.rows]`.
pub(crate) fn linear(x: &[f32], w: Matrix<'_>, bias: Option<&[f32]>, out: &mut [f32]) {
    let mut row = vec![0.0; w.cols];
    let rows = out.len().checked_div(w.rows).unwrap_or(0);
    for n in 0..w.rows {
        widen_into(w.dtype, w.row(n), &mut row);
        for m in 0..rows {
            let sum = dot(&x[m * w.cols..][..w.cols], &row);
            out[m * w.rows + n] = sum + bias.map_or(0.0, |bias| bias[n]);
        }
    }
}

/// Sixteen running sums, then a tree: the order depends on the length alone.
fn dot(x: &[f32], w: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let (x_whole, x_rest) = x.as_chunks::<16>();
    let (w_whole, w_rest) = w.as_chunks::<16>();
    for (x, w) in x_whole.iter().zip(w_whole) {
        for lane in 0..16 {
            sums[lane] += x[lane] * w[lane];
        }
    }
    for (lane, (x, w)) in x_rest.iter().zip(w_rest).enumerate() {
        sums[lane] += x * w;
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

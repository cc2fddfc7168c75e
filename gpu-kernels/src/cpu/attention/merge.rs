//! Two attentions over parts of the same contexts become one.

use super::super::workers::Workers;
use super::{Floats, SharedOut};

/// `a` and `b` `[tokens, heads · dim]` are averages of values with the natural logarithms of their sums of
/// exponentials, `[tokens, heads]`; `a` becomes the average over both. All shapes are checked.
pub(crate) fn merge_states(
    workers: &Workers,
    (a, lse_a): (&mut [f32], &mut Floats),
    (b, lse_b): (&[f32], &Floats),
) {
    let pairs = lse_a.numbers.len();
    let dim = a.len().checked_div(pairs).unwrap_or(0);
    let (a, lse_a) = (SharedOut::new(a), SharedOut::new(&mut lse_a.numbers));
    workers.rows(pairs, dim, &|from, to| {
        for pair in from..to {
            // SAFETY: this piece alone has this token and head.
            let a = unsafe { a.slice(pair * dim, dim) };
            // SAFETY: as above.
            let lse = unsafe { lse_a.slice(pair, 1) };
            merge(a, &mut lse[0], &b[pair * dim..][..dim], lse_b.numbers[pair]);
        }
    });
}

fn merge(a: &mut [f32], lse_a: &mut f32, b: &[f32], lse_b: f32) {
    let most = lse_a.max(lse_b);
    if most == f32::NEG_INFINITY {
        return;
    }
    let (of_a, of_b) = ((*lse_a - most).exp(), (lse_b - most).exp());
    let total = of_a + of_b;
    let (of_a, of_b) = (of_a / total, of_b / total);
    *lse_a = most + total.ln();
    for (a, b) in a.iter_mut().zip(b) {
        *a = *a * of_a + b * of_b;
    }
}

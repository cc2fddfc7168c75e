//! Products with integers whose columns come in an order of their own.

use super::SharedOut;
use super::integers::Product;
use super::workers::Workers;

/// Gives `with` those of the products whose weights have groups of one size and columns in one order, and `x` in that
/// order, one lot after the other.
pub(super) fn in_order(
    workers: &Workers,
    x: &[f32],
    products: &[Product<'_>],
    mut with: impl FnMut(&[f32], &[Product<'_>]),
) {
    let alike = |a: &Product<'_>, b: &Product<'_>| {
        a.weight.group == b.weight.group && a.weight.order == b.weight.order
    };
    for products in products.chunk_by(alike) {
        match &products[0].weight.order {
            Some(order) => with(&turned(workers, x, order), products),
            None => with(x, products),
        }
    }
}

/// The columns of `x` in the order of a weight's.
fn turned(workers: &Workers, x: &[f32], order: &[u32]) -> Vec<f32> {
    let cols = order.len();
    let mut turned = vec![0.0; x.len()];
    let to = SharedOut::new(&mut turned);
    workers.rows(x.len() / cols, cols, &|from, end| {
        for row in from..end {
            let x = &x[row * cols..][..cols];
            // SAFETY: this piece alone has the row.
            let to = unsafe { to.slice(row * cols, cols) };
            to.iter_mut().zip(order).for_each(|(to, &input)| *to = x[input as usize]);
        }
    });
    turned
}

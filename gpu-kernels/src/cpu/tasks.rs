//! Products as tasks: groups of panels, each walked by one thread.

use super::SharedOut;
use super::scratch::Scratch;
use super::workers::{Turn, Workers};

/// A matrix in panels of sixteen outputs.
pub(crate) trait InPanels: Copy + Send + Sync {
    /// How many panels there are.
    fn count(self) -> usize;
    /// Where one begins.
    fn panel(self, panel: usize) -> *const u8;
}

/// One product of a call of `linear`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a, W> {
    /// A packed matrix.
    pub(crate) weight: W,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, outputs]`.
    pub(crate) out: SharedOut,
}

/// A group of panels of one product: what one thread does at a time.
#[derive(Clone, Copy)]
pub(super) struct Task<'a, W> {
    pub(super) product: Product<'a, W>,
    /// Panels `from..to`.
    pub(super) from: usize,
    pub(super) to: usize,
    /// It is the thread's first one.
    pub(super) first: bool,
    /// The first panel of the thread's next group.
    pub(super) next: Option<*const u8>,
    /// Rows of `out`.
    pub(super) rows: usize,
}

impl<W: InPanels> Task<'_, W> {
    /// Its panels, so many `together`, or `rest` where there are fewer: the first of them, how many they are, and where
    /// the thread goes on.
    #[inline(always)]
    pub(super) fn steps(
        &self,
        together: usize,
        rest: usize,
    ) -> impl Iterator<Item = (usize, usize, Option<*const u8>)> {
        let Self { product, mut from, to, next, .. } = *self;
        std::iter::from_fn(move || {
            let (panel, left) = (from, to - from);
            let count = if left >= together { together } else { left.min(rest) };
            from += count;
            let next = if from < to { Some(product.weight.panel(from)) } else { next };
            (left > 0).then_some((panel, count, next))
        })
    }
}

/// Runs `task` for all products of so many rows, in groups of a multiple of `size` panels.
pub(super) fn run<W: InPanels>(
    workers: &Workers,
    size: usize,
    rows: usize,
    products: &[Product<'_, W>],
    task: &(dyn Fn(Task<'_, W>, &mut Scratch) + Sync),
) {
    let groups = groups(size, workers.threads(), products.iter().map(|product| product.weight.count()));
    workers.run_in_sight(groups.len(), &|Turn { index, first, next }, scratch| {
        let Group { product, from, to } = groups[index];
        let next = next.map(|next| products[groups[next].product].weight.panel(groups[next].from));
        task(Task { product: products[product], from, to, first, next, rows }, scratch);
    });
}

/// Panels `from..to` of a product.
#[derive(Clone, Copy)]
struct Group {
    product: usize,
    from: usize,
    to: usize,
}

/// All products in groups of a multiple of `size` panels; `counts` are the panels of each.
///
/// A group is a quarter of what a thread would get of those that are left. Claiming one waits until the thread's last
/// sums are written, so there should be few, and at the end small ones.
fn groups(size: usize, threads: usize, counts: impl Iterator<Item = usize> + Clone) -> Vec<Group> {
    let mut left: usize = counts.clone().sum();
    let mut groups = Vec::new();
    for (product, panels) in counts.enumerate() {
        let mut from = 0;
        while from < panels {
            let to = panels.min(from + left.div_ceil(4 * threads * size) * size);
            groups.push(Group { product, from, to });
            (left, from) = (left - (to - from), to);
        }
    }
    groups
}

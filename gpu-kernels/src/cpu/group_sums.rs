//! Sums of groups of activations: what zero points of weights are multiplied by.

use super::lanes::{Kernel, Lanes, WIDTH, dispatch_pairs};
use super::tiles::some;
use super::workers::Workers;
use super::{Isa, SharedOut};

/// `[rows][groups]`: the sum of each group of each row of `x`, rounded to bf16; zeros where `x`, `[_, cols]`, has fewer
/// rows.
pub(super) fn group_sums(
    (workers, isa): (&Workers, Isa),
    x: &[f32],
    (rows, cols): (usize, usize),
    group: usize,
) -> Vec<f32> {
    let mut sums = vec![0.0; rows * cols.div_ceil(group)];
    if sums.is_empty() {
        return sums;
    }
    let to = SharedOut::new(&mut sums);
    workers.rows(rows.min(x.len() / cols), cols, &|from, end| {
        dispatch_pairs(isa, SumGroups { x, cols, group, to, from, end });
    });
    sums
}

/// The sums of rows `from..end`.
struct SumGroups<'a> {
    x: &'a [f32],
    cols: usize,
    group: usize,
    /// `[rows][groups]`
    to: SharedOut,
    from: usize,
    end: usize,
}

impl Kernel for SumGroups<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        // Two ones in bf16.
        let ones = lanes.splat(f32::from_bits(0x3f80_3f80));
        let groups = self.cols.div_ceil(self.group);
        for row in self.from..self.end {
            // SAFETY: this piece of work alone has the row.
            let to = unsafe { self.to.slice(row * groups, groups) };
            for (x, to) in self.x[row * self.cols..][..self.cols].chunks(self.group).zip(to) {
                let mut sums = lanes.splat(0.0);
                for at in (0..x.len()).step_by(2 * WIDTH) {
                    // SAFETY: as many elements as the group has.
                    let first = unsafe { some(lanes, x.as_ptr(), x.len(), at) };
                    // SAFETY: as above.
                    let second = unsafe { some(lanes, x.as_ptr(), x.len(), at + WIDTH) };
                    sums = lanes.dot_pairs(lanes.round_pairs(first, second), ones, sums);
                }
                *to = lanes.sum(sums);
            }
        }
    }
}

//! The limit of arithmetic: multiply-adds in registers, and nothing else.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Isa;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch, dispatch_pairs};
use super::workers::Workers;
use crate::Dtype;

/// Chains that do not wait for each other: a multiply-add takes four or five cycles, and two begin in each.
const CHAINS: usize = 12;

/// `rounds` multiply-adds in each chain, on every thread; how many operations that was, two for each product of
/// numbers.
pub(crate) fn multiply_add(workers: &Workers, (isa, weights): (Isa, Dtype), rounds: usize) -> usize {
    let operations = AtomicUsize::new(0);
    let chains = Chains { rounds, operations: &operations };
    workers.run(workers.threads(), &|_, _| {
        if weights == Dtype::Bf16 && isa.multiplies_pairs() {
            dispatch_pairs(isa, InPairs(chains));
        } else {
            dispatch(isa, chains);
        }
    });
    operations.into_inner()
}

#[derive(Clone, Copy)]
struct Chains<'a> {
    rounds: usize,
    operations: &'a AtomicUsize,
}

impl Kernel for Chains<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (a, b) = (lanes.splat_part(black_box(0.5)), lanes.splat_part(black_box(0.25)));
        let mut sums = [lanes.splat_part(black_box(1.0)); CHAINS];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = lanes.fma_part(*sum, a, b);
            }
        }
        for sum in sums {
            let mut out = [0.0_f32; WIDTH];
            // SAFETY: a register holds at most sixteen numbers.
            unsafe { lanes.store_part(out.as_mut_ptr(), sum) };
            black_box(out);
        }
        self.operations.fetch_add(self.rounds * CHAINS * 2 * WIDTH / L::PARTS, Ordering::Relaxed);
    }
}

/// The same of pairs of bf16.
struct InPairs<'a>(Chains<'a>);

impl Kernel for InPairs<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let (a, b) = (lanes.splat(black_box(0.5)), lanes.splat(black_box(0.25)));
        let mut sums = [lanes.splat(black_box(1.0)); CHAINS];
        for _ in 0..self.0.rounds {
            for sum in &mut sums {
                *sum = lanes.dot_pairs(a, b, *sum);
            }
        }
        for sum in sums {
            black_box(lanes.sum(sum));
        }
        self.0.operations.fetch_add(self.0.rounds * CHAINS * 4 * WIDTH, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroUsize;

    #[test]
    fn every_thread_counts_what_it_did() {
        let workers = Workers::new(NonZeroUsize::new(2)).unwrap();
        for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let found = multiply_add(&workers, (isa, dtype), 1000);
                assert_eq!(found % (2 * 1000 * CHAINS * 2), 0, "{isa}: {found}");
                assert_eq!(multiply_add(&workers, (isa, dtype), 2000), 2 * found, "{isa}");
            }
        }
    }
}

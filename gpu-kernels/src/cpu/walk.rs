//! The way of a thread through panels of small numbers: some at a time, all tiles of `x` against these.

use super::integers::{Integers, LINE};
use super::lanes::{Lanes, WIDTH};
use super::tasks::Task;
use super::tiles::{Asks, store_sums};

/// A task, and how its tiles are multiplied.
pub(super) trait Walk {
    /// Panels that go together where there are fewer than N: one or two.
    const REST: usize;

    fn task(&self) -> &Task<'_, &Integers>;

    /// How many tiles `x` has.
    fn tiles(&self) -> usize;

    /// Puts into `sums`, `[R][N][16]`, which are zeros, a tile of R rows times N panels: number `at.0`, from `at.1` on.
    fn tile<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        asks: Asks,
        at: (usize, usize),
        sums: &mut [f32],
    );

    /// All panels, N at a time. `memory` has room for sums.
    #[inline(always)]
    fn walk<L: Lanes, const R: usize, const N: usize>(&self, lanes: L, memory: &mut [f32]) {
        for (panel, count, next) in self.task().steps(N, Self::REST) {
            if count == 1 {
                self.panels::<L, R, 1>(lanes, memory, panel, next);
            } else if const { Self::REST == 2 } && count == 2 {
                self.panels::<L, R, 2>(lanes, memory, panel, next);
            } else {
                self.panels::<L, R, N>(lanes, memory, panel, next);
            }
        }
    }

    /// All tiles against N panels from `panel` on.
    #[inline(always)]
    fn panels<L: Lanes, const R: usize, const N: usize>(
        &self,
        lanes: L,
        memory: &mut [f32],
        panel: usize,
        next: Option<*const u8>,
    ) {
        let (task, tiles, sums) = (self.task(), self.tiles(), &mut memory[..R * N * WIDTH]);
        let weight = task.product.weight;
        for tile in 0..tiles {
            let cold = task.first && tiles > 1 && panel == task.from;
            let lines = (weight.panel(panel), weight.stride() / LINE, LINE);
            let asks = Asks::new((tile, tiles), lines, (next, LINE), cold);
            sums.fill(0.0);
            self.tile::<L, R, N>(lanes, asks, (tile, panel), sums);
            let (out, bias) = ((task.product.out, weight.rows), task.product.bias);
            store_sums::<L, R, N>(lanes, sums, (1.0, bias), out, (task.rows, tile * R, panel));
        }
    }
}

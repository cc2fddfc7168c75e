//! How long content stays and whether staying was worth it, measured on every n-th block.
//!
//! ```text
//!  published        found           found                 handed to somebody else
//!      |------ gap -----|----- gap -----|------- idle ----------|
//!      |--------------------- lifetime -------------------------|
//! ```
//!
//! Many long idles and few gaps: the cache is larger than the requests are alike. Gaps nearly as long as lifetimes:
//! a larger cache would find more.

use crate::{BlockId, Tick};

/// A block's content from when it could be found to when it was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// From the beginning to the end.
    pub lifetime_ticks: u64,
    /// From the last use to the end.
    pub idle_ticks: u64,
    /// How often it was found by another sequence.
    pub reuses: u32,
    /// The times between uses, the latest [`GAPS_MAX`] of them, oldest first; 0 behind them.
    pub gap_ticks: [u64; GAPS_MAX],
}

/// Times between uses that one sample tells.
pub const GAPS_MAX: usize = 4;

impl Residency {
    /// The times between uses, as far as they were kept.
    pub fn gaps(&self) -> &[u64] {
        &self.gap_ticks[..GAPS_MAX.min(self.reuses as usize)]
    }
}

/// Samples that are kept for a caller who does not ask.
const SAMPLES_MAX: usize = 4096;

/// The blocks that are watched, and what was seen of them.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    every: u32,
    now: Tick,
    /// By block number over `every`.
    lives: Vec<Option<Life>>,
    samples: Vec<Residency>,
}

#[derive(Clone, Copy, Debug)]
struct Life {
    born: Tick,
    used: Tick,
    reuses: u32,
    gaps: [u64; GAPS_MAX],
}

impl Watch {
    /// Watches every `every`-th of `blocks`.
    pub(crate) fn new(blocks: u32, every: u32) -> Self {
        let watched = (blocks / every) as usize + 1;
        Watch { every, now: Tick(0), lives: vec![None; watched], samples: Vec::new() }
    }

    /// What the caller's clock says. Time that runs backwards stands still.
    pub(crate) fn set_now(&mut self, now: Tick) {
        self.now = self.now.max(now);
    }

    /// Something of a block can be found, of which nothing could.
    pub(crate) fn published(&mut self, block: BlockId) {
        let now = self.now;
        if let Some(place) = self.place(block) {
            self.lives[place] = Some(Life { born: now, used: now, reuses: 0, gaps: [0; GAPS_MAX] });
        }
    }

    /// A block that could be found was handed out.
    pub(crate) fn lost(&mut self, block: BlockId) {
        let now = self.now;
        let life = self.place(block).and_then(|place| self.lives[place].take());
        if let Some(life) = life.filter(|_| self.samples.len() < SAMPLES_MAX) {
            self.samples.push(Residency {
                lifetime_ticks: now.0 - life.born.0,
                idle_ticks: now.0 - life.used.0,
                reuses: life.reuses,
                gap_ticks: life.gaps,
            });
        }
    }

    /// A block was found and shared.
    pub(crate) fn found(&mut self, block: BlockId) {
        let now = self.now;
        let Some(life) = self.place(block).and_then(|place| self.lives[place].as_mut()) else { return };
        if life.reuses as usize >= GAPS_MAX {
            life.gaps.rotate_left(1);
        }
        life.gaps[GAPS_MAX.min(life.reuses as usize + 1) - 1] = now.0 - life.used.0;
        life.used = now;
        life.reuses = life.reuses.saturating_add(1);
    }

    /// The lives that ended since the last call.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Residency> + '_ {
        self.samples.drain(..)
    }

    fn place(&self, block: BlockId) -> Option<usize> {
        block.get().is_multiple_of(self.every).then(|| (block.get() / self.every) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_is_told_when_the_content_is_lost() {
        let mut watch = Watch::new(9, 2);
        let blocks = [BlockId(4), BlockId(5)];
        watch.set_now(Tick(100));
        blocks.into_iter().for_each(|block| watch.published(block));
        for now in [110, 130, 131, 141, 200] {
            watch.set_now(Tick(now));
            blocks.into_iter().for_each(|block| watch.found(block));
        }
        watch.set_now(Tick(150));
        assert_eq!(watch.now, Tick(200), "time does not run backwards");
        watch.set_now(Tick(260));
        blocks.into_iter().for_each(|block| watch.lost(block));
        let samples: Vec<_> = watch.drain().collect();
        let expected =
            Residency { lifetime_ticks: 160, idle_ticks: 60, reuses: 5, gap_ticks: [20, 1, 10, 59] };
        assert_eq!(samples, [expected], "only every second block is watched");
        assert_eq!(samples[0].gaps(), [20, 1, 10, 59]);
        watch.published(BlockId(4));
        watch.set_now(Tick(270));
        watch.found(BlockId(4));
        watch.lost(BlockId(4));
        let next: Vec<_> = watch.drain().collect();
        assert_eq!(next[0].gaps(), [10], "a new life begins when the next content is published");
    }

    #[test]
    fn samples_do_not_pile_up_and_no_life_ends_twice() {
        let mut watch = Watch::new(9, 1);
        watch.lost(BlockId(8));
        assert_eq!(watch.drain().count(), 0);
        for _ in 0..SAMPLES_MAX + 5 {
            watch.published(BlockId(8));
            watch.lost(BlockId(8));
            watch.lost(BlockId(8));
        }
        assert_eq!(watch.drain().count(), SAMPLES_MAX);
    }
}

//! Whether it is worth fetching, how long to wait for it, and what several ranks make of it.

use crate::{BlockCount, Tick};

/// When content is fetched from a tier instead of computed, and how long a sequence waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Fewer blocks than this are not loaded to the device: computing them is quicker.
    pub load_min: BlockCount,
    /// Fewer blocks than this are not promoted from a staged tier.
    pub promote_min: BlockCount,
    /// How long to wait for what is on its way.
    pub patience: Patience,
}

/// How long a sequence waits for content that is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// Not at all: it takes what is there when it could begin.
    BestEffort,
    /// Until all of it is there.
    #[default]
    WaitComplete,
    /// Until all of it is there, but no longer than a fixed time and a time per block asked for.
    Timeout {
        /// Ticks for the first block and before.
        base: u64,
        /// Ticks for each block.
        per_block: u64,
    },
}

/// Whether a sequence goes on waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It begins with so many blocks. What is still under way may be given up.
    Begin(BlockCount),
    /// It waits, at most until this time, or until told.
    Wait(Option<Tick>),
}

impl Patience {
    /// What a sequence does that asked for `wanted` consecutive blocks at the time `began`, of which the first
    /// `arrived` have arrived by `now`.
    pub fn judge(self, wanted: BlockCount, arrived: BlockCount, began: Tick, now: Tick) -> Verdict {
        let deadline = match self {
            Patience::BestEffort => return Verdict::Begin(arrived),
            Patience::WaitComplete => None,
            Patience::Timeout { base, per_block } => {
                let ticks = base.saturating_add(per_block.saturating_mul(wanted.0.into()));
                Some(Tick(began.0.saturating_add(ticks)))
            }
        };
        let late = deadline.is_some_and(|deadline| now >= deadline);
        if arrived >= wanted || late { Verdict::Begin(arrived) } else { Verdict::Wait(deadline) }
    }
}

/// What all ranks of a model have: the fewest that any of them has. Each reports for itself how far it could load, or
/// how many copies arrived, and all go on with this number ([`Outcome::First`](super::Outcome::First)), so that their
/// tiers stay alike. No rank at all has nothing.
pub fn agreed(ranks: impl IntoIterator<Item = BlockCount>) -> BlockCount {
    ranks.into_iter().min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(patience: Patience, arrived: u32, now: u64) -> Verdict {
        patience.judge(BlockCount(8), BlockCount(arrived), Tick(100), Tick(now))
    }

    #[test]
    fn each_patience_ends_when_it_says() {
        let timeout = Patience::Timeout { base: 10, per_block: 2 };
        assert_eq!(judge(Patience::BestEffort, 3, 100), Verdict::Begin(BlockCount(3)));
        assert_eq!(judge(Patience::WaitComplete, 7, u64::MAX), Verdict::Wait(None));
        assert_eq!(judge(Patience::WaitComplete, 8, 100), Verdict::Begin(BlockCount(8)));
        assert_eq!(judge(timeout, 3, 125), Verdict::Wait(Some(Tick(126))));
        assert_eq!(judge(timeout, 3, 126), Verdict::Begin(BlockCount(3)));
        assert_eq!(judge(timeout, 8, 101), Verdict::Begin(BlockCount(8)));
        let endless = Patience::Timeout { base: u64::MAX, per_block: u64::MAX };
        assert_eq!(judge(endless, 0, 200), Verdict::Wait(Some(Tick(u64::MAX))), "no overflow");
    }

    #[test]
    fn ranks_agree_on_what_all_have() {
        assert_eq!(agreed([5, 3, 9].map(BlockCount)), BlockCount(3));
        assert_eq!(agreed([]), BlockCount(0));
    }
}

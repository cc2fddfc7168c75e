//! Numbers for gauges and counters.

use crate::{BlockCount, SequenceId};

/// How full the cache is, and what sharing has brought so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Blocks that can be handed out: all but the null block. Always `free + used + pinned`.
    pub blocks: BlockCount,
    /// Blocks that nobody holds. Some of them are still `cached`.
    pub free: BlockCount,
    /// Blocks that sequences hold and no pin, a shared one counted once.
    pub used: BlockCount,
    /// Blocks that pins hold, used by sequences as well or not, each counted once.
    pub pinned: BlockCount,
    /// Blocks whose content can be found by others, free or used.
    pub cached: BlockCount,
    /// Free blocks that are set aside for sequences whose K and V are on their way.
    pub reserved: BlockCount,
    /// Sequences that are open, holding blocks or not.
    pub sequences: u32,
    /// Sequences let in for the first time.
    pub first: HitStats,
    /// Sequences let in again after [`KvCache::release`](crate::KvCache::release). They mostly find what they
    /// themselves left behind, which says nothing about how alike the requests are.
    pub again: HitStats,
    /// Cached blocks that lost their content to a new one.
    pub evictions: u64,
    /// Claims that were not granted.
    pub refusals: Refusals,
}

/// Claims that were not granted, each answer counted. Counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Answers of [`Admission::Wait`](crate::Admission::Wait).
    pub wait: u64,
    /// Answers of [`Admission::NextStep`](crate::Admission::NextStep).
    pub next_step: u64,
    /// Answers of [`Admission::Never`](crate::Admission::Never).
    pub never: u64,
    /// Answers of [`Admission::OverLimit`](crate::Admission::OverLimit).
    pub over_limit: u64,
    /// The last that had to wait.
    pub last: Option<Refusal>,
}

/// Why a claim had to wait: `need + watermark + reserved` was more than `free`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Who asked.
    pub sequence: SequenceId,
    /// Blocks it would have taken out of the free list.
    pub need: BlockCount,
    /// What it had to leave over.
    pub watermark: BlockCount,
    /// Free blocks that are set aside for others.
    pub reserved: BlockCount,
    /// Blocks that were free.
    pub free: BlockCount,
}

impl Refusals {
    pub(crate) fn wait(&mut self, refusal: Refusal) {
        self.wait += 1;
        self.last = Some(refusal);
    }
}

/// Prefix lookups, counted once per admission and not once per question. Counters only grow.
/// Sequences that must not read, and caches that do not share, are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HitStats {
    /// Sequences admitted.
    pub admissions: u64,
    /// Tokens they knew.
    pub tokens: u64,
    /// Tokens of these that came out of the cache.
    pub hit_tokens: u64,
}

impl HitStats {
    pub(crate) fn count(&mut self, tokens: u32, hit_tokens: u32) {
        self.admissions += 1;
        self.tokens += u64::from(tokens);
        self.hit_tokens += u64::from(hit_tokens);
    }
}

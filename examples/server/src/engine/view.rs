//! What the engine's thread shows of itself.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quayline_engine::{Snapshot, Tick};

/// Least time between two snapshots while the engine is busy.
pub(super) const SNAPSHOT_EVERY: Duration = Duration::from_millis(50);

/// The engine at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    pub(crate) snapshot: Arc<Snapshot>,
    /// When it was taken.
    pub(crate) at: Tick,
    pub(crate) output_tokens_per_second: f64,
    pub(crate) prompt_tokens_per_second: f64,
}

/// Tokens per second over about the last second.
#[derive(Debug, Default)]
pub(super) struct Rates {
    samples: VecDeque<(Instant, u64, u64)>,
}

impl Rates {
    pub(super) fn update(&mut self, now: Instant, output: u64, prompt: u64) -> (f64, f64) {
        while self.samples.len() > 1 && now - self.samples[0].0 > Duration::from_secs(1) {
            self.samples.pop_front();
        }
        let (since, output_then, prompt_then) =
            self.samples.front().copied().unwrap_or((now, output, prompt));
        self.samples.push_back((now, output, prompt));
        let seconds = (now - since).as_secs_f64().max(SNAPSHOT_EVERY.as_secs_f64());
        let per_second = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        (per_second(output, output_then), per_second(prompt, prompt_then))
    }
}

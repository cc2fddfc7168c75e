//! Host memory behind the cache on the command line, and the speeds that decide who is moved there.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use quayline_engine::{Engine, Offloading, OffloadingDisk, OffloadingWrite, Options, Preemption, Speeds};

/// Host memory behind the cache.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Host memory")]
pub(crate) struct OffloadingFlags {
    /// GiB of host memory for blocks that the cache has no room for; 0 is none
    #[arg(long, visible_alias = "swap-space", default_value_t = 0.0, value_parser = gibibytes)]
    kv_offloading_size: f64,
    /// A directory for a file of blocks behind the host memory; what lies there is found after a restart
    #[arg(long, requires = "kv_offloading_disk_size")]
    kv_offloading_disk_path: Option<PathBuf>,
    /// GiB that this file may take
    #[arg(long, requires = "kv_offloading_disk_path", value_parser = gibibytes)]
    kv_offloading_disk_size: Option<f64>,
    /// What looks after it
    #[arg(long, value_enum, default_value_t = Backend::Native)]
    kv_offloading_backend: Backend,
    /// Keep a block when it has been used so many times; 0 keeps it when the cache is about to overwrite it
    #[arg(long, default_value_t = 1)]
    kv_offloading_store_threshold: u32,
    /// Which blocks are given up when it is full
    #[arg(long, value_enum, default_value_t = Eviction::Lru)]
    kv_offloading_eviction_policy: Eviction,
    /// Whether a request that yields its blocks is moved to host memory or computes them again
    #[arg(long, value_enum, default_value_t = Mode::Cheaper)]
    preemption_mode: Mode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Native,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Eviction {
    Lru,
    Arc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Whichever is quicker, as measured.
    Cheaper,
    Recompute,
    Swap,
}

/// A size in GiB, which may have a fraction.
fn gibibytes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(size) if (0.0..=1_048_576.0).contains(&size) => Ok(size),
        _ => Err("must be a number of GiB from 0 to 1048576".to_owned()),
    }
}

impl OffloadingFlags {
    /// Adds what these flags say.
    pub(crate) fn add_to(&self, options: Options) -> Options {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 2^50")]
        let bytes = |gibibytes: f64| (gibibytes * f64::from(1 << 30)) as u64;
        let disk = self.kv_offloading_disk_path.clone().zip(self.kv_offloading_disk_size);
        let Backend::Native = self.kv_offloading_backend;
        let write = match NonZeroU32::new(self.kv_offloading_store_threshold) {
            None => OffloadingWrite::Back,
            Some(NonZeroU32::MIN) => OffloadingWrite::Through,
            Some(uses) => OffloadingWrite::AfterUses(uses),
        };
        let arc = self.kv_offloading_eviction_policy == Eviction::Arc;
        Options {
            offloading: (self.kv_offloading_size > 0.0).then(|| Offloading {
                bytes: bytes(self.kv_offloading_size),
                write,
                arc,
            }),
            offloading_disk: disk
                .filter(|&(_, size)| size > 0.0)
                .map(|(directory, size)| OffloadingDisk { directory, bytes: bytes(size) }),
            preemption: match self.preemption_mode {
                Mode::Cheaper => Preemption::Cheaper(Speeds::default()),
                Mode::Recompute => Preemption::Recompute,
                Mode::Swap => Preemption::Swap,
            },
            ..options
        }
    }
}

/// How fast this machine copies blocks and reads prompts, as seen on the engine's thread.
#[derive(Debug)]
pub(crate) struct Speedometer {
    bytes_per_second: NonZeroU64,
    /// Prompt tokens a second, over the last steps.
    prefill: f64,
    /// What the engine was told.
    told: f64,
}

/// Fewer prompt tokens in a step say little about the speed of many.
const PREFILL_TOKENS_MIN: u32 = 32;

/// The weight of the last step in the mean.
const LAST: f64 = 0.2;

impl Speedometer {
    /// Times copies, for some milliseconds. `None` if there is no host memory to copy to.
    pub(crate) fn new(engine: &mut Engine) -> Option<Self> {
        let mut times = 1;
        loop {
            let begun = Instant::now();
            let bytes = engine.exercise_copies(times)?;
            let elapsed = begun.elapsed();
            if elapsed >= Duration::from_millis(2) {
                let bytes_per_second = rate(bytes as f64, elapsed);
                return Some(Self { bytes_per_second, prefill: 0.0, told: 0.0 });
            }
            times *= 2;
        }
    }

    /// A step took so long. Tells the engine when its prompts have become a quarter faster or slower.
    pub(crate) fn note(&mut self, engine: &mut Engine, elapsed: Duration) {
        let step = engine.last_step();
        if step.prefill_tokens < PREFILL_TOKENS_MIN || step.decode_requests > step.prefill_tokens / 8 {
            return;
        }
        let now = rate(f64::from(step.prefill_tokens), elapsed).get() as f64;
        self.prefill = if self.prefill > 0.0 { self.prefill + LAST * (now - self.prefill) } else { now };
        if (self.prefill - self.told).abs() > self.told / 4.0 {
            self.told = self.prefill;
            engine.set_speeds(Speeds {
                bytes_per_second: self.bytes_per_second,
                prefill_tokens_per_second: rate(self.prefill, Duration::from_secs(1)),
            });
        }
    }
}

/// At least one a second.
fn rate(count: f64, elapsed: Duration) -> NonZeroU64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count, and at most 2^64")]
    let whole = (count / elapsed.as_secs_f64().max(1e-9)) as u64;
    NonZeroU64::new(whole).unwrap_or(NonZeroU64::MIN)
}

#[cfg(test)]
mod tests {
    use quayline_engine::ModelFiles;

    use super::*;

    #[test]
    fn speeds_are_measured_where_there_is_something_to_decide() {
        let load = |offloading| {
            let preemption = Preemption::Cheaper(Speeds::default());
            let options = Options { offloading, preemption, ..Options::default() };
            Engine::load(&ModelFiles::bundled(), &options).unwrap()
        };
        assert!(Speedometer::new(&mut load(None)).is_none());
        let speed = Speedometer::new(&mut load(Some(Offloading::new(1 << 20)))).unwrap();
        assert!(speed.bytes_per_second.get() > 1_000_000, "{speed:?}");
    }

    #[test]
    fn a_rate_is_never_nothing() {
        assert_eq!(rate(0.0, Duration::from_secs(1)), NonZeroU64::MIN);
        assert_eq!(rate(100.0, Duration::from_millis(500)).get(), 200);
    }
}

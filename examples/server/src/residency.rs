//! Whether it is measured how long blocks keep their contents, on the command line.

use std::num::NonZeroU32;

use clap::Args;

/// How long blocks keep their contents, and whether keeping them was worth it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct ResidencyFlags {
    /// Measure how long blocks keep their contents
    #[arg(long, overrides_with = "no_kv_cache_metrics")]
    kv_cache_metrics: bool,
    /// Do not (the default)
    #[arg(long)]
    no_kv_cache_metrics: bool,
    /// Share of the blocks that are watched, above 0 and up to 1
    #[arg(long, default_value_t = 0.01, value_parser = share)]
    kv_cache_metrics_sample: f64,
}

impl ResidencyFlags {
    /// Every how manyth block is watched.
    pub(crate) fn every(&self) -> Option<NonZeroU32> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 2^20")]
        let every = (1.0 / self.kv_cache_metrics_sample).round() as u32;
        NonZeroU32::new(every).filter(|_| self.kv_cache_metrics)
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (1.0 / f64::from(1 << 20)..=1.0).contains(&share) => Ok(share),
        _ => Err("must be a number above 0 (2^-20 at least) and up to 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: ResidencyFlags,
    }

    fn every(line: &str) -> Result<Option<u32>, clap::Error> {
        let line = Line::try_parse_from(std::iter::once("server").chain(line.split_whitespace()))?;
        Ok(line.flags.every().map(NonZeroU32::get))
    }

    #[test]
    fn a_share_becomes_every_nth_block() {
        assert_eq!(every("").unwrap(), None);
        assert_eq!(every("--kv-cache-metrics-sample 0.5").unwrap(), None);
        assert_eq!(every("--kv-cache-metrics").unwrap(), Some(100));
        assert_eq!(every("--kv-cache-metrics --kv-cache-metrics-sample 1").unwrap(), Some(1));
        assert_eq!(every("--kv-cache-metrics --kv-cache-metrics-sample 0.3").unwrap(), Some(3));
        assert_eq!(every("--kv-cache-metrics --no-kv-cache-metrics").unwrap(), None);
        for wrong in ["0", "-0.1", "1.5", "NaN", "1e-300", "many"] {
            assert!(every(&format!("--kv-cache-metrics-sample={wrong}")).is_err(), "{wrong}");
        }
    }
}

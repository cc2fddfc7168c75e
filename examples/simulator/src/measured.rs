//! A run of a real engine: what was asked, when it answered, and with which settings it ran.
//!
//! The form is LLMServingSim's: `requests.jsonl` (`input_toks`, `output_toks`, `arrival_time` by the wall
//! clock, and `queued_ts`, `first_token_ts`, `last_token_ts` by the engine's) and beside it `meta.json`, the
//! settings of vLLM.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::latency::Summary;
use crate::trace::{self, Arrival};

/// What a real engine did with a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// What was asked, first come first.
    pub arrivals: Vec<Arrival>,
    /// Seconds from the engine's queue to the first token.
    pub first_token: Summary,
    /// Seconds from a token to the next, by request.
    pub per_token: Summary,
    /// Seconds from the engine's queue to the last token.
    pub whole: Summary,
    /// Seconds from the first arrival to the last token.
    pub seconds: f64,
}

#[derive(Deserialize)]
struct Line {
    input_toks: u32,
    output_toks: u32,
    arrival_time: f64,
    queued_ts: f64,
    first_token_ts: f64,
    last_token_ts: f64,
}

/// The longest prompt or answer that is taken for one.
const TOKENS_MAX: u32 = 1 << 22;

impl Line {
    /// What no engine can have done.
    fn check(&self) -> Result<(), String> {
        for (name, tokens) in [("input_toks", self.input_toks), ("output_toks", self.output_toks)] {
            if !(1..=TOKENS_MAX).contains(&tokens) {
                return Err(format!("{name} is {tokens}, not 1 to {TOKENS_MAX}"));
            }
        }
        let times = [self.queued_ts, self.first_token_ts, self.last_token_ts];
        if !times.is_sorted() || !times.iter().all(|time| time.is_finite()) {
            return Err(format!(
                "queued_ts, first_token_ts and last_token_ts do not follow each other: {times:?}"
            ));
        }
        Ok(())
    }
}

/// Reads the run, at most its first `limit` requests, if the file is one.
///
/// # Errors
/// At the first line that is not in the form, with its number. A file that does not begin like a run is none.
pub fn read(path: &Path, limit: usize) -> Result<Option<Measured>, String> {
    let text = trace::text(path).map_err(|error| format!("{}: {error}", path.display()))?;
    if !text.lines().next().is_some_and(|line| line.contains("\"input_toks\"")) {
        return Ok(None);
    }
    let mut lines: Vec<Line> = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit) {
        let parsed = serde_json::from_str(line).map_err(|error| error.to_string());
        let parsed = parsed.and_then(|line: Line| line.check().map(|()| line));
        lines.push(parsed.map_err(|why| format!("{}:{}: {why}", path.display(), index + 1))?);
    }
    lines.sort_by(|a, b| a.arrival_time.total_cmp(&b.arrival_time));
    let Some(first) = lines.first() else { return Ok(None) };
    let (wall, clock) = (first.arrival_time, first.queued_ts);
    let arrival = |line: &Line| {
        Some(Arrival {
            at: Duration::try_from_secs_f64(line.arrival_time - wall).ok()?,
            prompt_tokens: line.input_toks,
            output_tokens: line.output_toks,
            blocks: Vec::new(),
        })
    };
    let arrivals = lines.iter().map(arrival).collect::<Option<_>>();
    let of = |seconds: fn(&Line) -> f64| Summary::of(lines.iter().map(seconds).collect());
    Ok(Some(Measured {
        arrivals: arrivals.ok_or_else(|| format!("{}: an arrival is no time", path.display()))?,
        first_token: of(|line| line.first_token_ts - line.queued_ts),
        per_token: Summary::of(
            lines
                .iter()
                .filter(|line| line.output_toks > 1)
                .map(|line| (line.last_token_ts - line.first_token_ts) / f64::from(line.output_toks - 1))
                .collect(),
        ),
        whole: of(|line| line.last_token_ts - line.queued_ts),
        seconds: lines.iter().map(|line| line.last_token_ts - clock).fold(0.0, f64::max),
    }))
}

/// The settings of vLLM that decide about a replay. Those that are not written down are `None`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Meta {
    /// The model's name.
    pub model: Option<String>,
    /// What the engine was asked for.
    #[serde(default)]
    pub engine_kwargs: EngineSettings,
    /// What it found for its cache.
    #[serde(default)]
    pub kv_cache: CacheSettings,
    #[serde(default)]
    hardware: Hardware,
    #[serde(default)]
    resolved_config: ResolvedConfig,
}

/// What the engine was asked for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct EngineSettings {
    /// GPUs that the model is split over.
    pub tensor_parallel_size: Option<u32>,
    /// Requests that run at once.
    pub max_num_seqs: Option<u32>,
    /// Tokens of a step.
    pub max_num_batched_tokens: Option<u32>,
    /// The longest prompt and answer together.
    pub max_model_len: Option<u32>,
}

/// What the engine found for its cache.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct CacheSettings {
    /// Blocks, the null block among them.
    pub num_gpu_blocks: Option<u32>,
    /// Tokens of a block.
    pub block_size: Option<u32>,
    /// Whether equal prefixes are shared.
    pub enable_prefix_caching: Option<bool>,
    /// Share of the memory that the engine may use.
    pub gpu_memory_utilization: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
struct Hardware {
    device_total_memory_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
struct ResolvedConfig {
    #[serde(default)]
    scheduler_config: SchedulerConfig,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
struct SchedulerConfig {
    async_scheduling: Option<bool>,
    enable_chunked_prefill: Option<bool>,
}

impl Meta {
    /// Reads a `meta.json`.
    ///
    /// # Errors
    /// When it is not there or not in the form.
    pub fn read(path: &Path) -> Result<Meta, String> {
        let of = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| of(&error))?;
        serde_json::from_str(&text).map_err(|error| of(&error))
    }

    /// Memory of the GPU, as the driver shows it.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.hardware.device_total_memory_bytes
    }

    /// Whether the engine plans a step while the one before runs.
    pub fn async_scheduling(&self) -> Option<bool> {
        self.resolved_config.scheduler_config.async_scheduling
    }

    /// Whether prompts are cut into chunks.
    pub fn chunked_prefill(&self) -> Option<bool> {
        self.resolved_config.scheduler_config.enable_chunked_prefill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_engine_can_have_done_is_no_line_of_a_run() {
        let line = |text: &str| {
            let line: Line = serde_json::from_str(text).map_err(|error| error.to_string())?;
            line.check()
        };
        let good = r#"{"input_toks": 9, "output_toks": 4, "arrival_time": 1, "queued_ts": 2, "first_token_ts": 3,
                       "last_token_ts": 4}"#;
        assert_eq!(line(good), Ok(()));
        for (from, to) in [
            ("\"input_toks\": 9", "\"input_toks\": 0"),
            ("\"input_toks\": 9", "\"input_toks\": 4000000000"),
            ("\"output_toks\": 4", "\"output_toks\": 0"),
            ("\"output_toks\": 4", "\"output_toks\": -4"),
            ("\"first_token_ts\": 3", "\"first_token_ts\": 1"),
            ("\"last_token_ts\": 4", "\"last_token_ts\": 2.5"),
            ("\"queued_ts\": 2", "\"queued_ts\": null"),
        ] {
            let wrong = good.replace(from, to);
            assert!(wrong != good && line(&wrong).is_err(), "{wrong}");
        }
    }
}

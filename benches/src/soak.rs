//! After a storm: does nothing run, are all blocks free, is the memory what it was?

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, Failure};
use crate::machine::Resident;

/// What a server says about its work, read from `/metrics` and `/debug/state`.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Requests that run.
    pub running: f64,
    /// Requests that wait.
    pub waiting: f64,
    /// The share of blocks in use.
    pub cache_usage: f64,
    /// Blocks in use, where `/debug/state` exists and says so.
    pub used_blocks: Option<u64>,
    /// What the server's own audit found, where `/debug/state` tells; empty when all is well.
    pub violations: Vec<String>,
}

impl State {
    /// Nothing runs, nothing waits, no block is held, and the audit is clean.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running == 0.0
            && self.waiting == 0.0
            && self.cache_usage == 0.0
            && self.used_blocks.unwrap_or(0) == 0
            && self.violations.is_empty()
    }
}

/// Asks the server for its state.
///
/// # Errors
/// When `/metrics` does not answer, or lacks one of the three gauges.
pub async fn state(client: &mut Client) -> Result<State, Failure> {
    let metrics = client.get("/metrics").await?;
    let gauge = |name| gauge(&metrics, name).ok_or(Failure::Malformed);
    let (used_blocks, violations) = match client.get("/debug/state").await {
        Ok(text) => audit(&text)?,
        Err(Failure::Status(_)) => (None, Vec::new()),
        Err(failure) => return Err(failure),
    };
    Ok(State {
        running: gauge("vllm:num_requests_running")?,
        waiting: gauge("vllm:num_requests_waiting")?,
        cache_usage: gauge("vllm:kv_cache_usage_perc")?,
        used_blocks,
        violations,
    })
}

/// Asks until the server is idle or `patience` has passed, and gives back the last state.
///
/// # Errors
/// As [`state`].
pub async fn settle(client: &mut Client, patience: Duration) -> Result<State, Failure> {
    let start = Instant::now();
    loop {
        let state = state(client).await?;
        if state.is_idle() || start.elapsed() > patience {
            return Ok(state);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The sum of all samples of a metric, whatever their labels.
fn gauge(metrics: &str, name: &str) -> Option<f64> {
    let samples = metrics.lines().filter_map(|line| line.strip_prefix(name));
    let values = samples.filter(|rest| rest.starts_with(['{', ' '])).filter_map(|rest| {
        let after_labels = rest.rsplit_once('}').map_or(rest, |(_, value)| value);
        after_labels.split_ascii_whitespace().next()?.parse::<f64>().ok()
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// Used blocks and what the audit found, from a document with `blocks.used`, `phase` (`"failed"` when the engine
/// ended itself) and `check` (null, `"ok"`, `true`, or what is wrong).
fn audit(text: &str) -> Result<(Option<u64>, Vec<String>), Failure> {
    let document: Value = serde_json::from_str(text).map_err(|_| Failure::Malformed)?;
    let used = document.pointer("/blocks/used").and_then(Value::as_u64);
    let mut violations = match document.get("check") {
        None | Some(Value::Null | Value::Bool(true)) => Vec::new(),
        Some(Value::String(text)) if text == "ok" => Vec::new(),
        Some(Value::Array(items)) => items.iter().map(Value::to_string).collect(),
        Some(other) => vec![other.to_string()],
    };
    if document.get("phase").is_some_and(|phase| phase == "failed") {
        violations.push("the engine failed".to_owned());
    }
    Ok((used, violations))
}

/// A server may give memory back some seconds after it has fallen idle.
pub const MEMORY_RETURNS: Duration = Duration::from_secs(15);

/// Whether memory grew between two idle moments by more than noise: two in a hundred and four mebibytes.
#[must_use]
pub const fn memory_is_flat(before: Resident, after: Resident) -> bool {
    after.anonymous_bytes <= before.anonymous_bytes + before.anonymous_bytes / 50 + (4 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "# HELP vllm:num_requests_running x\n# TYPE vllm:num_requests_running gauge\n\
        vllm:num_requests_running{model_name=\"a}b\",engine=\"0\"} 2\nvllm:num_requests_running{engine=\"1\"} 1.5\n\
        vllm:num_requests_running_total 9\nvllm:plain 4\n";

    #[test]
    fn a_gauge_is_summed_over_its_labels() {
        assert_eq!(gauge(METRICS, "vllm:num_requests_running"), Some(3.5));
        assert_eq!(gauge(METRICS, "vllm:plain"), Some(4.0));
        assert_eq!(gauge(METRICS, "vllm:absent"), None);
    }

    #[test]
    fn an_audit_is_clean_or_says_what_is_wrong() {
        assert_eq!(audit(r#"{"blocks":{"used":3},"check":"ok"}"#), Ok((Some(3), Vec::new())));
        assert_eq!(audit(r#"{"blocks":{"used":0},"check":[]}"#), Ok((Some(0), Vec::new())));
        assert_eq!(audit(r#"{"phase":"ready"}"#), Ok((None, Vec::new())));
        assert_eq!(audit(r#"{"phase":"failed"}"#).unwrap().1.len(), 1);
        assert_eq!(audit(r#"{"check":["block 3 is held twice"]}"#).unwrap().1.len(), 1);
        assert_eq!(audit(r#"{"check":"block 3 is held twice"}"#).unwrap().1.len(), 1);
    }

    #[test]
    fn a_leak_is_more_than_noise() {
        let memory = |mebibytes: u64| Resident { bytes: 0, anonymous_bytes: mebibytes << 20 };
        assert!(memory_is_flat(memory(100), memory(105)));
        assert!(!memory_is_flat(memory(100), memory(107)));
        assert!(memory_is_flat(memory(100), memory(60)));
    }
}

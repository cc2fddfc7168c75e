//! A run as a line of a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::client::Answer;
use crate::run::Measurement;
use crate::statistics::Summary;

/// What is reported of a run. Times are milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How requests were sent, in words: `C=8`, `4/s`, a trace.
    pub pace: String,
    /// Requests answered in full.
    pub answered: usize,
    /// Wrong requests refused, as they should be.
    pub refused: u64,
    /// Requests that the client left on purpose.
    pub left: u64,
    /// Requests that failed, by kind.
    pub failures: BTreeMap<String, u64>,
    /// Seconds from the first request to the last end.
    pub wall_seconds: f64,
    /// Answers per second.
    pub requests_per_second: f64,
    /// Tokens generated per second, as the server counted them.
    pub output_tokens_per_second: f64,
    /// The same and the prompts' tokens.
    pub total_tokens_per_second: f64,
    /// Tokens of the prompts of answered requests.
    pub prompt_tokens: u64,
    /// The part of them that the server had computed before.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Time to the first piece of text.
    pub ttft_ms: Option<Summary>,
    /// Time per token after the first: from the first to the last piece of text, divided by the tokens but
    /// one.
    pub tpot_ms: Option<Summary>,
    /// Time between two pieces of text of a stream; a piece may hold several tokens.
    pub itl_ms: Option<Summary>,
    /// Time from sending to the end of the answer.
    pub e2e_ms: Option<Summary>,
    /// Time by which a request was sent later than it arrived (open loop).
    pub lag_ms: Option<Summary>,
    /// CPU seconds of this client.
    pub client_cpu_seconds: Option<f64>,
    /// CPU seconds of the server, where its process was named.
    pub server_cpu_seconds: Option<f64>,
    /// Resident memory of the server at the end, where its process was named.
    pub server_memory: Option<crate::machine::Resident>,
}

impl Report {
    /// Sums up a run.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^52")]
    pub fn new(pace: String, measurement: &Measurement) -> Self {
        let answers = &measurement.answers;
        let wall = measurement.wall.as_secs_f64().max(1e-9);
        let sum = |count: fn(&Answer) -> u64| answers.iter().map(count).sum::<u64>();
        let output_tokens = sum(|answer| answer.usage.completion_tokens);
        let prompt_tokens = sum(|answer| answer.usage.prompt_tokens);
        let ms = |time: fn(&Answer) -> std::time::Duration| {
            Summary::of(
                &mut answers.iter().map(|answer| time(answer).as_secs_f64() * 1e3).collect::<Vec<_>>(),
            )
        };
        Self {
            pace,
            answered: answers.len(),
            refused: measurement.refused,
            left: measurement.left,
            failures: measurement.failures.iter().map(|(kind, &count)| (kind.to_string(), count)).collect(),
            wall_seconds: wall,
            requests_per_second: answers.len() as f64 / wall,
            output_tokens_per_second: output_tokens as f64 / wall,
            total_tokens_per_second: (prompt_tokens + output_tokens) as f64 / wall,
            prompt_tokens,
            cached_tokens: sum(|answer| answer.usage.cached_tokens),
            output_tokens,
            ttft_ms: ms(|answer| answer.first),
            tpot_ms: Summary::of(&mut answers.iter().filter_map(per_token_ms).collect::<Vec<_>>()),
            itl_ms: Summary::of(
                &mut measurement.gaps.iter().map(|&gap| f64::from(gap) / 1e3).collect::<Vec<_>>(),
            ),
            e2e_ms: ms(|answer| answer.end),
            lag_ms: Summary::of(&mut measurement.lags.iter().map(|lag| lag * 1e3).collect::<Vec<_>>()),
            client_cpu_seconds: measurement.client_cpu_seconds,
            server_cpu_seconds: None,
            server_memory: None,
        }
    }

    /// One line under [`HEADER`].
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!(
            "{:<10} {:>5} {:>4} {:>8.2} {:>9.1} {:>9.1}",
            self.pace,
            self.answered,
            self.failures.values().sum::<u64>(),
            self.requests_per_second,
            self.output_tokens_per_second,
            self.total_tokens_per_second,
        );
        for summary in [&self.ttft_ms, &self.tpot_ms, &self.itl_ms, &self.e2e_ms] {
            let cell = summary.map_or_else(|| "-".to_owned(), cell);
            // Writing into a String cannot fail.
            let _ = write!(line, " {cell:>29}");
        }
        let share = self.client_cpu_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.2}"));
        let _ = write!(line, " {share:>7}");
        line
    }

    /// What went wrong, in words; nothing when nothing did.
    #[must_use]
    pub fn complaints(&self) -> Option<String> {
        let kinds: Vec<String> =
            self.failures.iter().map(|(kind, count)| format!("{count} x {kind}")).collect();
        (!kinds.is_empty()).then(|| format!("{}: {}", self.pace, kinds.join(", ")))
    }
}

/// The head of the table. Times are `mean / p50 / p90 / p99` in milliseconds.
pub const HEADER: &str = "pace          ok  err    req/s out tok/s all tok/s    TTFT ms mean/p50/p90/p99    \
     TPOT ms mean/p50/p90/p99     ITL ms mean/p50/p90/p99     E2E ms mean/p50/p90/p99 cpu s";

fn cell(summary: Summary) -> String {
    let digits = usize::from(summary.p99 < 1000.0);
    let Summary { mean, p50, p90, p99, .. } = summary;
    format!("{mean:.digits$}/{p50:.digits$}/{p90:.digits$}/{p99:.digits$}")
}

#[expect(clippy::cast_precision_loss, reason = "counts of tokens are far below 2^52")]
fn per_token_ms(answer: &Answer) -> Option<f64> {
    let steps =
        answer.usage.completion_tokens.checked_sub(1).filter(|&steps| steps > 0 && answer.pieces > 1)?;
    Some((answer.last - answer.first).as_secs_f64() * 1e3 / steps as f64)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::client::{Failure, Usage};

    fn answer(first: u64, last: u64, tokens: u64) -> Answer {
        Answer {
            first: Duration::from_millis(first),
            last: Duration::from_millis(last),
            end: Duration::from_millis(last + 1),
            pieces: 3,
            usage: Usage { prompt_tokens: 10, completion_tokens: tokens, cached_tokens: 4 },
        }
    }

    #[test]
    fn rates_are_sums_over_wall_time() {
        let measurement = Measurement {
            answers: vec![answer(10, 110, 11), answer(30, 230, 21)],
            gaps: vec![50_000, 50_000],
            failures: [(Failure::Status(503), 2)].into(),
            wall: Duration::from_secs(2),
            ..Measurement::default()
        };
        let report = Report::new("C=2".to_owned(), &measurement);
        assert_eq!(report.output_tokens_per_second, 16.0);
        assert_eq!(report.total_tokens_per_second, 26.0);
        assert_eq!(report.cached_tokens, 8);
        assert_eq!(report.ttft_ms.unwrap().p50, 20.0);
        assert_eq!(report.tpot_ms.unwrap().mean, 10.0);
        assert_eq!(report.itl_ms.unwrap().max, 50.0);
        assert_eq!(report.complaints().unwrap(), "C=2: 2 x status 503");
        assert!(report.line().contains("20.0/20.0/28.0/29.8"), "{}", report.line());
    }

    #[test]
    fn an_answer_of_one_token_has_no_time_per_token() {
        let measurement = Measurement { answers: vec![answer(10, 10, 1)], ..Measurement::default() };
        assert_eq!(Report::new(String::new(), &measurement).tpot_ms, None);
    }
}

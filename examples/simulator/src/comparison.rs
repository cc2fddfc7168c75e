//! A report for readers: orders side by side, and a replay beside what was measured.

use std::fmt::{self, Write as _};

use crate::latency::Summary;
use crate::measured::Measured;
use crate::serve::{Report, Served};

/// The times of a run. All but the last count from when a request came.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Seconds to the first token (TTFT).
    pub first_token: Summary,
    /// Seconds from a token to the next, the mean of each request (TPOT).
    pub per_token: Summary,
    /// Seconds from a token to the next, each by itself (ITL).
    pub gap: Summary,
    /// Seconds to the last token.
    pub whole: Summary,
    /// Seconds to the first token from when the engine took the request in, which is what an engine measures.
    pub queued_first_token: Summary,
}

impl Times {
    /// Of the requests that were served.
    pub fn of(report: &Report) -> Times {
        let served = || report.requests.iter().filter(|served| served.tokens > 0);
        let of = |seconds: fn(&Served) -> f64| Summary::of(served().map(seconds).collect());
        Times {
            first_token: of(|served| served.first - served.arrived),
            per_token: Summary::of(served().filter_map(Served::per_token).collect()),
            gap: Summary::of(report.gaps.iter().map(|&gap| f64::from(gap)).collect()),
            whole: of(|served| served.last - served.arrived),
            queued_first_token: of(|served| served.first - served.queued),
        }
    }
}

/// Orders side by side.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// A name, what came of it, and its times.
    pub runs: Vec<(String, Report, Times)>,
}

impl Comparison {
    /// Adds a run.
    pub fn add(&mut self, name: &str, report: Report) {
        let times = Times::of(&report);
        self.runs.push((name.to_owned(), report, times));
    }
}

/// Two tables: the times, then everything else.
impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = ["TTFT s", "TPOT ms", "ITL ms", "E2E s"];
        write!(f, "{:<9}", "order")?;
        for column in columns {
            write!(f, "  {column:>8}: mean     p50     p90     p99")?;
        }
        for (name, _, times) in &self.runs {
            write!(f, "\n{name:<9}")?;
            let parts =
                [(times.first_token, 1.0), (times.per_token, 1e3), (times.gap, 1e3), (times.whole, 1.0)];
            for (summary, unit) in parts {
                write!(f, "  {:>7}", "")?;
                summary.named().iter().try_for_each(|(_, seconds)| write!(f, " {:>7.2}", seconds * unit))?;
            }
        }
        write!(
            f,
            "\n\n{:<9}  {:>8}  {:>9}  {:>9}  {:>8}  {:>9}  {:>7}  {:>6}  worst-served tenant",
            "order", "requests", "refused", "token/s", "seconds", "preempted", "hits", "Jain"
        )?;
        for (name, report, _) in &self.runs {
            let refused = report.requests.iter().filter(|served| served.tokens == 0).count();
            let tokens: u64 = report.requests.iter().map(|served| u64::from(served.tokens)).sum();
            write!(
                f,
                "\n{name:<9}  {:>8}  {refused:>9}  {:>9.0}  {:>8.1}  {:>9}  {:>5.1} %  {}",
                report.requests.len(),
                tokens as f64 / report.seconds,
                report.seconds,
                report.preemptions,
                100.0 * report.hit_tokens as f64 / report.prompt_tokens.max(1) as f64,
                fairness(report),
            )?;
        }
        writeln!(f)
    }
}

fn fairness(report: &Report) -> String {
    let mut text = report.fairness.jain.map_or(format!("{:>6}", "-"), |jain| format!("{jain:>6.3}"));
    if let Some((tenant, share)) = report.fairness.worst {
        let waits = report.requests.iter().filter(|served| served.tenant == tenant && served.tokens > 0);
        let waits = Summary::of(waits.map(|served| served.first - served.arrived).collect());
        let _ = write!(text, "  {tenant}: {:.0} % of its share, TTFT p50 {:.1} s", 100.0 * share, waits.p50);
    }
    text
}

/// A replay beside the real run: times, and by how much they are off.
pub fn beside(measured: &Measured, report: &Report) -> String {
    let times = Times::of(report);
    let whole = Summary::of(report.requests.iter().map(|served| served.last - served.queued).collect());
    let rows = [
        ("TTFT s", measured.first_token, times.queued_first_token, 1.0),
        ("TPOT ms", measured.per_token, times.per_token, 1e3),
        ("E2E s", measured.whole, whole, 1.0),
    ];
    let mut text = format!("{:<13}  {:>9}  {:>9}  {:>7}\n", "", "measured", "simulated", "off");
    let mut row = |name: String, measured: f64, simulated: f64| {
        let off = 100.0 * (simulated / measured - 1.0);
        let _ = writeln!(text, "{name:<13}  {measured:>9.3}  {simulated:>9.3}  {off:>+5.1} %");
    };
    for (name, measured, simulated, unit) in rows {
        for ((what, measured), (_, simulated)) in measured.named().into_iter().zip(simulated.named()) {
            row(format!("{name} {what}"), measured * unit, simulated * unit);
        }
    }
    row("whole run s".to_owned(), measured.seconds, report.seconds);
    text
}

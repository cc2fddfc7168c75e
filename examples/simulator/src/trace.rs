//! Recorded traffic: when requests came, how long they were, and which blocks of prompt they shared.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

/// One recorded request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Arrival {
    /// Time since the first request of the trace.
    pub at: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens of the answer.
    pub output_tokens: u32,
    /// Names of the prompt's blocks of [`BLOCK_TOKENS`] tokens; equal leading names mean equal leading
    /// tokens. Empty when not recorded.
    pub blocks: Vec<u64>,
}

/// Tokens behind one name of [`Arrival::blocks`].
pub const BLOCK_TOKENS: u32 = 512;

/// Why a trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file could not be opened or unpacked.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is not what its format says.
    #[error("{path}:{line}: {what}")]
    Line {
        /// The file.
        path: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The file holds no request.
    #[error("{path}: the trace holds no request")]
    Empty {
        /// The file.
        path: String,
    },
}

/// What is wrong in a text that need not be a file: where, and what.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    Line(usize, String),
    Empty,
}

/// Reads a trace, at most `limit` requests of it: JSON lines in Mooncake's form or CSV in Azure's, either
/// packed with gzip or plain.
/// The form is told from the first character of the text.
///
/// # Errors
/// When the file cannot be read, or at the first line that is not in that form.
pub fn read(path: &Path, limit: usize) -> Result<Vec<Arrival>, TraceError> {
    let name = path.display().to_string();
    let text = text(path).map_err(|source| TraceError::File { path: name.clone(), source })?;
    let read = if text.trim_start().starts_with('{') { mooncake(&text, limit) } else { azure(&text, limit) };
    read.map_err(|fault| match fault {
        Fault::Line(line, what) => TraceError::Line { path: name, line, what },
        Fault::Empty => TraceError::Empty { path: name },
    })
}

/// The text of a file that may be packed with gzip.
pub(crate) fn text(path: &Path) -> std::io::Result<String> {
    let bytes = std::fs::read(path)?;
    let mut text = String::new();
    if bytes.starts_with(&[0x1f, 0x8b]) {
        flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_string(&mut text)?;
    } else {
        bytes.as_slice().read_to_string(&mut text)?;
    }
    Ok(text)
}

#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Parses lines of `{"timestamp": ms, "input_length", "output_length", "hash_ids"}`.
fn mooncake(text: &str, limit: usize) -> Result<Vec<Arrival>, Fault> {
    let mut arrivals = Vec::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (index, line) in lines.take(limit) {
        let parsed: MooncakeLine =
            serde_json::from_str(line).map_err(|error| Fault::Line(index + 1, without_place(&error)))?;
        arrivals.push(Arrival {
            at: Duration::from_millis(parsed.timestamp),
            prompt_tokens: parsed.input_length,
            output_tokens: parsed.output_length,
            blocks: parsed.hash_ids,
        });
    }
    from_the_first(arrivals)
}

/// Parses `TIMESTAMP,ContextTokens,GeneratedTokens` with times like `2023-11-16 18:17:03.9799600`.
fn azure(text: &str, limit: usize) -> Result<Vec<Arrival>, Fault> {
    let mut arrivals = Vec::new();
    let lines = text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty());
    for (index, line) in lines.take(limit) {
        arrivals.push(
            azure_line(line.trim())
                .ok_or_else(|| Fault::Line(index + 1, format!("not a time and two counts: {line:?}")))?,
        );
    }
    from_the_first(arrivals)
}

/// What serde says, less its own count of lines: there is one line.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split_once(" at line 1 column ")
        .map_or(text.clone(), |(what, column)| format!("{what} (column {column})"))
}

fn azure_line(line: &str) -> Option<Arrival> {
    let mut fields = line.split(',');
    let (time, prompt, output) = (fields.next()?, fields.next()?, fields.next()?);
    Some(Arrival {
        at: since_1970(time)?,
        prompt_tokens: prompt.trim().parse().ok()?,
        output_tokens: output.trim().parse().ok()?,
        blocks: Vec::new(),
    })
}

/// Reads `YYYY-MM-DD hh:mm:ss[.fraction]`.
fn since_1970(time: &str) -> Option<Duration> {
    let (date, clock) = time.trim().split_once([' ', 'T'])?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut clock = clock.splitn(3, ':');
    let hour: u64 = clock.next()?.parse().ok()?;
    let minute: u64 = clock.next()?.parse().ok()?;
    let second: f64 = clock.next()?.parse().ok()?;
    let valid =
        year >= 1970 && (1..=12).contains(&month) && (1..=31).contains(&day) && hour < 24 && minute < 60;
    if !valid || !(0.0..61.0).contains(&second) {
        return None;
    }
    let whole = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60;
    Some(Duration::from_secs(whole) + Duration::from_secs_f64(second))
}

/// Days from 1970-01-01 to a date of the Gregorian calendar; years are counted from March, so that the leap
/// day comes last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

fn from_the_first(mut arrivals: Vec<Arrival>) -> Result<Vec<Arrival>, Fault> {
    arrivals.sort_by_key(|arrival| arrival.at);
    let first = arrivals.first().ok_or(Fault::Empty)?.at;
    for arrival in &mut arrivals {
        arrival.at -= first;
    }
    Ok(arrivals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mooncake_line_keeps_its_shared_blocks() {
        let text = "{\"timestamp\": 27000, \"input_length\": 6758, \"output_length\": 500, \"hash_ids\": [0, 1, 2]}\n\
                    {\"timestamp\": 30000, \"input_length\": 7322, \"output_length\": 490, \"hash_ids\": [0, 14]}\n";
        let trace = mooncake(text, 10).unwrap();
        assert_eq!(trace[0].at, Duration::ZERO);
        assert_eq!(trace[1].at, Duration::from_secs(3));
        assert_eq!((trace[1].prompt_tokens, trace[1].output_tokens), (7322, 490));
        assert_eq!(trace[1].blocks, [0, 14]);
        assert_eq!(mooncake(text, 1).unwrap().len(), 1);
    }

    #[test]
    fn an_azure_time_is_read_to_the_microsecond() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.9799600,4808,10\r\n\
                    2023-11-17 00:00:00.0319600,3180,8\r\n";
        let trace = azure(text, 10).unwrap();
        assert_eq!(trace.len(), 2);
        assert!((trace[1].at.as_secs_f64() - 0.052).abs() < 2e-6, "{:?}", trace[1].at);
        assert_eq!((trace[0].prompt_tokens, trace[0].output_tokens), (4808, 10));
    }

    #[test]
    fn days_follow_the_calendar() {
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2000, 3, 1) - days_since_1970(2000, 2, 28), 2);
        assert_eq!(days_since_1970(2100, 3, 1) - days_since_1970(2100, 2, 28), 1);
        assert_eq!(days_since_1970(2023, 11, 16), 19_677);
    }

    #[test]
    fn a_wrong_line_is_named() {
        let error = azure("header\n2023-11-16 18:17:03,1,2\n2023-13-16 18:17:03,1,2\n", 10).unwrap_err();
        assert!(matches!(error, Fault::Line(3, _)), "{error:?}");
        let error = mooncake("{\"timestamp\": 1}\n", 10).unwrap_err();
        assert_eq!(error, Fault::Line(1, "missing field `input_length` (column 16)".to_owned()));
        assert!(matches!(azure("header\n", 10), Err(Fault::Empty)));
    }

    #[test]
    fn the_published_traces_read_whole() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/llm-requests");
        let files = [
            ("mooncake/conversation_trace.jsonl.gz", 12_031, 3_537.0),
            ("azure-2023/AzureLLMInferenceTrace_code.csv.gz", 8_819, 3_436.0),
        ];
        for (file, count, seconds) in files {
            let path = folder.join(file);
            if !path.exists() {
                eprintln!("skipped: {file} is not beside the repository");
                continue;
            }
            let trace = read(&path, usize::MAX).unwrap();
            assert_eq!(trace.len(), count, "{file}");
            assert_eq!(trace[count - 1].at.as_secs_f64().round(), seconds, "{file}");
        }
    }
}

//! Load on an OpenAI-compatible server, and what it felt like to the clients.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program's answer goes to its standard output"
)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use quayline_benches::client::{Client, Failure, Target, TargetError, first_model};
use quayline_benches::machine::{cpu_seconds_of, resident};
use quayline_benches::prompt::Form;
use quayline_benches::report::{HEADER, Report};
use quayline_benches::run::{Bounds, Measurement, Pace, run};
use quayline_benches::soak;
use quayline_benches::trace::{self, TraceError};
use quayline_benches::workload::{Endpoint, Length, Source, Workload};
use serde_json::{Map, Value};

/// Load on an OpenAI-compatible server: closed loop, Poisson arrivals, or a recorded trace.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The server, as http://host:port[/base].
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Allow a server that is not on this machine.
    #[arg(long)]
    allow_remote: bool,
    /// API key, sent as a bearer token.
    #[arg(long)]
    api_key: Option<String>,
    /// Model name; by default the first that the server lists.
    #[arg(long)]
    model: Option<String>,
    /// The endpoint.
    #[arg(long, value_enum, default_value_t = EndpointName::Completions)]
    endpoint: EndpointName,
    /// Prompts as token ids (exact lengths) or as words.
    #[arg(long, value_enum, default_value_t = PromptForm::Ids)]
    prompt: PromptForm,
    /// Token ids are drawn from FIRST..END.
    #[arg(long, value_name = "FIRST..END", value_parser = range, default_value = "300..1000")]
    ids: (u32, u32),

    /// Closed loop: workers, one run for each number.
    #[arg(long, value_delimiter = ',', default_values_t = [8])]
    concurrency: Vec<usize>,
    /// Open loop: Poisson arrivals per second, one run for each number.
    #[arg(long, value_delimiter = ',', conflicts_with = "concurrency")]
    rate: Vec<f64>,
    /// Open loop: a recorded trace (Mooncake JSON lines or Azure CSV, plain or gzip).
    #[arg(long, conflicts_with_all = ["concurrency", "rate"])]
    trace: Option<PathBuf>,
    /// Play the trace so many times faster.
    #[arg(long, default_value_t = 1.0)]
    speedup: f64,
    /// Multiply the trace's lengths by this; sharing is kept.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Read so many requests of the trace.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    /// Longest prompt of a trace, after scaling.
    #[arg(long, default_value_t = 1024)]
    prompt_len_max: u32,
    /// Longest answer of a trace, after scaling.
    #[arg(long, default_value_t = 256)]
    output_len_max: u32,
    /// Open loop: requests in flight at most.
    #[arg(long, default_value_t = 512)]
    in_flight_max: usize,

    /// Requests of each run; by default three for each worker, and at least 16.
    #[arg(long)]
    requests: Option<u64>,
    /// Requests before each run that are not measured.
    #[arg(long, default_value_t = 2)]
    warmup: u64,
    /// Longest run, in seconds.
    #[arg(long, default_value_t = 600.0)]
    seconds_max: f64,
    /// Longest request, in seconds.
    #[arg(long, default_value_t = 300.0)]
    request_seconds_max: f64,

    /// Tokens of a prompt.
    #[arg(long, default_value_t = 128)]
    prompt_len: u32,
    /// Prompt lengths differ by up to this share.
    #[arg(long, default_value_t = 0.0)]
    prompt_spread: f64,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 64)]
    output_len: u32,
    /// Answer lengths differ by up to this share.
    #[arg(long, default_value_t = 0.0)]
    output_spread: f64,
    /// Tokens that the prompts of a group share at their beginning.
    #[arg(long, default_value_t = 0)]
    shared_prefix_len: u32,
    /// Groups of requests that share a prefix.
    #[arg(long, default_value_t = 1)]
    shared_groups: u64,
    /// Sampling temperature.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Go on past the end-of-text token, so that every answer has its full length.
    #[arg(long)]
    ignore_eos: bool,
    /// Ask for whole answers in place of streams.
    #[arg(long)]
    no_stream: bool,
    /// Further members of every request, as a JSON object.
    #[arg(long, value_parser = object, default_value = "{}")]
    extra: Map<String, Value>,
    /// Share of requests whose client disconnects early.
    #[arg(long, default_value_t = 0.0)]
    cancel_rate: f64,
    /// Share of requests whose client reads slowly.
    #[arg(long, default_value_t = 0.0)]
    slow_rate: f64,

    /// A storm of mixed requests, then an audit: nothing runs, all blocks are free, memory is flat. Lasts
    /// --seconds-max.
    #[arg(long)]
    soak: bool,
    /// Process of the server, to report its CPU time and memory.
    #[arg(long)]
    server_pid: Option<u32>,
    /// Two runs with the same seed ask the same things.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the reports to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EndpointName {
    Completions,
    Chat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PromptForm {
    Ids,
    Text,
}

fn range(text: &str) -> Result<(u32, u32), String> {
    let parsed =
        text.split_once("..").and_then(|(first, end)| Some((first.parse().ok()?, end.parse().ok()?)));
    parsed.filter(|(first, end)| first < end).ok_or_else(|| format!("{text:?} is not of the form FIRST..END"))
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// Why the program ends without a report.
#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("the server does not answer as expected ({0})")]
    Server(Failure),
    #[error("{0}")]
    Argument(String),
    #[error("{path}: {source}")]
    Json { path: String, source: std::io::Error },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => tokio::task::LocalSet::new().block_on(&runtime, start(&arguments)),
        Err(error) => Err(Stop::Argument(format!("no event loop: {error}"))),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(stop) => {
            eprintln!("load: {stop}");
            ExitCode::from(2)
        }
    }
}

/// Runs what was asked; true when nothing failed.
async fn start(arguments: &Arguments) -> Result<bool, Stop> {
    let target = Target::parse(&arguments.url, arguments.api_key.clone(), arguments.allow_remote)?;
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => first_model(&mut Client::new(target.clone())).await.map_err(Stop::Server)?,
    };
    let workload = workload(arguments, model)?;
    let (good, reports) = if arguments.soak {
        storm(arguments, &target, &workload).await?
    } else {
        measure(arguments, &target, &workload).await
    };
    if let Some(path) = &arguments.json {
        write_json(path, &reports)
            .map_err(|source| Stop::Json { path: path.display().to_string(), source })?;
    }
    Ok(good)
}

fn write_json(path: &std::path::Path, reports: &[Report]) -> std::io::Result<()> {
    std::fs::write(path, serde_json::to_string_pretty(reports)? + "\n")
}

fn workload(arguments: &Arguments, model: String) -> Result<Workload, Stop> {
    let share = |name: &str, value: f64| {
        let wrong = || Stop::Argument(format!("--{name} {value} is not a share between 0 and 1"));
        if (0.0..=1.0).contains(&value) { Ok(value) } else { Err(wrong()) }
    };
    let positive = |name: &str, value: f64| {
        let wrong = || Stop::Argument(format!("--{name} {value} is not above 0"));
        if value > 0.0 && value.is_finite() { Ok(value) } else { Err(wrong()) }
    };
    positive("speedup", arguments.speedup)?;
    positive("seconds-max", arguments.seconds_max)?;
    positive("request-seconds-max", arguments.request_seconds_max)?;
    for &rate in &arguments.rate {
        positive("rate", rate)?;
    }
    let source = match &arguments.trace {
        Some(path) => Source::Trace {
            arrivals: trace::read(path, arguments.limit)?,
            scale: positive("scale", arguments.scale)?,
            prompt_tokens_max: arguments.prompt_len_max,
            output_tokens_max: arguments.output_len_max,
        },
        None => Source::Drawn {
            prompt: Length {
                tokens: arguments.prompt_len,
                spread: share("prompt-spread", arguments.prompt_spread)?,
            },
            output: Length {
                tokens: arguments.output_len,
                spread: share("output-spread", arguments.output_spread)?,
            },
            shared_prefix_tokens: arguments.shared_prefix_len,
            shared_groups: arguments.shared_groups,
        },
    };
    Ok(Workload {
        seed: arguments.seed,
        model,
        endpoint: match arguments.endpoint {
            EndpointName::Completions => Endpoint::Completions,
            EndpointName::Chat => Endpoint::Chat,
        },
        form: match arguments.prompt {
            PromptForm::Ids => Form::Ids { first: arguments.ids.0, end: arguments.ids.1 },
            PromptForm::Text => Form::Text,
        },
        source,
        temperature: arguments.temperature,
        ignore_eos: arguments.ignore_eos,
        stream: !arguments.no_stream,
        extra: arguments.extra.clone(),
        cancel_rate: share("cancel-rate", arguments.cancel_rate)?,
        slow_rate: share("slow-rate", arguments.slow_rate)?,
        mixed: arguments.soak,
    })
}

/// The runs that were asked for, each with its name and number of requests.
fn paces(arguments: &Arguments, source: &Source) -> Vec<(String, Pace, u64)> {
    let in_flight_max = arguments.in_flight_max;
    let requests = |default: usize| arguments.requests.unwrap_or(default as u64);
    if let Source::Trace { arrivals, .. } = source {
        let pace = Pace::Recorded { speedup: arguments.speedup, in_flight_max };
        return vec![("trace".to_owned(), pace, requests(arrivals.len()))];
    }
    if !arguments.rate.is_empty() {
        let poisson = |&per_second: &f64| {
            (format!("{per_second}/s"), Pace::Poisson { per_second, in_flight_max }, requests(64))
        };
        return arguments.rate.iter().map(poisson).collect();
    }
    let closed = |&workers: &usize| {
        (format!("C={workers}"), Pace::Closed { workers }, requests((3 * workers).max(16)))
    };
    arguments.concurrency.iter().map(closed).collect()
}

async fn measure(arguments: &Arguments, target: &Target, workload: &Workload) -> (bool, Vec<Report>) {
    let bounds = |requests| Bounds {
        requests,
        duration: Duration::from_secs_f64(arguments.seconds_max),
        request: Duration::from_secs_f64(arguments.request_seconds_max),
    };
    println!("{HEADER}");
    let mut reports = Vec::new();
    let mut first_index = 0;
    for (name, pace, requests) in paces(arguments, &workload.source) {
        let warm = Pace::Closed { workers: 1 };
        run(target, workload.clone(), 1 << 40, warm, bounds(arguments.warmup)).await;
        let cpu_before = arguments.server_pid.and_then(cpu_seconds_of);
        let measurement = run(target, workload.clone(), first_index, pace, bounds(requests)).await;
        if arguments.trace.is_none() {
            first_index += requests;
        }
        let report = report(arguments, name, &measurement, cpu_before);
        println!("{}", report.line());
        report.complaints().iter().for_each(|text| eprintln!("  {text}"));
        reports.push(report);
    }
    (reports.iter().all(|report| report.failures.is_empty()), reports)
}

fn report(arguments: &Arguments, name: String, measurement: &Measurement, cpu_before: Option<f64>) -> Report {
    let mut report = Report::new(name, measurement);
    let cpu_after = arguments.server_pid.and_then(cpu_seconds_of);
    report.server_cpu_seconds = cpu_after.zip(cpu_before).map(|(after, before)| after - before);
    report.server_memory = arguments.server_pid.and_then(resident);
    report
}

/// A quarter of the time to warm up, the rest to soak; after each the server must come to rest. Workers that
/// send one request after the other, or a trace, from its beginning each time.
async fn storm(
    arguments: &Arguments,
    target: &Target,
    workload: &Workload,
) -> Result<(bool, Vec<Report>), Stop> {
    let workers = arguments.concurrency.iter().copied().max().unwrap_or(8);
    let (pace, requests) = match &workload.source {
        Source::Drawn { .. } => (Pace::Closed { workers }, u64::MAX),
        Source::Trace { arrivals, .. } => {
            let (speedup, in_flight_max) = (arguments.speedup, arguments.in_flight_max);
            (Pace::Recorded { speedup, in_flight_max }, arrivals.len() as u64)
        }
    };
    let mut workload = workload.clone();
    if arguments.cancel_rate == 0.0 && arguments.slow_rate == 0.0 {
        (workload.cancel_rate, workload.slow_rate) = (0.3, 0.05);
    }
    let mut reports = Vec::new();
    let mut memory = Vec::new();
    let mut complaints = Vec::new();
    println!("{HEADER}");
    for (name, share, first_index) in [("warm-up", 0.25, 0), ("soak", 0.75, 1 << 32)] {
        let bounds = Bounds {
            requests,
            duration: Duration::from_secs_f64(arguments.seconds_max * share),
            request: Duration::from_secs_f64(arguments.request_seconds_max),
        };
        let cpu_before = arguments.server_pid.and_then(cpu_seconds_of);
        let mut measurement = run(target, workload.clone(), first_index, pace, bounds).await;
        // Being cut off at the end of the time is how this run ends.
        measurement.left += measurement.failures.remove(&Failure::CutOff).unwrap_or(0);
        let report = report(arguments, name.to_owned(), &measurement, cpu_before);
        println!("{}   {} left, {} refused as they should", report.line(), report.left, report.refused);
        complaints.extend(report.complaints());
        reports.push(report);
        let mut client = Client::new(target.clone());
        let state = soak::settle(&mut client, Duration::from_secs(20)).await.map_err(Stop::Server)?;
        println!("{name}: {state:?}");
        if !state.is_idle() {
            complaints.push(format!("after {name} the server did not come to rest: {state:?}"));
        }
        tokio::time::sleep(soak::MEMORY_RETURNS).await;
        memory.extend(arguments.server_pid.and_then(resident));
    }
    if let [before, after] = memory[..] {
        println!("memory: {before:?} after warm-up, {after:?} at the end");
        if !soak::memory_is_flat(before, after) {
            complaints.push("memory grew".to_owned());
        }
    } else {
        println!("memory: not looked at (--server-pid names the process)");
    }
    complaints.iter().for_each(|complaint| eprintln!("  {complaint}"));
    Ok((complaints.is_empty(), reports))
}

//! The program: arguments in, reports out. What it does is in the library.

mod serving;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use quayline_kv_cache::evict::PolicyName;
use quayline_simulator::curves::Curves;
use quayline_simulator::prompts::Prompts;
use quayline_simulator::scenario::Crate;
use quayline_simulator::{svg, trace};

/// Recorded traffic and scenarios, run through the crates that decide.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Cache(Cache),
    Serve(Box<serving::Serve>),
    Scenario(Scenario),
}

/// Compares eviction policies on a trace.
///
/// Every prompt of the trace goes through the real cache, one after the other. The tables say which share of
/// blocks, of tokens and of prefill work the cache had, for each policy and size, beside the most that any
/// policy could have (Belady's optimum). The curves are drawn as an SVG.
#[derive(Args)]
struct Cache {
    /// JSON lines in Mooncake's form, with `hash_ids`; plain or gzip.
    trace: PathBuf,
    /// How many blocks the cache keeps; several sizes draw a curve.
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 30),
          default_values_t = [1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000])]
    blocks: Vec<u32>,
    /// Which policies, in this order: lru, leaf-first, slru, arc, cost.
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', default_values_t = PolicyName::ALL)]
    policy: Vec<PolicyName>,
    /// Only the first so many requests.
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    limit: usize,
    /// Where the curves go.
    #[arg(long, value_name = "FILE", default_value = "cache-curves.svg")]
    svg: PathBuf,
}

/// Prints the transcript of a scenario file: its commands with the answers of the crate as it is now.
///
/// The commands are in the documentation of each crate's `scenario` module.
#[derive(Args)]
struct Scenario {
    /// Whose language the file is in.
    #[arg(value_name = "CRATE")]
    of: Of,
    /// The file; "-" reads standard input.
    file: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Of {
    KvCache,
    Batching,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Cache(arguments) => cache(&arguments),
        Command::Serve(arguments) => serving::serve(&arguments).and_then(|text| print(&text)),
        Command::Scenario(arguments) => scenario(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            let _ = writeln!(io::stderr(), "error: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn cache(arguments: &Cache) -> Result<(), String> {
    let Cache { trace: path, blocks, policy, limit, svg } = arguments;
    let arrivals = trace::read(path, *limit).map_err(|error| error.to_string())?;
    let prompts = Prompts::of(&arrivals).map_err(|error| of_file(path, error))?;
    let mut sizes = blocks.clone();
    sizes.sort_unstable();
    sizes.dedup();
    let curves = Curves::of(&prompts, &sizes, policy).map_err(|error| error.to_string())?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    std::fs::write(svg, svg::draw(&curves, &format!("Hit share of blocks: {name}")))
        .map_err(|error| of_file(svg, error))?;
    print(&format!(
        "{name}: {} prompts, {} blocks, {} of them distinct\n\n{}\ncurves: {}\n",
        arrivals.len(),
        prompts.blocks(),
        prompts.distinct_blocks(),
        curves.tables(),
        svg.display(),
    ))
}

fn scenario(arguments: &Scenario) -> Result<(), String> {
    let path = &arguments.file;
    let text =
        if path.as_os_str() == "-" { io::read_to_string(io::stdin()) } else { std::fs::read_to_string(path) };
    let text = text.map_err(|error| of_file(path, error))?;
    let of = match arguments.of {
        Of::KvCache => Crate::KvCache,
        Of::Batching => Crate::Batching,
    };
    print(&of.transcript(&text))
}

fn of_file(path: &Path, error: impl std::fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

/// Whoever closed our output has seen enough.
fn print(text: &str) -> Result<(), String> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(format!("standard output: {error}")),
        _ => Ok(()),
    }
}

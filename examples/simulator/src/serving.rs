//! The arguments of `serve`, and what they come to.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use quayline_batching::{self as batching, Fair, Policy, Prefill, Targets};
use quayline_simulator::comparison::{self, Comparison};
use quayline_simulator::cost::Cost;
use quayline_simulator::gpu::{Gpu, Host};
use quayline_simulator::measured::{self, Meta};
use quayline_simulator::model::Model;
use quayline_simulator::profile::Profile;
use quayline_simulator::serve::{self, Engine};
use quayline_simulator::{spread, tenants, trace};

/// Serves a trace with a simulated engine, in one order or several.
///
/// Requests arrive as the trace says; the real batcher plans every step over the real cache; a cost model says
/// how long each step takes on a GPU. The tables say how long requests waited and how tenants fared, for each
/// order. A trace that is a recorded run of a real engine is set beside it.
#[derive(Args)]
pub(crate) struct Serve {
    /// Mooncake's JSON lines, Azure's CSV or a run of LLMServingSim (`requests.jsonl`); plain or gzip.
    trace: PathBuf,
    /// Who goes first.
    #[arg(long, value_name = "ORDER,ORDER", value_delimiter = ',', default_values_t = [Order::Fcfs], value_enum)]
    order: Vec<Order>,
    /// The GPU: rtx-pro-6000 or rtx-4090, as profiled; a100, h100 or h200, by the data sheet.
    #[arg(long, value_name = "NAME", default_value = "rtx-pro-6000")]
    gpu: Gpu,
    /// Kernel times from which the GPU's constants are fitted instead, in the form of LLMServingSim.
    #[arg(long, value_name = "FOLDER")]
    profile: Option<PathBuf>,
    /// The model: llama-3.1-8b or -70b, qwen3-8b, -14b or -32b, or the path of a config.json [default: llama-3.1-8b].
    #[arg(long, value_name = "NAME")]
    model: Option<Model>,
    /// vLLM's meta.json, for all of the settings that follow; those given here go before it.
    #[arg(long, value_name = "FILE")]
    meta: Option<PathBuf>,
    /// GPUs that the model is split over [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    tensor_parallel: Option<u32>,
    /// Requests that run at once [default: 128].
    #[arg(long, value_name = "N")]
    max_num_seqs: Option<u32>,
    /// Tokens of a step [default: 2048].
    #[arg(long, value_name = "N")]
    max_num_batched_tokens: Option<u32>,
    /// Tokens of a block [default: 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    block_size: Option<u32>,
    /// Blocks of the cache [default: what the GPU has room for beside the weights].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    blocks: Option<u32>,
    /// Share of the memory that may be used, when the blocks are not given [default: 0.9].
    #[arg(long, value_name = "SHARE")]
    memory_utilization: Option<f64>,
    /// Share no prefixes.
    #[arg(long)]
    no_prefix_caching: bool,
    /// Plan a step only when the one before has ended.
    #[arg(long)]
    no_async_scheduling: bool,
    /// Cut prompts into pieces of so many tokens, so that short ones pass.
    #[arg(long, value_name = "N")]
    long_prefill_token_threshold: Option<NonZeroU32>,
    /// How many tenants the requests are drawn for; the kth asks in proportion to 1/k. Lower ones have priority.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    tenants: u32,
    /// The seed of that draw.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// When answers are due, for `deadline`: milliseconds to the first token, and from each to the next.
    #[arg(long, value_name = "TTFT,TPOT", value_delimiter = ',', num_args = 1, default_values_t = [2000, 50])]
    targets: Vec<u32>,
    /// Only the first so many requests.
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    limit: usize,
    /// Let requests come so many times as fast as they came.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    speed: f64,
    /// Where the picture goes; without it there is none.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Who goes first.
#[derive(Clone, Copy, ValueEnum)]
enum Order {
    /// First come, first served.
    Fcfs,
    /// Lower tenants first.
    Priority,
    /// Whose next token is due first.
    Deadline,
    /// Who has the fewest tokens left to generate; their number is taken from the trace.
    Shortest,
    /// Who has most of its prompt in the cache.
    Prefix,
    /// Tenants get equal shares of tokens.
    Fair,
}

impl Order {
    fn policy(self) -> Policy {
        match self {
            Order::Fcfs => Policy::FirstCome,
            Order::Priority => Policy::Priority,
            Order::Deadline => Policy::Deadline,
            Order::Shortest => Policy::ShortestJob,
            Order::Prefix => Policy::LongestPrefix { lookups_max: 16 },
            Order::Fair => Policy::Fair(Fair::new()),
        }
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().expect("every order has a name").get_name())
    }
}

/// Runs what the arguments say and returns the report.
pub(crate) fn serve(arguments: &Serve) -> Result<String, String> {
    let measured = measured::read(&arguments.trace, arguments.limit)?;
    let mut arrivals = match &measured {
        Some(measured) => measured.arrivals.clone(),
        None => trace::read(&arguments.trace, arguments.limit).map_err(|error| error.to_string())?,
    };
    if !(arguments.speed > 0.0 && arguments.speed.is_finite()) {
        return Err("--speed is a positive number".to_owned());
    }
    for arrival in &mut arrivals {
        arrival.at = arrival.at.div_f64(arguments.speed);
    }
    let engine = arguments.engine()?;
    let owners = tenants::draw(arrivals.len(), arguments.tenants, arguments.seed);
    let mut comparison = Comparison::default();
    let start = Instant::now();
    for order in &arguments.order {
        let report = serve::serve(&engine, order.policy(), &arrivals, &owners)?;
        comparison.add(&order.to_string(), report);
    }
    let rate = (arrivals.len() * arguments.order.len()) as f64 / start.elapsed().as_secs_f64();
    let name = arguments.trace.file_name().unwrap_or_default().to_string_lossy();
    let mut text = format!(
        "{name}: {} requests, {} blocks of {} tokens, at most {} requests and {} tokens in a step\n\n{comparison}",
        arrivals.len(),
        engine.blocks,
        engine.block_tokens,
        engine.batching.running_max,
        engine.batching.step_tokens_max,
    );
    if let (Some(measured), [(order, report, _), ..]) = (&measured, &*comparison.runs) {
        text.push_str(&format!("\n{order}, from the engine's queue on, beside the recorded run\n"));
        text.push_str(&comparison::beside(measured, report));
    }
    text.push_str(&format!("\nsimulated {rate:.0} requests in a second of wall time\n"));
    if let Some(path) = &arguments.svg {
        std::fs::write(path, spread::draw(&comparison, &format!("Waiting by order: {name}")))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        text.push_str(&format!("picture: {}\n", path.display()));
    }
    Ok(text)
}

impl Serve {
    fn engine(&self) -> Result<Engine, String> {
        let meta = self.meta.as_deref().map_or_else(|| Ok(Meta::default()), Meta::read)?;
        let (asked, found) = (&meta.engine_kwargs, &meta.kv_cache);
        let cost = self.cost(&meta)?;
        let block_tokens = self.block_size.or(found.block_size).unwrap_or(16);
        if block_tokens == 0 {
            return Err("a block of no tokens holds nothing".to_owned());
        }
        let utilization = self.memory_utilization.or(found.gpu_memory_utilization).unwrap_or(0.9);
        // One of the blocks that vLLM counts is its null block.
        let recorded = found.num_gpu_blocks.map(|blocks| blocks.saturating_sub(1));
        let blocks = match self.blocks.or(recorded) {
            Some(blocks) => blocks,
            None => blocks_beside_the_weights(&cost, block_tokens, utilization)?,
        };
        let chunked = meta.chunked_prefill().unwrap_or(true);
        let prefill = match self.long_prefill_token_threshold {
            Some(tokens_max) => Prefill::Capped { tokens_max, adaptive: false },
            None if chunked => Prefill::Chunked,
            None => Prefill::Whole,
        };
        let ahead = !self.no_async_scheduling && meta.async_scheduling().unwrap_or(true);
        let &[first, next] = &*self.targets else { return Err("--targets are two numbers".to_owned()) };
        Ok(Engine {
            batching: batching::Config {
                step_tokens_max: self.max_num_batched_tokens.or(asked.max_num_batched_tokens).unwrap_or(2048),
                running_max: self.max_num_seqs.or(asked.max_num_seqs).unwrap_or(128),
                prefill,
                outputs_ahead: u32::from(ahead),
                ..batching::Config::new(2)
            },
            block_tokens,
            blocks,
            prefix_caching: !self.no_prefix_caching && found.enable_prefix_caching.unwrap_or(true),
            targets: Targets { first_token_ticks: nanoseconds(first), token_ticks: nanoseconds(next) },
            cost,
        })
    }

    fn cost(&self, meta: &Meta) -> Result<Cost, String> {
        let named = || meta.model.as_deref().map_or(Ok(Model::LLAMA_3_1_8B), str::parse);
        let model = self.model.clone().map_or_else(named, Ok)?;
        let ranks = self.tensor_parallel.or(meta.engine_kwargs.tensor_parallel_size).unwrap_or(1).max(1);
        let mut gpu = match &self.profile {
            Some(folder) => Profile::read(folder, &model, ranks)?
                .gpu(&self.gpu)
                .map_err(|why| format!("{}: {why}", folder.display()))?,
            None => self.gpu.clone(),
        };
        gpu.memory_bytes = meta.memory_bytes().map_or(gpu.memory_bytes, |bytes| bytes as f64);
        Ok(Cost { model, gpu, ranks, host: Host::VLLM })
    }
}

fn blocks_beside_the_weights(cost: &Cost, block_tokens: u32, utilization: f64) -> Result<u32, String> {
    let blocks = cost.blocks(block_tokens, utilization);
    if !(1.0..f64::from(1 << 30)).contains(&blocks) {
        return Err("beside the weights the memory has no room for blocks".to_owned());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range")]
    Ok(blocks as u32)
}

fn nanoseconds(milliseconds: u32) -> u64 {
    u64::from(milliseconds) * 1_000_000
}

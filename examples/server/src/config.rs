//! The command line: vLLM's names for what exists here, a clear refusal for what does not.

use std::ffi::OsString;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

use clap::{ArgAction, CommandFactory, Parser, ValueEnum};
use quayline_engine::{GenerationConfig, KvDtype, KvSize, LoadError, ModelFiles, Options, Order, Rounding};
use serde_json::{Map, Value};

use crate::foreign;
use crate::offloading::OffloadingFlags;
use crate::residency::ResidencyFlags;
use crate::speculative::SpeculativeConfig;
use crate::transfer::{TransferConfig, Transfers};

/// Serves a language model over the OpenAI API.
#[derive(Debug, Clone, Parser)]
#[command(name = "quayline-server", version, args_override_self = true)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch on the command line")]
pub(crate) struct Flags {
    /// Directory of the model in Hugging Face form. Without it, the model that is part of this program
    #[arg(value_name = "MODEL")]
    positional: Option<PathBuf>,
    /// The same, by name
    #[arg(long, conflicts_with = "positional")]
    model: Option<PathBuf>,
    /// Names under which the model is served; the first is the one in answers and metrics
    #[arg(long, num_args = 1..)]
    served_model_name: Vec<String>,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1", help_heading = "Network")]
    pub(crate) host: String,
    /// Port to listen on; 0 lets the system choose
    #[arg(long, default_value_t = 8000, help_heading = "Network")]
    pub(crate) port: u16,
    /// Listen on this Unix socket instead
    #[arg(long, help_heading = "Network")]
    pub(crate) uds: Option<PathBuf>,
    /// Keys that open /v1; any one will do. VLLM_API_KEY adds one
    #[arg(long, num_args = 1.., help_heading = "Network", hide_env_values = true)]
    api_key: Vec<String>,
    /// Further key, from the environment
    #[arg(long = "api-key-from-environment", env = "VLLM_API_KEY", hide = true, hide_env_values = true)]
    api_key_environment: Option<String>,
    /// Path under which a proxy publishes this server
    #[arg(long, default_value = "", help_heading = "Network")]
    pub(crate) root_path: String,
    /// Origins that browsers may call from, as a JSON list
    #[arg(long, default_value = r#"["*"]"#, value_parser = json::<Vec<String>>, help_heading = "Network")]
    pub(crate) allowed_origins: std::vec::Vec<String>,
    /// Largest request body in bytes
    #[arg(long, default_value_t = 8 << 20, value_parser = count_usize, help_heading = "Network")]
    pub(crate) max_body_bytes: usize,
    /// Seconds that running requests may take after SIGTERM
    #[arg(long, default_value_t = 30, help_heading = "Network")]
    pub(crate) shutdown_timeout: u64,
    /// Seconds between comments on a silent stream; 0 sends none
    #[arg(long, default_value_t = 0, help_heading = "Network")]
    pub(crate) sse_keep_alive_interval: u64,
    /// Paths, comma separated, that are not written to the access log
    #[arg(long, value_delimiter = ',', help_heading = "Network")]
    pub(crate) disable_access_log_for_endpoints: Vec<String>,
    /// Put X-Request-Id on every answer
    #[arg(long, help_heading = "Network")]
    pub(crate) enable_request_id_headers: bool,
    /// Count running requests for /load
    #[arg(long, help_heading = "Network")]
    pub(crate) enable_server_load_tracking: bool,

    /// Report cached tokens in `usage`
    #[arg(long, help_heading = "Answers")]
    pub(crate) enable_prompt_tokens_details: bool,
    /// Report usage at the end of every stream, asked for or not
    #[arg(long, help_heading = "Answers")]
    pub(crate) enable_force_include_usage: bool,
    /// A chat template in place of the model's: a file, or the template itself
    #[arg(long, help_heading = "Answers")]
    chat_template: Option<String>,
    /// How message contents reach the template
    #[arg(long, value_enum, default_value_t = ContentFormat::Auto, help_heading = "Answers")]
    pub(crate) chat_template_content_format: ContentFormat,
    /// Variables for the chat template, as a JSON object; a request may override them
    #[arg(long, value_parser = json::<Map<String, Value>>, help_heading = "Answers")]
    pub(crate) default_chat_template_kwargs: Option<Map<String, Value>>,
    /// Let requests bring their own chat template
    #[arg(long, help_heading = "Answers")]
    pub(crate) trust_request_chat_template: bool,
    /// Where sampling defaults come from: `auto` is the model, `vllm` none, or a directory
    #[arg(long, default_value = "auto", help_heading = "Answers")]
    generation_config: String,
    /// Sampling defaults that come first, as a JSON object
    #[arg(long, value_parser = json::<Map<String, Value>>, help_heading = "Answers")]
    override_generation_config: Option<Map<String, Value>>,
    /// Most log-probabilities per token that a request may ask for
    #[arg(long, default_value_t = 20, help_heading = "Answers")]
    pub(crate) max_logprobs: u32,
    /// Seeds requests that bring no seed
    #[arg(long, default_value_t = 0, help_heading = "Answers")]
    seed: u64,

    /// Longest sequence, prompt and answer together; the default is the model's own limit
    #[arg(long, value_parser = context, help_heading = "Engine")]
    max_model_len: Option<Context>,
    /// Most requests in one step
    #[arg(long, value_parser = count_u32, help_heading = "Engine")]
    max_num_seqs: Option<u32>,
    /// Most tokens in one step
    #[arg(long, value_parser = count_u32, help_heading = "Engine")]
    max_num_batched_tokens: Option<u32>,
    /// Most prompt tokens in a step in which somebody generates; 0 is no limit
    #[arg(long, value_parser = count_u32, help_heading = "Engine")]
    mixed_prefill_tokens: Option<u32>,
    /// Spread a long prompt over several steps (the default)
    #[arg(long, overrides_with = "no_enable_chunked_prefill", help_heading = "Engine")]
    enable_chunked_prefill: bool,
    /// Run each prompt in one step
    #[arg(long, help_heading = "Engine")]
    no_enable_chunked_prefill: bool,
    /// Most prompt tokens of one request in one step; 0 is no limit
    #[arg(long, value_parser = count_u32, help_heading = "Engine")]
    long_prefill_token_threshold: Option<u32>,
    /// Reuse the cache of equal beginnings (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching", help_heading = "Engine")]
    enable_prefix_caching: bool,
    /// Compute every prompt anew
    #[arg(long, help_heading = "Engine")]
    no_enable_prefix_caching: bool,
    /// Tokens per cache block
    #[arg(long, help_heading = "Engine")]
    block_size: Option<NonZeroU32>,
    /// Integers to which the matrices are rounded when they are loaded; checkpoints of AWQ and GPTQ bring theirs
    #[arg(long, short = 'q', value_enum, help_heading = "Engine")]
    quantization: Option<Quantization>,
    /// Number format of cached keys and values
    #[arg(long, value_enum, default_value_t = CacheDtype::Auto, help_heading = "Engine")]
    kv_cache_dtype: CacheDtype,
    /// Bytes for cached keys and values: 512M, 2G
    #[arg(long, value_parser = count_u64, conflicts_with = "num_gpu_blocks_override", help_heading = "Engine")]
    kv_cache_memory_bytes: Option<u64>,
    /// Number of cache blocks
    #[arg(long, value_parser = count_u32, help_heading = "Engine")]
    num_gpu_blocks_override: Option<u32>,
    /// Who runs first
    #[arg(long, value_enum, default_value_t = Policy::Fcfs, help_heading = "Engine")]
    scheduling_policy: Policy,
    /// Draft likely tokens from the text so far, and verify several in one step:
    /// {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    #[arg(long, value_parser = json::<SpeculativeConfig>, value_name = "JSON", help_heading = "Engine")]
    speculative_config: Option<SpeculativeConfig>,
    /// Plan the next step while one computes
    #[arg(long, help_heading = "Engine")]
    async_scheduling: bool,
    /// Plan a step when the one before it is done (the default)
    #[arg(long, overrides_with = "async_scheduling", help_heading = "Engine")]
    no_async_scheduling: bool,
    /// Most requests that may wait; more get 429
    #[arg(long, default_value_t = 4096, value_parser = count_u32, help_heading = "Engine")]
    max_num_queued_reqs: u32,
    /// Most prompt tokens that may wait; more get 429
    #[arg(long, default_value_t = 8 << 20, value_parser = count_u64, help_heading = "Engine")]
    max_num_queued_tokens: u64,
    /// Threads for the arithmetic; the default is one per core
    #[arg(long, help_heading = "Engine")]
    threads: Option<NonZeroUsize>,
    /// Where the arithmetic runs
    #[arg(long, value_enum, default_value_t = Device::Cpu, help_heading = "Engine")]
    device: Device,
    /// Number format of the arithmetic: the weights decide
    #[arg(long, value_enum, default_value_t = Dtype::Auto, help_heading = "Engine")]
    dtype: Dtype,
    /// Devices to spread the model over: one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1), help_heading = "Engine")]
    tensor_parallel_size: u32,

    /// Read prompts for other servers, or let others read them:
    /// {"kv_connector": "HttpConnector", "kv_role": "kv_both"}
    #[arg(long, value_parser = json::<TransferConfig>, value_name = "JSON", help_heading = "Engine")]
    kv_transfer_config: Option<TransferConfig>,
    #[command(flatten)]
    residency: ResidencyFlags,
    #[command(flatten)]
    offloading: OffloadingFlags,

    /// Routes for testing (/reset_prefix_cache) and audits while idle
    #[arg(long = "server-dev-mode", env = "VLLM_SERVER_DEV_MODE", value_parser = switch, default_value = "0",
        action = ArgAction::Set, hide = true)]
    pub(crate) dev_mode: bool,
}

/// How message contents reach the chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ContentFormat {
    /// Text parts joined to one string.
    Auto,
    /// The same.
    String,
    /// Every content as a list of parts.
    Openai,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Quantization {
    /// Half of the bytes to read for each token, at next to no cost in quality.
    Int8,
    /// A quarter of the bytes, at some.
    Int4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheDtype {
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(name = "bfloat16", alias = "bf16")]
    Bf16,
    #[value(name = "float16", alias = "f16", alias = "half")]
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Policy {
    Fcfs,
    Priority,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    Cpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Auto,
}

/// Why there is no server, with options as they are typed.
pub(crate) fn explain(error: &LoadError) -> String {
    match error {
        LoadError::Options { option, problem } => format!("--{}: {problem}", option.replace('_', "-")),
        error => error.to_string(),
    }
}

/// Sampling defaults of the server, below what a request says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Defaults {
    pub(crate) generation: GenerationConfig,
}

impl Flags {
    /// Reads a command line. The first argument is the program's name.
    ///
    /// # Errors
    /// What is wrong with it, ready to be shown; also `--help` and `--version`.
    pub(crate) fn parse_from_command_line(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, clap::Error> {
        let arguments: Vec<OsString> = arguments.into_iter().map(with_dashes).collect();
        if let Some(flag) = arguments.iter().skip(1).find_map(|argument| foreign::flag(argument.to_str()?)) {
            let message =
                format!("{flag} is an option of vLLM that this server does not have; leave it out\n");
            return Err(Self::command().error(clap::error::ErrorKind::UnknownArgument, message));
        }
        Self::try_parse_from(arguments)
    }

    /// The checkpoint to serve.
    ///
    /// # Errors
    /// When the directory is not there or holds no model.
    pub(crate) fn files(&self) -> Result<ModelFiles, LoadError> {
        match self.positional.as_ref().or(self.model.as_ref()) {
            Some(directory) => ModelFiles::open(directory),
            None => Ok(ModelFiles::bundled()),
        }
    }

    /// The names the model answers to; at least one.
    pub(crate) fn names(&self, files: &ModelFiles) -> Vec<String> {
        if self.served_model_name.is_empty() {
            // vLLM's default is the argument as typed, which clients then send back.
            let typed = self.positional.as_ref().or(self.model.as_ref());
            vec![typed.map_or_else(|| files.name().to_owned(), |path| path.display().to_string())]
        } else {
            self.served_model_name.clone()
        }
    }

    /// Every key that opens the API; none leaves it open.
    pub(crate) fn keys(&self) -> Vec<&str> {
        let environment = self.api_key_environment.iter();
        self.api_key.iter().chain(environment).map(String::as_str).filter(|key| !key.is_empty()).collect()
    }

    /// What the engine is told.
    pub(crate) fn options(&self) -> Options {
        let base = Options::default();
        let max_num_seqs = self.max_num_seqs.unwrap_or(base.max_num_seqs);
        let kv = match (self.num_gpu_blocks_override, self.kv_cache_memory_bytes) {
            (Some(blocks), _) => KvSize::Blocks(blocks),
            (None, Some(bytes)) => KvSize::Bytes(bytes),
            (None, None) => KvSize::Auto,
        };
        let options = Options {
            block_size: self.block_size.unwrap_or(base.block_size),
            quantization: self.quantization.map(|to| match to {
                Quantization::Int8 => Rounding::Int8,
                Quantization::Int4 => Rounding::Int4,
            }),
            kv,
            kv_dtype: match self.kv_cache_dtype {
                CacheDtype::Auto => KvDtype::Auto,
                CacheDtype::F32 => KvDtype::F32,
                CacheDtype::Bf16 => KvDtype::Bf16,
                CacheDtype::F16 => KvDtype::F16,
            },
            max_model_len: self.max_model_len.and_then(|context| context.0),
            max_num_seqs,
            // A step has room for a token of everybody.
            max_num_batched_tokens: self
                .max_num_batched_tokens
                .unwrap_or(base.max_num_batched_tokens.max(max_num_seqs)),
            mixed_prefill_tokens: self.mixed_prefill_tokens.unwrap_or(base.mixed_prefill_tokens),
            chunked_prefill: !self.no_enable_chunked_prefill,
            long_prefill_token_threshold: self
                .long_prefill_token_threshold
                .unwrap_or(base.long_prefill_token_threshold),
            prefix_caching: !self.no_enable_prefix_caching,
            order: match self.scheduling_policy {
                Policy::Fcfs => Order::FirstCome,
                Policy::Priority => Order::Priority,
            },
            async_scheduling: self.async_scheduling,
            speculation: self.speculative_config.map(SpeculativeConfig::speculation),
            residency_every: self.residency.every(),
            max_queued_requests: Some(self.max_num_queued_reqs),
            max_queued_tokens: Some(self.max_num_queued_tokens),
            threads: self.threads,
            seed: self.seed,
            ..base
        };
        let options = self.offloading.add_to(options);
        self.kv_transfer_config.iter().fold(options, |options, transfer| transfer.add_to(options))
    }

    /// This server's end of transfers, if it has one.
    pub(crate) fn transfers(&self) -> Option<Transfers> {
        let config = self.kv_transfer_config.clone()?;
        Some(Transfers::new(config, &self.host, self.port))
    }

    /// Sampling defaults: `--override-generation-config` over `--generation-config`.
    ///
    /// # Errors
    /// When a file or a value of them is wrong.
    pub(crate) fn defaults(&self, files: &ModelFiles) -> Result<Defaults, LoadError> {
        const FILE: &str = "generation_config.json";
        let (directory, fields) = match self.generation_config.as_str() {
            "auto" => (files.directory(), files.json(FILE)?),
            "vllm" => (None, None),
            directory => (Some(Path::new(directory)), ModelFiles::open(directory)?.json(FILE)?),
        };
        let read = |fields: &Map<String, Value>, source: &Path| {
            GenerationConfig::from_json(fields).map_err(|error| LoadError::Invalid {
                file: source.display().to_string(),
                problem: error.to_string(),
            })
        };
        let mut fields = fields.unwrap_or_default();
        read(&fields, &directory.unwrap_or(Path::new("")).join(FILE))?;
        fields.extend(self.override_generation_config.clone().unwrap_or_default());
        Ok(Defaults { generation: read(&fields, Path::new("--override-generation-config"))? })
    }

    /// The chat template that replaces the model's.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn template(&self) -> Result<Option<String>, LoadError> {
        let Some(given) = &self.chat_template else { return Ok(None) };
        if given.contains("{{") || given.contains("{%") || given.contains('\n') {
            return Ok(Some(given.clone()));
        }
        let read = std::fs::read_to_string(given);
        read.map(Some).map_err(|source| LoadError::Read { path: given.into(), source })
    }

    /// Whether requests may jump the queue.
    pub(crate) fn by_priority(&self) -> bool {
        self.scheduling_policy == Policy::Priority
    }
}

/// `--max_model_len` is as good as `--max-model-len`; values keep their underscores.
fn with_dashes(argument: OsString) -> OsString {
    let Some(text) = argument.to_str().filter(|text| text.starts_with("--")) else { return argument };
    match text.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")).into(),
        None => text.replace('_', "-").into(),
    }
}

/// `--max-model-len auto` and `-1` mean the model's own limit.
#[derive(Debug, Clone, Copy)]
struct Context(Option<u32>);

fn context(text: &str) -> Result<Context, String> {
    match text {
        "auto" | "-1" => Ok(Context(None)),
        text => count_u32(text).map(|tokens| Context(Some(tokens))),
    }
}

/// A count as vLLM reads it: `4096`, `4k` is 4000, `4K` is 4096, `1.5G`.
fn count_u64(text: &str) -> Result<u64, String> {
    const UNITS: [(char, u64); 8] = [
        ('k', 1000),
        ('m', 1_000_000),
        ('g', 1_000_000_000),
        ('t', 1_000_000_000_000),
        ('K', 1 << 10),
        ('M', 1 << 20),
        ('G', 1 << 30),
        ('T', 1 << 40),
    ];
    let unit = UNITS.iter().find(|(letter, _)| text.ends_with(*letter));
    let Some((letter, factor)) = unit else {
        return text.parse().map_err(|_| format!("{text:?} is not a count; 4096, 4k and 4K are"));
    };
    let number: f64 =
        text.trim_end_matches(*letter).parse().map_err(|_| format!("{text:?} is not a count"))?;
    let value = number * *factor as f64;
    if !(0.0..=1e15).contains(&value) || value.fract() != 0.0 {
        return Err(format!("{text:?} is not a whole count up to 1000t"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole, checked above")]
    Ok(value as u64)
}

fn count_u32(text: &str) -> Result<u32, String> {
    u32::try_from(count_u64(text)?).map_err(|_| format!("{text} is above {}", u32::MAX))
}

fn count_usize(text: &str) -> Result<usize, String> {
    usize::try_from(count_u64(text)?).map_err(|_| format!("{text} is above {}", usize::MAX))
}

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| format!("not the JSON expected here: {error}"))
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" | "" => Ok(false),
        other => Err(format!("{other:?} is neither 0 nor 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, String> {
        let arguments = std::iter::once("quayline-server").chain(line.split_whitespace());
        Flags::parse_from_command_line(arguments.map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_typical_vllm_command_line_is_understood() {
        let flags = parse(
            "/models/a --served-model-name a b --port 9000 --max-model-len 4K --max_num_seqs=8 \
             --no-enable-prefix-caching --kv-cache-memory-bytes 1G --dtype auto --tensor-parallel-size 1",
        )
        .unwrap();
        let options = flags.options();
        assert_eq!(flags.port, 9000);
        assert_eq!(flags.served_model_name, ["a", "b"]);
        assert_eq!(options.max_model_len, Some(4096));
        assert_eq!(options.max_num_seqs, 8);
        assert_eq!(options.kv, KvSize::Bytes(1 << 30));
        assert!(!options.prefix_caching);
        assert!(options.chunked_prefill);
    }

    #[test]
    fn the_later_of_a_switch_and_its_opposite_wins() {
        let on = parse("--no-enable-chunked-prefill --enable-chunked-prefill").unwrap();
        assert!(on.options().chunked_prefill);
        let on = parse("--no-async-scheduling --async-scheduling").unwrap();
        assert!(on.options().async_scheduling);
        let off = parse("--async-scheduling --no-async-scheduling").unwrap();
        assert!(!off.options().async_scheduling);
    }

    #[test]
    fn an_unknown_flag_names_the_nearest() {
        let error = parse("--max-num-seq 4").unwrap_err();
        assert!(error.contains("--max-num-seqs"), "{error}");
    }

    #[test]
    fn a_flag_of_vllm_that_is_missing_here_says_so() {
        for line in ["--enable-lora", "--gpu_memory_utilization 0.9", "--compilation-config=3"] {
            let error = parse(line).unwrap_err();
            assert!(error.contains("is an option of vLLM that this server does not have"), "{error}");
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        for line in [
            "--tensor-parallel-size 2",
            "--quantization awq",
            "--dtype float16",
            "--device cuda",
            "--port 70000",
            "--block-size 0",
            "--max-model-len 4.5",
            "--max-num-seqs 99999999999",
            "--allowed-origins *",
            "--kv-cache-memory-bytes 1G --num-gpu-blocks-override 9",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn counts_read_as_vllm_reads_them() {
        assert_eq!(count_u64("1k"), Ok(1000));
        assert_eq!(count_u64("1K"), Ok(1024));
        assert_eq!(count_u64("1.5G"), Ok(3 << 29));
        assert!(count_u64("1.0001K").is_err());
        assert!(count_u64("-1").is_err());
        assert!(count_u64("1e400G").is_err());
    }
}

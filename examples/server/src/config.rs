//! The command line: vLLM's names for what exists here, a clear refusal for what does not.

mod answers;
mod engine;
mod network;
mod parse;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, CommandFactory, Parser};
use quayline_engine::{LoadError, ModelFiles, Options};

use self::answers::AnswerFlags;
pub(crate) use self::answers::{ContentFormat, Defaults};
use self::engine::EngineFlags;
use self::network::NetworkFlags;
pub(crate) use self::parse::{json, switch};
use crate::foreign;
use crate::kv_events::KvEventsFlags;
use crate::offloading::OffloadingFlags;
use crate::order::OrderFlags;
use crate::residency::ResidencyFlags;
use crate::transfer::{TransferConfig, Transfers};

/// Serves a language model over the OpenAI API.
#[derive(Debug, Clone, Parser)]
#[command(name = "quayline-server", version, args_override_self = true)]
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

    #[command(flatten)]
    pub(crate) network: NetworkFlags,
    #[command(flatten)]
    pub(crate) answers: AnswerFlags,
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    pub(crate) order: OrderFlags,
    /// Read prompts for other servers, or let others read them:
    /// {"kv_connector": "HttpConnector", "kv_role": "kv_both"}
    #[arg(long, value_parser = json::<TransferConfig>, value_name = "JSON", help_heading = "Engine")]
    kv_transfer_config: Option<TransferConfig>,
    #[command(flatten)]
    residency: ResidencyFlags,
    #[command(flatten)]
    offloading: OffloadingFlags,
    #[command(flatten)]
    pub(crate) kv_events: KvEventsFlags,

    /// Routes for testing (/reset_prefix_cache) and audits while idle
    #[arg(long = "server-dev-mode", env = "VLLM_SERVER_DEV_MODE", value_parser = switch, default_value = "0",
        action = ArgAction::Set, hide = true)]
    pub(crate) dev_mode: bool,
}

/// Why there is no server, with options as they are typed.
pub(crate) fn explain(error: &LoadError) -> String {
    match error {
        LoadError::Options { option, problem } => format!("--{}: {problem}", option.replace('_', "-")),
        error => error.to_string(),
    }
}

impl Flags {
    /// Reads a command line. The first argument is the program's name.
    ///
    /// # Errors
    /// What is wrong with it, ready to be shown; also `--help` and `--version`.
    pub(crate) fn parse_from_command_line(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> Result<Self, clap::Error> {
        let idle = |argument: &OsString| argument.to_str().is_some_and(foreign::is_idle);
        let arguments = arguments.into_iter().map(with_dashes).filter(|argument| !idle(argument));
        let arguments: Vec<OsString> = arguments.collect();
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

    /// Every key that opens the API, and the tenant whose it is; none leaves it open.
    pub(crate) fn keys(&self) -> Vec<(&str, Option<&str>)> {
        let owned = self.order.tenants().keys().map(|(key, tenant)| (key, Some(tenant)));
        owned.chain(self.network.keys().into_iter().map(|key| (key, None))).collect()
    }

    /// What the engine is told.
    pub(crate) fn options(&self) -> Options {
        let options = Options {
            residency_every: self.residency.every(),
            seed: self.answers.seed,
            ..self.engine.options()
        };
        let options = self.kv_events.add_to(self.offloading.add_to(self.order.add_to(options)));
        self.kv_transfer_config.iter().fold(options, |options, transfer| transfer.add_to(options))
    }

    /// This server's end of transfers, if it has one.
    pub(crate) fn transfers(&self) -> Option<Transfers> {
        let config = self.kv_transfer_config.clone()?;
        Some(Transfers::new(config, &self.network.host, self.network.port))
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

#[cfg(test)]
mod tests {
    use quayline_engine::{CublasLtPlace, HashAlgorithm, KvSize, Policy, Rounding};

    use super::*;

    fn parse(line: &str) -> Result<Flags, String> {
        let arguments = std::iter::once("quayline-server").chain(line.split_whitespace());
        Flags::parse_from_command_line(arguments.map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_typical_vllm_command_line_is_understood() {
        let flags = parse(
            "/models/a --served-model-name a b --port 9000 --max-model-len 4K --max_num_seqs=8 \
             --no-enable-prefix-caching --kv-cache-memory-bytes 1G --dtype auto --device cuda --tensor-parallel-size 1 \
             --gpu_memory_utilization 0.8",
        )
        .unwrap();
        let options = flags.options();
        assert!((options.gpu_memory_utilization - 0.8).abs() < 1e-9);
        assert_eq!(flags.network.port, 9000);
        assert_eq!(flags.served_model_name, ["a", "b"]);
        assert_eq!(options.max_model_len, Some(4096));
        assert_eq!(options.max_num_seqs, 8);
        assert_eq!(options.device, quayline_engine::Device::Cuda);
        assert_eq!(options.kv, KvSize::Bytes(1 << 30));
        assert!(!options.prefix_caching);
        assert!(options.chunked_prefill);
    }

    #[test]
    fn a_library_for_products_is_the_machines_or_a_file() {
        let place = |line| parse(line).unwrap().options().cublaslt;
        assert_eq!(place("/models/a"), None);
        // A path behind it is the model's.
        let flags = parse("--device cuda --cublaslt /models/a").unwrap();
        assert_eq!(flags.options().cublaslt, Some(CublasLtPlace::Installed));
        assert_eq!(flags.positional, Some("/models/a".into()));
        let file = CublasLtPlace::File("/models/libcublasLt.so.13".into());
        assert_eq!(place("--cublaslt=/models/libcublasLt.so.13"), Some(file));
    }

    #[test]
    fn hashes_have_vllms_names() {
        let hash = |line| parse(line).map(|flags| flags.options().hash);
        assert_eq!(hash(""), Ok(HashAlgorithm::Xxh3));
        assert_eq!(hash("--prefix-caching-hash-algo sha256"), Ok(HashAlgorithm::VllmSha256));
        assert_eq!(hash("--prefix_caching_hash_algo sha256_cbor"), Ok(HashAlgorithm::VllmSha256Cbor));
        assert_eq!(hash("--prefix-caching-hash-algo xxhash_cbor"), Ok(HashAlgorithm::VllmXxhashCbor));
        assert!(hash("--prefix-caching-hash-algo md5").unwrap_err().contains("sha256_cbor"));
    }

    #[test]
    fn number_formats_have_vllms_names() {
        let options = |line: &str| parse(line).unwrap().options();
        assert_eq!(options("--quantization fp8").quantization, Some(Rounding::Fp8));
        let methods = ["awq", "awq_marlin", "gptq", "compressed-tensors"].map(|name| {
            options(&format!("--quantization {name}")).quantization_method.map(|method| method.name())
        });
        assert_eq!(methods, ["awq", "awq", "gptq", "compressed-tensors"].map(Some));
        assert_eq!(options("--dtype auto").dtype, None);
        let types = ["half", "float16", "bfloat16", "float", "float32"]
            .map(|name| options(&format!("--dtype {name}")).dtype.unwrap().to_string());
        assert_eq!(types, ["f16", "f16", "bf16", "f32", "f32"]);
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
    fn every_order_has_its_name() {
        let order = |line| parse(line).unwrap().options().order;
        assert_eq!(order(""), Policy::FirstCome);
        assert_eq!(order("--scheduling-policy priority"), Policy::Priority);
        assert_eq!(order("--scheduling-policy deadline --slo-ttft-ms 9.5"), Policy::Deadline);
        assert_eq!(order("--scheduling-policy sjf"), Policy::ShortestJob);
        assert!(matches!(order("--scheduling-policy lpm"), Policy::LongestPrefix { lookups_max: 1.. }));
        assert_eq!(order("--scheduling-policy fair"), Policy::fair());
        assert_ne!(order(r#"--scheduling-policy fair --tenants {"a":{"weight":2}}"#), Policy::fair());
        assert_eq!(parse("--scheduling-patience 3").unwrap().options().patience_ticks, Some(3_000_000));
    }

    #[test]
    fn an_unknown_flag_names_the_nearest() {
        let error = parse("--max-num-seq 4").unwrap_err();
        assert!(error.contains("--max-num-seqs"), "{error}");
    }

    #[test]
    fn a_flag_of_vllm_that_is_missing_here_says_so() {
        for line in ["--enable-lora", "--cpu_offload_gb 1", "--compilation-config=3"] {
            let error = parse(line).unwrap_err();
            assert!(error.contains("is an option of vLLM that this server does not have"), "{error}");
        }
    }

    #[test]
    fn what_turns_off_what_is_not_here_is_taken() {
        for line in [
            "--disable-log-requests",
            "--disable_log_requests --port 9000",
            "--no-enable-log-requests",
            "--no-enable-log-outputs --no-enable-log-deltas",
            "--disable-log-stats",
            "--no-enable-lora",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in ["--enable-log-requests", "--no-enforce-eager", "--no-enable-thinking", "--port"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn impossible_values_are_refused() {
        for line in [
            "--tensor-parallel-size 2",
            "--quantization gguf",
            "--dtype float8",
            "--device tpu",
            "--port 70000",
            "--block-size 0",
            "--max-model-len 4.5",
            "--max-num-seqs 99999999999",
            "--allowed-origins *",
            r#"--allowed-origins ["a\u0000b"]"#,
            r#"--override-generation-config {"temprature":1}"#,
            "--threads 0",
            "--scheduling-policy fairest",
            "--slo-ttft-ms 0",
            "--slo-ttft-ms NaN",
            "--slo-tpot-ms -1",
            "--scheduling-patience -1",
            "--kv-cache-memory-bytes 1G --num-gpu-blocks-override 9",
            "--kv-events-config {}}",
            r#"--kv-events-config {"publisher":"kafka"}"#,
            r#"--kv-events-config {"endpoint":"ipc:///run/events"}"#,
            r#"--kv-events-config {"buffer_steps":-1}"#,
            r#"--kv-events-config {"port":5557}"#,
            "--data-parallel-rank 70000",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}

#![doc = include_str!("../README.md")]

use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use quayline_engine::{
    Chat, Device, Engine, ModelFiles, Options, Request, RequestId, Rounding, Sampling, Tick,
};

/// Continues a text with a language model.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The text to continue; "-" reads it from standard input.
    #[arg(default_value = "ROMEO:\n")]
    prompt: String,
    /// A checkpoint directory in Hugging Face form; without it, the model inside this program.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// What the matrices are rounded to when they are loaded: a half or a quarter of the bytes to read for each token.
    /// Checkpoints of AWQ, GPTQ and FP8 bring theirs.
    #[arg(long)]
    quantization: Option<Quantization>,
    /// The prompt is a message to answer, by the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 200)]
    max_tokens: u32,
    /// 0 takes the most likely token every time.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,
    /// Only the fewest most likely tokens whose probabilities reach this sum.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Only so many of the most likely tokens; 0 is all.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// The same seed gives the same text.
    #[arg(long)]
    seed: Option<u64>,
    /// Stop where this text appears; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Longest sequence, prompt and answer together.
    #[arg(long)]
    max_model_len: Option<u32>,
    /// Where the arithmetic runs: the CPU, an NVIDIA GPU, or the GPU if there is one that works.
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Threads for the arithmetic; without it, one per core.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

/// Eight bits cost next to nothing, four cost some quality.
#[derive(Clone, Copy, ValueEnum)]
enum Quantization {
    Int8,
    Fp8,
    Int4,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceName {
    Cpu,
    Cuda,
    Auto,
}

fn main() -> ExitCode {
    match generate(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn generate(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let progress = ProgressBar::new_spinner().with_message("loading");
    progress.enable_steady_tick(Duration::from_millis(100));
    let files = match &arguments.model {
        Some(directory) => ModelFiles::open(directory)?,
        None => ModelFiles::bundled(),
    };
    let options = Options {
        quantization: arguments.quantization.map(|to| match to {
            Quantization::Int8 => Rounding::Int8,
            Quantization::Fp8 => Rounding::Fp8,
            Quantization::Int4 => Rounding::Int4,
        }),
        max_model_len: arguments.max_model_len,
        device: match arguments.device {
            DeviceName::Cpu => Device::Cpu,
            DeviceName::Cuda => Device::Cuda,
            DeviceName::Auto => Device::Auto,
        },
        threads: arguments.threads,
        max_num_seqs: 1,
        ..Options::default()
    };
    let mut engine = Engine::load(&files, &options)?;
    if let Some(error) = engine.no_gpu() {
        progress.suspend(|| writeln!(io::stderr(), "no GPU that works ({error}): computing on the CPU"))?;
    }

    let prompt = encode(&engine, arguments)?;
    let prompt_tokens = prompt.len() as u64;
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        top_k: arguments.top_k,
        seed: Some(arguments.seed.unwrap_or_else(seed_from_clock)),
        max_tokens: Some(arguments.max_tokens),
        stop: arguments.stop.clone(),
        ..Sampling::default()
    };
    engine.add(Request { sampling, ..Request::new(RequestId(0), prompt) })?;

    progress.set_style(ProgressStyle::with_template("reading {bar:40} {pos}/{len} tokens {eta}")?);
    progress.set_length(prompt_tokens);
    let mut outputs = Vec::new();
    let mut out = io::stdout().lock();
    let (begun, mut first, mut tokens) = (Instant::now(), None, 0);
    while engine.has_work() {
        progress.inc(u64::from(engine.step(Tick::default(), &mut outputs)));
        for output in outputs.drain(..) {
            first.get_or_insert_with(Instant::now);
            progress.finish_and_clear();
            tokens = output.output_tokens;
            out.write_all(output.text.as_bytes())?;
            out.flush()?;
        }
    }
    writeln!(out)?;

    let first = first.unwrap_or(begun);
    let (reading, writing) = ((first - begun).as_secs_f64(), first.elapsed().as_secs_f64());
    let rate = f64::from(tokens.saturating_sub(1)) / writing.max(f64::EPSILON);
    let summary = format!("{prompt_tokens} tokens read in {reading:.2} s, {tokens} written, {rate:.1}/s");
    writeln!(io::stderr(), "{summary}")?;
    Ok(())
}

fn encode(engine: &Engine, arguments: &Arguments) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
    let mut prompt = arguments.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        io::stdin().read_to_string(&mut prompt)?;
    }
    let text = engine.text();
    if !arguments.chat {
        return Ok(text.encode(&prompt, true)?);
    }
    let chat = Chat { add_generation_prompt: true, ..Chat::of("user", &prompt) };
    Ok(text.encode_chat(&chat)?)
}

fn seed_from_clock() -> u64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    since.as_secs() ^ u64::from(since.subsec_nanos())
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

//! The model being served: what connections need of it. The engine itself stays on its thread.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use quayline_engine::{Device, Engine, Grammars, LoadError, ModelFiles, Options, Text};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::config::{Defaults, Flags};
use crate::engine::View;
use crate::metrics::{EngineCollector, EngineMetrics, Metrics};

/// What is known once the model is loaded.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) text: Arc<Text>,
    pub(crate) grammars: Arc<Grammars>,
    /// The template that replaces the model's own.
    pub(crate) template: Option<String>,
    /// Tokens of prompt and answer together.
    pub(crate) context: u32,
    /// Every token id is below.
    pub(crate) vocab_size: u32,
    /// Sampling defaults.
    pub(crate) defaults: Defaults,
    /// Tells checkpoints apart: `system_fingerprint` on the wire.
    pub(crate) fingerprint: String,
    /// When it was loaded, in Unix seconds.
    pub(crate) created: u64,
}

/// Loads the engine and all that goes with it.
///
/// # Errors
/// Why the checkpoint or an option cannot be served, in one line.
pub(crate) fn load(
    flags: &Flags,
    files: &ModelFiles,
    metrics: &Metrics,
    view: &watch::Receiver<View>,
) -> Result<(Engine, EngineMetrics, Model), LoadError> {
    let options = flags.options();
    let (template, defaults) = (flags.answers.template()?, flags.answers.defaults(files)?);
    let mut engine = Engine::load(files, &options)?;
    engine.warm_up()?;
    let fingerprint = fingerprint(files, &options, engine.device())?;
    if let Some(error) = engine.no_gpu() {
        tracing::warn!(%error, "no GPU that works: computing on the CPU");
    }
    let context = engine.model_tokens_max();
    let name = flags.names(files).swap_remove(0);
    let collector = EngineCollector { view: view.clone(), options };
    let engine_metrics = metrics.add_engine(&name, context, collector);
    let model = Model {
        text: engine.text(),
        grammars: engine.grammars(),
        template,
        context,
        vocab_size: engine.vocab_size(),
        defaults,
        fingerprint,
        created: crate::app::unix_seconds(),
    };
    Ok((engine, engine_metrics, model))
}

/// Bytes taken from both ends of each weight file. The head names every tensor, its shape and place.
const SAMPLE_BYTES: usize = 1 << 16;

/// A short hash of what the checkpoint is: its configuration, and the ends and lengths of its weight files; and of what
/// it is computed with, since neither bits nor cached blocks are the same there.
/// Reading all of the weights would take longer than loading them does.
fn fingerprint(files: &ModelFiles, options: &Options, device: Device) -> Result<String, LoadError> {
    let mut hash = Sha256::new();
    if device == Device::Cuda {
        hash.update("cuda");
        hash.update(if options.cublaslt.is_some() { "cublaslt" } else { "" });
    }
    if let Some(rounding) = options.quantization {
        hash.update(format!("{rounding:?}"));
    }
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        if let Some(content) = files.read(name)? {
            hash.update(&content);
        }
    }
    match files.directory() {
        Some(directory) => {
            let mut paths: Vec<_> = std::fs::read_dir(directory)
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
                .map_err(|source| LoadError::Read { path: directory.into(), source })?;
            paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
            paths.sort();
            for path in paths {
                sample(&mut hash, &path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
            }
        }
        None => {
            let weights = files.read("model.safetensors")?.unwrap_or_default();
            hash.update(&weights[..weights.len().min(SAMPLE_BYTES)]);
            hash.update(&weights[weights.len().saturating_sub(SAMPLE_BYTES)..]);
            hash.update(weights.len().to_le_bytes());
        }
    }
    let digest = hash.finalize();
    Ok(digest.iter().take(5).fold("fp_".to_owned(), |text, byte| format!("{text}{byte:02x}")))
}

fn sample(hash: &mut Sha256, path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    for start in [0, length.saturating_sub(SAMPLE_BYTES as u64)] {
        let mut ends = Vec::with_capacity(SAMPLE_BYTES);
        file.seek(SeekFrom::Start(start))?;
        (&file).take(SAMPLE_BYTES as u64).read_to_end(&mut ends)?;
        hash.update(&ends);
    }
    hash.update(length.to_le_bytes());
    Ok(())
}

//! Where a checkpoint's files come from: a directory in Hugging Face form, or memory.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use quayline_gpu_kernels::WeightBytes;
use serde_json::{Map, Value};

use crate::config::{ConfigError, GenerationConfig, ModelConfig};
use crate::error::LoadError;
use crate::weights::Weights;

/// Small files (everything but weights and vocabulary) above this are refused unread.
const TEXT_BYTES_MAX: u64 = 256 << 20;

const CONFIG: &str = "config.json";

const A_GGUF_FILE: &str =
    "GGUF files are not read; a model is a directory with config.json, tokenizer.json and safetensors";

/// One checkpoint. Opening it reads nothing yet; each file is read when asked for, weights are mapped.
#[derive(Clone)]
pub struct ModelFiles {
    name: String,
    source: Source,
}

#[derive(Clone)]
enum Source {
    Directory(PathBuf),
    Memory(&'static [(&'static str, &'static [u8])]),
}

impl ModelFiles {
    /// A directory that holds `config.json`, `tokenizer.json`, the weights and what goes with them.
    ///
    /// # Errors
    /// When it is no directory, or one without `config.json`.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, LoadError> {
        let directory = directory.as_ref();
        let refuse = |kind, problem| Err(cannot_read(directory, io::Error::new(kind, problem)));
        match fs::metadata(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return refuse(error.kind(), "no such directory (models are not downloaded)");
            }
            Err(error) => return Err(cannot_read(directory, error)),
            Ok(metadata) if !metadata.is_dir() => {
                let is_gguf = directory.extension().is_some_and(|extension| extension == "gguf");
                let what = if is_gguf { A_GGUF_FILE } else { "a model is a directory, this is a file" };
                return refuse(io::ErrorKind::NotADirectory, what);
            }
            Ok(_) => {}
        }
        let name = directory.file_name().unwrap_or(directory.as_os_str()).to_string_lossy().into_owned();
        let files = Self { name, source: Source::Directory(directory.to_owned()) };
        match files.read(CONFIG)? {
            Some(_) => Ok(files),
            None => Err(files.missing(CONFIG, instead_of_a_model(directory))),
        }
    }

    /// Files that are part of the program, by name.
    #[must_use]
    pub fn from_memory(name: impl Into<String>, files: &'static [(&'static str, &'static [u8])]) -> Self {
        Self { name: name.into(), source: Source::Memory(files) }
    }

    /// A short name for people: the last part of the directory, or the name given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory, if it is one.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        match &self.source {
            Source::Directory(directory) => Some(directory),
            Source::Memory(_) => None,
        }
    }

    /// The whole content of `file`, or `None` if there is no such file.
    ///
    /// # Errors
    /// When it exists and cannot be read, or is too large for what it is.
    pub fn read(&self, file: &str) -> Result<Option<Vec<u8>>, LoadError> {
        match &self.source {
            Source::Memory(files) => Ok(in_memory(files, file).map(<[u8]>::to_vec)),
            Source::Directory(directory) => {
                let path = directory.join(file);
                let fail = |source| cannot_read(&path, source);
                match fs::metadata(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(fail(error)),
                    Ok(metadata) if metadata.len() > TEXT_BYTES_MAX => {
                        let problem = format!("{} bytes, more than {TEXT_BYTES_MAX}", metadata.len());
                        return Err(LoadError::invalid(file, problem));
                    }
                    Ok(_) => {}
                }
                fs::read(&path).map(Some).map_err(fail)
            }
        }
    }

    /// The whole content of `file`.
    ///
    /// # Errors
    /// As [`ModelFiles::read`], and when there is no such file.
    pub fn required(&self, file: &str) -> Result<Vec<u8>, LoadError> {
        self.read(file)?.ok_or_else(|| self.missing(file, ""))
    }

    /// The JSON object in `file`, or `None` if there is no such file.
    ///
    /// # Errors
    /// When it cannot be read, is no JSON, or is another kind of JSON value.
    pub fn json(&self, file: &str) -> Result<Option<Map<String, Value>>, LoadError> {
        let Some(text) = self.read(file)? else { return Ok(None) };
        match serde_json::from_slice(&text) {
            Ok(Value::Object(fields)) => Ok(Some(fields)),
            Ok(_) => Err(LoadError::invalid(file, "not a JSON object")),
            Err(error) => Err(LoadError::invalid(file, format!("not valid JSON: {error}"))),
        }
    }

    /// The checked `config.json`.
    ///
    /// # Errors
    /// When it is absent, no JSON, or describes what is not computed here.
    pub fn config(&self) -> Result<ModelConfig, LoadError> {
        let fields = self.json(CONFIG)?.ok_or_else(|| self.missing(CONFIG, ""))?;
        Ok(ModelConfig::from_json(&fields)?)
    }

    /// The checked `generation_config.json`; without the file, a silent one.
    ///
    /// # Errors
    /// When it is no JSON, or holds values of the wrong kind.
    pub fn generation_config(&self) -> Result<GenerationConfig, LoadError> {
        const FILE: &str = "generation_config.json";
        let Some(fields) = self.json(FILE)? else { return Ok(GenerationConfig::default()) };
        GenerationConfig::from_json(&fields).map_err(|error: ConfigError| LoadError::invalid(FILE, error))
    }

    /// The weights: mapped, their headers checked, nothing read. Cost: the size of the headers.
    ///
    /// # Errors
    /// When a file is absent or damaged, or the index does not fit the files.
    pub fn weights(&self) -> Result<Weights, LoadError> {
        Weights::open(self)
    }

    /// The bytes of `file`, mapped if it lies in a directory, or `None` if there is no such file.
    pub(crate) fn map(&self, file: &str) -> Result<Option<Content>, LoadError> {
        match &self.source {
            Source::Memory(files) => {
                Ok(in_memory(files, file).map(|bytes| Content::InMemory(Arc::new(bytes))))
            }
            Source::Directory(directory) => map_file(&directory.join(file)),
        }
    }

    pub(crate) fn exists(&self, file: &str) -> bool {
        match &self.source {
            Source::Memory(files) => in_memory(files, file).is_some(),
            Source::Directory(directory) => directory.join(file).exists(),
        }
    }

    /// The refusal for a file that is not there; `hint` is appended to it.
    pub(crate) fn missing(&self, file: &str, hint: impl fmt::Display) -> LoadError {
        let directory = self.directory().unwrap_or(Path::new(&self.name));
        let source = io::Error::new(io::ErrorKind::NotFound, format!("no such file{hint}"));
        cannot_read(&directory.join(file), source)
    }
}

/// The bytes of a file that is not copied.
pub(crate) enum Content {
    Mapped(Arc<Mmap>),
    InMemory(WeightBytes),
}

impl Content {
    pub(crate) fn bytes(&self) -> WeightBytes {
        match self {
            Self::Mapped(map) => Arc::clone(map) as WeightBytes,
            Self::InMemory(bytes) => Arc::clone(bytes),
        }
    }

    /// Gives the memory of what was read back to the system; whoever reads a part again finds it in the file.
    pub(crate) fn release(&self) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            #[expect(unsafe_code, reason = "the system may be told only through an unsafe call")]
            // SAFETY: the map is of a file and never written, so its pages can be had again as they were. Where the
            // system does not do it, nothing is lost.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }
}

/// What a directory without `config.json` may be, as the end of a sentence.
fn instead_of_a_model(directory: &Path) -> String {
    let entries = |directory: &Path| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into()).collect();
        names.sort_unstable();
        names
    };
    let names = entries(directory);
    if names.iter().any(|name| name == "adapter_config.json") {
        return "; this is a LoRA adapter, not a model".into();
    }
    if let Some(file) = names.iter().find(|name| name.ends_with(".gguf")) {
        return format!("; GGUF files like {file} are not read");
    }
    let snapshots = directory.join("snapshots");
    match entries(&snapshots).into_iter().find(|name| snapshots.join(name).join(CONFIG).exists()) {
        Some(snapshot) => format!("; there is one in {}", snapshots.join(snapshot).display()),
        None => String::new(),
    }
}

impl fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = self.directory();
        f.debug_struct("ModelFiles").field("name", &self.name).field("directory", &directory).finish()
    }
}

fn cannot_read(path: &Path, source: io::Error) -> LoadError {
    LoadError::Read { path: path.to_owned(), source }
}

fn in_memory(files: &'static [(&'static str, &'static [u8])], file: &str) -> Option<&'static [u8]> {
    files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| *bytes)
}

fn map_file(path: &Path) -> Result<Option<Content>, LoadError> {
    let fail = |source| cannot_read(path, source);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
    };
    let metadata = file.metadata().map_err(fail)?;
    if metadata.is_dir() {
        return Err(fail(io::Error::new(
            io::ErrorKind::IsADirectory,
            "a file is expected, this is a directory",
        )));
    }
    if metadata.len() == 0 {
        return Ok(Some(Content::InMemory(Arc::new([0_u8; 0]))));
    }
    #[expect(unsafe_code, reason = "mapping is the one way to read weights without a copy in between")]
    // SAFETY: the map is private and only ever read. Its bytes stay as they are as long as no other process
    // rewrites or truncates the file; that is the documented condition of serving a checkpoint from a directory.
    let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
    Ok(Some(Content::Mapped(Arc::new(map))))
}

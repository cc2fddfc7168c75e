//! Safetensors files, single or sharded: headers checked (`header.rs`), every tensor named, shaped, typed and used.

mod header;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use half::{bf16, f16};
use quayline_gpu_kernels::{Dtype, WeightPart, WeightSource};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use self::header::read_header;
use crate::error::LoadError;
use crate::files::{Content, ModelFiles};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Buffers that some checkpoints carry although they follow from the configuration.
const IGNORED_SUFFIXES: &[&str] = &["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"];

/// Why the weights were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file ends before its own header says it does, or is damaged in another way.
    #[error("{file}: {problem}")]
    Damaged {
        /// Which file.
        file: String,
        /// What is wrong with it, with the numbers.
        problem: String,
    },
    /// The index and the files disagree.
    #[error("{INDEX} {problem}")]
    Index {
        /// What does not fit.
        problem: String,
    },
    /// A tensor that the architecture needs is in no file.
    #[error("tensor {name} is missing (expected shape {expected:?})")]
    Missing {
        /// The tensor.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name} has shape {found:?}, config.json implies {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a number format that is not computed here.
    #[error("tensor {name} is stored as {found}; BF16, F16 and F32 are supported")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its format in the file.
        found: String,
    },
    /// A matrix has no scale beside it.
    #[error("tensor {name} of E4M3 numbers has no {expected} beside it")]
    Scale {
        /// The matrix.
        name: String,
        /// What its scale would be called.
        expected: String,
    },
    /// A tensor of a quantised matrix is stored in another number format than its form says.
    #[error("tensor {name} is stored as {found}, this form of quantisation has {expected}")]
    Part {
        /// The tensor.
        name: String,
        /// Its format in the file.
        found: String,
        /// The format it should have.
        expected: String,
    },
    /// A quantised matrix has its inputs in groups that are not those of its scales.
    #[error("tensor {name} puts {found} inputs into group {group}, not {expected}")]
    Groups {
        /// The tensor.
        name: String,
        /// The group's number.
        group: i32,
        /// Inputs that it was given.
        found: usize,
        /// Inputs of a group, or none where there is no such group.
        expected: usize,
    },
    /// The same tensor name occurs twice.
    #[error("tensor {name} occurs twice: in {first} and in {second}")]
    Twice {
        /// The tensor.
        name: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// The files hold tensors that have no use: this is not the model that `config.json` describes.
    #[error("{count} of the tensors have no place in this architecture, the first is {name}")]
    Extra {
        /// How many.
        count: usize,
        /// The first of them by name.
        name: String,
    },
}

/// All tensors of a checkpoint, where they lie in its files. Taking one marks it as used.
pub struct Weights {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Stored>,
    taken: BTreeSet<String>,
}

struct Shard {
    file: String,
    content: Content,
}

struct Stored {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Weights {
    /// Maps the weight files of `files` and checks their headers.
    ///
    /// # Errors
    /// When a file is absent or damaged, a tensor occurs twice, or the index does not fit the files.
    pub fn open(files: &ModelFiles) -> Result<Self, LoadError> {
        let mut weights = Self { shards: Vec::new(), tensors: BTreeMap::new(), taken: BTreeSet::new() };
        if let Some(content) = files.map(SINGLE)? {
            weights.add_shard(SINGLE, content)?;
            return Ok(weights);
        }
        let Some(index) = files.json(INDEX)? else {
            let others = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"];
            let other = others.iter().find(|other| files.exists(other));
            let hint = other.map(|other| format!(", and {other} is a format that is not read"));
            return Err(files.missing(SINGLE, hint.unwrap_or_default()));
        };
        let named = shard_of_each_tensor(&index)?;
        for file in named.values().collect::<BTreeSet<_>>() {
            let missing = || index_error(format!("names {file}, which is not there"));
            let content = files.map(file)?.ok_or_else(missing)?;
            weights.add_shard(file, content)?;
        }
        weights.check_index(&named)?;
        Ok(weights)
    }

    /// The matrix or vector `name`, which must have exactly the shape `expected`.
    ///
    /// # Errors
    /// When it is missing, or has another shape, or a number format that is not computed here.
    pub fn take(&mut self, name: &str, expected: &[usize]) -> Result<WeightSource, WeightsError> {
        let stored = self.find(name, expected)?;
        let dtype = floats(name, stored)?;
        let bytes = self.shards[stored.shard].content.bytes();
        let source = WeightSource { bytes, range: stored.range.clone(), dtype, shape: stored.shape.clone() };
        self.taken.insert(name.to_owned());
        Ok(source)
    }

    /// A tensor `name` of a quantised matrix, which must have exactly this shape and number format.
    ///
    /// # Errors
    /// When it is missing, or has another shape or format.
    pub fn take_part(
        &mut self,
        name: &str,
        expected: &[usize],
        dtype: safetensors::Dtype,
    ) -> Result<WeightPart, WeightsError> {
        let stored = self.find(name, expected)?;
        if stored.dtype != dtype {
            let (found, expected) = (format!("{:?}", stored.dtype), format!("{dtype:?}"));
            return Err(WeightsError::Part { name: name.into(), found, expected });
        }
        let part =
            WeightPart { bytes: self.shards[stored.shard].content.bytes(), range: stored.range.clone() };
        self.taken.insert(name.to_owned());
        Ok(part)
    }

    /// Floats in any of these shapes, widened.
    ///
    /// # Errors
    /// When it is missing, or has another shape, or a number format that is not computed here.
    pub fn take_floats(&mut self, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>, WeightsError> {
        let shape = self.tensors.get(name).map(|stored| stored.shape.as_slice());
        let expected = shapes.iter().find(|&&expected| Some(expected) == shape).unwrap_or(&shapes[0]);
        let WeightSource { bytes, range, dtype, .. } = self.take(name, expected)?;
        let (fours, twos) = (
            (*bytes).as_ref()[range.clone()].as_chunks::<4>().0,
            (*bytes).as_ref()[range].as_chunks::<2>().0,
        );
        Ok(match dtype {
            Dtype::F32 => fours.iter().map(|&x| f32::from_le_bytes(x)).collect(),
            Dtype::Bf16 => twos.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
            Dtype::F16 => twos.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect(),
        })
    }

    /// Whether there is a tensor of this name in E4M3.
    #[must_use]
    pub fn is_fp8(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|stored| stored.dtype == safetensors::Dtype::F8_E4M3)
    }

    /// Counts a tensor as used that has no use here, if there is one.
    pub fn skip(&mut self, name: &str) {
        if self.contains(name) {
            self.taken.insert(name.to_owned());
        }
    }

    /// The tensor that says which group each of `inputs` belongs to, if there is one: every group has `group` of them.
    ///
    /// # Errors
    /// When groups have more or fewer, or it has another shape or format.
    pub fn take_groups(
        &mut self,
        name: &str,
        inputs: usize,
        group: usize,
    ) -> Result<Option<WeightPart>, WeightsError> {
        if !self.contains(name) {
            return Ok(None);
        }
        let part = self.take_part(name, &[inputs], safetensors::Dtype::I32)?;
        let mut members = BTreeMap::new();
        for &word in (*part.bytes).as_ref()[part.range.clone()].as_chunks().0 {
            *members.entry(i32::from_le_bytes(word)).or_insert(0) += 1;
        }
        for (number, members) in members {
            let is_one = usize::try_from(number).is_ok_and(|number| number < inputs / group);
            let expected = if is_one { group } else { 0 };
            if members != expected {
                let name = name.into();
                return Err(WeightsError::Groups { name, group: number, found: members, expected });
            }
        }
        Ok(Some(part))
    }

    fn find(&self, name: &str, expected: &[usize]) -> Result<&Stored, WeightsError> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(WeightsError::Missing { name: name.into(), expected: expected.into() });
        };
        if stored.shape != expected {
            let found = stored.shape.clone();
            return Err(WeightsError::Shape { name: name.into(), found, expected: expected.into() });
        }
        Ok(stored)
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|stored| stored.range.len() as u64).sum()
    }

    /// A number that other weights do not have: of every tensor its name, shape, format, and beginning.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        const SAMPLE: usize = 4096;
        let mut hash = Xxh3::new();
        for (name, Stored { shard, dtype, shape, range }) in &self.tensors {
            hash.update(format!("{name} {dtype:?} {shape:?}").as_bytes());
            let bytes = self.shards[*shard].content.bytes();
            hash.update(&(*bytes).as_ref()[range.start..range.end.min(range.start + SAMPLE)]);
        }
        hash.digest()
    }

    /// Ends the loading of a model: what nobody took has no place in it. What was read of the files is given back
    /// to the system; tables that stay where they lie are read again, row by row.
    ///
    /// # Errors
    /// When tensors are left over, other than buffers known to be harmless.
    pub fn finish(self) -> Result<(), WeightsError> {
        let known = |name: &str| IGNORED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
        let mut extra = self.tensors.keys().filter(|name| !self.taken.contains(*name) && !known(name));
        let Some(first) = extra.next() else {
            self.shards.iter().for_each(|shard| shard.content.release());
            return Ok(());
        };
        Err(WeightsError::Extra { name: first.clone(), count: 1 + extra.count() })
    }

    fn add_shard(&mut self, file: &str, content: Content) -> Result<(), WeightsError> {
        let damaged = |problem: String| WeightsError::Damaged { file: file.into(), problem };
        let (data_start, header) = read_header((*content.bytes()).as_ref()).map_err(damaged)?;
        let shard = self.shards.len();
        self.shards.push(Shard { file: file.into(), content });
        for (name, info) in header {
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let stored = Stored { shard, dtype: info.dtype, shape: info.shape, range };
            if let Some(before) = self.tensors.get(&name) {
                let first = self.shards[before.shard].file.clone();
                return Err(WeightsError::Twice { name, first, second: file.into() });
            }
            self.tensors.insert(name, stored);
        }
        Ok(())
    }

    /// Every tensor must lie in the file that the index names for it, and be named in the index.
    fn check_index(&self, named: &BTreeMap<String, String>) -> Result<(), WeightsError> {
        for (name, file) in named {
            match self.tensors.get(name).map(|stored| &self.shards[stored.shard].file) {
                Some(found) if found == file => {}
                Some(found) => {
                    return Err(index_error(format!(
                        "says that tensor {name} is in {file}, it is in {found}"
                    )));
                }
                None => return Err(index_error(format!("says that tensor {name} is in {file}, it is not"))),
            }
        }
        match self.tensors.iter().find(|(name, _)| !named.contains_key(*name)) {
            Some((name, stored)) => {
                let file = &self.shards[stored.shard].file;
                Err(index_error(format!("does not name tensor {name} of {file}")))
            }
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<&str> = self.shards.iter().map(|shard| shard.file.as_str()).collect();
        f.debug_struct("Weights").field("files", &files).field("tensors", &self.tensors.len()).finish()
    }
}

/// The number format of a tensor of floats.
fn floats(name: &str, stored: &Stored) -> Result<Dtype, WeightsError> {
    match stored.dtype {
        safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
        safetensors::Dtype::F16 => Ok(Dtype::F16),
        safetensors::Dtype::F32 => Ok(Dtype::F32),
        other => Err(WeightsError::Dtype { name: name.into(), found: format!("{other:?}") }),
    }
}

fn index_error(problem: String) -> WeightsError {
    WeightsError::Index { problem }
}

fn shard_of_each_tensor(
    index: &serde_json::Map<String, Value>,
) -> Result<BTreeMap<String, String>, WeightsError> {
    let Some(Value::Object(map)) = index.get("weight_map") else {
        return Err(index_error("has no weight_map object".into()));
    };
    let mut named = BTreeMap::new();
    for (name, file) in map {
        match file.as_str() {
            // A shard lies beside its index: a path elsewhere is not followed.
            Some(file) if is_plain_file_name(file) => named.insert(name.clone(), file.to_owned()),
            _ => return Err(index_error(format!("names {file} for tensor {name}, which is no file name"))),
        };
    }
    if named.is_empty() {
        return Err(index_error("names no tensor".into()));
    }
    Ok(named)
}

fn is_plain_file_name(file: &str) -> bool {
    file.ends_with(".safetensors") && !file.contains(['/', '\\', '\0', ':'])
}

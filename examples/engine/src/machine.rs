//! What a model computes on: its weights, its cache and the arithmetic, wherever they are. The engine does not know
//! whether that is the CPU or a GPU.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use quayline_gpu_kernels::cpu::Workers;
use quayline_gpu_kernels::cuda::{self, MemoryUse};
use quayline_gpu_kernels::{Cpu, Cuda, Draw, Dtype, Error, Isa, Ops, Sampled, Sampling};

use crate::agreement;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::files::ModelFiles;
use crate::graphs::Graphs;
use crate::model::{Model, Pass, StepInput, StepLimits};
use crate::options::{CublasLtPlace, Device, KvDtype, Options};
use crate::sizing::Sizes;

/// A model and its cache.
pub(crate) trait Machine: Send + Sync {
    fn device(&self) -> Device;
    fn config(&self) -> &ModelConfig;
    fn limits(&self) -> StepLimits;
    /// Bytes of all weights in the files.
    fn weight_bytes(&self) -> u64;
    /// Bytes of one block of the cache.
    fn block_bytes(&self) -> usize;
    /// As [`Model::run`].
    fn run(&mut self, input: &StepInput<'_>) -> Result<(), Error>;
    /// As [`Model::logits`].
    fn logits(&mut self, range: Range<u32>) -> Result<Cow<'_, [f32]>, Error>;
    /// Whether it [draws](Machine::draw) tokens.
    fn draws(&self) -> bool;
    /// Draws a token from each of the last step's wanted rows from `start` on, at most as many as
    /// [`Machine::logits`] takes at once, without bringing logits to the host; `masks` as for [`Cuda::sample`]. No
    /// token: no logit that may be drawn is a number.
    fn draw(&mut self, start: u32, draws: &[Draw<'_>], masks: &[u32]) -> Result<Vec<Option<u32>>, Error>;
    /// As [`Ops::copy_blocks`].
    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), Error>;
    /// As [`Ops::save_blocks`].
    fn save_blocks(&self, blocks: &mut [(u32, &mut [u8])]) -> Result<(), Error>;
    /// As [`Ops::load_blocks`].
    fn load_blocks(&mut self, blocks: &[(u32, &[u8])]) -> Result<(), Error>;
}

/// A way to compute some steps that is quicker than [`Model::run`].
pub(crate) trait Shortcut<O: Ops>: Send + Sync {
    /// Computes a step, and keeps its logits; or says that it is none of those.
    fn run(&mut self, pass: &Pass<O>, pool: &mut O::KvPool, input: &StepInput<'_>) -> Result<bool, Error>;
    /// As [`Model::logits`], of a step that was computed here.
    fn logits(&mut self, pass: &Pass<O>, range: Range<u32>) -> Result<Cow<'_, [f32]>, Error>;
    /// Logits of all wanted rows of a step that was computed here, where they are; behind them may be others.
    fn all_logits(&self) -> &O::Tensor;
}

/// Of a row that nobody draws from: the least work.
pub(crate) fn no_draw<'a>() -> Draw<'a> {
    Draw { temperature: 0.0, ..Draw::default() }
}

/// Operators that may draw tokens where the logits are.
pub(crate) trait Drawing: Ops {
    /// Whether they do.
    const DRAWS: bool;

    /// A token for each row from `start` on for which there is a draw.
    fn draw(
        &self,
        logits: &Self::Tensor,
        start: usize,
        draws: &[Draw<'_>],
        masks: &[u32],
    ) -> Result<Vec<Sampled>, Error>;
}

impl Drawing for Cuda {
    const DRAWS: bool = true;

    fn draw(
        &self,
        logits: &Self::Tensor,
        start: usize,
        draws: &[Draw<'_>],
        masks: &[u32],
    ) -> Result<Vec<Sampled>, Error> {
        let mut all = vec![no_draw(); logits.rows()];
        all[start..start + draws.len()].copy_from_slice(draws);
        let mut sampled = self.sample(logits, &all, masks)?.split_off(start);
        sampled.truncate(draws.len());
        Ok(sampled)
    }
}

/// The host does it, which has the logits at hand.
impl Drawing for Cpu {
    const DRAWS: bool = false;

    fn draw(&self, _: &Self::Tensor, _: usize, _: &[Draw<'_>], _: &[u32]) -> Result<Vec<Sampled>, Error> {
        unreachable!("the CPU draws nothing")
    }
}

/// No step is.
impl Shortcut<Cpu> for () {
    fn run(&mut self, _: &Pass<Cpu>, _: &mut <Cpu as Ops>::KvPool, _: &StepInput<'_>) -> Result<bool, Error> {
        Ok(false)
    }

    fn logits(&mut self, _: &Pass<Cpu>, _: Range<u32>) -> Result<Cow<'_, [f32]>, Error> {
        unreachable!("no step was computed here")
    }

    fn all_logits(&self) -> &<Cpu as Ops>::Tensor {
        unreachable!("no step was computed here")
    }
}

/// Where a model can be loaded.
pub(crate) enum Place {
    Cpu(Cpu),
    Cuda(Cuda),
}

impl Place {
    /// The place that the options ask for; and, where they leave it open and it is not a GPU, why. `given` is a device
    /// in the place of the machine's GPU. Weights of 32 bits are computed with in f16 there.
    pub(crate) fn find(
        options: &Options,
        weights: Dtype,
        given: Option<Arc<dyn cuda::Device>>,
    ) -> Result<(Self, Option<Error>), LoadError> {
        if let (None, Device::Cpu, Some(_)) = (&given, options.device, &options.cublaslt) {
            let problem = "it multiplies on a GPU, and the device is the CPU".to_owned();
            return Err(LoadError::Options { option: "cublaslt", problem });
        }
        let dtype = if weights == Dtype::F32 { Dtype::F16 } else { weights };
        let isa = (options.dtype == Some(Dtype::F32)).then(Isa::best_in_f32);
        let cpu = || Ok::<_, LoadError>(Self::Cpu(Cpu::new(options.threads, isa)?));
        let cuda = match (given, options.device) {
            (Some(device), _) => Cuda::on(device, dtype),
            (None, Device::Cpu) => return Ok((cpu()?, None)),
            (None, Device::Cuda | Device::Auto) => first_gpu(dtype),
        };
        match cuda {
            Ok(cuda) => Ok((Self::Cuda(with_library(cuda, options.cublaslt.as_ref())?), None)),
            Err(error) if options.device == Device::Auto => Ok((cpu()?, Some(error))),
            Err(error) => Err(LoadError::Options { option: "device", problem: format!("no CUDA: {error}") }),
        }
    }

    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            Self::Cuda(_) => Device::Cuda,
        }
    }

    /// Threads of the host: those that compute, where it does.
    pub(crate) fn workers(&self, options: &Options) -> Result<Arc<Workers>, Error> {
        match self {
            Self::Cpu(cpu) => Ok(cpu.workers()),
            Self::Cuda(_) => Workers::new(options.threads).map(Arc::new),
        }
    }

    /// How much memory a GPU has, if it is one and says so.
    pub(crate) fn memory_use(&self) -> Result<Option<MemoryUse>, LoadError> {
        match self {
            Self::Cpu(_) => Ok(None),
            Self::Cuda(cuda) => Ok(cuda.memory_use()?),
        }
    }

    /// How keys and values are cached: a GPU takes its own format alone.
    pub(crate) fn kv_dtype(&self, options: &Options, weights: Dtype) -> Result<Dtype, LoadError> {
        let computed = match self {
            Self::Cpu(_) => Dtype::F32,
            Self::Cuda(cuda) => cuda.dtype(),
        };
        agreement::dtype(options.dtype, weights, computed)?;
        let asked = match options.kv_dtype {
            KvDtype::Auto => None,
            KvDtype::F32 => Some(Dtype::F32),
            KvDtype::Bf16 => Some(Dtype::Bf16),
            KvDtype::F16 => Some(Dtype::F16),
        };
        match self {
            Self::Cpu(_) => Ok(asked.or(options.dtype).unwrap_or(weights)),
            Self::Cuda(cuda) => match asked {
                Some(asked) if asked != cuda.dtype() => {
                    let problem = format!("{asked} on a GPU that computes in {}", cuda.dtype());
                    Err(LoadError::Options { option: "kv_cache_dtype", problem })
                }
                _ => Ok(cuda.dtype()),
            },
        }
    }

    /// Loads a model, and makes a cache for it.
    pub(crate) fn load(
        self,
        files: &ModelFiles,
        options: &Options,
        sizes: &Sizes,
        limits: StepLimits,
    ) -> Result<Box<dyn Machine>, LoadError> {
        let (blocks, block_size) = (sizes.blocks as usize + 1, options.block_size.get() as usize);
        let rounding = agreement::rounding(options, &files.config()?)?;
        Ok(match self {
            Self::Cpu(cpu) => {
                let model = Model::load_rounded(cpu, files, limits, rounding)?;
                Box::new(Hosted::new(model, (blocks, block_size, sizes.dtype), Device::Cpu, ())?)
            }
            Self::Cuda(cuda) => {
                let model = Model::load_rounded(cuda, files, limits, rounding)?;
                let graphs = Graphs::new(model.pass(), model.limits(), options.max_num_seqs, block_size)?;
                Box::new(Hosted::new(model, (blocks, block_size, sizes.dtype), Device::Cuda, graphs)?)
            }
        })
    }
}

#[cfg(feature = "cuda")]
fn first_gpu(dtype: Dtype) -> Result<Cuda, Error> {
    Cuda::detect(dtype)
}

#[cfg(not(feature = "cuda"))]
fn first_gpu(_: Dtype) -> Result<Cuda, Error> {
    Err(Error::Device { call: "cuda", reason: "this program was built without the feature cuda".to_owned() })
}

/// Lets a library multiply, if one is asked for.
fn with_library(cuda: Cuda, place: Option<&CublasLtPlace>) -> Result<Cuda, LoadError> {
    let Some(place) = place else { return Ok(cuda) };
    load_library(cuda, place)
        .map_err(|error| LoadError::Options { option: "cublaslt", problem: error.to_string() })
}

#[cfg(feature = "cuda")]
fn load_library(cuda: Cuda, place: &CublasLtPlace) -> Result<Cuda, Error> {
    cuda.with_cublaslt(match place {
        CublasLtPlace::Installed => cuda::CublasLt::find()?,
        CublasLtPlace::File(path) => cuda::CublasLt::open(path)?,
    })
}

#[cfg(not(feature = "cuda"))]
fn load_library(_: Cuda, _: &CublasLtPlace) -> Result<Cuda, Error> {
    let reason = "this program was built without the feature cuda".to_owned();
    Err(Error::Device { call: "cublaslt", reason })
}

/// A model over some operators, and its cache.
struct Hosted<O: Ops, S> {
    model: Model<O>,
    pool: O::KvPool,
    block_bytes: usize,
    device: Device,
    shortcut: S,
    /// The last step was computed by the shortcut.
    was_short: bool,
}

impl<O: Ops, S: Shortcut<O>> Hosted<O, S> {
    fn new(
        model: Model<O>,
        (blocks, block_size, dtype): (usize, usize, Dtype),
        device: Device,
        shortcut: S,
    ) -> Result<Self, Error> {
        let pool = model.kv_pool(blocks, block_size, dtype)?;
        let block_bytes = model.ops().kv_block_bytes(model.kv_shape(1, block_size, dtype))?;
        Ok(Self { model, pool, block_bytes, device, shortcut, was_short: false })
    }
}

impl<O: Drawing, S: Shortcut<O>> Machine for Hosted<O, S>
where
    Self: Send + Sync,
{
    fn device(&self) -> Device {
        self.device
    }

    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn limits(&self) -> StepLimits {
        self.model.limits()
    }

    fn weight_bytes(&self) -> u64 {
        self.model.weight_bytes()
    }

    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn run(&mut self, input: &StepInput<'_>) -> Result<(), Error> {
        self.model.cover_positions(input.batch.positions)?;
        self.was_short = self.shortcut.run(self.model.pass(), &mut self.pool, input)?;
        if self.was_short { Ok(()) } else { self.model.run(&mut self.pool, input) }
    }

    fn logits(&mut self, range: Range<u32>) -> Result<Cow<'_, [f32]>, Error> {
        if self.was_short { self.shortcut.logits(self.model.pass(), range) } else { self.model.logits(range) }
    }

    fn draws(&self) -> bool {
        O::DRAWS
    }

    fn draw(&mut self, start: u32, draws: &[Draw<'_>], masks: &[u32]) -> Result<Vec<Option<u32>>, Error> {
        let count = u32::try_from(draws.len()).unwrap_or(u32::MAX);
        let sampled = if self.was_short {
            self.model.ops().draw(self.shortcut.all_logits(), start as usize, draws, masks)?
        } else {
            self.model.compute_logits(start..start + count)?;
            self.model.ops().draw(self.model.computed_logits(), 0, draws, masks)?
        };
        let token = |sampled: Sampled| (sampled.token != u32::MAX).then_some(sampled.token);
        Ok(sampled.into_iter().map(token).collect())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), Error> {
        self.model.ops().copy_blocks(&mut self.pool, pairs)
    }

    fn save_blocks(&self, blocks: &mut [(u32, &mut [u8])]) -> Result<(), Error> {
        self.model.ops().save_blocks(&self.pool, blocks)
    }

    fn load_blocks(&mut self, blocks: &[(u32, &[u8])]) -> Result<(), Error> {
        self.model.ops().load_blocks(&mut self.pool, blocks)
    }
}

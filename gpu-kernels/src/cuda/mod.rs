//! The operators on an NVIDIA GPU, sm_80 (Ampere) or later.
//!
//! The kernels are CUDA C++ of our own, in `kernels/`: they include no header of a toolkit. This module checks
//! shapes, cuts the work and launches; what it launches on is a [`Device`].

mod attention;
mod batch;
#[cfg(feature = "cuda")]
mod cache;
mod copy;
#[cfg(feature = "cuda")]
mod cublaslt;
mod device;
#[cfg(feature = "cuda")]
mod driver;
mod elementwise;
#[cfg(feature = "cuda")]
mod embedded;
mod gemm;
mod graph;
mod hopper;
mod hopper_product;
mod latent;
mod layout;
mod memory;
mod merge;
mod moe;
mod norm;
#[cfg(feature = "cuda")]
mod nvrtc;
mod ops;
mod packing;
#[cfg(feature = "cuda")]
mod places;
mod plan;
mod pool;
#[cfg(feature = "cuda")]
mod probe;
#[cfg(feature = "cuda")]
mod products;
mod quant;
mod rope;
mod sample;
mod source;
mod tensor;
mod verify;

use std::sync::{Arc, Mutex, PoisonError};

pub use attention::{Floats, TreeMask};
pub use batch::Batch;
#[cfg(feature = "cuda")]
pub use cublaslt::CublasLt;
pub use device::{
    Address, Device, EncodedTileMap, Launch, MemoryUse, Recording, Stream, TileElement, TileMap,
    Work as LibraryWork,
};
pub use graph::Graph;
pub use layout::KvStrides;
pub use moe::Routing;
pub use norm::QuantTensor;
pub use plan::{CHUNK, Cut, Item, Merge, Plan, ROWS_FEW, ROWS_MANY, Work, plan};
pub use pool::{DeviceMemory, KvPool};
pub use rope::RopeTable;
pub use sample::Distributions;
pub use source::{HEADERS, OPTIONS, SOURCES, Source};
pub use tensor::{Tensor, Weight};

use memory::{Keeper, Memory};

use crate::error::at_most;
use crate::{BatchInput, Dtype, Error};

/// The operators, on a device.
///
/// Activations are bf16 or f16, and weights are rounded to that when they are brought over. Sums are f32.
#[derive(Debug)]
pub struct Cuda {
    device: Arc<Keeper>,
    dtype: Dtype,
    /// Partial results of attention.
    workspace: Mutex<Arc<Memory>>,
    /// Prompts take Hopper's kernel where there is one.
    fast_prompts: bool,
    /// Positions that it adds up together.
    hopper_chunk: u32,
    /// Launches may begin while those before them end.
    early_launches: bool,
    /// What multiplies in our kernels' place.
    #[cfg(feature = "cuda")]
    products: Option<Arc<products::Products>>,
}

impl Cuda {
    /// The operators on a given device, with activations of a given type.
    ///
    /// # Errors
    /// When the type is neither bf16 nor f16.
    pub fn on(device: Arc<dyn Device>, dtype: Dtype) -> Result<Self, Error> {
        if dtype == Dtype::F32 {
            return Err(Error::Unsupported {
                operator: "cuda",
                what: "activations of",
                found: dtype.to_string(),
                supported: "bf16 and f16",
            });
        }
        let device = Keeper::new(device);
        let workspace = Mutex::new(Arc::new(Memory::new(&device, 0)?));
        Ok(Self {
            device,
            dtype,
            workspace,
            fast_prompts: false,
            hopper_chunk: hopper::CHUNK,
            early_launches: true,
            #[cfg(feature = "cuda")]
            products: None,
        })
    }

    /// Whether prompts take the kernels that are made for Hopper, on such a GPU: attention of spans of more than 16
    /// rows of a kv head, and products of more than 64 rows with matrices of the activations' type. They sum in
    /// another order: with them, a token's bits depend on how its prompt was cut into steps, and on what else was in
    /// the step. Off at first.
    #[must_use]
    pub fn with_fast_prompts(self, fast_prompts: bool) -> Self {
        Self { fast_prompts, ..self }
    }

    /// How many positions of a context attention on Hopper adds up together ([`Cuda::with_fast_prompts`]), rounded up
    /// to a multiple of 128: contexts are cut over blocks at multiples of it. Bits depend on it, but not on which of
    /// these cuts are made. 8192 at first.
    #[must_use]
    pub fn with_hopper_chunk(self, positions: u32) -> Self {
        Self { hopper_chunk: positions.clamp(1, 1 << 30).next_multiple_of(128), ..self }
    }

    /// Whether a launch may begin while the one before it ends, on a GPU that can (Hopper and later, with a driver of
    /// CUDA 12.4 or later; "programmatic dependent launch"): its blocks are in place when the last results are there, in
    /// a [`Graph`] too. No result depends on it. On at first.
    #[must_use]
    pub fn with_early_launches(self, early_launches: bool) -> Self {
        Self { early_launches, ..self }
    }

    /// How activations and weights are stored.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How much memory the device has, if it can tell.
    ///
    /// # Errors
    /// When the device fails.
    pub fn memory_use(&self) -> Result<Option<MemoryUse>, Error> {
        self.device.memory_use()
    }

    /// A step whose work has room for any contexts, so that a [`Graph`] of it can be replayed for others: see
    /// [`Batch::refill`].
    ///
    /// # Errors
    /// As [`Ops::batch`](crate::Ops::batch).
    pub fn fixed_batch(&self, input: BatchInput<'_>) -> Result<Batch, Error> {
        Batch::new(&self.device, input, true)
    }

    /// Memory that lives until a later call needs more. Calls are in one order, so they share it.
    fn workspace(&self, bytes: usize) -> Result<Arc<Memory>, Error> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if workspace.bytes() < bytes {
            *workspace = Arc::new(Memory::new(&self.device, bytes.next_power_of_two())?);
        }
        Ok(Arc::clone(&workspace))
    }

    /// Launches a kernel that exists once for each type of activations.
    fn launch<A: bytemuck::Pod>(
        &self,
        file: &'static str,
        kernel: &str,
        blocks: u32,
        threads: usize,
        shared_bytes: usize,
        argument: &A,
    ) -> Result<(), Error> {
        self.start(file, &format!("{kernel}_{}", self.dtype), blocks, threads, shared_bytes, argument)
    }

    /// Launches a kernel; an empty grid is nothing to do.
    fn start<A: bytemuck::Pod>(
        &self,
        file: &'static str,
        kernel: &str,
        blocks: u32,
        threads: usize,
        shared_bytes: usize,
        argument: &A,
    ) -> Result<(), Error> {
        if blocks == 0 {
            return Ok(());
        }
        let most = self.device.shared_bytes_max();
        at_most("launch", "shared memory of a block, in bytes", shared_bytes, most as usize)?;
        let launch = Launch {
            file,
            kernel,
            blocks,
            threads: count("launch", "threads", threads)?,
            shared_bytes: count("launch", "shared memory", shared_bytes)?,
            argument: bytemuck::bytes_of(argument),
            early: self.early_launches,
        };
        // SAFETY: the operators check shapes and indices against the memory whose addresses they pass, and that
        // memory is borrowed for the call; releases come after it in the device's order.
        unsafe { self.device.launch(launch) }
    }
}

/// A dimension as kernels take it.
fn count(operator: &'static str, dimension: &'static str, n: usize) -> Result<u32, Error> {
    u32::try_from(n).map_err(|_| Error::TooLarge { operator, dimension, found: n, max: u32::MAX as usize })
}

/// Blocks of a grid that share `n` things, `each` a block.
fn divide(operator: &'static str, n: usize, each: usize) -> Result<u32, Error> {
    let blocks = n.div_ceil(each);
    at_most(operator, "blocks of a grid", blocks, i32::MAX as usize)?;
    count(operator, "blocks of a grid", blocks)
}

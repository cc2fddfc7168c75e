//! What the CUDA operators need of a machine: memory, copies and launches.

use std::fmt;
use std::sync::Arc;

use crate::Error;

/// An address in a device's memory; 0 is none.
pub type Address = u64;

/// A grid of thread blocks on its way to a device.
#[derive(Clone, Copy)]
pub struct Launch<'a> {
    /// The source that the kernel is in: a file of `kernels/`, without its ending.
    pub file: &'static str,
    /// The kernel's name.
    pub kernel: &'a str,
    /// Blocks of the grid, at least 1.
    pub blocks: u32,
    /// Threads of a block, whole warps.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The kernel's one argument, a C struct.
    pub argument: &'a [u8],
    /// It may begin while the launch before it ends, where the device can: the kernel itself waits for what came
    /// earlier before it reads or writes anything.
    pub early: bool,
}

impl fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}<<<{}, {}, {}>>>", self.kernel, self.blocks, self.threads, self.shared_bytes)
    }
}

/// What a [`TileMap`] is of, and how its boxes come to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileElement {
    /// In panels of 128 bytes a row, permuted.
    Bf16,
    /// The same.
    F16,
    /// Eight bits of any meaning: row after row as they are.
    Byte,
}

/// A tensor of four dimensions, as Hopper's memory unit copies boxes of it. The first dimension is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileMap {
    /// A multiple of 16.
    pub start: Address,
    /// What it is of.
    pub element: TileElement,
    /// Elements along each dimension.
    pub sizes: [u64; 4],
    /// Bytes from one element to the next along all dimensions but the first: multiples of 16.
    pub strides: [u64; 3],
    /// Elements of a box along each dimension, at most 256: along the first 64, or a multiple of 16 bytes.
    pub box_sizes: [u32; 4],
}

/// A [`TileMap`] as a device's kernels take it.
pub type EncodedTileMap = [u8; 128];

/// A stream of CUDA (`CUstream`) as a number: a library puts its work there.
pub type Stream = u64;

/// Work of a library, on the stream that it is given. A device that plays recordings itself may do it again.
pub type Work = Arc<dyn Fn(Stream) -> Result<(), Error> + Send + Sync>;

/// The number that a device gave to what it recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Recording(pub u64);

/// How much memory a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes that nobody has.
    pub free: u64,
    /// Bytes in all.
    pub total: u64,
}

/// A machine that runs the kernels: a GPU behind its driver, or the emulator of the tests.
///
/// All work is in one order, as if on one stream: a call sees what the calls before it wrote.
pub trait Device: fmt::Debug + Send + Sync {
    /// Multiprocessors, so that work can be cut to fill them.
    fn multiprocessors(&self) -> u32;

    /// Shared memory that one block may have, in bytes.
    fn shared_bytes_max(&self) -> u32;

    /// How much memory it has, if it can tell.
    ///
    /// # Errors
    /// When the device fails.
    fn memory_use(&self) -> Result<Option<MemoryUse>, Error> {
        Ok(None)
    }

    /// Whether it runs the programs that are made for Hopper alone.
    fn is_hopper(&self) -> bool {
        false
    }

    /// A map for a Hopper kernel.
    ///
    /// # Errors
    /// When the device has no such unit, or refuses the numbers.
    fn encode(&self, map: &TileMap) -> Result<EncodedTileMap, Error> {
        Err(Error::Device { call: "encode", reason: format!("this device copies no tiles: {map:?}") })
    }

    /// Records what `step` launches and fills, which then does not happen yet. Until it returns, memory cannot be
    /// had and bytes cannot be copied: what is recorded keeps to its addresses.
    ///
    /// # Errors
    /// The step's own, and when the device cannot record.
    fn capture(&self, step: &mut dyn FnMut() -> Result<(), Error>) -> Result<Recording, Error> {
        let _not_run = step;
        Err(Error::Device { call: "capture", reason: "this device cannot record".to_owned() })
    }

    /// Makes this device the calling thread's, for a library, and says where its work goes.
    ///
    /// # Errors
    /// When libraries cannot work on this device.
    fn current(&self) -> Result<Stream, Error> {
        Err(Error::Device { call: "current", reason: "no library can work on this device".to_owned() })
    }

    /// Lets a library work, in the order of the other calls; or records that it would.
    ///
    /// # Errors
    /// As [`Device::current`], and the work's own.
    fn enqueue(&self, work: Work) -> Result<(), Error> {
        work(self.current()?)
    }

    /// Does again what was recorded.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// All addresses of the recorded launches lie in live memory of this device.
    unsafe fn replay(&self, recording: Recording) -> Result<(), Error> {
        Err(Error::Device { call: "replay", reason: format!("nothing is recorded as {recording:?}") })
    }

    /// Forgets a recording.
    fn forget(&self, _recording: Recording) {}

    /// Memory at a multiple of 256 bytes; `bytes` is not 0.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Address, Error>;

    /// Gives memory back. Errors have nowhere to go.
    fn release(&self, address: Address);

    /// Sets bytes to a value.
    ///
    /// # Errors
    /// When the device fails.
    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), Error>;

    /// Bytes to the device. The source may change after the call.
    ///
    /// # Errors
    /// When the device fails.
    fn upload(&self, to: Address, from: &[u8]) -> Result<(), Error>;

    /// Bytes from the device, after all that was asked for before.
    ///
    /// # Errors
    /// When the device fails, now or in an earlier launch.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), Error>;

    /// Bytes to the device from several places, one after the other there.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn upload_from(&self, to: Address, from: &[&[u8]]) -> Result<(), Error> {
        self.upload(to, &from.concat())
    }

    /// Bytes from the device to several places, one after the other here.
    ///
    /// # Errors
    /// As [`Device::download`].
    fn download_to(&self, from: Address, to: &mut [&mut [u8]]) -> Result<(), Error> {
        let mut bytes = vec![0; to.iter().map(|part| part.len()).sum()];
        self.download(from, &mut bytes)?;
        let mut rest = &bytes[..];
        for part in to {
            let (these, others) = rest.split_at(part.len());
            part.copy_from_slice(these);
            rest = others;
        }
        Ok(())
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// When the kernel cannot be had or started.
    ///
    /// # Safety
    /// The argument is the kernel's struct, and every address that the kernel computes from it lies in live memory of
    /// this device.
    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), Error>;
}

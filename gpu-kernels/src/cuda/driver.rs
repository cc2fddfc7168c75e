//! A GPU behind NVIDIA's driver, which is found at run time.

mod programs;
mod staging;
mod start;

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use programs::Module;
use staging::Staging;

use super::Cuda;
use super::cache::Cache;
use super::device::{
    Address, Device, EncodedTileMap, Launch, MemoryUse, Recording, Stream, TileElement, TileMap,
};
use super::embedded::waits;
use crate::{Dtype, Error};

/// The oldest driver that records launches which begin early: CUDA 12.4.
const EARLY_DRIVER_MIN: i32 = 12_040;

impl Cuda {
    /// The machine's first GPU.
    ///
    /// # Errors
    /// When there is no driver, or it is too old, or there is no GPU, or it is older than sm_80, with what was found.
    pub fn detect(dtype: Dtype) -> Result<Self, Error> {
        Self::on(Arc::new(Gpu::new(0)?), dtype)
    }
}

/// One GPU, with a stream on which all work is in order.
struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    capability: (i32, i32),
    multiprocessors: u32,
    shared_bytes_max: u32,
    /// Copies from the host may read its memory after the call: the GPU walks the host's page tables (Grace
    /// Hopper), and nothing is staged.
    reads_host_late: bool,
    driver: i32,
    cache: Option<Cache>,
    modules: Mutex<HashMap<&'static str, Module>>,
    staging: Mutex<Staging>,
    /// What was recorded, by its number.
    graphs: Mutex<HashMap<Recording, sys::CUgraphExec>>,
    /// A recording is under way.
    capturing: AtomicBool,
    recorded: AtomicU64,
}

// SAFETY: the handles are the driver's, which any thread may use; the maps are behind a lock.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Makes this GPU the calling thread's.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: a context that is retained for as long as we live.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// Until all that was asked for is done.
    fn wait(&self) -> Result<(), Error> {
        // SAFETY: our stream.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    /// An error while a recording is under way.
    fn not_recording(&self, what: &str, bytes: usize) -> Result<(), Error> {
        if self.capturing.load(Ordering::Relaxed) {
            return Err(failed("capture", &format!("a recorded step may not {what} {bytes} bytes")));
        }
        Ok(())
    }

    /// What a stream recorded, ready to run.
    fn instantiate(&self, graph: sys::CUgraph) -> Result<Recording, Error> {
        let mut ready = ptr::null_mut();
        // SAFETY: a place for one handle, and a graph that was just recorded.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0) };
        // SAFETY: the graph is ours, and what was made of it does not need it.
        let _gone = unsafe { sys::cuGraphDestroy(graph) };
        check("cuGraphInstantiate", made)?;
        let recording = Recording(self.recorded.fetch_add(1, Ordering::Relaxed));
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner).insert(recording, ready);
        Ok(recording)
    }
}

impl Device for Gpu {
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn shared_bytes_max(&self) -> u32 {
        self.shared_bytes_max
    }

    fn memory_use(&self) -> Result<Option<MemoryUse>, Error> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for two numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok(Some(MemoryUse { free: free as u64, total: total as u64 }))
    }

    fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }

    fn encode(&self, map: &TileMap) -> Result<EncodedTileMap, Error> {
        self.enter()?;
        use sys::{CUtensorMapDataType as Element, CUtensorMapSwizzle as Swizzle};
        let (element, swizzle) = match map.element {
            TileElement::Bf16 => {
                (Element::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, Swizzle::CU_TENSOR_MAP_SWIZZLE_128B)
            }
            TileElement::F16 => {
                (Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT16, Swizzle::CU_TENSOR_MAP_SWIZZLE_128B)
            }
            TileElement::Byte => {
                (Element::CU_TENSOR_MAP_DATA_TYPE_UINT8, Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE)
            }
        };
        let steps = [1_u32; 4];
        let mut encoded = MaybeUninit::<sys::CUtensorMap>::zeroed();
        // SAFETY: a place for one map; sizes, strides, boxes and steps are arrays of the four dimensions, strides
        // of three.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                encoded.as_mut_ptr(),
                element,
                4,
                map.start as *mut c_void,
                map.sizes.as_ptr(),
                map.strides.as_ptr(),
                map.box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", result)?;
        let mut bytes = [0; 128];
        const { assert!(size_of::<sys::CUtensorMap>() == 128) };
        // SAFETY: 128 bytes that were zeros before the driver wrote them.
        unsafe { ptr::copy_nonoverlapping(encoded.as_ptr().cast::<u8>(), bytes.as_mut_ptr(), 128) };
        Ok(bytes)
    }

    fn capture(&self, step: &mut dyn FnMut() -> Result<(), Error>) -> Result<Recording, Error> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: our stream.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })?;
        self.capturing.store(true, Ordering::Relaxed);
        let done = step();
        self.capturing.store(false, Ordering::Relaxed);
        let mut graph = ptr::null_mut();
        // SAFETY: our stream, which records, and a place for one handle.
        let ended = unsafe { sys::cuStreamEndCapture(self.stream, &raw mut graph) };
        if done.is_err() && !graph.is_null() {
            // SAFETY: a graph that nobody else has.
            let _gone = unsafe { sys::cuGraphDestroy(graph) };
        }
        done?;
        check("cuStreamEndCapture", ended)?;
        self.instantiate(graph)
    }

    fn current(&self) -> Result<Stream, Error> {
        self.enter()?;
        Ok(self.stream as Stream)
    }

    unsafe fn replay(&self, recording: Recording) -> Result<(), Error> {
        self.enter()?;
        let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = graphs.get(&recording).copied();
        let ready =
            ready.ok_or_else(|| failed("replay", &format!("nothing is recorded as {recording:?}")))?;
        // SAFETY: a graph of ours; its addresses are the caller's promise.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(ready, self.stream) })
    }

    fn forget(&self, recording: Recording) {
        let ready = self.graphs.lock().unwrap_or_else(PoisonError::into_inner).remove(&recording);
        if let (Some(ready), Ok(())) = (ready, self.enter()) {
            // SAFETY: ours, and nobody has it any more; a launch under way goes on.
            let _gone = unsafe { sys::cuGraphExecDestroy(ready) };
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Address, Error> {
        self.not_recording("allocate", bytes)?;
        self.enter()?;
        let mut address = 0;
        // SAFETY: a place for one address.
        match unsafe { sys::cuMemAllocAsync(&raw mut address, bytes, self.stream) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::Memory { operator: "cuda", bytes }),
            result => check("cuMemAllocAsync", result).map(|()| address),
        }
    }

    fn release(&self, address: Address) {
        if self.enter().is_ok() {
            // SAFETY: an address of `allocate` that nobody has any more; the stream frees it when it gets there.
            let _lost = unsafe { sys::cuMemFreeAsync(address, self.stream) };
        }
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the operators stay inside what they allocated.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(to, byte, bytes, self.stream) })
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<(), Error> {
        self.not_recording("upload", from.len())?;
        self.enter()?;
        let source = from.as_ptr().cast::<c_void>();
        // Memory that is not pinned is staged before the call returns, where it is staged at all.
        // SAFETY: as above, and the source is a slice.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, source, from.len(), self.stream) };
        check("cuMemcpyHtoDAsync", copied)?;
        if self.reads_host_late { self.wait() } else { Ok(()) }
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        self.not_recording("download", to.len())?;
        self.enter()?;
        let target = to.as_mut_ptr().cast::<c_void>();
        // SAFETY: as above, and the target is a slice that outlives the wait below.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(target, from, to.len(), self.stream) };
        let done = self.wait();
        check("cuMemcpyDtoHAsync", copied)?;
        done
    }

    fn upload_from(&self, to: Address, from: &[&[u8]]) -> Result<(), Error> {
        let bytes = from.iter().map(|part| part.len()).sum();
        self.not_recording("upload", bytes)?;
        self.enter()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staged = staging.room(bytes)?;
        let mut rest = &mut *staged;
        for part in from {
            rest.split_off_mut(..part.len()).expect("room for all").copy_from_slice(part);
        }
        self.upload(to, staged)?;
        // The next of these calls writes over what the GPU reads.
        self.wait()
    }

    fn download_to(&self, from: Address, to: &mut [&mut [u8]]) -> Result<(), Error> {
        let bytes = to.iter().map(|part| part.len()).sum();
        self.enter()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staged = staging.room(bytes)?;
        self.download(from, staged)?;
        let mut rest = &*staged;
        for part in to {
            part.copy_from_slice(rest.split_off(..part.len()).expect("room for all"));
        }
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), Error> {
        self.enter()?;
        let kernel = self.kernel(&launch)?;
        let mut arguments = [launch.argument.as_ptr().cast_mut().cast::<c_void>()];
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut early = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &raw mut early,
            numAttrs: u32::from(launch.early && waits(self.capability) && self.driver >= EARLY_DRIVER_MIN),
        };
        // SAFETY: the kernel takes one struct, which the driver copies at once, as it does the attribute; the rest is
        // the caller's promise.
        let started = unsafe {
            sys::cuLaunchKernelEx(&raw const config, kernel, arguments.as_mut_ptr(), ptr::null_mut())
        };
        check("cuLaunchKernelEx", started)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        if !self.stream.is_null() {
            // SAFETY: our stream; nothing of ours runs once it is done.
            let _done = unsafe { sys::cuStreamSynchronize(self.stream) };
            // SAFETY: as above, and nobody uses it after us.
            let _gone = unsafe { sys::cuStreamDestroy_v2(self.stream) };
        }
        for (_, ready) in self.graphs.get_mut().unwrap_or_else(PoisonError::into_inner).drain() {
            // SAFETY: made by us, and nothing of it runs any more.
            let _gone = unsafe { sys::cuGraphExecDestroy(ready) };
        }
        for module in self.modules.get_mut().unwrap_or_else(PoisonError::into_inner).values() {
            // SAFETY: loaded by us, and no kernel of it runs any more.
            let _gone = unsafe { sys::cuModuleUnload(module.handle) };
        }
        self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).give_back();
        // SAFETY: retained once, in `new`.
        let _gone = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "Gpu(sm_{major}{minor}, {} multiprocessors, CUDA {})", self.multiprocessors, self.driver)
    }
}

pub(super) fn failed(call: &'static str, reason: &str) -> Error {
    Error::Device { call, reason: reason.to_owned() }
}

fn check(call: &'static str, result: CUresult) -> Result<(), Error> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(call, &format!("{result:?}"))) }
}

//! A GPU behind NVIDIA's driver, which is found at run time. Without one there is an error, never a panic.
//!
//! A kernel's machine code comes from the first of: the disk cache; the PTX inside this crate, which the driver
//! compiles; the run-time compiler (NVRTC), if the machine has it. What NVRTC made goes into the disk cache.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::panic::catch_unwind;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute, CUresult};

use super::cache::Cache;
use super::device::{
    Address, Device, EncodedTileMap, Launch, MemoryUse, Recording, Stream, TileElement, TileMap,
};
use super::nvrtc::compile;
use super::source::SOURCES;
use super::{Cuda, embedded};
use crate::{Dtype, Error};

/// The oldest driver that has all we call: CUDA 12.0.
const DRIVER_MIN: i32 = 12_000;
/// The oldest driver that records launches which begin early: CUDA 12.4.
const EARLY_DRIVER_MIN: i32 = 12_040;
/// The oldest GPU on which they do: sm_90.
const EARLY_CAPABILITY_MIN: (i32, i32) = (9, 0);
/// The program that is loaded to see whether programs can be: one that all need, and small.
const FIRST: &str = "copy";
/// The oldest GPU: sm_80.
const CAPABILITY_MIN: (i32, i32) = (8, 0);

impl Cuda {
    /// The machine's first GPU.
    ///
    /// # Errors
    /// When there is no driver, or it is too old, or there is no GPU, or it is older than sm_80, with what was found.
    pub fn detect(dtype: Dtype) -> Result<Self, Error> {
        Self::on(Arc::new(Gpu::new(0)?), dtype)
    }
}

/// A refusal of drivers before [`DRIVER_MIN`].
fn new_enough(driver: i32) -> Result<(), Error> {
    if driver >= DRIVER_MIN {
        return Ok(());
    }
    let version = |number: i32| format!("{}.{}", number / 1000, number % 1000 / 10);
    let (found, oldest) = (version(driver), version(DRIVER_MIN));
    Err(failed("cuda", &format!("the driver is of CUDA {found}, {oldest} is the oldest that works")))
}

/// A refusal of GPUs before [`CAPABILITY_MIN`].
fn capable(ordinal: i32, (major, minor): (i32, i32)) -> Result<(), Error> {
    if (major, minor) >= CAPABILITY_MIN {
        return Ok(());
    }
    Err(failed("cuda", &format!("GPU {ordinal} is sm_{major}{minor}, sm_80 is the oldest that works")))
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
    /// What was recorded, by its number.
    graphs: Mutex<HashMap<Recording, sys::CUgraphExec>>,
    /// A recording is under way.
    capturing: AtomicBool,
    recorded: AtomicU64,
}

/// A loaded program and the kernels that were asked of it.
struct Module {
    handle: sys::CUmodule,
    kernels: HashMap<String, sys::CUfunction>,
}

impl Module {
    fn new(handle: sys::CUmodule) -> Self {
        Self { handle, kernels: HashMap::new() }
    }
}

// SAFETY: the handles are the driver's, which any thread may use; the maps are behind a lock.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    fn new(ordinal: i32) -> Result<Self, Error> {
        // SAFETY: opens a library by name and closes it.
        if !unsafe { sys::is_culib_present() } {
            return Err(failed("cuda", "no NVIDIA driver (libcuda) on this machine"));
        }
        // A library that is not the driver lacks the symbol, at which the binding panics.
        // SAFETY: the first call to the driver; it has no arguments to be wrong.
        let started = catch_unwind(|| unsafe { sys::cuInit(0) });
        let started = started.map_err(|_| failed("cuInit", "libcuda is not NVIDIA's driver"))?;
        if started != CUresult::CUDA_SUCCESS {
            return Err(failed("cuInit", &format!("{started:?}")));
        }
        let mut driver = 0;
        // SAFETY: a place for one number.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut driver) })?;
        new_enough(driver)?;
        let mut count = 0;
        // SAFETY: as above.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
        if ordinal >= count {
            return Err(failed("cuda", &format!("GPU {ordinal} of {count}")));
        }
        let mut device = 0;
        // SAFETY: as above.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, ordinal) })?;
        let major = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        capable(ordinal, (major, minor))?;
        let multiprocessors =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared =
            attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let host_tables =
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES;
        let reads_host_late = attribute(device, host_tables)? != 0;
        let mut context = ptr::null_mut();
        // SAFETY: a place for one handle, and a device that exists.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, device) };
        check("cuDevicePrimaryCtxRetain", retained)?;
        let mut gpu = Self {
            device,
            context,
            stream: ptr::null_mut(),
            capability: (major, minor),
            multiprocessors: multiprocessors.unsigned_abs(),
            shared_bytes_max: shared.unsigned_abs(),
            reads_host_late,
            driver,
            cache: Cache::of_user(),
            modules: Mutex::default(),
            graphs: Mutex::default(),
            capturing: AtomicBool::new(false),
            recorded: AtomicU64::new(0),
        };
        gpu.enter()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place for one handle.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut gpu.stream, flags) })?;
        gpu.keep_memory()?;
        // A driver that takes our programs from nowhere is found out here, not by the first request.
        let handle = gpu.load(FIRST)?;
        gpu.modules.get_mut().unwrap_or_else(PoisonError::into_inner).insert(FIRST, Module::new(handle));
        Ok(gpu)
    }

    /// Lets the driver keep what is given back for who asks next; at first it returns all of it at every wait.
    fn keep_memory(&self) -> Result<(), Error> {
        let mut pool = ptr::null_mut();
        // SAFETY: a place for one handle, and a device that exists.
        let found = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, self.device) };
        check("cuDeviceGetDefaultMemPool", found)?;
        let mut bytes = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the device's pool, and a number of the attribute's size.
        let kept = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut bytes).cast()) };
        check("cuMemPoolSetAttribute", kept)
    }

    /// Makes this GPU the calling thread's.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: a context that is retained for as long as we live.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
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

    /// Whether its instructions wait for earlier launches; without them a launch must not begin early.
    fn waits(&self) -> bool {
        self.capability >= EARLY_CAPABILITY_MIN
    }

    /// The kernel of a name, loading its program if this is the first of it.
    fn kernel(&self, launch: &Launch<'_>) -> Result<sys::CUfunction, Error> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if !modules.contains_key(launch.file) {
            modules.insert(launch.file, Module::new(self.load(launch.file)?));
        }
        let module = modules.get_mut(launch.file).ok_or_else(|| failed("cuda", launch.file))?;
        if let Some(&kernel) = module.kernels.get(launch.kernel) {
            return Ok(kernel);
        }
        let name = CString::new(launch.kernel).map_err(|_| failed("cuda", launch.kernel))?;
        let mut kernel = ptr::null_mut();
        // SAFETY: a place for one handle, a loaded module, a C string.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut kernel, module.handle, name.as_ptr()) };
        check("cuModuleGetFunction", found)?;
        let shared = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let most = i32::try_from(self.shared_bytes_max).unwrap_or(i32::MAX);
        // SAFETY: a kernel that was just found.
        check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(kernel, shared, most) })?;
        module.kernels.insert(launch.kernel.to_owned(), kernel);
        Ok(kernel)
    }

    /// Loads a program from the first place that has it.
    fn load(&self, file: &str) -> Result<sys::CUmodule, Error> {
        let source = SOURCES.iter().find(|source| source.name == file);
        let source = source.ok_or_else(|| failed("cuda", &format!("no program {file}")))?;
        let architecture = architecture(self.capability);
        let name = format!("{file}-{architecture}-{:016x}", source.hash());
        let cached = self.cache.as_ref().and_then(|cache| cache.load(&name));
        // A cubin that the driver refuses (made for another driver, say) is no more than a missing one.
        if let Some(Ok(module)) = cached.map(|cubin| load_module(&cubin)) {
            return Ok(module);
        }
        let embedded = match embedded::ptx(source) {
            Some(packed) => {
                let ptx = embedded::unpack(packed, self.waits());
                let ptx = ptx.map_err(|error| failed("cuda", &error.to_string()));
                ptx.and_then(|ptx| load_module(&ptx))
            }
            None => Err(failed("cuda", "no PTX of this source inside the crate")),
        };
        match embedded {
            Ok(module) => Ok(module),
            Err(refused) => {
                let cubin = compile(source, &architecture)
                    .map_err(|missing| failed("cuda", &format!("{file}: {refused}; {missing}")))?;
                if let Some(cache) = &self.cache {
                    cache.store(&name, &cubin);
                }
                load_module(&cubin)
            }
        }
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
        if self.reads_host_late {
            // SAFETY: our stream.
            check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })?;
        }
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        self.not_recording("download", to.len())?;
        self.enter()?;
        let target = to.as_mut_ptr().cast::<c_void>();
        // SAFETY: as above, and the target is a slice that outlives the wait below.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(target, from, to.len(), self.stream) };
        // SAFETY: our stream.
        let done = unsafe { sys::cuStreamSynchronize(self.stream) };
        check("cuMemcpyDtoHAsync", copied)?;
        check("cuStreamSynchronize", done)
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
            numAttrs: u32::from(launch.early && self.waits() && self.driver >= EARLY_DRIVER_MIN),
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

fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Result<i32, Error> {
    let mut value = 0;
    // SAFETY: a place for one number, and a device that exists.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
    Ok(value)
}

/// The name by which compilers know a GPU; Hopper and the first Blackwells have one for all their instructions.
fn architecture((major, minor): (i32, i32)) -> String {
    let all = if matches!((major, minor), (9 | 10, 0)) { "a" } else { "" };
    format!("sm_{major}{minor}{all}")
}

/// A module of a cubin, or of PTX that ends in a zero.
fn load_module(image: &[u8]) -> Result<sys::CUmodule, Error> {
    let mut module = ptr::null_mut();
    // SAFETY: a place for one handle; a cubin says how long it is, and PTX ends in a zero.
    check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) })?;
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_gets_an_error() {
        match Cuda::detect(Dtype::Bf16) {
            Ok(cuda) => eprintln!("skipped: this machine has one, {cuda:?}"),
            Err(Error::Device { call, reason }) => assert!(!call.is_empty() && !reason.is_empty()),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn old_drivers_and_gpus_are_refused_by_what_was_found() {
        let reason = |result: Result<(), Error>| match result {
            Err(Error::Device { call: "cuda", reason }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(new_enough(11_080)), "the driver is of CUDA 11.8, 12.0 is the oldest that works");
        assert_eq!(reason(capable(1, (7, 5))), "GPU 1 is sm_75, sm_80 is the oldest that works");
        assert!(new_enough(12_000).is_ok() && new_enough(13_010).is_ok());
        assert!(capable(0, (8, 0)).is_ok() && capable(0, (12, 0)).is_ok());
        assert!(SOURCES.iter().any(|source| source.name == FIRST));
    }
}

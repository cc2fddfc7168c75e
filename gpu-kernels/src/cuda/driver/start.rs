//! From nothing to a GPU that runs programs. What is not there is an error, and nothing panics: the bindings do where a
//! library or a symbol is missing, so we look before they do.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute};

use super::super::cache::Cache;
use super::super::probe;
use super::programs::Module;
use super::{Gpu, check, failed};
use crate::Error;

/// The oldest driver that has all we call: CUDA 12.0.
const DRIVER_MIN: i32 = 12_000;
/// The program that is loaded to see whether programs can be: one that all need, and small.
const FIRST: &str = "copy";
/// The oldest GPU: sm_80.
const CAPABILITY_MIN: (i32, i32) = (8, 0);

/// What every driver has, of whatever age.
const FIRST_CALLS: [&str; 2] = ["cuInit", "cuDriverGetVersion"];
/// All that we call besides.
const CALLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetDefaultMemPool",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuFuncSetAttribute",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuLaunchKernelEx",
    "cuMemAllocAsync",
    "cuMemAllocHost_v2",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemPoolSetAttribute",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuTensorMapEncodeTiled",
];

/// The driver's version, once it has started and has all that we call.
fn start() -> Result<i32, Error> {
    let library = probe::library(&["cuda", "nvcuda"])
        .ok_or_else(|| failed("cuda", "no NVIDIA driver (libcuda) on this machine"))?;
    if probe::missing(&library, &FIRST_CALLS).is_some() {
        return Err(failed("cuInit", "libcuda is not NVIDIA's driver"));
    }
    // SAFETY: the first call to the driver; it has no arguments to be wrong.
    check("cuInit", unsafe { sys::cuInit(0) })?;
    let mut driver = 0;
    // SAFETY: a place for one number.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut driver) })?;
    new_enough(driver)?;
    match probe::missing(&library, CALLS) {
        Some(name) => Err(failed("cuda", &format!("the driver has no {name}"))),
        None => Ok(driver),
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

impl Gpu {
    pub(super) fn new(ordinal: i32) -> Result<Self, Error> {
        let driver = start()?;
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
            staging: Mutex::default(),
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
}

fn attribute(device: sys::CUdevice, which: CUdevice_attribute) -> Result<i32, Error> {
    let mut value = 0;
    // SAFETY: a place for one number, and a device that exists.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::super::source::SOURCES;
    use super::*;
    use crate::{Cuda, Dtype};

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

    /// A call that is not looked for would panic where it is missing.
    #[test]
    fn all_that_is_called_is_looked_for_first() {
        let sources = [
            include_str!("../driver.rs"),
            include_str!("programs.rs"),
            include_str!("staging.rs"),
            include_str!("start.rs"),
        ];
        let known: BTreeSet<&str> = FIRST_CALLS.iter().chain(CALLS).copied().collect();
        assert_eq!(probe::called(&sources, "sys::"), known);
    }
}

//! Kernels in a driver's hands. A program's machine code comes from the first of: the disk cache; the PTX inside
//! this crate, which the driver compiles; the run-time compiler (NVRTC), if the machine has it. What NVRTC made goes
//! into the disk cache.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::PoisonError;

use cudarc::driver::sys::{self, CUfunction_attribute};

use super::super::device::Launch;
use super::super::embedded;
use super::super::nvrtc::compile;
use super::super::source::SOURCES;
use super::{Gpu, check, failed};
use crate::Error;

/// A loaded program and the kernels that were asked of it.
pub(super) struct Module {
    pub(super) handle: sys::CUmodule,
    kernels: HashMap<String, sys::CUfunction>,
}

impl Module {
    pub(super) fn new(handle: sys::CUmodule) -> Self {
        Self { handle, kernels: HashMap::new() }
    }
}

impl Gpu {
    /// The kernel of a name, loading its program if this is the first of it.
    pub(super) fn kernel(&self, launch: &Launch<'_>) -> Result<sys::CUfunction, Error> {
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
    pub(super) fn load(&self, file: &str) -> Result<sys::CUmodule, Error> {
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

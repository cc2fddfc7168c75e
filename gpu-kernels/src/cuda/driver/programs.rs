//! Kernels in a driver's hands.

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::PoisonError;

use cudarc::driver::sys::{self, CUfunction_attribute};

use super::super::device::Launch;
use super::super::nvrtc::compile;
use super::super::places;
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
        places::load(file, self.capability, self.cache.as_ref(), load_module, compile)
    }
}

/// A module of a cubin, or of PTX that ends in a zero.
fn load_module(image: &[u8]) -> Result<sys::CUmodule, Error> {
    let mut module = ptr::null_mut();
    // SAFETY: a place for one handle; a cubin says how long it is, and PTX ends in a zero.
    check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) })?;
    Ok(module)
}

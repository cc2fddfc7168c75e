//! Products by NVIDIA's cuBLASLt, where the machine has that library and the caller wants it. It is found at run time:
//! building needs nothing of it, and without it our own kernels do the same.
//! `products.rs` calls it.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fmt;
use std::path::Path;

use cudarc::cublaslt::sys;
use libloading::Library;

use crate::Error;

/// The oldest version whose interface is the one that we call: 12.0.
const VERSION_MIN: usize = 120_000;
/// Names under which it is installed.
const NAMES: [&str; 5] =
    ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "cublasLt64_13.dll", "cublasLt64_12.dll"];
/// Where toolkits put it, if the loader does not look there.
const FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"];

/// NVIDIA's cuBLASLt, loaded.
pub struct CublasLt {
    pub(super) calls: Calls,
    version: usize,
    /// The calls are its.
    _library: Library,
}

impl CublasLt {
    /// The machine's: where its loader looks, or where NVIDIA's toolkit puts it.
    ///
    /// # Errors
    /// When none is found, or as [`CublasLt::open`] of the first that is.
    pub fn find() -> Result<Self, Error> {
        let in_folders = FOLDERS.iter().flat_map(|folder| NAMES.map(|name| Path::new(folder).join(name)));
        let candidates = NAMES.map(|name| Path::new(name).to_owned()).into_iter().chain(in_folders);
        // SAFETY: NVIDIA's library by its names, whose constructors set up its own state alone.
        let mut opened = candidates.filter_map(|path| Some((unsafe { Library::new(&path) }.ok()?, path)));
        let (library, path) = opened.next().ok_or_else(|| {
            failed(format!(
                "not found: neither {} on the loader's path nor in {}",
                NAMES.join(", "),
                FOLDERS.join(", ")
            ))
        })?;
        Self::of(library, path.as_os_str())
    }

    /// The library in this file.
    ///
    /// # Errors
    /// When the file is no library, lacks a call that we need, or is older than 12.0; with the name of what is wrong.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // SAFETY: the caller names a cuBLASLt, whose constructors set up its own state alone.
        let library =
            unsafe { Library::new(path) }.map_err(|error| failed(format!("{}: {error}", path.display())))?;
        Self::of(library, path.as_os_str())
    }

    fn of(library: Library, path: &OsStr) -> Result<Self, Error> {
        let path = path.display();
        let missing = |name: &str| failed(format!("{path} has no {name}"));
        // SAFETY: the header declares it so in every version.
        let version = unsafe { library.get::<unsafe extern "C" fn() -> usize>("cublasLtGetVersion") };
        let version = version.map_err(|_| missing("cublasLtGetVersion"))?;
        // SAFETY: it takes nothing and gives a number.
        let version = unsafe { version() };
        if version < VERSION_MIN {
            return Err(failed(format!(
                "{path} is of version {version}, {VERSION_MIN} is the oldest that works"
            )));
        }
        let calls = Calls::of(&library).map_err(missing)?;
        Ok(Self { calls, version, _library: library })
    }

    /// As the library says it: 10000 for each major version, 100 for each minor one.
    #[must_use]
    pub fn version(&self) -> usize {
        self.version
    }
}

impl fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CublasLt({})", self.version)
    }
}

/// What a call gives back: 0, or what went wrong. Newer libraries know more of them than any header.
pub(super) type Status = u32;
pub(super) const SUCCESS: Status = sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS as Status;
pub(super) const NOT_SUPPORTED: Status = sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED as Status;
/// A handle, a description or a layout.
pub(super) type Opaque = *mut c_void;

/// What we call, declared as in NVIDIA's header.
#[derive(Clone, Copy)]
pub(super) struct Calls {
    pub(super) status_name: unsafe extern "C" fn(Status) -> *const c_char,
    pub(super) create: unsafe extern "C" fn(*mut Opaque) -> Status,
    pub(super) destroy: unsafe extern "C" fn(Opaque) -> Status,
    pub(super) product_create:
        unsafe extern "C" fn(*mut Opaque, sys::cublasComputeType_t, sys::cudaDataType) -> Status,
    pub(super) product_set:
        unsafe extern "C" fn(Opaque, sys::cublasLtMatmulDescAttributes_t, *const c_void, usize) -> Status,
    pub(super) product_destroy: unsafe extern "C" fn(Opaque) -> Status,
    pub(super) layout_create: unsafe extern "C" fn(*mut Opaque, sys::cudaDataType, u64, u64, i64) -> Status,
    pub(super) layout_destroy: unsafe extern "C" fn(Opaque) -> Status,
    pub(super) wish_create: unsafe extern "C" fn(*mut Opaque) -> Status,
    pub(super) wish_set: unsafe extern "C" fn(
        Opaque,
        sys::cublasLtMatmulPreferenceAttributes_t,
        *const c_void,
        usize,
    ) -> Status,
    pub(super) wish_destroy: unsafe extern "C" fn(Opaque) -> Status,
    pub(super) choose: unsafe extern "C" fn(
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        c_int,
        *mut Choice,
        *mut c_int,
    ) -> Status,
    pub(super) multiply: unsafe extern "C" fn(
        Opaque,
        Opaque,
        *const c_void,
        *const c_void,
        Opaque,
        *const c_void,
        Opaque,
        *const c_void,
        *const c_void,
        Opaque,
        *mut c_void,
        Opaque,
        *const sys::cublasLtMatmulAlgo_t,
        *mut c_void,
        usize,
        *mut c_void,
    ) -> Status,
}

impl Calls {
    /// All of them, or the name of the first that is not there.
    fn of(library: &Library) -> Result<Self, &'static str> {
        fn find<F: Copy>(library: &Library, name: &'static str) -> Result<F, &'static str> {
            // SAFETY: `Calls` declares each as NVIDIA's header does, from 12.0 on.
            unsafe { library.get::<F>(name) }.map(|found| *found).map_err(|_| name)
        }
        Ok(Self {
            status_name: find(library, "cublasLtGetStatusName")?,
            create: find(library, "cublasLtCreate")?,
            destroy: find(library, "cublasLtDestroy")?,
            product_create: find(library, "cublasLtMatmulDescCreate")?,
            product_set: find(library, "cublasLtMatmulDescSetAttribute")?,
            product_destroy: find(library, "cublasLtMatmulDescDestroy")?,
            layout_create: find(library, "cublasLtMatrixLayoutCreate")?,
            layout_destroy: find(library, "cublasLtMatrixLayoutDestroy")?,
            wish_create: find(library, "cublasLtMatmulPreferenceCreate")?,
            wish_set: find(library, "cublasLtMatmulPreferenceSetAttribute")?,
            wish_destroy: find(library, "cublasLtMatmulPreferenceDestroy")?,
            choose: find(library, "cublasLtMatmulAlgoGetHeuristic")?,
            multiply: find(library, "cublasLtMatmul")?,
        })
    }

    /// An error with the library's name of it.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), Error> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: any number is legal.
        let name = unsafe { (self.status_name)(status) };
        // SAFETY: a C string that lives as long as the library, or none.
        let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_string_lossy());
        Err(Error::Device { call, reason: format!("{} ({status})", name.unwrap_or_default()) })
    }
}

/// `cublasLtMatmulHeuristicResult_t`, whose state may be a number that our header does not name.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub(super) algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
    pub(super) state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Choice>() == size_of::<sys::cublasLtMatmulHeuristicResult_t>());

fn failed(reason: String) -> Error {
    Error::Device { call: "cublaslt", reason }
}

//! A stand-in for cuBLASLt with its interface, which computes on the host's memory: `fake_cublaslt.cpp`, compiled by
//! the machine's C++ compiler.

use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::process::Command;

use crate::emulator;

/// The stand-in. It stays loaded, so that its numbers stay too.
pub(crate) struct Fake {
    pub(crate) path: PathBuf,
    loaded: *mut c_void,
}

impl Fake {
    /// Compiled so; nothing, and a line in the log, where there is no compiler.
    pub(crate) fn build(name: &str, flags: &[&str]) -> Option<Self> {
        let Some(compiler) = emulator::compiler() else {
            eprintln!("skipped: no C++ compiler (c++, g++ or clang++) for the stand-in");
            return None;
        };
        let source = emulator::in_workspace("gpu-kernels/tests/common/fake_cublaslt.cpp");
        let path = emulator::scratch().join(format!("{name}.{}.so", std::process::id()));
        let options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-o"];
        let built = Command::new(compiler).args(options).arg(&path).args(flags).arg(source).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the stand-in, which has no constructors.
        let loaded = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!loaded.is_null());
        Some(Self { path, loaded })
    }

    /// A number that it counts.
    pub(crate) fn counted(&self, name: &str) -> i32 {
        let name = CString::new(name).unwrap();
        // SAFETY: a library that is loaded, and a C string.
        let number = unsafe { libc::dlsym(self.loaded, name.as_ptr()) }.cast::<i32>();
        assert!(!number.is_null());
        // SAFETY: its own number, of this type; nothing runs in it now.
        unsafe { number.read() }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // SAFETY: opened once, in `build`.
        unsafe { libc::dlclose(self.loaded) };
        let _gone = std::fs::remove_file(&self.path);
    }
}

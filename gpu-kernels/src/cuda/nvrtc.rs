//! NVIDIA's run-time compiler, where the machine has it: the last place from which a program comes.

use std::ffi::{CStr, CString};
use std::ptr;

use cudarc::nvrtc::sys as nvrtc;

use super::driver::failed;
use super::probe;
use super::source::{HEADERS, OPTIONS, Source};
use crate::Error;

/// All that we call.
const CALLS: [&str; 7] = [
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
];

/// Machine code of a program, made by the run-time compiler.
pub(super) fn compile(source: &Source, architecture: &str) -> Result<Vec<u8>, Error> {
    let library = probe::library(&["nvrtc"])
        .ok_or_else(|| failed("nvrtc", "no run-time compiler (libnvrtc) on this machine"))?;
    if let Some(name) = probe::missing(&library, &CALLS) {
        return Err(failed("nvrtc", &format!("libnvrtc has no {name}")));
    }
    let c_string = |text: &str| CString::new(text).map_err(|_| failed("nvrtc", "a zero in the source"));
    let (text, name) = (c_string(source.text)?, c_string(source.name)?);
    let headers = HEADERS.iter().map(|h| c_string(h.text)).collect::<Result<Vec<_>, _>>()?;
    let names = HEADERS.iter().map(|h| c_string(h.name)).collect::<Result<Vec<_>, _>>()?;
    let options = OPTIONS.iter().map(|&option| option.to_owned());
    let options = options.chain([format!("--gpu-architecture={architecture}")]);
    let options = options.map(|option| c_string(&option)).collect::<Result<Vec<_>, _>>()?;
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let (headers, names, flags) = (pointers(&headers), pointers(&names), pointers(&options));
    let count = |list: &[*const _]| i32::try_from(list.len()).unwrap_or(i32::MAX);

    let mut program = Program(ptr::null_mut());
    // SAFETY: C strings that live until the program is destroyed, and their numbers.
    let created = unsafe {
        nvrtc::nvrtcCreateProgram(
            &raw mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            count(&headers),
            headers.as_ptr(),
            names.as_ptr(),
        )
    };
    check_nvrtc("nvrtcCreateProgram", created)?;
    // SAFETY: a program that was just made, and C strings.
    let compiled = unsafe { nvrtc::nvrtcCompileProgram(program.0, count(&flags), flags.as_ptr()) };
    if compiled != nvrtc::nvrtcResult::NVRTC_SUCCESS {
        return Err(failed(
            "nvrtc",
            &format!("{} for {architecture}: {compiled:?}\n{}", source.name, program.log()),
        ));
    }
    let mut size = 0;
    // SAFETY: a compiled program, and a place for one number.
    check_nvrtc("nvrtcGetCUBINSize", unsafe { nvrtc::nvrtcGetCUBINSize(program.0, &raw mut size) })?;
    let mut cubin = vec![0_u8; size];
    // SAFETY: as many bytes as it asked for.
    check_nvrtc("nvrtcGetCUBIN", unsafe { nvrtc::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) })?;
    Ok(cubin)
}

/// A program under compilation.
struct Program(nvrtc::nvrtcProgram);

impl Program {
    /// What the compiler said.
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: a live program, and a place for one number.
        if unsafe { nvrtc::nvrtcGetProgramLogSize(self.0, &raw mut size) }
            != nvrtc::nvrtcResult::NVRTC_SUCCESS
        {
            return String::new();
        }
        let mut log = vec![0_u8; size + 1];
        // SAFETY: at least as many bytes as it asked for.
        let _said = unsafe { nvrtc::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram`, or null, which it refuses.
        let _gone = unsafe { nvrtc::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn check_nvrtc(call: &'static str, result: nvrtc::nvrtcResult) -> Result<(), Error> {
    if result == nvrtc::nvrtcResult::NVRTC_SUCCESS {
        Ok(())
    } else {
        Err(failed(call, &format!("{result:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::source::SOURCES;
    use super::*;

    /// A call that is not looked for would panic where it is missing.
    #[test]
    fn all_that_is_called_is_looked_for_first() {
        let called = probe::called(&[include_str!("nvrtc.rs")], "nvrtc::");
        assert_eq!(called, CALLS.into_iter().collect());
    }

    #[test]
    fn the_compiler_is_used_where_there_is_one() {
        if probe::library(&["nvrtc"]).is_none() {
            eprintln!("skipped: no libnvrtc on the library path");
            return;
        }
        let source = SOURCES.iter().find(|source| source.name == "norm").unwrap();
        assert!(compile(source, "sm_80").unwrap().starts_with(b"\x7fELF"));
        let broken = Source { name: "broken", text: "#include \"prelude.cuh\"\nnot C++" };
        assert!(
            matches!(compile(&broken, "sm_80"), Err(Error::Device { reason, .. }) if reason.contains("broken"))
        );
    }
}

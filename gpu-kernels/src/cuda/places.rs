//! Where a program comes from. The first of these that has it, and of which the driver takes it: the disk cache; the
//! machine code inside this crate; the PTX inside this crate, which the driver compiles; the run-time compiler (NVRTC),
//! if the machine has it. What NVRTC made goes into the disk cache.

use super::cache::Cache;
use super::driver::failed;
use super::embedded;
use super::source::{SOURCES, Source};
use crate::Error;

/// Loads a program for a GPU. `take` is the driver, to which a cubin, or PTX that ends in a zero, becomes a module;
/// `compile` makes a cubin for an architecture.
///
/// # Errors
/// When no place has it, or the driver refuses it from all, with the reason of each.
pub(crate) fn load<M>(
    file: &str,
    capability: (i32, i32),
    cache: Option<&Cache>,
    take: impl Fn(&[u8]) -> Result<M, Error>,
    compile: impl FnOnce(&Source, &str) -> Result<Vec<u8>, Error>,
) -> Result<M, Error> {
    let source = SOURCES.iter().find(|source| source.name == file);
    let source = source.ok_or_else(|| failed("cuda", &format!("no program {file}")))?;
    let architecture = architecture(capability);
    let name = source.code_name(&architecture);
    // What the driver refuses (a cubin made for another one, say) is no more than missing.
    if let Some(Ok(module)) = cache.and_then(|cache| cache.load(&name)).map(|cubin| take(&cubin)) {
        return Ok(module);
    }
    let of_cubin = match embedded::cubin(source, capability).and_then(|cubin| take(&cubin)) {
        Ok(module) => return Ok(module),
        Err(refused) => refused,
    };
    let of_ptx = match embedded::ptx(source, embedded::waits(capability)).and_then(|ptx| take(&ptx)) {
        Ok(module) => return Ok(module),
        Err(refused) => refused,
    };
    let cubin = compile(source, &architecture)
        .map_err(|missing| failed("cuda", &format!("{file}: {of_cubin}; {of_ptx}; {missing}")))?;
    if let Some(cache) = cache {
        cache.store(&name, &cubin);
    }
    take(&cubin)
}

/// The name by which compilers know a GPU; Hopper and the first Blackwells have one for all their instructions.
fn architecture((major, minor): (i32, i32)) -> String {
    let all = if matches!((major, minor), (9 | 10, 0)) { "a" } else { "" };
    format!("sm_{major}{minor}{all}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that says what it was given, and takes only some of it.
    fn driver(takes: &[&str]) -> impl Fn(&[u8]) -> Result<String, Error> {
        move |image| {
            let kind = match image {
                [0x7f, b'E', b'L', b'F', ..] => "cubin",
                [b'.', b'v', b'e', b'r', b's', b'i', b'o', b'n', .., 0] => "ptx",
                _ => str::from_utf8(image).unwrap(),
            };
            let opened =
                if kind == "ptx" && !image.windows(4).any(|four| four == b"/*gr") { ", opened" } else { "" };
            if takes.contains(&kind) { Ok(format!("{kind}{opened}")) } else { Err(failed("take", kind)) }
        }
    }

    fn compiler(source: &Source, architecture: &str) -> Result<Vec<u8>, Error> {
        Ok(format!("{} for {architecture}", source.name).into_bytes())
    }

    fn no_compiler(_: &Source, _: &str) -> Result<Vec<u8>, Error> {
        Err(failed("nvrtc", "not here"))
    }

    #[test]
    fn places_are_asked_in_their_order() {
        let folder = std::env::temp_dir().join(format!("quayline-places-{}", std::process::id()));
        let cache = Cache::new(&folder);
        let all = ["cubin", "ptx", "norm for sm_86"];
        let from = |takes: &[&str]| load("norm", (8, 6), Some(&cache), driver(takes), compiler).unwrap();
        assert_eq!(from(&all), "cubin");
        assert_eq!(from(&all[1..]), "ptx");
        // Nothing of these is kept on disk: both are at hand the next time.
        assert!(!folder.exists());
        assert_eq!(from(&all[2..]), "norm for sm_86");
        // What was compiled is, and comes before all others; but not where the driver refuses it.
        assert_eq!(from(&all), "norm for sm_86");
        assert_eq!(from(&all[..2]), "cubin");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn gpus_without_machine_code_of_their_own_take_ptx_and_those_that_wait_take_it_opened() {
        let from =
            |capability, takes: &[&str]| load("copy", capability, None, driver(takes), no_compiler).unwrap();
        for (capability, takes, expected) in [
            ((8, 0), &["cubin", "ptx"][..], "cubin"),
            ((8, 7), &["cubin", "ptx"], "ptx"),
            ((9, 0), &["cubin", "ptx"], "cubin"),
            ((9, 0), &["ptx"], "ptx, opened"),
            ((10, 3), &["cubin", "ptx"], "cubin"),
            ((12, 0), &["cubin", "ptx"], "ptx, opened"),
        ] {
            assert_eq!(from(capability, takes), expected, "{capability:?}");
        }
    }

    #[test]
    fn when_nobody_has_it_each_says_why() {
        let refusal = |file, capability| match load(file, capability, None, driver(&[]), no_compiler) {
            Err(Error::Device { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        let reason = refusal("norm", (8, 0));
        for part in ["norm", "take: cubin", "take: ptx", "nvrtc: not here"] {
            assert!(reason.contains(part), "{reason}");
        }
        assert!(refusal("norm", (12, 0)).contains("none for sm_120"));
        assert!(refusal("hopper_gemm", (8, 0)).contains("hopper_gemm as sm_80: not of this source"));
        assert_eq!(refusal("nothing", (8, 0)), "no program nothing");
    }

    #[test]
    fn compilers_are_asked_for_the_gpu_itself() {
        let named = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)].map(architecture);
        assert_eq!(named, ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_103", "sm_120"]);
    }
}

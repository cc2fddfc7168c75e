//! The programs inside the crate, so that a driver alone can run them: machine code (cubins) for the GPUs of data
//! centres, and PTX, which a driver compiles for any GPU from sm_80 on.
//!
//! `scripts/prebuild` makes them, and writes the hash of each source beside them. A program whose source has changed
//! since then counts as missing; a test fails until it is made anew.
//!
//! Which drivers take what: machine code of any toolkit 12.x is loaded by any driver of CUDA 12, from release 525 on
//! (NVIDIA's "CUDA Compatibility", minor versions); PTX by drivers no older than the toolkit that wrote it: 12.4,
//! release 550. Machine code runs on GPUs of the same major and no smaller minor revision, but not on Tegra if it was
//! made for others (CUDA C++ Programming Guide, "Binary Compatibility").

use std::io::{Error as Damage, Read};
use std::sync::OnceLock;

use lzma_rust2::LzmaReader;

use super::cache::unsealed;
use super::driver::failed;
use super::source::Source;
use crate::Error;

/// All programs of one kind.
struct Archive {
    kind: &'static str,
    packed: &'static [u8],
    /// Made at the first use, in a twentieth of a second.
    unpacked: OnceLock<Vec<u8>>,
}

impl Archive {
    const fn new(kind: &'static str, packed: &'static [u8]) -> Self {
        Self { kind, packed, unpacked: OnceLock::new() }
    }
}

static ARCHIVES: [Archive; 4] = [
    Archive::new("ptx", include_bytes!("../../prebuilt/ptx.lzma")),
    Archive::new("sm_80", include_bytes!("../../prebuilt/sm_80.lzma")),
    Archive::new("sm_90a", include_bytes!("../../prebuilt/sm_90a.lzma")),
    Archive::new("sm_100", include_bytes!("../../prebuilt/sm_100.lzma")),
];

/// Of each part, in their order: its archive, its program, the hash of its source, and its bytes.
const INDEX: &str = include_str!("../../prebuilt/index.txt");

/// The oldest GPU whose code waits for earlier launches: sm_90.
const WAITING_CAPABILITY_MIN: (i32, i32) = (9, 0);

/// Whether the code for a GPU waits for earlier launches; without that a launch must not begin early.
pub(crate) fn waits(capability: (i32, i32)) -> bool {
    capability >= WAITING_CAPABILITY_MIN
}

/// The machine code of exactly this source, for a GPU.
///
/// # Errors
/// When there is none, or it is damaged.
pub(crate) fn cubin(source: &Source, capability: (i32, i32)) -> Result<Vec<u8>, Error> {
    let (major, minor) = capability;
    let kind = kind(capability).ok_or_else(|| failed("cubin", &format!("none for sm_{major}{minor}")))?;
    part(kind, source)
}

/// The archive whose machine code runs on a GPU.
fn kind(capability: (i32, i32)) -> Option<&'static str> {
    match capability {
        (8, 0 | 6 | 9) => Some("sm_80"),
        (9, 0) => Some("sm_90a"),
        (10, 0 | 3) => Some("sm_100"),
        _ => None,
    }
}

/// The PTX of exactly this source, with a zero at its end. With `waits` as GPUs from Hopper on take it: the
/// instructions are opened with which a kernel waits for earlier launches (`kernels/device.cuh`), comments before that.
///
/// # Errors
/// When there is none, or it is damaged.
pub(crate) fn ptx(source: &Source, waits: bool) -> Result<Vec<u8>, Error> {
    let ptx = String::from_utf8(part("ptx", source)?).map_err(|_| failed("ptx", "it is no text"))?;
    let mut ptx = if waits { opened(&ptx) } else { ptx }.into_bytes();
    ptx.push(0);
    Ok(ptx)
}

fn opened(ptx: &str) -> String {
    let ptx = ptx.replace("/*griddepcontrol.wait;*/", "griddepcontrol.wait;");
    let ptx = ptx.replace("/*griddepcontrol.launch_dependents;*/", "griddepcontrol.launch_dependents;");
    ptx.replacen(".target sm_80", ".target sm_90", 1)
}

/// A program of an archive.
fn part(kind: &'static str, source: &Source) -> Result<Vec<u8>, Error> {
    let refused = |reason: &str| failed("embedded", &format!("{} as {kind}: {reason}", source.name));
    let archive = ARCHIVES.iter().find(|archive| archive.kind == kind);
    let archive = archive.ok_or_else(|| refused("no such archive"))?;
    let whole = match archive.unpacked.get() {
        Some(whole) => whole,
        None => {
            let whole = unpack(archive.packed).map_err(|damage| refused(&damage.to_string()))?;
            archive.unpacked.get_or_init(|| whole)
        }
    };
    let range = range(kind, source).ok_or_else(|| refused("not of this source"))?;
    let code = whole.get(range).and_then(|sealed| unsealed(&source.code_name(kind), sealed));
    code.map(<[u8]>::to_vec).ok_or_else(|| refused("damaged"))
}

/// Where the code of exactly this source is in its archive.
fn range(kind: &str, source: &Source) -> Option<std::ops::Range<usize>> {
    let mut start = 0;
    for line in INDEX.lines() {
        let [of, program, hash, bytes] = *line.split(' ').collect::<Vec<_>>() else { return None };
        let end = start + if of == kind { bytes.parse().ok()? } else { 0 };
        if (of, program) == (kind, source.name) {
            return (hash == format!("{:016x}", source.hash())).then_some(start..end);
        }
        start = end;
    }
    None
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, Damage> {
    let mut whole = Vec::new();
    LzmaReader::new_mem_limit(packed, u32::MAX, None)?.read_to_end(&mut whole)?;
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::source::SOURCES;
    use super::*;

    fn text(source: &Source, waits: bool) -> String {
        String::from_utf8(ptx(source, waits).unwrap()).unwrap()
    }

    #[test]
    fn every_kernel_waits_for_earlier_launches_before_it_touches_memory() {
        for source in SOURCES {
            let (name, [plain, opened]) = (source.name, [false, true].map(|waits| text(source, waits)));
            // Programs for Hopper alone have the instructions as they are.
            let hopper = plain.contains(".target sm_90a");
            assert_eq!(hopper, name.starts_with("hopper_"), "{name}");
            assert!(hopper || plain.contains(".target sm_80"), "{name}");
            assert_eq!(plain.contains("/*griddepcontrol"), !hopper, "{name}");
            assert!(opened.contains(".target sm_90") && !opened.contains("/*"), "{name}");
            let kernels: Vec<_> = opened.split(".entry ").skip(1).collect();
            assert!(!kernels.is_empty(), "{name}");
            for kernel in kernels {
                let line = kernel.lines().next().unwrap();
                let (before, after) = kernel.split_once("\tgriddepcontrol.wait;\n").unwrap_or_else(|| {
                    panic!("{name}: {line} does not wait");
                });
                assert!(after.starts_with("\tgriddepcontrol.launch_dependents;\n"), "{name}: {line}");
                let touches = ["global", "shared", "generic", "bar.", "ld.u", "st.", "atom", "red."];
                let touched = touches.iter().find(|touch| before.contains(**touch));
                assert_eq!(touched, None, "{name}: {line}");
            }
        }
    }

    /// What an emulator cannot show: `wgmma` reads and writes registers after it was asked for, so between the fence
    /// and the wait nothing else may name those of its sums and weights.
    #[test]
    fn nobody_touches_the_registers_of_products_under_way() {
        for source in SOURCES.iter().filter(|source| source.name.starts_with("hopper_")) {
            let (name, ptx) = (source.name, text(source, true));
            for kernel in ptx.split(".entry ").skip(1) {
                let lines: Vec<_> = kernel.lines().map(str::trim).collect();
                let at = |what: &str| -> Vec<usize> {
                    (0..lines.len()).filter(|&line| lines[line].starts_with(what)).collect()
                };
                let (fences, products) = (at("wgmma.fence"), at("wgmma.mma_async"));
                let waits = at("wgmma.wait_group.sync.aligned 0");
                assert!(!fences.is_empty() && !products.is_empty() && !waits.is_empty(), "{name}");
                for &product in &products {
                    let own = registers(lines[product]);
                    assert!(own.len() >= 32, "{name}: {}", lines[product]);
                    let fence = *fences.iter().rfind(|&&fence| fence < product).unwrap();
                    let wait = *waits.iter().find(|&&wait| wait > product).unwrap();
                    let others = lines[fence..wait].iter().filter(|line| !line.starts_with("wgmma."));
                    for other in others {
                        assert!(
                            registers(other).is_disjoint(&own),
                            "{name}: {other} between {fence} and {wait}"
                        );
                    }
                }
            }
        }
    }

    /// The registers of 32 bits that a line names.
    fn registers(line: &str) -> BTreeSet<&str> {
        let names = line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '%'));
        names
            .filter(|name| name.starts_with("%f") || (name.starts_with("%r") && !name.starts_with("%rd")))
            .collect()
    }

    /// The memory unit reads its maps where the driver put the argument, not in a copy of a thread's own.
    #[test]
    fn maps_stay_in_the_argument() {
        for source in SOURCES.iter().filter(|source| source.name.starts_with("hopper_")) {
            let (name, ptx) = (source.name, text(source, true));
            assert!(!ptx.contains(".local"), "{name} has memory of a thread's own");
            for kernel in ptx.split(".entry ").skip(1) {
                assert!(kernel.contains(".param .align 128 "), "{name}: maps are at multiples of 128");
                assert!(kernel.contains("cvta.param.u64"), "{name}: no address in the argument");
            }
        }
    }

    #[test]
    fn every_program_is_inside_as_its_source_is_now() {
        for source in SOURCES {
            let hopper = source.name.starts_with("hopper_");
            let kinds: &[_] = if hopper { &["ptx", "sm_90a"] } else { &["ptx", "sm_80", "sm_90a", "sm_100"] };
            for kind in kinds {
                let found = part(kind, source);
                assert!(found.is_ok(), "run gpu-kernels/scripts/prebuild: {}", found.unwrap_err());
            }
            let absent = ["sm_80", "sm_100"].map(|kind| part(kind, source).is_err());
            assert_eq!(absent, [hopper; 2], "{}", source.name);
        }
        assert!(part("ptx", &Source { name: "norm", text: "" }).is_err());
        assert!(part("sm_80", &Source { name: "norm", text: "" }).is_err());
    }

    /// What of a cubin says the GPU that it is for: ELF's flags, of the older and of the newer form.
    fn architecture(cubin: &[u8]) -> (u8, bool) {
        assert_eq!((&cubin[..4], &cubin[18..20]), (b"\x7fELF".as_slice(), [190, 0].as_slice()), "CUDA's ELF");
        match (cubin[8], &cubin[48..52]) {
            (7, flags) => (flags[0], flags[1] & 8 != 0),
            (_, flags) => (flags[1], flags[0] & 8 != 0),
        }
    }

    #[test]
    fn machine_code_is_for_its_gpus_and_has_the_kernels_of_its_source() {
        for (kind, expected) in [("sm_80", (80, false)), ("sm_90a", (90, true)), ("sm_100", (100, false))] {
            for source in SOURCES.iter().filter(|source| range(kind, source).is_some()) {
                let (cubin, ptx) = (part(kind, source).unwrap(), text(source, false));
                assert_eq!(architecture(&cubin), expected, "{}", source.name);
                let entries = ptx.split(".entry ").skip(1).map(|entry| entry.split('(').next().unwrap());
                let strings = cubin.split(|&byte| byte == 0).filter_map(|name| str::from_utf8(name).ok());
                let sections: BTreeSet<_> = strings.filter_map(|name| name.strip_prefix(".text.")).collect();
                assert_eq!(sections, entries.collect(), "{} {kind}", source.name);
            }
        }
    }

    #[test]
    fn each_gpu_has_the_archive_that_nvidia_promises_to_run_there() {
        let kinds = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)].map(kind);
        let (ampere, blackwell) = (Some("sm_80"), Some("sm_100"));
        assert_eq!(kinds, [ampere, ampere, ampere, Some("sm_90a"), blackwell, blackwell]);
        // Tegra's, and what came later.
        assert_eq!([(8, 7), (10, 1), (11, 0), (12, 0), (12, 1)].map(kind), [None; 5]);
        // Code that waits goes to GPUs of which launches know it, and no other.
        assert!(!waits((8, 9)) && waits((9, 0)) && waits((10, 3)) && waits((12, 0)));
    }

    #[test]
    fn damage_is_an_error() {
        let archive = &ARCHIVES[1];
        assert_eq!(archive.kind, "sm_80");
        let whole = unpack(archive.packed).unwrap();
        assert!(unpack(&archive.packed[..archive.packed.len() / 2]).is_err());
        let source = SOURCES.iter().find(|source| source.name == "copy").unwrap();
        let (name, range) = (source.code_name("sm_80"), range("sm_80", source).unwrap());
        let sealed = &whole[range];
        assert!(unsealed(&name, sealed).is_some() && unsealed(&name, &sealed[..sealed.len() - 1]).is_none());
        assert!(unsealed(&source.code_name("sm_90a"), sealed).is_none());
        for at in (0..sealed.len()).step_by(101) {
            let mut flipped = sealed.to_vec();
            flipped[at] ^= 1;
            assert!(unsealed(&name, &flipped).is_none(), "byte {at}");
        }
    }
}

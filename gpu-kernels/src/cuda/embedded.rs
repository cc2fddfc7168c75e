//! PTX of every program, inside the crate: a driver alone can run it on any GPU from sm_80 on.
//!
//! `scripts/prebuild` makes it, with a compiler old enough for the drivers in use, and writes the hash of each source
//! beside it. A program whose source has changed since then counts as missing; a test fails until it is made anew.

use super::source::{Source, programs};

macro_rules! embedded {
    ($($name:literal),+) => {
        /// Each program's name and its gzipped PTX.
        const PTX: &[(&str, &[u8])] =
            &[$(($name, include_bytes!(concat!("../../prebuilt/", $name, ".ptx.gz")))),+];
    };
}

programs!(embedded);

/// Lines of a program's name and the hash of its source.
const HASHES: &str = include_str!("../../prebuilt/hashes.txt");

/// The gzipped PTX of exactly this source.
pub(crate) fn ptx(source: &Source) -> Option<&'static [u8]> {
    let line = format!("{} {:016x}", source.name, source.hash());
    let same = HASHES.lines().any(|known| known == line);
    PTX.iter().find(|(name, _)| same && *name == source.name).map(|(_, ptx)| *ptx)
}

/// The PTX, with a zero at its end. With `waits` as GPUs from Hopper on take it: the instructions are opened with
/// which a kernel waits for earlier launches (`kernels/device.cuh`), comments before that.
///
/// # Errors
/// When the bytes are damaged.
#[cfg(feature = "cuda")]
pub(crate) fn unpack(packed: &[u8], waits: bool) -> std::io::Result<Vec<u8>> {
    let ptx = std::io::read_to_string(flate2::read::GzDecoder::new(packed))?;
    let mut ptx = if waits { opened(&ptx) } else { ptx }.into_bytes();
    ptx.push(0);
    Ok(ptx)
}

#[cfg(feature = "cuda")]
fn opened(ptx: &str) -> String {
    let ptx = ptx.replace("/*griddepcontrol.wait;*/", "griddepcontrol.wait;");
    let ptx = ptx.replace("/*griddepcontrol.launch_dependents;*/", "griddepcontrol.launch_dependents;");
    ptx.replacen(".target sm_80", ".target sm_90", 1)
}

#[cfg(test)]
mod tests {
    use super::super::source::SOURCES;
    use super::*;

    #[cfg(feature = "cuda")]
    #[test]
    fn every_kernel_waits_for_earlier_launches_before_it_touches_memory() {
        for (name, packed) in PTX {
            let [plain, opened] =
                [false, true].map(|waits| String::from_utf8(unpack(packed, waits).unwrap()).unwrap());
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
    #[cfg(feature = "cuda")]
    #[test]
    fn nobody_touches_the_registers_of_products_under_way() {
        for (name, packed) in PTX.iter().filter(|(name, _)| name.starts_with("hopper_")) {
            let ptx = String::from_utf8(unpack(packed, true).unwrap()).unwrap();
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
    #[cfg(feature = "cuda")]
    fn registers(line: &str) -> std::collections::BTreeSet<&str> {
        let names = line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '%'));
        names
            .filter(|name| name.starts_with("%f") || (name.starts_with("%r") && !name.starts_with("%rd")))
            .collect()
    }

    /// The memory unit reads its maps where the driver put the argument, not in a copy of a thread's own.
    #[cfg(feature = "cuda")]
    #[test]
    fn maps_stay_in_the_argument() {
        for (name, packed) in PTX.iter().filter(|(name, _)| name.starts_with("hopper_")) {
            let ptx = String::from_utf8(unpack(packed, true).unwrap()).unwrap();
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
            assert!(
                ptx(source).is_some(),
                "{}.cu has changed: run gpu-kernels/scripts/prebuild",
                source.name
            );
        }
        assert!(ptx(&Source { name: "norm", text: "" }).is_none());
    }
}

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

#[cfg(test)]
mod tests {
    use super::super::source::SOURCES;
    use super::*;

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

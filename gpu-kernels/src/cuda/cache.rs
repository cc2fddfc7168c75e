//! Machine code on disk: what the run-time compiler made once need not be made again.
//!
//! A file holds a mark, a hash of what follows, and the code. A file that is damaged, of another version or of
//! another program counts as missing, and the next compilation replaces it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::source::hash;

const MARK: &[u8; 8] = b"quaycub1";

/// A folder of compiled kernels.
#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// `$QUAYLINE_CACHE`, else the user's cache folder; `None` where there is neither.
    pub(crate) fn of_user() -> Option<Self> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = set("QUAYLINE_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("quayline")))
            .or_else(|| set("HOME").map(|folder| folder.join(".cache/quayline")))?;
        Some(Self::new(&folder))
    }

    /// The code kept under a name, whole and unchanged, or nothing.
    pub(crate) fn load(&self, name: &str) -> Option<Vec<u8>> {
        Some(unsealed(name, &fs::read(self.path(name)).ok()?)?.to_vec())
    }

    /// Keeps code under a name. A cache that cannot be written is no error: the next start compiles again.
    pub(crate) fn store(&self, name: &str, code: &[u8]) {
        let hash = hash(&[name.as_bytes(), code]);
        let bytes = [MARK, hash.to_le_bytes().as_slice(), code].concat();
        // The finished file takes its place at once: a reader sees all of it or nothing. Others may be at the
        // same program.
        static STORED: AtomicU64 = AtomicU64::new(0);
        let turn = STORED.fetch_add(1, Ordering::Relaxed);
        let unfinished = self.folder.join(format!("{name}.{}.{turn}", std::process::id()));
        let written = fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(&unfinished, bytes))
            .and_then(|()| fs::rename(&unfinished, self.path(name)));
        if written.is_err() {
            let _gone = fs::remove_file(unfinished);
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.cubin"))
    }
}

/// The code in a file of this name, or in a part of an archive, if it is whole and unchanged.
pub(crate) fn unsealed<'a>(name: &str, bytes: &'a [u8]) -> Option<&'a [u8]> {
    let (found, code) = bytes.strip_prefix(MARK)?.split_first_chunk()?;
    (hash(&[name.as_bytes(), code]) == u64::from_le_bytes(*found)).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty(name: &str) -> Cache {
        let folder = std::env::temp_dir().join(format!("quayline-cache-{name}-{}", std::process::id()));
        let _gone = fs::remove_dir_all(&folder);
        Cache::new(&folder)
    }

    #[test]
    fn what_was_stored_is_loaded() {
        let cache = empty("stored");
        assert_eq!(cache.load("a"), None);
        cache.store("a", b"code");
        cache.store("b", b"");
        assert_eq!(cache.load("a").as_deref(), Some(b"code".as_slice()));
        assert_eq!(cache.load("b").as_deref(), Some(b"".as_slice()));
        fs::remove_dir_all(cache.folder).unwrap();
    }

    #[test]
    fn a_damaged_file_counts_as_missing_and_is_replaced() {
        let cache = empty("damaged");
        cache.store("a", b"some code");
        let whole = fs::read(cache.path("a")).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            damaged.push(flipped);
        }
        damaged.push([whole.clone(), vec![0]].concat());
        for bytes in damaged {
            fs::write(cache.path("a"), &bytes).unwrap();
            assert_eq!(cache.load("a"), None, "{bytes:?}");
        }
        // The code of another program under this name.
        cache.store("b", b"some code");
        fs::copy(cache.path("b"), cache.path("a")).unwrap();
        assert_eq!(cache.load("a"), None);
        cache.store("a", b"some code");
        assert_eq!(cache.load("a").as_deref(), Some(b"some code".as_slice()));
        fs::remove_dir_all(cache.folder).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let cache = Cache::new(Path::new("/dev/null/nowhere"));
        cache.store("a", b"code");
        assert_eq!(cache.load("a"), None);
    }
}

//! A file of cache blocks that outlives the process: what was computed before a restart is found after it.
//!
//! ```text
//!  slot 0                         slot 1
//!  |-- header --|-- K and V ------|-- header --|-- K and V ------|  ...
//! ```
//!
//! A header names the block, and carries a checksum of both. So a file that was cut, a slot that was half written when
//! the power went, or one that a failing drive returns otherwise, is known for what it is when it is read; then the
//! block is computed again. Blocks of another model, layout or seed are passed over, and written over in time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use quayline_kv_cache::hash::AnyHash;
use quayline_kv_cache::tier::BlockKey;
use quayline_kv_cache::{Digest, GroupId};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::LoadError;
use crate::files::ModelFiles;
use crate::machine::Machine;
use crate::options::{OffloadingDisk, Options};

/// The name of a block and its group.
pub(crate) type Key = BlockKey<AnyHash>;

/// The file, and what its slots are for.
#[derive(Debug)]
pub(crate) struct BlockFile {
    file: File,
    slots: u32,
    block_bytes: usize,
    /// What the bytes mean: a number that another model, layout or seed does not have.
    identity: u64,
    /// Counts the writes over all processes, so that the oldest is known.
    writes: u64,
}

/// A file, how many slots it may have, and what was found in them: what was written first, first.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: BlockFile,
    pub(crate) slots: u32,
    pub(crate) held: Vec<(Key, u32)>,
}

/// The name of the file in its directory.
const NAME: &str = "blocks.quayline";

const MAGIC: u64 = u64::from_le_bytes(*b"QLKVBLK2");

/// More slots are not kept count of.
const SLOTS_MAX: u32 = 1 << 24;

/// Magic, identity, number of the write, name (up to 32 bytes), group, bytes of the name, checksum.
pub(crate) const HEADER: usize = 72;

impl BlockFile {
    /// Opens the file in `directory`, which is made if need be, and lists what it holds: what was written first, first.
    pub(crate) fn open(
        directory: &Path,
        slots: u32,
        block_bytes: usize,
        identity: u64,
    ) -> io::Result<(Self, Vec<(Key, u32)>)> {
        fs::create_dir_all(directory)?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(directory.join(NAME))?;
        let mut opened = Self { file, slots, block_bytes, identity, writes: 0 };
        // What a larger tier left behind the last slot is given back.
        if opened.file.metadata()?.len() > opened.start(slots) {
            opened.file.set_len(opened.start(slots))?;
        }
        let held = opened.list()?;
        Ok((opened, held))
    }

    /// Writes a block over what a slot holds.
    pub(crate) fn write(&mut self, slot: u32, key: &Key, bytes: &[u8]) -> io::Result<()> {
        self.writes += 1;
        let header = self.header(self.writes, key, bytes);
        self.file.seek(SeekFrom::Start(self.start(slot)))?;
        self.file.write_all(&header)?;
        self.file.write_all(bytes)
    }

    /// Reads a block; `None` if the slot does not hold it as it was written. It is not listed again then.
    pub(crate) fn read(&mut self, slot: u32, key: &Key) -> Option<Arc<[u8]>> {
        let mut read: Arc<[u8]> = (0..self.block_bytes).map(|_| 0).collect();
        let bytes = Arc::get_mut(&mut read).expect("nobody else has what was just made");
        let whole = self.read_slot(slot, bytes).is_ok_and(|header| {
            let written = number(&header, 16);
            header == self.header(written, key, bytes)
        });
        if !whole {
            let _best_effort = self.erase(slot);
        }
        whole.then_some(read)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)
    }

    fn start(&self, slot: u32) -> u64 {
        u64::from(slot) * (HEADER + self.block_bytes) as u64
    }

    fn header(&self, written: u64, key: &Key, bytes: &[u8]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC.to_le_bytes());
        header[8..16].copy_from_slice(&self.identity.to_le_bytes());
        header[16..24].copy_from_slice(&written.to_le_bytes());
        let name = key.digest.bytes();
        header[24..24 + name.len()].copy_from_slice(name);
        header[56] = key.group.0;
        header[57] = u8::try_from(name.len()).expect("a name has up to 32 bytes");
        let mut checksum = Xxh3::new();
        checksum.update(&header[..64]);
        checksum.update(bytes);
        header[64..].copy_from_slice(&checksum.digest().to_le_bytes());
        header
    }

    fn read_slot(&mut self, slot: u32, bytes: &mut [u8]) -> io::Result<[u8; HEADER]> {
        let mut header = [0; HEADER];
        self.file.seek(SeekFrom::Start(self.start(slot)))?;
        self.file.read_exact(&mut header)?;
        self.file.read_exact(bytes)?;
        Ok(header)
    }

    fn erase(&mut self, slot: u32) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.start(slot)))?;
        self.file.write_all(&[0; HEADER])
    }

    /// The blocks of this model and layout, each once: of two under one name the one that was written last.
    fn list(&mut self) -> io::Result<Vec<(Key, u32)>> {
        let length = self.file.metadata()?.len();
        let mut found = Vec::new();
        let whole = u32::try_from(length / self.start(1)).unwrap_or(u32::MAX);
        for slot in 0..whole.min(self.slots) {
            let header = self.read_slot(slot, &mut [])?;
            let ours = number(&header, 0) == MAGIC && number(&header, 8) == self.identity;
            let name = header[24..56].get(..usize::from(header[57]));
            if let (true, Some(digest)) = (ours, name.and_then(AnyHash::new)) {
                let key = BlockKey { digest, group: GroupId(header[56]) };
                found.push((number(&header, 16), key, slot));
            }
        }
        found.sort_unstable_by_key(|&(written, ..)| std::cmp::Reverse(written));
        self.writes = found.first().map_or(0, |&(written, ..)| written);
        let mut names = std::collections::BTreeSet::new();
        found.retain(|&(_, key, _)| names.insert(key));
        Ok(found.into_iter().rev().map(|(_, key, slot)| (key, slot)).collect())
    }
}

/// Opens the file of an engine.
///
/// # Errors
/// [`LoadError::Options`] for a size without room for a block; [`LoadError::Read`] for a file that cannot be had.
pub(crate) fn open(
    files: &ModelFiles,
    options: &Options,
    disk: &OffloadingDisk,
    machine: &dyn Machine,
) -> Result<Opened, LoadError> {
    let (block_bytes, device) = (machine.block_bytes(), machine.device());
    let slot_bytes = (HEADER + block_bytes) as u64;
    // The tier takes some memory for each slot, whatever is in it.
    let slots = u32::try_from(disk.bytes / slot_bytes).unwrap_or(u32::MAX).min(SLOTS_MAX);
    if slots == 0 {
        let problem = format!("there must be room for one block of {slot_bytes} bytes");
        return Err(LoadError::Options { option: "kv_offloading_disk_size", problem });
    }
    // Blocks lie under the hash of their tokens. All else that their bytes depend on is in this.
    let (config, weights) = (files.config()?, files.weights()?.fingerprint());
    let Options { block_size, hash, hash_seed, kv_dtype, quantization, seed, .. } = options;
    let (version, library) = (env!("CARGO_PKG_VERSION"), options.cublaslt.is_some());
    let meaning = format!(
        "{version} {config:?} {weights} {quantization:?} {block_size} {kv_dtype:?} {seed} {block_bytes} {device:?} \
         {library} {hash} {hash_seed:?}"
    );
    let opened = BlockFile::open(&disk.directory, slots, block_bytes, xxh3_64(meaning.as_bytes()));
    let (file, held) = opened.map_err(|source| LoadError::Read { path: disk.directory.clone(), source })?;
    Ok(Opened { file, slots, held })
}

fn number(header: &[u8; HEADER], at: usize) -> u64 {
    u64::from_le_bytes(*header[at..].first_chunk().expect("a header has eight bytes there"))
}

//! A file of cache blocks that outlives the process: what was computed before a restart is found after it.
//!
//! ```text
//!  slot 0                         slot 1
//!  |-- header --|-- K and V ------|-- header --|-- K and V ------|  ...
//! ```
//!
//! A header names the block, and carries a checksum of both. So a file that was cut, a slot that was half written when
//! the power went, or one that a failing drive returns otherwise, is known for what it is when it is read; then the
//! block is computed again. Blocks of another model, layout, seed or arithmetic are passed over, and written over in
//! time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use quayline_gpu_kernels as kernels;
use quayline_kv_cache::hash::AnyHash;
use quayline_kv_cache::tier::BlockKey;
use quayline_kv_cache::{Digest, GroupId};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::LoadError;
use crate::failure::expected;
use crate::files::ModelFiles;
use crate::input::{StepArrays, count};
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
    /// What the bytes mean: a number that another model, layout, seed or arithmetic does not have.
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
    machine: &mut dyn Machine,
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
    let arithmetic = trial(machine, block_size.get())?;
    let meaning = format!(
        "{version} {config:?} {weights} {quantization:?} {block_size} {kv_dtype:?} {seed} {block_bytes} {device:?} \
         {library} {hash} {hash_seed:?} {arithmetic}"
    );
    let opened = BlockFile::open(&disk.directory, slots, block_bytes, xxh3_64(meaning.as_bytes()));
    let (file, held) = opened.map_err(|source| LoadError::Read { path: disk.directory.clone(), source })?;
    Ok(Opened { file, slots, held })
}

/// What this machine makes of a few tokens: a number of the K and V that it computes for them, through all layers.
/// Instruction sets, GPUs and builds whose results differ differ in it; those with equal bits share blocks.
///
/// It writes over the first blocks of the pool.
fn trial(machine: &mut dyn Machine, block_size: u32) -> Result<u64, kernels::Error> {
    /// Less than a second's work for a model of a billion weights, more than one panel of keys and one tile of rows.
    const TOKENS: u32 = 32;
    let blocks = (TOKENS / block_size).max(1);
    // Where no sequence fills a block, none is kept.
    let tokens = (blocks * block_size).min(count(machine.limits().positions));
    let vocab = count(machine.config().vocab);
    let prompt: Vec<u32> = (0..tokens).map(|position| (position * 7919 + 1) % vocab).collect();
    let mut arrays = StepArrays::new(block_size as usize);
    arrays.push(0, [&prompt, &[]], 1..=blocks);
    expected(machine.run(&arrays.input()))?;
    let (mut bytes, mut hash) = (vec![0; machine.block_bytes()], Xxh3::new());
    for block in 1..=tokens / block_size {
        expected(machine.save_blocks(&mut [(block, &mut bytes[..])]))?;
        hash.update(&bytes);
    }
    Ok(hash.digest())
}

fn number(header: &[u8; HEADER], at: usize) -> u64 {
    u64::from_le_bytes(*header[at..].first_chunk().expect("a header has eight bytes there"))
}

#[cfg(test)]
mod tests {
    use quayline_gpu_kernels::cpu::Isa;
    use quayline_gpu_kernels::{Cpu, Dtype, Rounding};

    use super::*;
    use crate::machine::Place;
    use crate::options::Device;
    use crate::sizing::Sizes;

    fn trial_on(isa: Isa, quantization: Option<Rounding>) -> u64 {
        let (files, options) = (ModelFiles::bundled(), Options { quantization, ..Options::default() });
        let config = files.config().unwrap();
        let sizes = Sizes::new(&options, &config, Dtype::Bf16, None).unwrap();
        let limits = sizes.step_limits(&options, config.vocab, Device::Cpu);
        let place = Place::Cpu(Cpu::new(options.threads, Some(isa)).unwrap());
        let mut machine = place.load(&files, &options, &sizes, limits).unwrap();
        trial(&mut *machine, options.block_size.get()).unwrap()
    }

    /// Without fused multiply-adds products are rounded before they are added; AVX2 and AVX-512 have the same bits.
    #[test]
    #[cfg(all(target_arch = "x86_64", not(target_feature = "fma")))]
    fn blocks_are_shared_between_instruction_sets_with_equal_bits_alone() {
        let plain = trial_on(Isa::Portable, None);
        assert_eq!(plain, trial_on(Isa::Portable, None), "it does not change by itself");
        assert_ne!(plain, trial_on(Isa::Portable, Some(Rounding::Int8)));
        if Isa::Avx2.available() {
            let fused = trial_on(Isa::Avx2, None);
            assert_ne!(fused, plain);
            assert!(!Isa::Avx512.available() || trial_on(Isa::Avx512, None) == fused);
        }
    }
}

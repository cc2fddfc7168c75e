//! A file behind host memory: what one engine computed, the next one reads, as far as it is sound.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;
#[path = "common/directory.rs"]
mod directory;

use std::fs;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use common::load;
use directory::Directory;
use quayline_engine::{
    DiskUse, Engine, HashAlgorithm, KvSize, LoadError, ModelFiles, Offloading, OffloadingDisk, Options,
    Output, Request, RequestId, SampledToken, Sampling,
};

/// K and V of a block of 8 tokens of the bundled model: 6 layers, 2 heads of 32 numbers of 2 bytes.
const BLOCK_BYTES: u64 = 8 * 6 * 2 * 2 * 32 * 2;

/// What stands before each block in the file.
const HEADER_BYTES: u64 = 72;

impl Directory {
    /// Where the file lies, once somebody has made it.
    fn tier(&self) -> PathBuf {
        self.0.join("tier")
    }

    fn file(&self) -> PathBuf {
        self.tier().join("blocks.quayline")
    }

    /// Room for 16 blocks on the device, 12 in host memory, `blocks` in the file.
    fn options(&self, blocks: u64) -> Options {
        Options {
            block_size: NonZeroU32::new(8).unwrap(),
            kv: KvSize::Blocks(16),
            offloading: Some(Offloading::new(12 * BLOCK_BYTES)),
            offloading_disk: Some(OffloadingDisk {
                directory: self.tier(),
                bytes: blocks * (BLOCK_BYTES + HEADER_BYTES),
            }),
            threads: NonZeroUsize::new(1),
            ..Options::default()
        }
    }

    fn flip(&self, at: u64) {
        let mut bytes = fs::read(self.file()).unwrap();
        bytes[usize::try_from(at).unwrap()] ^= 1;
        fs::write(self.file(), bytes).unwrap();
    }
}

/// A prompt of `tokens` tokens that begins like no other's.
fn request(id: u64, begin: u32, tokens: u32) -> Request {
    let prompt: Vec<u32> = (0..tokens).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect();
    let sampling =
        Sampling { max_tokens: Some(6), ignore_eos: true, logprobs: Some(1), ..Sampling::greedy() };
    Request { sampling, ..Request::new(RequestId(id), prompt) }
}

fn answer(engine: &mut Engine, request: Request) -> Output {
    engine.add(request).unwrap();
    let outputs = common::run(engine);
    engine.check().unwrap();
    outputs.into_iter().next().unwrap()
}

/// The tokens of the whole answer to prompt 1, and what of the prompt was loaded.
fn ask(engine: &mut Engine, id: u64) -> (Vec<SampledToken>, u32) {
    engine.add(request(id, 1, 50)).unwrap();
    let outputs = common::run(engine);
    engine.check().unwrap();
    (outputs.iter().flat_map(|output| output.tokens.clone()).collect(), outputs[0].loaded_tokens)
}

fn disk(engine: &Engine) -> DiskUse {
    engine.snapshot().disk.unwrap()
}

/// What an engine without any tier answers.
fn expected() -> Vec<SampledToken> {
    let options = Options { offloading: None, offloading_disk: None, ..Directory::new("plain").options(1) };
    ask(&mut load(&options), 1).0
}

#[test]
fn names_of_another_hash_are_found_again_and_not_taken_for_ours() {
    let directory = Directory::new("hash");
    let ours = directory.options(100);
    let theirs = Options { hash: HashAlgorithm::VllmSha256Cbor, ..ours.clone() };
    let seeded = Options { hash_seed: Some("7".to_owned()), ..theirs.clone() };
    let loaded = |options: &Options| ask(&mut load(options), 1);
    assert_eq!(loaded(&theirs), (expected(), 0));
    assert_eq!(loaded(&theirs), (expected(), 48));
    assert_eq!(loaded(&ours), (expected(), 0), "another algorithm");
    assert_eq!(loaded(&seeded), (expected(), 0), "another seed");
}

#[test]
fn a_prompt_is_read_from_the_file_after_a_restart() {
    let directory = Directory::new("restart");
    let mut before = load(&directory.options(100));
    assert_eq!(ask(&mut before, 1), (expected(), 0));
    assert!(disk(&before).used >= 6, "{:?}", disk(&before));
    drop(before);
    let mut after = load(&directory.options(100));
    assert_eq!(ask(&mut after, 2), (expected(), 48));
    let now = disk(&after);
    assert_eq!((now.loaded_bytes, now.failed_blocks), (6 * BLOCK_BYTES, 0));
}

#[test]
fn what_host_memory_gave_up_comes_back_from_the_file() {
    let directory = Directory::new("crowd");
    let mut engine = load(&directory.options(200));
    ask(&mut engine, 1);
    for begin in 10..16 {
        answer(&mut engine, request(1000 + u64::from(begin), begin, 60));
    }
    assert!(engine.snapshot().host.unwrap().evictions > 0);
    assert_eq!(ask(&mut engine, 2), (expected(), 48));
    assert!(disk(&engine).loaded_bytes >= 5 * BLOCK_BYTES, "{:?}", disk(&engine));
}

#[test]
fn from_the_first_bad_block_on_a_prompt_is_computed() {
    // Blocks are written in the order of the prompt. The third is damaged: in its header, in its first and last byte.
    let third = 2 * (HEADER_BYTES + BLOCK_BYTES);
    for at in [third + 30, third + HEADER_BYTES, third + HEADER_BYTES + BLOCK_BYTES - 1] {
        let directory = Directory::new("damage");
        ask(&mut load(&directory.options(100)), 1);
        directory.flip(at);
        let mut after = load(&directory.options(100));
        assert_eq!(ask(&mut after, 2), (expected(), 16), "byte {at}");
        // What was computed again is written again, and is sound.
        drop(after);
        assert_eq!(ask(&mut load(&directory.options(100)), 3), (expected(), 48), "byte {at}");
    }
}

#[test]
fn a_file_that_was_cut_is_good_for_what_is_left_of_it() {
    let slot = HEADER_BYTES + BLOCK_BYTES;
    for (length, loaded) in [(0, 0), (10, 0), (slot, 8), (4 * slot - 1, 24), (4 * slot + 60, 32)] {
        let directory = Directory::new("cut");
        ask(&mut load(&directory.options(100)), 1);
        fs::OpenOptions::new().write(true).open(directory.file()).unwrap().set_len(length).unwrap();
        assert_eq!(ask(&mut load(&directory.options(100)), 2), (expected(), loaded), "{length} bytes");
    }
}

#[test]
fn the_file_stays_as_large_as_it_may_get() {
    let directory = Directory::new("bounded");
    let mut engine = load(&directory.options(8));
    for begin in 10..16 {
        answer(&mut engine, request(u64::from(begin), begin, 60));
    }
    let now = disk(&engine);
    assert_eq!((now.blocks, now.used), (8, 8));
    assert!(now.evictions > 0);
    let length = fs::metadata(directory.file()).unwrap().len();
    assert_eq!(length, 8 * (HEADER_BYTES + BLOCK_BYTES));
    drop(engine);
    // A smaller one is cut.
    load(&directory.options(3));
    assert!(fs::metadata(directory.file()).unwrap().len() <= 3 * (HEADER_BYTES + BLOCK_BYTES));
}

#[test]
fn another_layout_or_seed_finds_nothing_and_spoils_nothing_it_reads() {
    let directory = Directory::new("foreign");
    ask(&mut load(&directory.options(100)), 1);
    let other = Options { seed: 7, ..directory.options(100) };
    let mut engine = load(&other);
    assert_eq!(disk(&engine).used, 0);
    assert_eq!(ask(&mut engine, 2), (expected(), 0));
}

#[test]
fn a_reset_forgets_the_file_too() {
    let directory = Directory::new("reset");
    let mut engine = load(&directory.options(100));
    ask(&mut engine, 1);
    assert!(engine.reset_prefix_cache());
    while engine.wait_for_disk() {}
    assert_eq!((disk(&engine).used, fs::metadata(directory.file()).unwrap().len()), (0, 0));
    assert_eq!(ask(&mut engine, 2), (expected(), 0));
}

/// The system's file that is always full.
#[cfg(target_os = "linux")]
#[test]
fn a_drive_that_is_full_costs_nothing_but_what_it_would_have_kept() {
    let directory = Directory::new("full");
    fs::create_dir_all(directory.tier()).unwrap();
    std::os::unix::fs::symlink("/dev/full", directory.file()).unwrap();
    let mut engine = load(&directory.options(100));
    assert_eq!(ask(&mut engine, 1), (expected(), 0));
    let now = disk(&engine);
    assert!(now.failed_blocks > 0 && now.used == 0 && now.saved_bytes == 0, "{now:?}");
    assert_eq!(ask(&mut engine, 2).0, expected());
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    let refused = |options: &Options| Engine::load(&ModelFiles::bundled(), options).unwrap_err().to_string();
    let directory = Directory::new("refused");
    let alone = Options { offloading: None, ..directory.options(9) };
    assert!(refused(&alone).contains("kv_offloading_disk_size"), "{}", refused(&alone));
    assert!(refused(&directory.options(0)).contains("room for one block"));
    fs::write(directory.tier(), "a file where a directory should be").unwrap();
    let error = Engine::load(&ModelFiles::bundled(), &directory.options(9)).unwrap_err();
    assert!(matches!(error, LoadError::Read { .. } | LoadError::In { .. }), "{error}");
}

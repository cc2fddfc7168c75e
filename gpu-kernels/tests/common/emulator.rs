//! A device that is not there: runs the kernels' source, compiled by the machine's C++ compiler, thread by thread.
//!
//! See `kernels/emulator/emulator.hpp` for what it acts out. Here are its memory and launches. Memory starts as bytes
//! of 0xff, which are no numbers, and has a rim of them; a launch that changes a rim fails.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, c_char, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use quayline_gpu_kernels::cuda::{
    Address, Device, EncodedTileMap, Launch, LibraryWork, MemoryUse, Recording, SOURCES, Stream, TileElement,
    TileMap,
};
use quayline_gpu_kernels::{Cuda, Dtype, Error};

use crate::common::Random;

const RIM: usize = 4096;

/// Whether the tests are to run on this machine's GPU: `QUAYLINE_GPU` is set, and the feature `cuda` is there.
pub(crate) fn on_gpu() -> bool {
    cfg!(feature = "cuda") && std::env::var_os("QUAYLINE_GPU").is_some()
}

/// How often a GPU does a thing again that must give equal bits: the order of its threads is another each time.
pub(crate) fn repeats() -> usize {
    let asked = std::env::var("QUAYLINE_REPEATS").ok().and_then(|n| n.parse().ok());
    if on_gpu() { asked.unwrap_or(50) } else { 0 }
}

/// A file or folder of the workspace: where this was built, or else (what was packed runs elsewhere) here.
pub(crate) fn in_workspace(path: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut places = package.ancestors().map(|folder| folder.join(path));
    places.find(|place| place.exists()).unwrap_or_else(|| path.into())
}

/// A folder for what tests make.
pub(crate) fn scratch() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    if std::fs::create_dir_all(&folder).is_ok() { folder } else { std::env::temp_dir() }
}

/// Runs a test once with either 16-bit type, with threads in either order.
pub(crate) fn each(mut test: impl FnMut(Dtype, &Cuda, &mut Random)) {
    for (seed, (dtype, descending)) in (0..).zip([(Dtype::Bf16, false), (Dtype::F16, true)]) {
        let Some((cuda, _)) = cuda(dtype, descending) else { return };
        test(dtype, &cuda, &mut Random::new(seed));
    }
}

/// The emulator, or `None` and a line in the log where there is no C++ compiler; or the GPU, and an emulator that
/// counts nothing.
pub(crate) fn cuda(dtype: Dtype, descending: bool) -> Option<(Cuda, Arc<Emulator>)> {
    #[cfg(feature = "cuda")]
    if on_gpu() {
        return Some((Cuda::detect(dtype).expect("a GPU that works"), Arc::new(Emulator::idle(descending))));
    }
    let emulator = Arc::new(Emulator::new(descending)?);
    let device: Arc<dyn Device> = Arc::clone(&emulator) as _;
    Some((Cuda::on(device, dtype).expect("a type of two bytes"), emulator))
}

/// What a recording does, in order.
enum Act {
    Fill(Address, u8, usize),
    Launch { file: &'static str, kernel: String, numbers: [u32; 3], argument: Vec<u8>, early: bool },
    Library(LibraryWork),
}

pub(crate) struct Emulator {
    /// What is being recorded, and what was.
    recording: Mutex<Option<Vec<Act>>>,
    recorded: Mutex<BTreeMap<Recording, Vec<Act>>>,
    memory: Mutex<BTreeMap<Address, Vec<u64>>>,
    /// Fibres and blocks run in descending order.
    descending: bool,
    /// Pieces that `ldmatrix` had to wait for, over all launches.
    pub(crate) bank_conflicts: AtomicU64,
    /// Memory is zeros that cost nothing until they are touched, and `fill` leaves it so.
    pub(crate) lazy: AtomicBool,
    /// Programs for Hopper run, and how many did.
    pub(crate) hopper: AtomicBool,
    pub(crate) hopper_launches: AtomicU64,
    /// Launches that added up what others left.
    pub(crate) merge_launches: AtomicU64,
    /// How many blocks attention cuts its work for.
    pub(crate) multiprocessors: AtomicU32,
    /// Launches that may have begun while the one before them ended.
    pub(crate) early_launches: AtomicU64,
    /// Recordings that were replayed.
    pub(crate) replays: AtomicU64,
    /// The memory that it says is free; 0 says nothing.
    pub(crate) total_bytes: AtomicU64,
    /// Of these, what others have.
    pub(crate) taken_bytes: AtomicU64,
    /// Bytes that were brought to the host.
    pub(crate) downloaded: AtomicU64,
    /// Launches that succeed; all after them fail.
    pub(crate) launches_left: AtomicU64,
    /// What a block may have: that of the smallest GPUs, unless a test says otherwise.
    pub(crate) shared_bytes_max: AtomicU32,
}

impl Emulator {
    pub(crate) fn new(descending: bool) -> Option<Self> {
        if compiler().is_none() {
            eprintln!("skipped: no C++ compiler (c++, g++ or clang++) to run the kernels with");
            return None;
        }
        Some(Self::idle(descending))
    }

    /// One that runs nothing.
    pub(crate) fn idle(descending: bool) -> Self {
        Self {
            recording: Mutex::default(),
            recorded: Mutex::default(),
            memory: Mutex::default(),
            descending,
            bank_conflicts: AtomicU64::new(0),
            lazy: AtomicBool::new(false),
            hopper: AtomicBool::new(false),
            hopper_launches: AtomicU64::new(0),
            merge_launches: AtomicU64::new(0),
            multiprocessors: AtomicU32::new(4),
            early_launches: AtomicU64::new(0),
            replays: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            taken_bytes: AtomicU64::new(0),
            downloaded: AtomicU64::new(0),
            launches_left: AtomicU64::new(u64::MAX),
            shared_bytes_max: AtomicU32::new(99 << 10),
        }
    }

    /// Pieces of memory that somebody has.
    pub(crate) fn allocations(&self) -> usize {
        self.memory.lock().expect("no panic").len()
    }

    /// Bytes of all of them, rounded up to eights.
    pub(crate) fn allocated_bytes(&self) -> usize {
        let memory = self.memory.lock().expect("no panic");
        let of = |(&address, words): (&Address, &Vec<u64>)| {
            words.len() * 8 - RIM - (address - words.as_ptr() as u64) as usize
        };
        memory.iter().map(of).sum()
    }

    /// An error while a recording is under way.
    fn not_recording(&self, what: &str, bytes: usize) -> Result<(), Error> {
        if self.recording.lock().expect("no panic").is_some() {
            return Err(failed(format!("a recorded step may not {what} {bytes} bytes")));
        }
        Ok(())
    }

    fn check_rims(&self, launch: &Launch<'_>) -> Result<(), Error> {
        for (address, words) in self.memory.lock().expect("no panic").iter() {
            let rims = [&words[..RIM / 8], &words[words.len() - RIM / 8..]];
            if rims.iter().any(|rim| rim.iter().any(|&word| word != u64::MAX)) {
                return Err(failed(format!("{launch:?} wrote around the memory at {address:#x}")));
            }
        }
        Ok(())
    }
}

impl Device for Emulator {
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors.load(Ordering::Relaxed)
    }

    fn shared_bytes_max(&self) -> u32 {
        self.shared_bytes_max.load(Ordering::Relaxed)
    }

    fn is_hopper(&self) -> bool {
        self.hopper.load(Ordering::Relaxed)
    }

    /// `emulator::Box`.
    fn encode(&self, map: &TileMap) -> Result<EncodedTileMap, Error> {
        let aligned = [map.start].iter().chain(&map.strides).all(|n| n.is_multiple_of(16));
        let far = map.strides.iter().any(|&stride| stride >= 1 << 40);
        if far || !aligned || map.box_sizes.iter().any(|&n| n == 0 || n > 256) {
            return Err(failed(format!("a map that the driver refuses: {map:?}")));
        }
        let mut encoded = [0; 128];
        let words = [&[map.start][..], &map.sizes, &map.strides].concat();
        let element_bytes = if map.element == TileElement::Byte { 1_u32 } else { 2 };
        let boxes = map.box_sizes.into_iter().chain([element_bytes]).map(u32::to_ne_bytes);
        let bytes = words.into_iter().flat_map(u64::to_ne_bytes).chain(boxes.flatten());
        encoded.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
        Ok(encoded)
    }

    fn capture(&self, step: &mut dyn FnMut() -> Result<(), Error>) -> Result<Recording, Error> {
        *self.recording.lock().expect("no panic") = Some(Vec::new());
        let done = step();
        let acts = self.recording.lock().expect("no panic").take().unwrap_or_default();
        done?;
        let mut recorded = self.recorded.lock().expect("no panic");
        let recording = Recording(recorded.len() as u64);
        recorded.insert(recording, acts);
        Ok(recording)
    }

    fn memory_use(&self) -> Result<Option<MemoryUse>, Error> {
        let total = self.total_bytes.load(Ordering::Relaxed);
        let free = total - self.taken_bytes.load(Ordering::Relaxed);
        Ok((total > 0).then_some(MemoryUse { free, total }))
    }

    fn current(&self) -> Result<Stream, Error> {
        Ok(0)
    }

    fn enqueue(&self, work: LibraryWork) -> Result<(), Error> {
        match &mut *self.recording.lock().expect("no panic") {
            Some(acts) => acts.push(Act::Library(work)),
            None => work(0)?,
        }
        Ok(())
    }

    unsafe fn replay(&self, recording: Recording) -> Result<(), Error> {
        self.replays.fetch_add(1, Ordering::Relaxed);
        let recorded = self.recorded.lock().expect("no panic");
        for act in &recorded[&recording] {
            match act {
                Act::Fill(to, byte, bytes) => self.fill(*to, *byte, *bytes)?,
                Act::Library(work) => work(0)?,
                Act::Launch { file, kernel, numbers: [blocks, threads, shared_bytes], argument, early } => {
                    let (blocks, threads, shared_bytes, early) = (*blocks, *threads, *shared_bytes, *early);
                    let launch = Launch { file, kernel, blocks, threads, shared_bytes, argument, early };
                    // SAFETY: as the caller promises.
                    unsafe { self.launch(launch) }?;
                }
            }
        }
        Ok(())
    }

    fn forget(&self, recording: Recording) {
        self.recorded.lock().expect("no panic").remove(&recording).expect("a recording is forgotten once");
    }

    fn allocate(&self, bytes: usize) -> Result<Address, Error> {
        self.not_recording("allocate", bytes)?;
        let (len, rim) = (bytes.div_ceil(8) + 2 * RIM / 8 + 32, RIM / 8);
        let mut words = if self.lazy.load(Ordering::Relaxed) { vec![0; len] } else { vec![u64::MAX; len] };
        words[..rim + 32].fill(u64::MAX);
        words[len - rim - 32..].fill(u64::MAX);
        // From a multiple of 256, so that a multiple of 16 is one because the kernel asked for it.
        let first = words.as_mut_ptr().wrapping_byte_add(RIM) as u64;
        let address = first.next_multiple_of(256);
        words.truncate(words.len() - 32 + (address - first) as usize / 8);
        self.memory.lock().expect("no panic").insert(address, words);
        Ok(address)
    }

    fn release(&self, address: Address) {
        self.memory.lock().expect("no panic").remove(&address).expect("memory is given back once");
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), Error> {
        if let Some(acts) = &mut *self.recording.lock().expect("no panic") {
            acts.push(Act::Fill(to, byte, bytes));
            return Ok(());
        }
        if byte == 0 && self.lazy.load(Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: the operators stay inside what they allocated.
        unsafe { (to as *mut u8).write_bytes(byte, bytes) };
        Ok(())
    }

    fn upload(&self, to: Address, from: &[u8]) -> Result<(), Error> {
        self.not_recording("upload", from.len())?;
        // SAFETY: as above.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        self.not_recording("download", to.len())?;
        self.downloaded.fetch_add(to.len() as u64, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { (from as *const u8).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn launch(&self, launch: Launch<'_>) -> Result<(), Error> {
        if let Some(acts) = &mut *self.recording.lock().expect("no panic") {
            acts.push(Act::Launch {
                file: launch.file,
                kernel: launch.kernel.to_owned(),
                numbers: [launch.blocks, launch.threads, launch.shared_bytes],
                argument: launch.argument.to_vec(),
                early: launch.early,
            });
            return Ok(());
        }
        let left = self.launches_left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(failed(format!("{launch:?}: this device was told to fail")));
        }
        self.launches_left.store(left.saturating_sub(u64::from(left < u64::MAX)), Ordering::Relaxed);
        let run = kernel(launch.file, launch.kernel)?;
        let mut complaint = [0_u8; 512];
        let mut conflicts = 0;
        let how = How {
            blocks: launch.blocks,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            descending: self.descending.into(),
            complaint: complaint.as_mut_ptr().cast(),
            complaint_bytes: complaint.len(),
            bank_conflicts: &raw mut conflicts,
        };
        // SAFETY: the emulated kernel with this argument, as the caller promises of a real one.
        let failure = unsafe { run(launch.argument.as_ptr().cast(), launch.argument.len(), &raw const how) };
        if failure != 0 {
            let text = complaint.split(|&byte| byte == 0).next().unwrap_or_default();
            return Err(failed(format!("{launch:?}: {}", String::from_utf8_lossy(text))));
        }
        self.bank_conflicts.fetch_add(conflicts, Ordering::Relaxed);
        self.early_launches.fetch_add(launch.early.into(), Ordering::Relaxed);
        if launch.file.starts_with("hopper_") {
            self.hopper_launches.fetch_add(1, Ordering::Relaxed);
        }
        self.merge_launches.fetch_add((launch.file == "merge").into(), Ordering::Relaxed);
        self.check_rims(&launch)
    }
}

impl fmt::Debug for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.descending { "Emulator(descending)" } else { "Emulator(ascending)" })
    }
}

/// `emulator::Launch`.
#[repr(C)]
struct How {
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
    descending: u32,
    complaint: *mut c_char,
    complaint_bytes: usize,
    bank_conflicts: *mut u64,
}

type Run = unsafe extern "C" fn(*const c_void, usize, *const How) -> i32;

fn failed(reason: String) -> Error {
    Error::Device { call: "emulator", reason }
}

pub(crate) fn compiler() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&str>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let works =
            |name: &&&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
        ["c++", "g++", "clang++"].iter().find(works).copied()
    })
}

/// The function that acts out a kernel, from its file's library.
fn kernel(file: &'static str, name: &str) -> Result<Run, Error> {
    type Library = OnceLock<Result<usize, String>>;
    static LIBRARIES: OnceLock<Mutex<HashMap<&str, Arc<Library>>>> = OnceLock::new();
    // Only who wants this file waits for its compiler.
    let library = {
        let mut libraries = LIBRARIES.get_or_init(Mutex::default).lock().expect("no panic");
        Arc::clone(libraries.entry(file).or_default())
    };
    let made = library.get_or_init(|| build(file).and_then(|path| load(&path)).map_err(|e| e.to_string()));
    let library = made.clone().map_err(failed)?;
    let symbol = CString::new(format!("run_{name}")).expect("no zeros in names");
    // SAFETY: a library that stays loaded.
    let found = unsafe { libc::dlsym(library as *mut c_void, symbol.as_ptr()) };
    if found.is_null() {
        return Err(failed(format!("no kernel {name} in {file}.cu")));
    }
    // SAFETY: `KERNEL` of the emulator defines it with this type.
    Ok(unsafe { std::mem::transmute::<*mut c_void, Run>(found) })
}

fn load(path: &Path) -> Result<usize, Error> {
    let name = CString::new(path.to_str().expect("a path in the target folder")).expect("no zeros in it");
    // SAFETY: our own library, without constructors that do anything.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
    if library.is_null() {
        Err(failed(format!("{} does not load", path.display())))
    } else {
        Ok(library as usize)
    }
}

/// The library of a file, compiled unless one of the same source is there.
fn build(file: &str) -> Result<PathBuf, Error> {
    let (kernels, folder) = (in_workspace("gpu-kernels/kernels"), scratch());
    let source = SOURCES
        .iter()
        .find(|source| source.name == file)
        .ok_or_else(|| failed(format!("no program {file}")))?;
    let mut emulator = Vec::new();
    for header in ["emulator/emulator.hpp", "emulator/hopper.hpp"] {
        emulator.extend(std::fs::read(kernels.join(header)).map_err(|e| failed(e.to_string()))?);
    }
    let hash = emulator.iter().fold(source.hash(), |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let library = folder.join(format!("{file}-{hash:016x}.so"));
    if library.exists() {
        return Ok(library);
    }
    // Another process may be at the same: the finished file takes its place at once.
    let unfinished = folder.join(format!("{file}-{hash:016x}.{}", std::process::id()));
    let output = Command::new(compiler().expect("asked for before"))
        .args([
            "-x",
            "c++",
            "-std=c++17",
            "-O2",
            "-ffp-contract=off",
            "-fPIC",
            "-ftls-model=initial-exec",
            "-shared",
            "-Wall",
            "-Wextra",
        ])
        .arg("-Werror")
        .arg("-o")
        .arg(&unfinished)
        .arg(kernels.join(format!("{file}.cu")))
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!("{file}.cu: {}", String::from_utf8_lossy(&output.stderr))));
    }
    std::fs::rename(&unfinished, &library).map_err(|e| failed(e.to_string()))?;
    Ok(library)
}

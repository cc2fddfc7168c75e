//! Tile instructions on machines that have none: the system's signal for an illegal instruction is caught, the
//! instruction is decoded where the program counter points, and its effect computed. So the tests execute the very
//! code that runs on hardware: its encodings, addresses, registers and loops.
//!
//! Encodings and effects: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (LDTILECFG,
//! TILELOADD, TDPBF16PS, TILESTORED, TILERELEASE). Anything else, tiles of other sizes, and tiles not configured, stay
//! illegal.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::emulated::multiply;
use super::{SIDE, TILE};

/// Instructions executed here, of all threads.
static EXECUTED: AtomicUsize = AtomicUsize::new(0);

/// Executes tile instructions from now on, on any thread; answers how many have been executed so far.
pub(super) fn install() -> usize {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeros are an action without flags and with an empty mask.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: `handle` has the signature that SA_SIGINFO promises, and does only what a handler may.
        let answer = unsafe { libc::sigaction(libc::SIGILL, &raw const action, ptr::null_mut()) };
        assert_eq!(answer, 0, "a handler for illegal instructions");
    });
    EXECUTED.load(Ordering::Relaxed)
}

/// What a thread's tile registers hold.
struct Tiles {
    configured: bool,
    tile: [[u16; TILE]; 8],
}

thread_local! {
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(Tiles { configured: false, tile: [[0; TILE]; 8] }) };
}

extern "C" fn handle(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system passes the interrupted thread's context, to be read and changed.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    // SAFETY: the interrupted thread is this one and stands in `block`, not here.
    let done = TILES.with(|tiles| execute(unsafe { &mut *tiles.get() }, registers));
    match done {
        Some(next) => {
            EXECUTED.fetch_add(1, Ordering::Relaxed);
            registers[libc::REG_RIP as usize] = next;
        }
        // The instruction is met again, and ends the process.
        // SAFETY: the default action is always there.
        None => unsafe {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        },
    }
}

/// The effect of the instruction at the program counter; the address of the next one, or nothing if it is illegal.
fn execute(tiles: &mut Tiles, registers: &[i64; 23]) -> Option<i64> {
    let mut code = Code { at: registers[libc::REG_RIP as usize] };
    let [0xc4, first, second, opcode] = [code.byte(), code.byte(), code.byte(), code.byte()] else {
        return None;
    };
    let (map, wide, long, prefix) = (first & 31, second >> 7, second >> 2 & 1, second & 3);
    if (map, wide, long) != (2, 0, 0) {
        return None;
    }
    let form = code.byte();
    let (reg, rm, other) =
        (usize::from(form >> 3 & 7), usize::from(form & 7), usize::from(!second >> 3 & 15));
    if form >> 6 == 3 {
        return match (opcode, prefix, form) {
            (0x49, 0, 0xc0) => {
                tiles.configured = false;
                Some(code.at)
            }
            (0x5c, 2, _) if tiles.configured && other < 8 => {
                let (a, b) = (pairs(&tiles.tile[rm]), pairs(&tiles.tile[other]));
                multiply(&a, &b, bytemuck::cast_slice_mut(&mut tiles.tile[reg]));
                Some(code.at)
            }
            _ => None,
        };
    }
    let memory = code.memory(registers, first, form)?;
    match (opcode, prefix) {
        (0x49, 0) => {
            // SAFETY: the program says that 64 bytes of a configuration are there.
            let config = unsafe { ptr::read_unaligned(memory.start as *const [u8; 64]) };
            tiles.configured = config == sixteen_rows_of_64_bytes();
            tiles.tile = [[0; TILE]; 8];
            tiles.configured.then_some(code.at)
        }
        (0x4b, 1 | 3) if tiles.configured => {
            for (row, to) in tiles.tile[reg].chunks_exact_mut(TILE / SIDE).enumerate() {
                let from = (memory.start + row * memory.stride) as *const [u16; TILE / SIDE];
                // SAFETY: the program says that a row is there.
                to.copy_from_slice(&unsafe { ptr::read_unaligned(from) });
            }
            Some(code.at)
        }
        (0x4b, 2) if tiles.configured => {
            for (row, from) in tiles.tile[reg].as_chunks::<{ TILE / SIDE }>().0.iter().enumerate() {
                let to = (memory.start + row * memory.stride) as *mut [u16; TILE / SIDE];
                // SAFETY: the program says that there is room for a row.
                unsafe { ptr::write_unaligned(to, *from) };
            }
            Some(code.at)
        }
        _ => None,
    }
}

/// Palette 1 with eight whole tiles, as the manual lays it out.
fn sixteen_rows_of_64_bytes() -> [u8; 64] {
    let mut config = [0; 64];
    config[0] = 1;
    for tile in 0..8 {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    config
}

fn pairs(tile: &[u16; TILE]) -> [[[u16; 2]; SIDE]; SIDE] {
    bytemuck::cast(*tile)
}

/// What an instruction says about memory: the first byte, and how far apart rows lie (the index register, scaled).
struct Memory {
    start: usize,
    stride: usize,
}

/// The bytes of an instruction.
struct Code {
    at: i64,
}

impl Code {
    fn byte(&mut self) -> u8 {
        // SAFETY: the processor has just read this instruction.
        let byte = unsafe { ptr::read(self.at as *const u8) };
        self.at += 1;
        byte
    }

    /// The operand of a ModR/M byte that names memory, with the three inverted register bits of the prefix.
    fn memory(&mut self, registers: &[i64; 23], prefix: u8, form: u8) -> Option<Memory> {
        let high = |bit: u8| if prefix >> bit & 1 == 0 { 8 } else { 0 };
        let mode = form >> 6;
        let (mut base, mut index) = (form & 7 | high(5), None);
        if form & 7 == 4 {
            let sib = self.byte();
            base = sib & 7 | high(5);
            index = Some((sib >> 3 & 7 | high(6), sib >> 6)).filter(|&(register, _)| register != 4);
        }
        if mode == 0 && base & 7 == 5 {
            return None; // no base, or relative to the program counter: nobody here writes that
        }
        let offset = match mode {
            1 => i64::from(self.byte() as i8),
            2 => i64::from(i32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])),
            _ => 0,
        };
        let start = registers[greg(base)] + offset;
        let stride = index.map_or(0, |(register, scale)| registers[greg(register)] << scale);
        #[expect(clippy::cast_possible_truncation, reason = "64-bit registers are addresses on this target")]
        let memory = Memory { start: start as usize, stride: stride as usize };
        Some(memory)
    }
}

/// Where the system keeps the register that instructions call by this number.
fn greg(number: u8) -> usize {
    const LOW: [c_int; 8] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
    ];
    let low = usize::from(number & 7);
    if number < 8 { LOW[low] as usize } else { libc::REG_R8 as usize + low }
}

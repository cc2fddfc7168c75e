//! The instructions themselves.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::LazyLock;

use super::{Emulated, SUMS, TILE, TileUnit};

/// The instructions themselves. Exists only where [`available`] said yes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hardware(());

impl Hardware {
    /// The unit, if this machine has one that works; in tests every machine does.
    pub(crate) fn get() -> Option<Self> {
        #[cfg(test)]
        return Some(Self::or_trapped());
        #[cfg(not(test))]
        available().then_some(Self(()))
    }

    /// The unit, or code that runs as if there were one (see [`super::trap`]).
    #[cfg(test)]
    pub(crate) fn or_trapped() -> Self {
        if !available() {
            super::trap::install();
        }
        Self(())
    }
}

/// What each of the eight tile registers holds: 16 rows of 64 bytes (palette 1).
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl TileUnit for Hardware {
    #[inline]
    fn open(self) {
        // SAFETY: the machine has tiles and the kernel lets us use them: `available` asked both. The
        // compiler itself never uses tile registers, so nothing is lost, and nothing of ours is lost
        // between two blocks of asm.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(readonly, nostack)) };
    }

    #[inline]
    fn close(self) {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }

    #[inline]
    unsafe fn block(self, a: [*const u16; 2], b: [*const u8; 2], pair: bool, steps: usize, c: &mut [f32]) {
        assert!(c.len() >= 4 * SUMS, "four tiles of sums");
        if steps == 0 {
            return;
        }
        if pair {
            // SAFETY: the caller's promise: two runs of tiles of `a` and two of `b` are readable at every step,
            // and `c` holds four tiles. The registers were configured by `open`.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{c} + {row}*1]",
                    "tileloadd tmm1, [{c} + {row}*1 + 1024]",
                    "tileloadd tmm2, [{c} + {row}*1 + 2048]",
                    "tileloadd tmm3, [{c} + {row}*1 + 3072]",
                    "2:",
                    "tileloadd tmm6, [{b0} + {row}*1]",
                    "tileloadd tmm4, [{a0} + {row}*1]",
                    "tileloadd tmm5, [{a1} + {row}*1]",
                    "tileloadd tmm7, [{b1} + {row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {row}*1], tmm0",
                    "tilestored [{c} + {row}*1 + 1024], tmm1",
                    "tilestored [{c} + {row}*1 + 2048], tmm2",
                    "tilestored [{c} + {row}*1 + 3072], tmm3",
                    a0 = inout(reg) a[0] => _,
                    a1 = inout(reg) a[1] => _,
                    b0 = inout(reg) b[0] => _,
                    b1 = inout(reg) b[1] => _,
                    steps = inout(reg) steps => _,
                    c = in(reg) c.as_mut_ptr(),
                    row = in(reg) 64_usize,
                    options(nostack),
                );
            }
        } else {
            // SAFETY: as above with one run of tiles of `a`; sums 2 and 3 stay as they are.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{c} + {row}*1]",
                    "tileloadd tmm1, [{c} + {row}*1 + 1024]",
                    "2:",
                    "tileloadd tmm4, [{a0} + {row}*1]",
                    "tileloadd tmm6, [{b0} + {row}*1]",
                    "tileloadd tmm7, [{b1} + {row}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a0}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c} + {row}*1], tmm0",
                    "tilestored [{c} + {row}*1 + 1024], tmm1",
                    a0 = inout(reg) a[0] => _,
                    b0 = inout(reg) b[0] => _,
                    b1 = inout(reg) b[1] => _,
                    steps = inout(reg) steps => _,
                    c = in(reg) c.as_mut_ptr(),
                    row = in(reg) 64_usize,
                    options(nostack),
                );
            }
        }
    }
}

/// Whether the processor has bf16 tiles, the operating system lets us use them, and they compute what they should.
pub(crate) fn available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| present() && permitted() && right(Hardware(())));
    *AVAILABLE
}

/// The processor names AMX-TILE and AMX-BF16, and the system saves the registers (XCR0 bits 17 and 18).
fn present() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILE_AND_BF16: u32 = 1 << 24 | 1 << 22;
    const SAVED: u64 = 0b11 << 17;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the instruction exists.
    let saved = unsafe { _xgetbv(0) };
    __cpuid_count(7, 0).edx & TILE_AND_BF16 == TILE_AND_BF16 && saved & SAVED == SAVED
}

/// Asks Linux for the permission to use tile data (since 5.16).
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let answer: isize;
    // SAFETY: a system call that reads no memory; it clobbers what is named.
    unsafe {
        asm!(
            "syscall",
            inout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

/// Small whole numbers, whose products and sums are exact in any order: the unit must agree with the loops.
pub(super) fn right<U: TileUnit>(unit: U) -> bool {
    const STEPS: usize = 3;
    let number = |i: usize| (((i * 7 + i / 5) % 9) as f32 - 4.0).to_bits() >> 16;
    #[expect(clippy::cast_possible_truncation, reason = "shifted right by 16")]
    let bits = |i: usize| number(i) as u16;
    let a: Vec<u16> = (0..2 * STEPS * TILE).map(bits).collect();
    let b: Vec<u16> = (0..2 * STEPS * TILE).map(|i| bits(i + 3)).collect();
    let tiles = [a.as_ptr(), a.as_ptr().wrapping_add(STEPS * TILE)];
    let panels = [b.as_ptr(), b.as_ptr().wrapping_add(STEPS * TILE)].map(<*const u16>::cast);
    [true, false].into_iter().all(|pair| {
        let (mut found, mut expected) = (vec![1.0; 4 * SUMS], vec![1.0; 4 * SUMS]);
        unit.open();
        // SAFETY: opened; `a` and `b` are two runs of STEPS tiles each.
        unsafe { unit.block(tiles, panels, pair, STEPS, &mut found) };
        unit.close();
        // SAFETY: as above.
        unsafe { Emulated.block(tiles, panels, pair, STEPS, &mut expected) };
        found == expected
    })
}

//! How elements are stored, and come into lanes.

use super::{Lanes, WIDTH};

/// How the elements of a row are stored; `load` widens sixteen of them.
pub(crate) trait Element: Copy {
    /// Bytes of one element.
    const BYTES: usize;
    /// # Safety
    /// 16 elements are readable at `at`, at any alignment.
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F;

    /// Sixteen pairs of bf16, of elements of two rows which are exact in bf16.
    /// # Safety
    /// 16 elements are readable at each of `at`, at any alignment.
    #[inline(always)]
    unsafe fn load_pairs<L: Lanes>(lanes: L, at: [*const u8; 2]) -> L::F {
        // SAFETY: the caller's promise.
        let [a, b] = at.map(|at| unsafe { Self::load(lanes, at) });
        lanes.join_pairs(a, b)
    }

    /// The first or the second element of `in` for the sixteen outputs of a line (see [`super::super::panels`]).
    /// # Safety
    /// A line is readable at `at`.
    #[inline(always)]
    unsafe fn half_line<L: Lanes, const SECOND: bool>(lanes: L, at: *const u8) -> L::F {
        let at = if SECOND { at.wrapping_add(WIDTH * Self::BYTES) } else { at };
        // SAFETY: the caller's promise.
        unsafe { Self::load(lanes, at) }
    }

    /// Lanes `lane..lane + count` of a line with `width` of them become the first of a line with sixteen.
    /// # Safety
    /// `width` pairs of elements are readable at `line`, `lane + count` is at most `width`, and `count` at most 16.
    #[inline(always)]
    unsafe fn part_of_line(
        line: *const u8,
        (lane, count, width): (usize, usize, usize),
        to: &mut [u8; 2 * WIDTH * 4],
    ) {
        for half in 0..2 {
            let from = line.wrapping_add((half * width + lane) * Self::BYTES);
            let to = to[half * WIDTH * Self::BYTES..].as_mut_ptr();
            // SAFETY: the caller's promise; sixteen elements of at most four bytes fit in each half.
            unsafe { std::ptr::copy_nonoverlapping(from, to, count * Self::BYTES) };
        }
    }

    /// The first `n < 16` elements, zeros behind them.
    /// # Safety
    /// `n` elements are readable at `at`, at any alignment.
    #[inline(always)]
    unsafe fn load_first<L: Lanes>(lanes: L, at: *const u8, n: usize) -> L::F {
        let mut whole = [0_u8; 64];
        // SAFETY: `n < 16` elements of at most 4 bytes fit in 64 bytes, and the caller says they are readable.
        unsafe { std::ptr::copy_nonoverlapping(at, whole.as_mut_ptr(), n * Self::BYTES) };
        // SAFETY: `whole` holds 16 elements.
        unsafe { Self::load(lanes, whole.as_ptr()) }
    }
}

/// Elements of which a register is loaded by itself too.
pub(crate) trait InParts: Element {
    /// # Safety
    /// As many elements as a register holds are readable at `at`, at any alignment.
    unsafe fn load_part<L: Lanes>(lanes: L, at: *const u8) -> L::P;
}

#[derive(Clone, Copy)]
pub(crate) struct AsF32;
#[derive(Clone, Copy)]
pub(crate) struct AsBf16;
#[derive(Clone, Copy)]
pub(crate) struct AsF16;

impl Element for AsF32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise; `load` takes any alignment.
        unsafe { lanes.load(at.cast()) }
    }
}

impl InParts for AsF32 {
    #[inline(always)]
    unsafe fn load_part<L: Lanes>(lanes: L, at: *const u8) -> L::P {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_part(at.cast()) }
    }
}

impl Element for AsBf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_bf16(at) }
    }
    #[inline(always)]
    unsafe fn load_pairs<L: Lanes>(lanes: L, at: [*const u8; 2]) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_pairs_bf16(at) }
    }
    #[inline(always)]
    unsafe fn half_line<L: Lanes, const SECOND: bool>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        if SECOND { unsafe { lanes.load_seconds_bf16(at) } } else { unsafe { lanes.load_firsts_bf16(at) } }
    }
    /// Pairs lie beside each other.
    #[inline(always)]
    unsafe fn part_of_line(
        line: *const u8,
        (lane, count, _): (usize, usize, usize),
        to: &mut [u8; 2 * WIDTH * 4],
    ) {
        // SAFETY: the caller's promise; sixteen pairs of four bytes fit.
        unsafe { std::ptr::copy_nonoverlapping(line.wrapping_add(lane * 4), to.as_mut_ptr(), count * 4) };
    }
}

impl InParts for AsBf16 {
    #[inline(always)]
    unsafe fn load_part<L: Lanes>(lanes: L, at: *const u8) -> L::P {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_part_bf16(at) }
    }
}

impl Element for AsF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(lanes: L, at: *const u8) -> L::F {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_f16(at) }
    }
}

impl InParts for AsF16 {
    #[inline(always)]
    unsafe fn load_part<L: Lanes>(lanes: L, at: *const u8) -> L::P {
        // SAFETY: the caller's promise.
        unsafe { lanes.load_part_f16(at) }
    }
}

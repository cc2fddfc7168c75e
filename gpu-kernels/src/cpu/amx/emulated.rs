//! The arithmetic of tiles in plain loops.

use super::{SIDE, SUMS, TILE, TileUnit};

/// Tiles in plain loops: bf16 pairs, sums of even and of odd elements apart, in f32 without denormals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Emulated;

impl TileUnit for Emulated {
    fn open(self) {}
    fn close(self) {}

    unsafe fn block(self, a: [*const u16; 2], b: [*const u8; 2], pair: bool, steps: usize, c: &mut [f32]) {
        for (index, tile) in c.chunks_exact_mut(SUMS).enumerate().filter(|(index, _)| pair || index / 2 == 0)
        {
            for step in 0..steps {
                let at = a[index / 2].wrapping_add(step * TILE);
                // SAFETY: the caller's promise.
                let a = unsafe { at.cast::<[[[u16; 2]; SIDE]; SIDE]>().read_unaligned() };
                let at = b[index % 2].wrapping_add(step * TILE * 2);
                // SAFETY: the caller's promise.
                let b = unsafe { at.cast::<[[[u16; 2]; SIDE]; SIDE]>().read_unaligned() };
                multiply(&a, &b, tile);
            }
        }
    }
}

/// What one instruction does: `sums[i][j] += Σ a[i][k] · b[k][j]`, with `a` and `b` in pairs of `k`.
pub(super) fn multiply(a: &[[[u16; 2]; SIDE]; SIDE], b: &[[[u16; 2]; SIDE]; SIDE], sums: &mut [f32]) {
    let wide = |bits: u16| flush(f32::from_bits(u32::from(bits) << 16));
    for (a, sums) in a.iter().zip(sums.chunks_exact_mut(SIDE)) {
        for (column, sum) in sums.iter_mut().enumerate() {
            let (mut even, mut odd) = (0.0, 0.0);
            for (a, b) in a.iter().zip(b) {
                even = flush(even + wide(a[0]) * wide(b[column][0]));
                odd = flush(odd + wide(a[1]) * wide(b[column][1]));
            }
            *sum = flush(*sum + flush(even + odd));
        }
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0 } else { x }
}

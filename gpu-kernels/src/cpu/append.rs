//! K and V of new tokens go to their slots.

use half::f16;

use super::Isa;
use super::lanes::{Kernel, Lanes, dispatch, round_bf16};
use super::pool::KvPool;
use super::workers::Workers;
use crate::{Dtype, KvShape};

/// Writes `k` and `v`, `[tokens, kv_heads * head_dim]`, into a layer of the pool.
///
/// Work is cut along heads: two tokens with the same slot are then written by the same thread, in order.
pub(crate) fn append(
    (workers, isa): (&Workers, Isa),
    pool: &mut KvPool,
    layer: usize,
    slots: &[i64],
    k: &[f32],
    v: &[f32],
) {
    let KvShape { kv_heads, head_dim, .. } = pool.shape;
    let planes = [0, 1].map(|which| {
        let plane = pool.plane_mut(layer, which);
        SharedPlane { start: plane.as_mut_ptr(), len: plane.len() }
    });
    let pool = &*pool;
    workers.rows(kv_heads, 2 * slots.len() * head_dim, &|from, to| {
        dispatch(isa, Append { pool, planes, slots, k, v, heads: (from, to) });
    });
}

#[derive(Clone, Copy)]
struct SharedPlane {
    start: *mut u8,
    len: usize,
}

// SAFETY: threads write different heads, which are different bytes.
unsafe impl Send for SharedPlane {}
// SAFETY: as above.
unsafe impl Sync for SharedPlane {}

impl SharedPlane {
    /// # Safety
    /// Only this thread touches these bytes.
    #[inline(always)]
    unsafe fn bytes<'a>(self, start: usize, len: usize) -> &'a mut [u8] {
        assert!(start + len <= self.len, "slots are checked at the door");
        // SAFETY: inside the plane, and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.wrapping_add(start), len) }
    }
}

struct Append<'a> {
    pool: &'a KvPool,
    planes: [SharedPlane; 2],
    slots: &'a [i64],
    k: &'a [f32],
    v: &'a [f32],
    heads: (usize, usize),
}

impl<'a> Kernel for Append<'a> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let KvShape { kv_heads, head_dim, block_size, dtype, .. } = self.pool.shape;
        let (layout, lanes, size) = (self.pool.layout, self.pool.lanes(), dtype.bytes());
        for head in self.heads.0..self.heads.1 {
            for (token, &slot) in self.slots.iter().enumerate() {
                let Ok(slot) = usize::try_from(slot) else { continue };
                let (block, place) = (slot / block_size, slot % block_size);
                let first = block * layout.page_stride + head * layout.head_stride;
                let row = |x: &'a [f32]| &x[(token * kv_heads + head) * head_dim..][..head_dim];
                let lane = place % lanes;
                let panel = first + (place - lane) * layout.token_stride;
                // SAFETY: only this thread writes this head.
                let to = unsafe { self.planes[0].bytes(panel * size, lanes * layout.token_stride * size) };
                into_panel(dtype, row(self.k), (lane, lanes), to);
                let start = (first + place * layout.token_stride) * size;
                // SAFETY: as above.
                narrow(dtype, row(self.v), unsafe { self.planes[1].bytes(start, head_dim * size) });
            }
        }
    }
}

/// A token's elements become one of the `lanes` of a panel ([`super::panels`]).
#[inline(always)]
fn into_panel(dtype: Dtype, from: &[f32], (lane, lanes): (usize, usize), to: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (line, from) in to.chunks_exact_mut(4 * lanes).zip(from) {
                line.as_chunks_mut::<4>().0[lane] = from.to_ne_bytes();
            }
        }
        Dtype::Bf16 => {
            for (line, pair) in to.chunks_exact_mut(4 * lanes).zip(from.chunks(2)) {
                let second = pair.get(1).map_or(0, |&x| u32::from(round_bf16(x)));
                let both = second << 16 | u32::from(round_bf16(pair[0]));
                line.as_chunks_mut::<4>().0[lane] = both.to_ne_bytes();
            }
        }
        Dtype::F16 => {
            for (line, &from) in to.chunks_exact_mut(2 * lanes).zip(from) {
                line.as_chunks_mut::<2>().0[lane] = f16::from_f32(from).to_ne_bytes();
            }
        }
    }
}

/// Rounds to the pool's type, ties to even.
#[inline(always)]
fn narrow(dtype: Dtype, from: &[f32], to: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (to, from) in to.as_chunks_mut::<4>().0.iter_mut().zip(from) {
                *to = from.to_ne_bytes();
            }
        }
        Dtype::Bf16 => {
            for (to, &from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                *to = round_bf16(from).to_ne_bytes();
            }
        }
        Dtype::F16 => {
            for (to, &from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                *to = f16::from_f32(from).to_ne_bytes();
            }
        }
    }
}

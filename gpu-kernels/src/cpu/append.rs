//! K and V of new tokens go to their slots.

use super::Isa;
use super::lanes::{Kernel, Lanes, dispatch, round_bf16};
use super::pool::Layout;
use super::workers::Workers;
use crate::{Dtype, KvShape};

/// Writes `x`, `[tokens, kv_heads * head_dim]`, into one plane of the pool.
///
/// Work is cut along heads: two tokens with the same slot are then written by the same thread, in order.
pub(crate) fn append(
    workers: &Workers,
    isa: Isa,
    plane: &mut [u8],
    (shape, layout): (KvShape, Layout),
    slots: &[i64],
    x: &[f32],
) {
    let plane = SharedPlane { start: plane.as_mut_ptr(), len: plane.len() };
    workers.rows(shape.kv_heads, slots.len() * shape.head_dim, &|from, to| {
        dispatch(isa, Append { plane, shape, layout, slots, x, heads: (from, to) });
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

struct Append<'a> {
    plane: SharedPlane,
    shape: KvShape,
    layout: Layout,
    slots: &'a [i64],
    x: &'a [f32],
    heads: (usize, usize),
}

impl Kernel for Append<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let KvShape { kv_heads, head_dim, block_size, dtype, .. } = self.shape;
        for head in self.heads.0..self.heads.1 {
            for (token, &slot) in self.slots.iter().enumerate() {
                let Ok(slot) = usize::try_from(slot) else { continue };
                let element = slot / block_size * self.layout.page_stride
                    + head * self.layout.head_stride
                    + slot % block_size * self.layout.token_stride;
                let (start, len) = (element * dtype.bytes(), head_dim * dtype.bytes());
                assert!(start + len <= self.plane.len, "slots are checked at the door");
                // SAFETY: inside the plane, and only this thread writes this head.
                let to = unsafe { std::slice::from_raw_parts_mut(self.plane.start.wrapping_add(start), len) };
                narrow(dtype, &self.x[(token * kv_heads + head) * head_dim..][..head_dim], to);
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
                *to = half::f16::from_f32(from).to_ne_bytes();
            }
        }
    }
}

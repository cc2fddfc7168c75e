//! K and V of new tokens go to their slots.

use half::f16;

use super::Isa;
use super::eight_bits::{INT8_MOST, to_int8};
use super::lanes::{Kernel, Lanes, dispatch, round_bf16};
use super::out::SharedOut;
use super::pool::{Form, KvPool, OfPlane};
use super::workers::Workers;
use crate::door::{LATENT_DIM_MAX, LATENT_ROPE_MAX};
use crate::shape::HEAD_DIM_MAX;
use crate::{KvShape, fp8};

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
    let planes = [0, 1].map(|which| SharedPlane::of(pool, layer, which));
    let scales = [0, 1].map(|which| Scale::of(pool, layer, which));
    let pool = &*pool;
    workers.rows(kv_heads, 2 * slots.len() * head_dim, &|from, to| {
        dispatch(isa, Append { pool, planes, scales, slots, rows: [k, v], heads: (from, to) });
    });
}

/// Writes each token's latent `[tokens, latent_dim]`, and behind it its rotated key `[tokens, rope_dim]`, into a layer
/// of a pool of latents.
pub(crate) fn append_latents(
    (workers, isa): (&Workers, Isa),
    pool: &mut KvPool,
    layer: usize,
    slots: &[i64],
    parts: [&[f32]; 2],
) {
    // Of equal slots the last token wins.
    let there = |(token, &slot): (usize, &i64)| usize::try_from(slot).ok().map(|slot| (slot, token));
    let mut rows: Vec<_> = slots.iter().enumerate().filter_map(there).collect();
    rows.sort_unstable();
    rows.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same {
            *kept = *later;
        }
        same
    });
    let (plane, scale) = (SharedPlane::of(pool, layer, 0), Scale::of(pool, layer, 0));
    let pool = &*pool;
    workers.rows(rows.len(), pool.shape.head_dim, &|from, to| {
        dispatch(isa, AppendLatents { pool, plane, scale, rows: &rows[from..to], parts });
    });
}

struct AppendLatents<'a> {
    pool: &'a KvPool,
    plane: SharedPlane,
    scale: Scale,
    /// Slots, none of them twice, and their tokens.
    rows: &'a [(usize, usize)],
    parts: [&'a [f32]; 2],
}

impl Kernel for AppendLatents<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let Self { pool, plane, scale, rows, parts: [latent, rope] } = self;
        let KvShape { block_size, head_dim, .. } = pool.shape;
        let latent_dim = pool.latent_dim.unwrap_or(head_dim);
        let (rope_dim, size) = (head_dim - latent_dim, pool.form.bytes());
        let (mut row, mut scaled) =
            ([0.0; LATENT_DIM_MAX + LATENT_ROPE_MAX], [0.0; LATENT_DIM_MAX + LATENT_ROPE_MAX]);
        for &(slot, token) in rows {
            let row = &mut row[..head_dim];
            row[..latent_dim].copy_from_slice(&latent[token * latent_dim..][..latent_dim]);
            row[latent_dim..].copy_from_slice(&rope[token * rope_dim..][..rope_dim]);
            let (block, place) = (slot / block_size, slot % block_size);
            let start = block * pool.layout.page_stride + place * pool.layout.token_stride;
            // SAFETY: only this thread has the slot.
            let to = unsafe { plane.bytes(start * size, head_dim * size) };
            // SAFETY: as above.
            narrow(pool.form, unsafe { scale.divide(pool.form, slot, row, &mut scaled) }, to);
        }
    }
}

#[derive(Clone, Copy)]
struct SharedPlane {
    start: *mut u8,
    len: usize,
}

// SAFETY: threads write different heads or slots, which are different bytes.
unsafe impl Send for SharedPlane {}
// SAFETY: as above.
unsafe impl Sync for SharedPlane {}

impl SharedPlane {
    /// K (`which` 0) or V (`which` 1) of a layer.
    fn of(pool: &mut KvPool, layer: usize, which: usize) -> Self {
        let plane = pool.plane_mut(layer, which);
        Self { start: plane.as_mut_ptr(), len: plane.len() }
    }

    /// # Safety
    /// Only this thread touches these bytes.
    #[inline(always)]
    unsafe fn bytes<'a>(self, start: usize, len: usize) -> &'a mut [u8] {
        assert!(start + len <= self.len, "slots are checked at the door");
        // SAFETY: inside the plane, and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.wrapping_add(start), len) }
    }
}

/// What elements are divided by on their way in.
#[derive(Clone, Copy)]
enum Scale {
    None,
    One(f32),
    /// By one that is made of them, and written to `[slot][kv head]`.
    Each(SharedOut),
}

impl Scale {
    /// Of K (`which` 0) or V (`which` 1) of a layer.
    fn of(pool: &mut KvPool, layer: usize, which: usize) -> Self {
        match (pool.scales_mut(layer, which), pool.scales(layer, which)) {
            (Some(each), _) => Self::Each(each),
            (None, Some(OfPlane::One(scale))) => Self::One(scale),
            _ => Self::None,
        }
    }

    /// A head's elements as they are stored, but for their type: `row` becomes them where there is a scale.
    ///
    /// # Safety
    /// Only this thread writes the head at this place.
    #[inline(always)]
    unsafe fn divide<'b>(self, form: Form, place: usize, from: &'b [f32], row: &'b mut [f32]) -> &'b [f32] {
        let scale = match self {
            Self::None => return from,
            Self::One(scale) => scale,
            Self::Each(scales) => {
                let most = if form == Form::Int8 { INT8_MOST } else { fp8::MAX };
                let size = from.iter().fold(0.0_f32, |size, x| size.max(x.abs()));
                let scale = if size > 0.0 { size / most } else { 1.0 };
                // SAFETY: the caller's promise.
                let of_head = unsafe { scales.slice(place, 1) };
                of_head[0] = scale;
                scale
            }
        };
        let row = &mut row[..from.len()];
        row.iter_mut().zip(from).for_each(|(to, from)| *to = from / scale);
        row
    }
}

struct Append<'a> {
    pool: &'a KvPool,
    planes: [SharedPlane; 2],
    scales: [Scale; 2],
    slots: &'a [i64],
    /// K and V.
    rows: [&'a [f32]; 2],
    heads: (usize, usize),
}

impl Kernel for Append<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let KvShape { kv_heads, head_dim, block_size, .. } = self.pool.shape;
        let (layout, lanes, form) = (self.pool.layout, self.pool.lanes(), self.pool.form);
        let (size, mut scaled) = (form.bytes(), [0.0; HEAD_DIM_MAX]);
        for head in self.heads.0..self.heads.1 {
            for (token, &slot) in self.slots.iter().enumerate() {
                let Ok(slot) = usize::try_from(slot) else { continue };
                let (block, place) = (slot / block_size, slot % block_size);
                let [keys, values] =
                    layout.head_strides.map(|stride| block * layout.page_stride + head * stride);
                let [k, v] = self.rows.map(|x| &x[(token * kv_heads + head) * head_dim..][..head_dim]);
                let of_head = slot * kv_heads + head;
                let lane = place % lanes;
                let panel = keys + (place - lane) * layout.token_stride;
                // SAFETY: only this thread writes this head.
                let to = unsafe { self.planes[0].bytes(panel * size, lanes * layout.wide * size) };
                // SAFETY: as above.
                let k = unsafe { self.scales[0].divide(form, of_head, k, &mut scaled) };
                into_panel(form, k, (lane, lanes), to);
                let start = (values + place * layout.token_stride) * size;
                // SAFETY: as above.
                let to = unsafe { self.planes[1].bytes(start, head_dim * size) };
                // SAFETY: as above.
                narrow(form, unsafe { self.scales[1].divide(form, of_head, v, &mut scaled) }, to);
            }
        }
    }
}

/// A token's elements become one of the `lanes` of a panel ([`super::panels`]).
#[inline(always)]
fn into_panel(form: Form, from: &[f32], (lane, lanes): (usize, usize), to: &mut [u8]) {
    match form {
        Form::F32 => {
            for (line, from) in to.chunks_exact_mut(4 * lanes).zip(from) {
                line.as_chunks_mut::<4>().0[lane] = from.to_ne_bytes();
            }
        }
        Form::Bf16 => {
            for (line, pair) in to.chunks_exact_mut(4 * lanes).zip(from.chunks(2)) {
                let second = pair.get(1).map_or(0, |&x| u32::from(round_bf16(x)));
                let both = second << 16 | u32::from(round_bf16(pair[0]));
                line.as_chunks_mut::<4>().0[lane] = both.to_ne_bytes();
            }
        }
        Form::F16 => {
            for (line, &from) in to.chunks_exact_mut(2 * lanes).zip(from) {
                line.as_chunks_mut::<2>().0[lane] = f16::from_f32(from).to_ne_bytes();
            }
        }
        Form::E4m3 => {
            to.chunks_exact_mut(lanes).zip(from).for_each(|(line, &x)| line[lane] = fp8::nearest(x))
        }
        Form::Int8 => to.chunks_exact_mut(lanes).zip(from).for_each(|(line, &x)| line[lane] = to_int8(x)),
    }
}

/// Rounds to the pool's type, ties to even.
#[inline(always)]
fn narrow(form: Form, from: &[f32], to: &mut [u8]) {
    match form {
        Form::F32 => {
            for (to, from) in to.as_chunks_mut::<4>().0.iter_mut().zip(from) {
                *to = from.to_ne_bytes();
            }
        }
        Form::Bf16 => {
            for (to, &from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                *to = round_bf16(from).to_ne_bytes();
            }
        }
        Form::F16 => {
            for (to, &from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from) {
                *to = f16::from_f32(from).to_ne_bytes();
            }
        }
        Form::E4m3 => to.iter_mut().zip(from).for_each(|(to, &x)| *to = fp8::nearest(x)),
        Form::Int8 => to.iter_mut().zip(from).for_each(|(to, &x)| *to = to_int8(x)),
    }
}

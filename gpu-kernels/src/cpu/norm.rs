//! RMSNorm.

use super::Isa;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::out::SharedOut;
use super::workers::Workers;

/// What a row goes through: `x += add`, then `out = x / rms(x) · (weight + offset)`.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    pub(crate) weight: &'a [f32],
    /// Added to the weight.
    pub(crate) offset: f32,
    pub(crate) eps: f32,
    /// Rows as long as the weight; changed where there is something to add.
    pub(crate) x: SharedOut,
    pub(crate) add: Option<&'a [f32]>,
    /// May be `x`.
    pub(crate) out: SharedOut,
}

pub(crate) fn rms_norm(workers: &Workers, isa: Isa, rows: usize, norm: RmsNorm<'_>) {
    workers.rows(rows, norm.weight.len(), &|from, to| dispatch(isa, Rows { norm, from, to }));
}

struct Rows<'a> {
    norm: RmsNorm<'a>,
    from: usize,
    to: usize,
}

impl Kernel for Rows<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for row in self.from..self.to {
            one(lanes, self.norm, row);
        }
    }
}

#[inline(always)]
fn one<L: Lanes>(lanes: L, norm: RmsNorm<'_>, row: usize) {
    let n = norm.weight.len();
    let (x, out) = (norm.x.row(row, n), norm.out.row(row, n));
    let (whole, rest) = (n / WIDTH * WIDTH, n % WIDTH);
    let mut squares = lanes.splat(0.0);
    for i in (0..n).step_by(WIDTH) {
        // SAFETY: `i` is inside the row; this piece alone holds it.
        let mut v = unsafe { load(lanes, x.wrapping_add(i), i < whole, rest) };
        if let Some(add) = norm.add {
            // SAFETY: `add` has the rows of `x`.
            let add = unsafe { load(lanes, add.as_ptr().wrapping_add(row * n + i), i < whole, rest) };
            v = lanes.add(v, add);
            // SAFETY: as at the load.
            unsafe { store(lanes, x.wrapping_add(i), v, i < whole, rest) };
        }
        squares = lanes.fma(v, v, squares);
    }
    #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
    let scale = lanes.splat(1.0 / (lanes.sum(squares) / n as f32 + norm.eps).sqrt());
    let offset = lanes.splat(norm.offset);
    for i in (0..n).step_by(WIDTH) {
        // SAFETY: `i` is inside the row.
        let v = unsafe { load(lanes, x.wrapping_add(i), i < whole, rest) };
        // SAFETY: the weight is as long as the row.
        let weight = unsafe { load(lanes, norm.weight.as_ptr().wrapping_add(i), i < whole, rest) };
        let v = lanes.mul(lanes.mul(v, scale), lanes.add(weight, offset));
        // SAFETY: `i` is inside the row; this piece alone writes it.
        unsafe { store(lanes, out.wrapping_add(i), v, i < whole, rest) };
    }
}

/// # Safety
/// 16 elements are readable at `at` if `whole`, else `rest`.
#[inline(always)]
pub(crate) unsafe fn load<L: Lanes>(lanes: L, at: *const f32, whole: bool, rest: usize) -> L::F {
    // SAFETY: the caller's promise.
    if whole { unsafe { lanes.load(at) } } else { unsafe { lanes.load_first(at, rest) } }
}

/// # Safety
/// 16 elements are writable at `at` if `whole`, else `rest`.
#[inline(always)]
pub(crate) unsafe fn store<L: Lanes>(lanes: L, at: *mut f32, x: L::F, whole: bool, rest: usize) {
    // SAFETY: the caller's promise.
    if whole { unsafe { lanes.store(at, x) } } else { unsafe { lanes.store_first(at, x, rest) } }
}

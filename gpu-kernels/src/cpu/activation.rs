//! SiLU times up.

use super::Isa;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::norm::{load, store};
use super::out::SharedOut;
use super::workers::Workers;

/// `out = gate / (1 + exp(-gate)) · up`, element by element.
pub(crate) fn silu_mul(workers: &Workers, isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    const PIECE: usize = 1024;
    let len = out.len();
    let out = SharedOut::new(out);
    workers.rows(len.div_ceil(PIECE), PIECE, &|from, to| {
        dispatch(isa, SiluMul { gate, up, out, from: from * PIECE, to: (to * PIECE).min(len) });
    });
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: SharedOut,
    from: usize,
    to: usize,
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let one = lanes.splat(1.0);
        for i in (self.from..self.to).step_by(WIDTH) {
            let (whole, rest) = (i + WIDTH <= self.to, self.to - i);
            // SAFETY: `i` is inside all three, which have the same length.
            let gate = unsafe { load(lanes, self.gate.as_ptr().wrapping_add(i), whole, rest) };
            // SAFETY: as above.
            let up = unsafe { load(lanes, self.up.as_ptr().wrapping_add(i), whole, rest) };
            let minus = lanes.sub(lanes.splat(0.0), gate);
            // `exp` stops growing at its bound; there the quotient is nothing.
            let beyond = lanes.zero_below(lanes.splat(f32::INFINITY), minus, lanes.splat(88.37));
            let below = lanes.add(one, lanes.add(lanes.exp(minus), beyond));
            let y = lanes.mul(lanes.div(gate, below), up);
            // SAFETY: as above, and this piece alone writes `from..to`.
            unsafe { store(lanes, self.out.row(0, 0).wrapping_add(i), y, whole, rest) };
        }
    }
}

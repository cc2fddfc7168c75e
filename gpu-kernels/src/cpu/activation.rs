//! Gated activations.

use super::Isa;
use super::lanes::{Kernel, Lanes, WIDTH, dispatch};
use super::norm::{load, store};
use super::out::SharedOut;
use super::workers::Workers;
use crate::Gate;

/// `out = act(gate) · up`, element by element.
pub(crate) fn gated((workers, isa): (&Workers, Isa), act: Gate, gate: &[f32], up: &[f32], out: &mut [f32]) {
    const PIECE: usize = 1024;
    let len = out.len();
    let out = SharedOut::new(out);
    workers.rows(len.div_ceil(PIECE), PIECE, &|from, to| {
        dispatch(isa, Gated { act, gate, up, out, from: from * PIECE, to: (to * PIECE).min(len) });
    });
}

struct Gated<'a> {
    act: Gate,
    gate: &'a [f32],
    up: &'a [f32],
    out: SharedOut,
    from: usize,
    to: usize,
}

impl Kernel for Gated<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.act {
            Gate::Silu => self.each(lanes, |x, up| lanes.mul(swish(lanes, x, x), up)),
            Gate::GeluTanh => self.each(lanes, |x, up| lanes.mul(gelu_tanh(lanes, x), up)),
            Gate::Gelu => self.each(lanes, |x, up| lanes.mul(gelu(lanes, x), up)),
            Gate::SwigluOai { alpha, limit } => self.each(lanes, |x, up| {
                let (most, one) = (lanes.splat(limit), lanes.splat(1.0));
                let x = lanes.min(most, x);
                let up = lanes.max(lanes.splat(-limit), lanes.min(most, up));
                lanes.mul(swish(lanes, x, lanes.mul(x, lanes.splat(alpha))), lanes.add(up, one))
            }),
        }
    }
}

impl Gated<'_> {
    #[inline(always)]
    fn each<L: Lanes>(&self, lanes: L, of: impl Fn(L::F, L::F) -> L::F) {
        for i in (self.from..self.to).step_by(WIDTH) {
            let (whole, rest) = (i + WIDTH <= self.to, self.to - i);
            // SAFETY: `i` is inside all three, which have the same length.
            let gate = unsafe { load(lanes, self.gate.as_ptr().wrapping_add(i), whole, rest) };
            // SAFETY: as above.
            let up = unsafe { load(lanes, self.up.as_ptr().wrapping_add(i), whole, rest) };
            // SAFETY: as above, and this piece alone writes `from..to`.
            unsafe { store(lanes, self.out.row(0, 0).wrapping_add(i), of(gate, up), whole, rest) };
        }
    }
}

/// `x / (1 + exp(-y))`.
#[inline(always)]
fn swish<L: Lanes>(lanes: L, x: L::F, y: L::F) -> L::F {
    let minus = lanes.sub(lanes.splat(0.0), y);
    // `exp` stops growing at its bound; there the quotient is nothing.
    let beyond = lanes.zero_below(lanes.splat(f32::INFINITY), minus, lanes.splat(88.37));
    lanes.div(x, lanes.add(lanes.splat(1.0), lanes.add(lanes.exp(minus), beyond)))
}

/// `x / 2 · (1 + tanh(u))` with `u = sqrt(2 / pi) (x + 0.044715 x³)`, which is `x / (1 + exp(-2 u))`.
#[inline(always)]
fn gelu_tanh<L: Lanes>(lanes: L, x: L::F) -> L::F {
    let cube = lanes.mul(lanes.mul(x, x), x);
    let u = lanes.fma(cube, lanes.splat(0.044_715), x);
    let twice = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;
    swish(lanes, x, lanes.mul(u, lanes.splat(twice)))
}

/// `x` times the normal distribution function, within `2e-7 |x|` (the error function: Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn gelu<L: Lanes>(lanes: L, x: L::F) -> L::F {
    let (zero, one) = (lanes.splat(0.0), lanes.splat(1.0));
    let size = lanes.max(x, lanes.sub(zero, x));
    let z = lanes.mul(size, lanes.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = lanes.div(one, lanes.fma(z, lanes.splat(0.327_591_1), one));
    let mut y = lanes.splat(1.061_405_4);
    for factor in [-1.453_152, 1.421_413_7, -0.284_496_72, 0.254_829_6] {
        y = lanes.fma(y, t, lanes.splat(factor));
    }
    let tail = lanes.mul(lanes.mul(y, t), lanes.exp(lanes.sub(zero, lanes.mul(z, z))));
    // Of the half below zero, the distribution function is the half of `tail`.
    let below = lanes.mul(size, lanes.mul(tail, lanes.splat(0.5)));
    lanes.sub(lanes.max(x, zero), below)
}

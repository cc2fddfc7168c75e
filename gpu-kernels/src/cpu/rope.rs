//! Rotary position embedding.

use super::Isa;
use super::lanes::{Kernel, Lanes, dispatch};
use super::out::SharedOut;
use super::workers::Workers;
use crate::door;
use crate::{Error, RopeStyle};

/// Cosines and sines, `[positions, rotary_dim / 2]`.
#[derive(Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    style: RopeStyle,
}

impl RopeTable {
    pub(crate) fn new(cos: &[f32], sin: &[f32], rotary_dim: usize, style: RopeStyle) -> Result<Self, Error> {
        door::rope_table(cos, sin, rotary_dim)?;
        Ok(Self { cos: cos.to_vec(), sin: sin.to_vec(), half: rotary_dim / 2, style })
    }

    pub(crate) fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    pub(crate) fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Turns the heads of every token of `x`, `[tokens, heads * dim]`. Positions are checked.
    pub(crate) fn rotate(
        &self,
        workers: &Workers,
        isa: Isa,
        positions: &[u32],
        x: &mut [f32],
        (heads, dim): (usize, usize),
    ) {
        let x = SharedOut::new(x);
        workers.rows(positions.len(), heads * dim, &|from, to| {
            let positions = &positions[from..to];
            dispatch(isa, Rotate { table: self, positions, x: x.row(from, heads * dim), heads, dim });
        });
    }
}

struct Rotate<'a> {
    table: &'a RopeTable,
    positions: &'a [u32],
    /// The first of the piece's tokens.
    x: *mut f32,
    heads: usize,
    dim: usize,
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let Self { table, positions, x, heads, dim } = self;
        // SAFETY: `x` has a row for every position, and this piece alone holds them.
        let x = unsafe { std::slice::from_raw_parts_mut(x, positions.len() * heads * dim) };
        for (token, &position) in x.chunks_exact_mut(heads * dim).zip(positions) {
            let at = position as usize * table.half;
            let (cos, sin) = (&table.cos[at..at + table.half], &table.sin[at..at + table.half]);
            for head in token.chunks_exact_mut(dim) {
                match table.style {
                    RopeStyle::Halves => {
                        let (first, second) = head[..2 * table.half].split_at_mut(table.half);
                        turn(first.iter_mut().zip(second), cos, sin);
                    }
                    RopeStyle::Interleaved => {
                        let pairs = head[..2 * table.half].as_chunks_mut::<2>().0;
                        turn(pairs.iter_mut().map(|[x, y]| (x, y)), cos, sin);
                    }
                }
            }
        }
    }
}

/// Turns each pair by its angle.
#[inline(always)]
fn turn<'a>(pairs: impl Iterator<Item = (&'a mut f32, &'a mut f32)>, cos: &[f32], sin: &[f32]) {
    for ((x, y), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
        (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
    }
}

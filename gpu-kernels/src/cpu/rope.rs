//! Rotary position embedding.

use crate::error::{multiple, same};
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
        multiple("rope_table", "rotary_dim", rotary_dim, 2)?;
        multiple("rope_table", "length of cos", cos.len(), rotary_dim / 2)?;
        same("rope_table", "length of sin", sin.len(), cos.len())?;
        Ok(Self { cos: cos.to_vec(), sin: sin.to_vec(), half: rotary_dim / 2, style })
    }

    pub(crate) fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    pub(crate) fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Turns the heads of every token of `x`, `[tokens, heads * dim]`.
    pub(crate) fn rotate(&self, positions: &[u32], x: &mut [f32], heads: usize, dim: usize) {
        for (token, &position) in x.chunks_exact_mut(heads * dim).zip(positions) {
            let at = position as usize * self.half;
            let (cos, sin) = (&self.cos[at..at + self.half], &self.sin[at..at + self.half]);
            for head in token.chunks_exact_mut(dim) {
                for i in 0..self.half {
                    let (a, b) = match self.style {
                        RopeStyle::Halves => (i, i + self.half),
                        RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                    };
                    let (x, y) = (head[a], head[b]);
                    head[a] = x * cos[i] - y * sin[i];
                    head[b] = y * cos[i] + x * sin[i];
                }
            }
        }
    }
}

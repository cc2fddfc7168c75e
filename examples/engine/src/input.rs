//! From a plan and block tables to the flat arrays of one forward pass.

use quayline_gpu_kernels::{BatchInput, Span};

use crate::model::StepInput;

/// One step's arrays. Their memory is kept from step to step.
#[derive(Debug, Default)]
pub struct StepArrays {
    block_size: usize,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<i64>,
    spans: Vec<Span>,
    /// Tables one behind the other, as long as each is.
    ragged: Vec<u32>,
    /// Where each one ends.
    ends: Vec<usize>,
    /// Tables under one another, as long as the longest.
    dense: Vec<u32>,
    logits_rows: Vec<u32>,
}

impl StepArrays {
    /// Arrays for a cache with blocks of `block_size` tokens.
    #[must_use]
    pub fn new(block_size: usize) -> Self {
        Self { block_size, ..Self::default() }
    }

    /// Forgets the last step.
    pub fn clear(&mut self) {
        let Self { block_size: _, tokens, positions, slots, spans, ragged, ends, dense, logits_rows } = self;
        tokens.clear();
        positions.clear();
        slots.clear();
        spans.clear();
        ragged.clear();
        ends.clear();
        dense.clear();
        logits_rows.clear();
    }

    /// Adds a sequence's part of the step: its tokens from position `start` on, what is known and drafts behind it;
    /// `blocks` is its block table. Returns the row of the first of them.
    ///
    /// # Panics
    /// When the table is too short for the tokens.
    pub fn push(&mut self, start: u32, tokens: [&[u32]; 2], blocks: impl Iterator<Item = u32>) -> u32 {
        let row = count(self.tokens.len());
        let len = count(tokens.iter().map(|piece| piece.len()).sum());
        let end = start + len;
        let table = self.ragged.len();
        self.ragged.extend(blocks.take((end as usize).div_ceil(self.block_size)));
        tokens.into_iter().for_each(|tokens| self.tokens.extend_from_slice(tokens));
        for position in start..end {
            let (block, offset) = (position as usize / self.block_size, position as usize % self.block_size);
            let slot = self.ragged[table + block] as usize * self.block_size + offset;
            self.positions.push(position);
            self.slots.push(i64::try_from(slot).expect("a pool has fewer than 2^63 slots"));
        }
        self.ends.push(self.ragged.len());
        self.spans.push(Span { query_start: row, query_len: len, context_len: end });
        row
    }

    /// Asks for the logits of a row; returns which of the asked ones it is.
    pub fn want_logits(&mut self, row: u32) -> u32 {
        self.logits_rows.push(row);
        count(self.logits_rows.len() - 1)
    }

    /// The arrays as the model takes them.
    pub fn input(&mut self) -> StepInput<'_> {
        self.make_dense();
        StepInput {
            tokens: &self.tokens,
            batch: BatchInput {
                positions: &self.positions,
                slots: &self.slots,
                spans: &self.spans,
                block_tables: &self.dense,
                block_size: self.block_size,
            },
            logits_rows: &self.logits_rows,
        }
    }

    fn make_dense(&mut self) {
        let Self { ragged, ends, dense, .. } = self;
        let starts = || std::iter::once(0).chain(ends.iter().copied());
        let longest = starts().zip(&*ends).map(|(start, &end)| end - start).max().unwrap_or(0);
        dense.clear();
        for (start, &end) in starts().zip(&*ends) {
            dense.extend_from_slice(&ragged[start..end]);
            // The null block, which nobody reads.
            dense.resize(dense.len() + longest - (end - start), 0);
        }
    }
}

pub(crate) fn count(n: usize) -> u32 {
    u32::try_from(n).expect("a step has fewer than 2^32 tokens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_lie_one_behind_the_other_and_tables_under_one_another() {
        let mut arrays = StepArrays::new(4);
        for _ in 0..2 {
            arrays.clear();
            assert_eq!(arrays.push(3, [&[30, 31], &[32]], [7, 2, 9].into_iter()), 0);
            assert_eq!(arrays.push(0, [&[40], &[]], [5].into_iter()), 3);
            assert_eq!(arrays.want_logits(2), 0);
            assert_eq!(arrays.want_logits(3), 1);
            let input = arrays.input();
            assert_eq!(input.tokens, [30, 31, 32, 40]);
            assert_eq!(input.batch.positions, [3, 4, 5, 0]);
            assert_eq!(input.batch.slots, [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 5 * 4]);
            let spans = [
                Span { query_start: 0, query_len: 3, context_len: 6 },
                Span { query_start: 3, query_len: 1, context_len: 1 },
            ];
            assert_eq!(input.batch.spans, spans);
            assert_eq!(input.batch.block_tables, [7, 2, 5, 0]);
            assert_eq!(input.logits_rows, [2, 3]);
        }
    }
}

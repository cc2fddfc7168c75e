//! One step's indices, checked once.

use crate::error::{at_most, multiple, same};
use crate::{BatchInput, Error, Span};

/// A step's positions, slots, spans and block tables, all within what they claim.
#[derive(Debug)]
pub struct Batch {
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<i64>,
    pub(crate) spans: Vec<Span>,
    pub(crate) block_tables: Vec<u32>,
    pub(crate) blocks_max: usize,
    pub(crate) block_size: usize,
    /// The largest block that attention will read.
    pub(crate) block_top: Option<u32>,
    /// The largest slot that append will write.
    pub(crate) slot_top: Option<i64>,
    /// The largest position that RoPE will look up.
    pub(crate) position_top: Option<u32>,
}

impl Batch {
    pub(crate) fn new(input: BatchInput<'_>) -> Result<Self, Error> {
        let tokens = input.positions.len();
        same("batch", "slots", input.slots.len(), tokens)?;
        multiple("batch", "block_size", input.block_size, 1)?;
        let blocks_max = blocks_max(&input)?;
        let mut block_top = None;
        let mut row = 0;
        for (index, span) in input.spans.iter().enumerate() {
            let (start, len) = (span.query_start as usize, span.query_len as usize);
            if start < row {
                return Err(Error::Shape {
                    operator: "batch",
                    dimension: "query_start of a span (spans ascend and do not overlap)",
                    found: start,
                    expected: row,
                });
            }
            row = start + len;
            at_most("batch", "end of a span's queries", row, tokens)?;
            let blocks = (span.context_len as usize).div_ceil(input.block_size);
            at_most("batch", "blocks of a context", blocks, blocks_max)?;
            let table = &input.block_tables[index * blocks_max..][..blocks];
            block_top = block_top.max(table.iter().copied().max());
        }
        Ok(Self {
            positions: input.positions.to_vec(),
            slots: input.slots.to_vec(),
            spans: input.spans.to_vec(),
            block_tables: input.block_tables.to_vec(),
            blocks_max,
            block_size: input.block_size,
            block_top,
            slot_top: input.slots.iter().copied().max().filter(|&slot| slot >= 0),
            position_top: input.positions.iter().copied().max(),
        })
    }

    /// Rows of the step.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// The block table of one span.
    pub(crate) fn table(&self, span: usize) -> &[u32] {
        &self.block_tables[span * self.blocks_max..][..self.blocks_max]
    }
}

fn blocks_max(input: &BatchInput<'_>) -> Result<usize, Error> {
    let (entries, spans) = (input.block_tables.len(), input.spans.len());
    if spans == 0 || entries == 0 {
        same("batch", "block_tables (no spans)", entries, 0)?;
        return Ok(0);
    }
    multiple("batch", "length of block_tables", entries, spans)?;
    Ok(entries / spans)
}

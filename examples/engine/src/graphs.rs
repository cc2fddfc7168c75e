//! Steps in which everybody gets one token, on a GPU: recorded once for each number of rows, then replayed. A step of
//! a large model is some hundred launches; replaying is one.
//!
//! ```text
//!   tokens ─ embed ─> rows ═ [layers, head] ═> logits      [ ] is recorded
//!   positions, slots, contexts, tables ──┘                 refilled before each replay
//! ```
//!
//! A step of fewer rows than were recorded is filled up with rows that stand for nobody. Bits do not depend on the
//! other rows, so a replayed step has those of any other way.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use quayline_gpu_kernels::cuda::{Batch, Graph, KvPool, Tensor};
use quayline_gpu_kernels::{BatchInput, Cuda, Error, Ops, Span};

use crate::layers::Rows;
use crate::machine::Shortcut;
use crate::model::{Pass, StepInput, StepLimits};
use crate::sizing::RECORDED_ROWS_MAX;

/// Recorded steps, and the activations that they share.
pub(crate) struct Graphs {
    rows: Rows<Cuda>,
    logits: Tensor,
    /// By number of rows.
    steps: BTreeMap<usize, Recorded>,
    rows_max: usize,
    /// Entries of a sequence's block table.
    blocks_max: usize,
    /// What the rotary table was when they were recorded.
    rope_positions: usize,
    /// The arrays of the step at hand.
    step: Arrays,
    /// Its logits, once they were asked for.
    found: Option<Vec<f32>>,
}

struct Recorded {
    batch: Batch,
    graph: Graph,
}

/// A step of one token each, filled up with rows that are nobody's.
#[derive(Default)]
struct Arrays {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<i64>,
    spans: Vec<Span>,
    block_tables: Vec<u32>,
    logits_rows: Vec<u32>,
    block_size: usize,
}

impl Graphs {
    /// Room for steps of as many rows as there are sequences at a time.
    pub(crate) fn new(
        pass: &Pass<Cuda>,
        limits: StepLimits,
        sequences_max: u32,
        block_size: usize,
    ) -> Result<Self, Error> {
        // Steps of more rows are computed as they come: by then launches take less time than what they launch.
        let rows_max = RECORDED_ROWS_MAX.min(sequences_max as usize).min(limits.tokens);
        Ok(Self {
            rows: Rows::new(&pass.ops, &pass.config, rows_max)?,
            logits: pass.ops.tensor(rows_max, pass.config.vocab)?,
            steps: BTreeMap::new(),
            rows_max,
            blocks_max: limits.positions.div_ceil(block_size),
            rope_positions: pass.rope_positions,
            step: Arrays::default(),
            found: None,
        })
    }

    /// The number of rows that a step of so many is recorded with.
    fn recorded_rows(&self, rows: usize) -> usize {
        let steps = if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(8) };
        steps.min(self.rows_max)
    }

    fn takes(&self, input: &StepInput<'_>) -> bool {
        let rows = input.tokens.len();
        let one_each = input.batch.spans.len() == rows
            && (0..).zip(input.batch.spans).all(|(row, span)| (span.query_start, span.query_len) == (row, 1));
        let all_wanted =
            input.logits_rows.len() == rows && (0..).zip(input.logits_rows).all(|(n, &row)| row == n);
        (1..=self.rows_max).contains(&rows) && one_each && all_wanted
    }
}

impl Shortcut<Cuda> for Graphs {
    fn run(&mut self, pass: &Pass<Cuda>, pool: &mut KvPool, input: &StepInput<'_>) -> Result<bool, Error> {
        if !self.takes(input) {
            return Ok(false);
        }
        if self.rope_positions != pass.rope_positions {
            self.steps.clear();
            self.rope_positions = pass.rope_positions;
        }
        let rows = self.recorded_rows(input.tokens.len());
        self.step.fill(input, rows, self.blocks_max);
        self.found = None;
        let Self { rows: activations, logits, steps, step, .. } = self;
        let input = step.input();
        pass.embed(input.tokens, activations)?;
        if let Some(Recorded { batch, graph }) = steps.get_mut(&rows) {
            batch.refill(input.batch)?;
            graph.replay()?;
            logits.resize(rows)?;
            return Ok(true);
        }
        let batch = pass.ops.fixed_batch(input.batch)?;
        let mut compute = || {
            pass.layers(pool, &batch, &input, activations)?;
            pass.head(&activations.normed, logits)
        };
        // The first time plans the work, and is the step; the second is recorded, and computes nothing.
        compute()?;
        let graph = pass.ops.capture(|_| compute())?;
        steps.insert(rows, Recorded { batch, graph });
        Ok(true)
    }

    fn logits(&mut self, pass: &Pass<Cuda>, range: Range<u32>) -> Result<Cow<'_, [f32]>, Error> {
        let found = match self.found.take() {
            Some(found) => found,
            None => pass.ops.read(&self.logits)?.into_owned(),
        };
        let vocab = pass.config.vocab;
        Ok(Cow::Borrowed(&self.found.insert(found)[range.start as usize * vocab..range.end as usize * vocab]))
    }

    fn all_logits(&self) -> &Tensor {
        &self.logits
    }
}

impl Arrays {
    #[expect(clippy::cast_possible_truncation, reason = "rows of a step are counted in 32 bits")]
    fn fill(&mut self, input: &StepInput<'_>, rows: usize, blocks_max: usize) {
        let Self { tokens, positions, slots, spans, block_tables, logits_rows, block_size } = self;
        let BatchInput { block_tables: tables, spans: parts, .. } = input.batch;
        tokens.clear();
        tokens.extend_from_slice(input.tokens);
        tokens.resize(rows, 0);
        positions.clear();
        positions.extend_from_slice(input.batch.positions);
        positions.resize(rows, 0);
        slots.clear();
        slots.extend_from_slice(input.batch.slots);
        slots.resize(rows, -1);
        spans.clear();
        spans.extend_from_slice(parts);
        let nobody = |row| Span { query_start: row as u32, query_len: 1, context_len: 0 };
        spans.extend((parts.len()..rows).map(nobody));
        block_tables.clear();
        let width = tables.len() / parts.len();
        for table in tables.chunks(width.max(1)) {
            block_tables.extend_from_slice(&table[..width.min(blocks_max)]);
            block_tables.resize(block_tables.len() + blocks_max.saturating_sub(width), 0);
        }
        block_tables.resize(rows * blocks_max, 0);
        logits_rows.clear();
        logits_rows.extend(0..rows as u32);
        *block_size = input.batch.block_size;
    }

    fn input(&self) -> StepInput<'_> {
        let Self { tokens, positions, slots, spans, block_tables, logits_rows, block_size } = self;
        let batch = BatchInput { positions, slots, spans, block_tables, block_size: *block_size };
        StepInput { tokens, batch, logits_rows }
    }
}

//! A loaded model: its weights, one forward pass over [`Ops`], logits out.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use quayline_gpu_kernels::{BatchInput, Dtype, Error, KvShape, Ops, Projection, RopeStyle, Rounding, Span};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::files::ModelFiles;
use crate::layers::{Loader, Rows, Step};
use crate::models::Network;
use crate::rope::Rope;

/// The rotary table starts with this many positions and doubles when a longer sequence comes: memory and time to
/// ready follow what is used, not what the model could do.
const ROPE_POSITIONS_FIRST: usize = 4096;

/// The room that a model makes for its activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens that go through the layers together; a step with more is computed in pieces, with the same bits. Each
    /// takes `5 hidden + 2 (heads + kv heads) head width + 3 intermediate` numbers of 4 bytes: 512 tokens of a model
    /// with 110 million weights take 23 MB, and are enough to keep a processor's arithmetic busy.
    pub tokens: usize,
    /// Most rows of logits in one call of [`Model::logits`]; at most `tokens`.
    pub logits_rows: usize,
    /// The longest sequence; at most the model's own limit.
    pub positions: usize,
}

/// One step: tokens of any number of sequences, where their keys and values go and which logits are wanted.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Token ids. `[tokens]`.
    pub tokens: &'a [u32],
    /// Positions, slots, sequences and their block tables.
    pub batch: BatchInput<'a>,
    /// Rows (indices into `tokens`) whose logits are wanted, in the order wanted; may be empty.
    pub logits_rows: &'a [u32],
}

/// A model on one machine. The cache of keys and values is the caller's ([`Model::kv_pool`]).
pub struct Model<O: Ops> {
    pass: Pass<O>,
    weight_dtype: Dtype,
    weight_bytes: u64,
    limits: StepLimits,
    rows: Rows<O>,
    /// What the head reads of the wanted rows, `[rows, hidden]`, if the last step was computed in pieces; after a
    /// step in one piece it lies in `rows.normed`.
    kept: Option<Vec<f32>>,
    logits: O::Tensor,
    /// The wanted rows whose logits these are.
    computed: Option<Range<u32>>,
}

impl<O: Ops> Model<O> {
    /// Maps the weights of `files`, checks each against `config.json`, hands them to the kernels, and makes room
    /// for steps within `limits`. Cost: one pass over the weights (on the CPU, which keeps its own form of each
    /// matrix).
    ///
    /// A checkpoint that ties its embeddings and yet brings an `lm_head.weight` is computed with that one.
    ///
    /// # Errors
    /// When the configuration is not computed here, a tensor is missing, misshapen, of another number format or
    /// left over, a file is damaged, or memory for the activations cannot be had.
    pub fn load(ops: O, files: &ModelFiles, limits: StepLimits) -> Result<Self, LoadError> {
        Self::load_rounded(ops, files, limits, None)
    }

    /// The same, with the matrices that products are made with rounded to eight bits or four, if so asked. Those that
    /// are so in the files are kept as they are.
    ///
    /// # Errors
    /// As [`Model::load`], and where `ops` does not compute with such matrices.
    pub fn load_rounded(
        ops: O,
        files: &ModelFiles,
        limits: StepLimits,
        rounding: Option<Rounding>,
    ) -> Result<Self, LoadError> {
        let mut config = files.config()?;
        let mut weights = files.weights()?;
        let positions = limits.positions.clamp(1, config.positions_max);
        let tokens = limits.tokens.max(1);
        let limits = StepLimits { tokens, logits_rows: limits.logits_rows.clamp(1, tokens), positions };
        forget_windows_beyond(&mut config, positions);

        let weight_bytes = weights.bytes();
        let mut loader = Loader { ops: &ops, weights: &mut weights, config: &config, rounding };
        const EMBEDDING: &str = "model.embed_tokens.weight";
        let has_head = ["lm_head.weight", "lm_head.qweight"].iter().any(|name| loader.weights.contains(name));
        let (embedding, head) = if !config.tied_embeddings || has_head {
            let embedding = loader.table(EMBEDDING, config.vocab, config.hidden)?;
            (embedding, Some(loader.matrix("lm_head", config.vocab, config.hidden)?))
        } else {
            (loader.matrix("model.embed_tokens", config.vocab, config.hidden)?, None)
        };
        let network = Network::load(&mut loader)?;
        let weight_dtype = weights.take(EMBEDDING, &[config.vocab, config.hidden])?.dtype;
        weights.finish()?;

        let rope = Rope::new(&config.rope, config.head_dim);
        let rope_positions = positions.min(ROPE_POSITIONS_FIRST);
        let rope_table = rope_table(&ops, &rope, rope_positions, config.head_dim)?;
        let rows = Rows::new(&ops, &config, limits.tokens)?;
        let logits = ops.tensor(limits.logits_rows, config.vocab)?;
        let pass = Pass { ops, config, embedding, network, head, rope, rope_table, rope_positions };
        Ok(Self { pass, weight_dtype, weight_bytes, limits, rows, kept: None, logits, computed: None })
    }

    /// What `config.json` said. A window at least as long as the longest sequence reads as none.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.pass.config
    }

    /// The room that was made.
    #[must_use]
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// The kernels.
    #[must_use]
    pub fn ops(&self) -> &O {
        &self.pass.ops
    }

    /// What computes a step.
    pub(crate) fn pass(&self) -> &Pass<O> {
        &self.pass
    }

    /// How the weights are stored (the embedding's format; others may differ).
    #[must_use]
    pub fn weight_dtype(&self) -> Dtype {
        self.weight_dtype
    }

    /// Bytes of all weights in the files.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The cache this model needs, with `blocks` blocks of `block_size` tokens.
    #[must_use]
    pub fn kv_shape(&self, blocks: usize, block_size: usize, dtype: Dtype) -> KvShape {
        let &ModelConfig { layers, kv_heads, head_dim, .. } = &self.pass.config;
        KvShape { layers, blocks, block_size, kv_heads, head_dim, dtype }
    }

    /// Memory for keys and values.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn kv_pool(&self, blocks: usize, block_size: usize, dtype: Dtype) -> Result<O::KvPool, Error> {
        self.pass.ops.kv_pool(self.kv_shape(blocks, block_size, dtype))
    }

    /// Runs the layers over one step and writes its keys and values into `pool`. Logits of the wanted rows can then
    /// be taken with [`Model::logits`], until the next step.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, a position is beyond the longest sequence, or the batch contradicts
    /// itself. The cache may then hold a part of the step.
    pub fn run(&mut self, pool: &mut O::KvPool, input: &StepInput<'_>) -> Result<(), Error> {
        self.cover_positions(input.batch.positions)?;
        self.computed = None;
        if input.tokens.len() <= self.limits.tokens {
            self.kept = None;
            return self.run_piece(pool, input);
        }
        let rows = input.tokens.len();
        if let Some(&row) = input.logits_rows.iter().find(|&&row| row as usize >= rows) {
            let (found, max) = (row as usize, rows - 1);
            return Err(Error::TooLarge { operator: "run", dimension: "row of logits", found, max });
        }
        let hidden = self.pass.config.hidden;
        let mut kept = vec![0.0; input.logits_rows.len() * hidden];
        for start in (0..rows).step_by(self.limits.tokens) {
            let piece = Piece::cut(input, start..rows.min(start + self.limits.tokens));
            self.run_piece(pool, &piece.input(input))?;
            let found = self.pass.ops.read(&self.rows.normed)?;
            for (&at, row) in piece.wanted_by.iter().zip(found.chunks_exact(hidden)) {
                kept[at * hidden..][..hidden].copy_from_slice(row);
            }
        }
        self.kept = Some(kept);
        Ok(())
    }

    fn run_piece(&mut self, pool: &mut O::KvPool, input: &StepInput<'_>) -> Result<(), Error> {
        let batch = self.pass.ops.batch(input.batch)?;
        self.pass.embed(input.tokens, &mut self.rows)?;
        self.pass.layers(pool, &batch, input, &mut self.rows)
    }

    /// Logits of the wanted rows `range` (indices into the last step's `logits_rows`): `[range, vocab]`, row-major.
    /// Many rows are taken in several calls, each of at most `limits().logits_rows`.
    ///
    /// # Errors
    /// When the range is larger than that, or not within the rows that the last step was asked for.
    pub fn logits(&mut self, range: Range<u32>) -> Result<Cow<'_, [f32]>, Error> {
        self.compute_logits(range)?;
        self.pass.ops.read(&self.logits)
    }

    /// Computes them, and leaves them where they are.
    pub(crate) fn compute_logits(&mut self, range: Range<u32>) -> Result<(), Error> {
        if self.computed.as_ref() == Some(&range) {
            return Ok(());
        }
        self.computed = None;
        let x = &mut self.rows.residual;
        match &self.kept {
            None => {
                let wanted: Vec<u32> = range.clone().collect();
                self.pass.ops.gather_rows(&self.rows.normed, &wanted, x)?;
            }
            Some(kept) => {
                let hidden = self.pass.config.hidden;
                let (start, end) = (range.start as usize * hidden, range.end as usize * hidden);
                let (operator, dimension) = ("logits", "row");
                let max = kept.len() / hidden;
                let wanted = kept.get(start..end);
                let found = range.end as usize;
                self.pass.ops.write(x, wanted.ok_or(Error::TooLarge { operator, dimension, found, max })?)?;
            }
        }
        self.pass.head(&self.rows.residual, &mut self.logits)?;
        self.computed = Some(range);
        Ok(())
    }

    /// What [`compute_logits`](Model::compute_logits) computed last.
    pub(crate) fn computed_logits(&self) -> &O::Tensor {
        &self.logits
    }

    /// Grows the rotary table to the step's last position.
    pub(crate) fn cover_positions(&mut self, positions: &[u32]) -> Result<(), Error> {
        let needed = positions.iter().max().map_or(0, |&last| last as usize + 1);
        if needed > self.limits.positions {
            let (found, max) = (needed - 1, self.limits.positions - 1);
            return Err(Error::TooLarge { operator: "rope", dimension: "position", found, max });
        }
        let Pass { ops, config, rope, rope_table: table, rope_positions, .. } = &mut self.pass;
        if needed > *rope_positions {
            let grown = needed.max(2 * *rope_positions).min(self.limits.positions);
            *table = rope_table(ops, rope, grown, config.head_dim)?;
            *rope_positions = grown;
        }
        Ok(())
    }
}

/// What a forward pass reads: everything but the step.
pub(crate) struct Pass<O: Ops> {
    pub(crate) ops: O,
    pub(crate) config: ModelConfig,
    embedding: O::Weight,
    network: Network<O>,
    /// `None` when the embedding is the head.
    head: Option<O::Weight>,
    rope: Rope,
    rope_table: O::RopeTable,
    /// Positions of the table.
    pub(crate) rope_positions: usize,
}

impl<O: Ops> Pass<O> {
    /// Tokens to rows.
    pub(crate) fn embed(&self, tokens: &[u32], rows: &mut Rows<O>) -> Result<(), Error> {
        self.ops.embed(&self.embedding, tokens, &mut rows.residual)
    }

    /// From embedded tokens to what the head reads of the rows whose logits are wanted, in `rows.normed`.
    pub(crate) fn layers(
        &self,
        pool: &mut O::KvPool,
        batch: &O::Batch,
        input: &StepInput<'_>,
        rows: &mut Rows<O>,
    ) -> Result<(), Error> {
        self.network.forward(&mut Step {
            ops: &self.ops,
            config: &self.config,
            rope: &self.rope_table,
            batch,
            pool,
            rows,
            logits_rows: input.logits_rows,
            tokens: input.tokens.len(),
        })
    }

    /// Logits of all rows of `x`.
    pub(crate) fn head(&self, x: &O::Tensor, logits: &mut O::Tensor) -> Result<(), Error> {
        let weight = self.head.as_ref().unwrap_or(&self.embedding);
        self.ops.linear(x, &mut [Projection { weight, bias: None, out: logits }])
    }
}

impl<O: Ops> fmt::Debug for Model<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.pass.config)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Some rows of a step that is too large for one pass. Spans that reach over a cut fall into two, the first of which
/// ends with a shorter context.
struct Piece {
    rows: Range<usize>,
    spans: Vec<Span>,
    /// Which of the step's block tables these spans have.
    tables: Range<usize>,
    /// The rows of the piece whose logits are wanted, and which of the step's wishes each fulfils.
    logits_rows: Vec<u32>,
    wanted_by: Vec<usize>,
}

impl Piece {
    #[expect(clippy::cast_possible_truncation, reason = "rows of a step are counted in 32 bits")]
    fn cut(input: &StepInput<'_>, rows: Range<usize>) -> Self {
        let (from, to) = (rows.start as u32, rows.end as u32);
        let end = |span: &Span| span.query_start.saturating_add(span.query_len);
        let is_here = |span: &Span| span.query_start < to && end(span) > from;
        let spans = input.batch.spans;
        let first = spans.iter().position(is_here).unwrap_or(0);
        let tables = first..spans.iter().rposition(is_here).map_or(first, |last| last + 1);
        let part = |span: &Span| {
            let (begins, ends) = (span.query_start.max(from), end(span).min(to));
            let later = end(span).saturating_sub(ends);
            Span {
                query_start: begins.min(to) - from,
                query_len: ends.saturating_sub(begins),
                context_len: span.context_len.saturating_sub(later),
            }
        };
        let spans = spans[tables.clone()].iter().map(part).collect();
        let wishes = input.logits_rows.iter().enumerate().filter(|&(_, row)| (from..to).contains(row));
        let (wanted_by, logits_rows) = wishes.map(|(at, row)| (at, row - from)).unzip();
        Self { rows, spans, tables, logits_rows, wanted_by }
    }

    fn input<'a>(&'a self, whole: &StepInput<'a>) -> StepInput<'a> {
        let batch = whole.batch;
        let blocks_max = batch.block_tables.len().checked_div(batch.spans.len()).unwrap_or(0);
        StepInput {
            tokens: &whole.tokens[self.rows.clone()],
            batch: BatchInput {
                positions: batch.positions.get(self.rows.clone()).unwrap_or_default(),
                slots: batch.slots.get(self.rows.clone()).unwrap_or_default(),
                spans: &self.spans,
                block_tables: &batch.block_tables
                    [self.tables.start * blocks_max..self.tables.end * blocks_max],
                block_size: batch.block_size,
            },
            logits_rows: &self.logits_rows,
        }
    }
}

fn rope_table<O: Ops>(
    ops: &O,
    rope: &Rope,
    positions: usize,
    head_dim: usize,
) -> Result<O::RopeTable, Error> {
    let table = rope.table(0..positions);
    ops.rope_table(&table.cos, &table.sin, head_dim, RopeStyle::Halves)
}

/// A window that reaches past the longest sequence hides nothing.
fn forget_windows_beyond(config: &mut ModelConfig, positions: usize) {
    for window in &mut config.windows {
        *window = window.filter(|&window| (window as usize) < positions);
    }
}

//! A loaded model: weights where they lie, one forward pass over [`Ops`], logits out.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use quayline_gpu_kernels::{BatchInput, Dtype, Error, KvShape, Ops, Projection, RopeStyle};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::files::ModelFiles;
use crate::layers::{Loader, Rows, Step};
use crate::models::Network;
use crate::rope::Rope;

/// The rotary table starts with this many positions and doubles when a longer sequence comes: memory and time to
/// ready follow what is used, not what the model could do.
const ROPE_POSITIONS_FIRST: usize = 4096;

/// The largest step that a model makes room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Most tokens in one step.
    pub tokens: usize,
    /// Most rows of logits in one call of [`Model::logits`].
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
    ops: O,
    config: ModelConfig,
    embedding: O::Weight,
    network: Network<O>,
    /// `None` when the embedding is the head.
    head: Option<O::Weight>,
    weight_dtype: Dtype,
    weight_bytes: u64,
    rope: Rope,
    rope_table: O::RopeTable,
    rope_positions: usize,
    limits: StepLimits,
    rows: Rows<O>,
    logits: O::Tensor,
}

impl<O: Ops> Model<O> {
    /// Maps the weights of `files`, checks each against `config.json`, and makes room for steps within `limits`.
    /// Copies no matrix; cost: the headers and norm vectors.
    ///
    /// A checkpoint that ties its embeddings and yet brings an `lm_head.weight` is computed with that one.
    ///
    /// # Errors
    /// When the configuration is not computed here, a tensor is missing, misshapen, of another number format or
    /// left over, a file is damaged, or memory for the activations cannot be had.
    pub fn load(ops: O, files: &ModelFiles, limits: StepLimits) -> Result<Self, LoadError> {
        let mut config = files.config()?;
        let mut weights = files.weights()?;
        let positions = limits.positions.clamp(1, config.positions_max);
        let limits = StepLimits { positions, ..limits };
        forget_windows_beyond(&mut config, positions);

        let weight_bytes = weights.bytes();
        let mut loader = Loader { ops: &ops, weights: &mut weights, config: &config };
        const EMBEDDING: &str = "model.embed_tokens.weight";
        const HEAD: &str = "lm_head.weight";
        let embedding = loader.matrix(EMBEDDING, config.vocab, config.hidden)?;
        let own_head = !config.tied_embeddings || loader.weights.contains(HEAD);
        let head = if own_head { Some(loader.matrix(HEAD, config.vocab, config.hidden)?) } else { None };
        let network = Network::load(&mut loader)?;
        let weight_dtype = weights.take(EMBEDDING, &[config.vocab, config.hidden])?.dtype;
        weights.finish()?;

        let rope = Rope::new(&config.rope, config.head_dim);
        let rope_positions = positions.min(ROPE_POSITIONS_FIRST);
        let rope_table = rope_table(&ops, &rope, rope_positions, config.head_dim)?;
        let rows = Rows::new(&ops, &config, limits.tokens)?;
        let logits = ops.tensor(limits.logits_rows, config.vocab)?;
        Ok(Self {
            ops,
            config,
            embedding,
            network,
            head,
            weight_dtype,
            weight_bytes,
            rope,
            rope_table,
            rope_positions,
            limits,
            rows,
            logits,
        })
    }

    /// What `config.json` said. A window at least as long as the longest sequence reads as none.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The room that was made.
    #[must_use]
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// The kernels.
    #[must_use]
    pub fn ops(&self) -> &O {
        &self.ops
    }

    /// How the weights are stored (the embedding's format; others may differ).
    #[must_use]
    pub fn weight_dtype(&self) -> Dtype {
        self.weight_dtype
    }

    /// Bytes of all weights, mapped and not copied.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The cache this model needs, with `blocks` blocks of `block_size` tokens.
    #[must_use]
    pub fn kv_shape(&self, blocks: usize, block_size: usize, dtype: Dtype) -> KvShape {
        let &ModelConfig { layers, kv_heads, head_dim, .. } = &self.config;
        KvShape { layers, blocks, block_size, kv_heads, head_dim, dtype }
    }

    /// Memory for keys and values.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn kv_pool(&self, blocks: usize, block_size: usize, dtype: Dtype) -> Result<O::KvPool, Error> {
        self.ops.kv_pool(self.kv_shape(blocks, block_size, dtype))
    }

    /// Runs the layers over one step and writes its keys and values into `pool`. Logits of the wanted rows can then
    /// be taken with [`Model::logits`], until the next step.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, a position is beyond the longest sequence, the step is larger than
    /// [`Model::limits`], or the batch contradicts itself. The cache may then hold a part of the step.
    pub fn run(&mut self, pool: &mut O::KvPool, input: &StepInput<'_>) -> Result<(), Error> {
        self.cover_positions(input.batch.positions)?;
        let batch = self.ops.batch(input.batch)?;
        self.ops.embed(&self.embedding, input.tokens, &mut self.rows.residual)?;
        self.network.forward(&mut Step {
            ops: &self.ops,
            config: &self.config,
            rope: &self.rope_table,
            batch: &batch,
            pool,
            rows: &mut self.rows,
            logits_rows: input.logits_rows,
            tokens: input.tokens.len(),
        })
    }

    /// Logits of the wanted rows `range` (indices into the last step's `logits_rows`): `[range, vocab]`, row-major.
    /// Many rows are taken in several calls, each of at most `limits().logits_rows`.
    ///
    /// # Errors
    /// When the range is larger than that, or not within the rows that the last step was asked for.
    pub fn logits(&mut self, range: Range<u32>) -> Result<Cow<'_, [f32]>, Error> {
        let wanted: Vec<u32> = range.collect();
        self.ops.gather_rows(&self.rows.normed, &wanted, &mut self.rows.residual)?;
        let weight = self.head.as_ref().unwrap_or(&self.embedding);
        let mut head = [Projection { weight, bias: None, out: &mut self.logits }];
        self.ops.linear(&self.rows.residual, &mut head)?;
        self.ops.read(&self.logits)
    }

    /// Grows the rotary table to the step's last position.
    fn cover_positions(&mut self, positions: &[u32]) -> Result<(), Error> {
        let needed = positions.iter().max().map_or(0, |&last| last as usize + 1);
        if needed > self.limits.positions {
            let (found, max) = (needed - 1, self.limits.positions - 1);
            return Err(Error::TooLarge { operator: "rope", dimension: "position", found, max });
        }
        if needed > self.rope_positions {
            let grown = needed.max(2 * self.rope_positions).min(self.limits.positions);
            self.rope_table = rope_table(&self.ops, &self.rope, grown, self.config.head_dim)?;
            self.rope_positions = grown;
        }
        Ok(())
    }
}

impl<O: Ops> fmt::Debug for Model<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
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

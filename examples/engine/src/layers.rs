//! The parts that forward passes are made of, over any [`Ops`].
//!
//! ```text
//! tokens -> embed -> residual ─┬─ norm -> q k v -> rope -> append, attention -> output ─┐ (per layer)
//!                              └────────────────────────── + ───────────────────────────┤
//!                              ┌─ norm -> gate, up -> silu · -> down ───────────────────┤
//!                              └────────────────────────── + ───────────────────────────┘
//!           -> norm -> head -> logits, for the rows that want them
//! ```

use std::mem;

use quayline_gpu_kernels::{
    Attention, Error, Fp8Source, Heads, Int4Layout, Int4Source, Ops, Projection, Rounding,
};
use safetensors::Dtype;

use crate::config::{Fp8Scales, ModelConfig, Quantization};
use crate::error::LoadError;
use crate::weights::{Weights, WeightsError};

/// Takes weights by name and hands them to the kernels.
pub(crate) struct Loader<'a, O> {
    pub(crate) ops: &'a O,
    pub(crate) weights: &'a mut Weights,
    pub(crate) config: &'a ModelConfig,
    /// To what matrices of floats are rounded.
    pub(crate) rounding: Option<Rounding>,
}

impl<O: Ops> Loader<'_, O> {
    pub(crate) fn vector(&mut self, name: &str, len: usize) -> Result<O::Weight, LoadError> {
        Ok(self.ops.weight(self.weights.take(name, &[len])?)?)
    }

    /// What products are made with under `prefix`, in the form that the files have it in.
    pub(crate) fn matrix(&mut self, prefix: &str, out: usize, into: usize) -> Result<O::Weight, LoadError> {
        let name = format!("{prefix}.weight");
        match self.config.quantization {
            Some(Quantization::Int4 { layout, group })
                if self.weights.contains(&format!("{prefix}.qweight")) =>
            {
                self.integers(prefix, (out, into), layout, group)
            }
            Some(Quantization::Fp8 { scales, .. }) if self.weights.is_fp8(&name) => {
                self.fp8(prefix, (out, into), scales)
            }
            _ => {
                let source = self.weights.take(&name, &[out, into])?;
                Ok(match self.rounding {
                    Some(rounding) => self.ops.weight_rounded(source, rounding)?,
                    None => self.ops.weight(source)?,
                })
            }
        }
    }

    /// A matrix that is E4M3 in the files. `weight_scale_inv` is multiplied by, as `weight_scale` is: the inverse is
    /// that of what weights were divided by.
    fn fp8(
        &mut self,
        prefix: &str,
        (rows, cols): (usize, usize),
        scales: Fp8Scales,
    ) -> Result<O::Weight, LoadError> {
        let name = format!("{prefix}.weight");
        let elements = self.weights.take_part(&name, &[rows, cols], Dtype::F8_E4M3)?;
        let names = ["weight_scale_inv", "weight_scale"].map(|scale| format!("{prefix}.{scale}"));
        let Some(scale) = names.iter().find(|name| self.weights.contains(name)) else {
            return Err(
                WeightsError::Scale { name, expected: "weight_scale or weight_scale_inv".into() }.into()
            );
        };
        let blocks: [usize; 2];
        let (block, shapes): (_, [&[usize]; 3]) = match scales {
            Fp8Scales::Tensor => ((rows, cols), [&[1], &[], &[1, 1]]),
            Fp8Scales::Channel => ((1, cols), [&[rows, 1], &[rows], &[rows]]),
            Fp8Scales::Blocks(down, across) => {
                blocks = [rows.div_ceil(down), cols.div_ceil(across)];
                ((down, across), [&blocks; 3])
            }
        };
        let scales = self.weights.take_floats(scale, &shapes)?;
        for of_activations in ["input_scale", "activation_scale"] {
            self.weights.skip(&format!("{prefix}.{of_activations}"));
        }
        Ok(self.ops.weight_fp8(&Fp8Source { rows, cols, elements, scales, block })?)
    }

    /// A matrix that is integers in the files.
    fn integers(
        &mut self,
        prefix: &str,
        (rows, cols): (usize, usize),
        layout: Int4Layout,
        group: Option<usize>,
    ) -> Result<O::Weight, LoadError> {
        let group = group.unwrap_or(cols);
        let groups = cols.div_ceil(group);
        let mut part = |name: &str, shape: [usize; 2], dtype| {
            self.weights.take_part(&format!("{prefix}.{name}"), &shape, dtype)
        };
        let shape = if layout == Int4Layout::Awq { [cols, rows / 8] } else { [cols / 8, rows] };
        let values = part("qweight", shape, Dtype::I32)?;
        let zeros = part("qzeros", [groups, rows / 8], Dtype::I32)?;
        let scales = part("scales", [groups, rows], Dtype::F16)?;
        let group_of = match layout {
            Int4Layout::Awq => None,
            Int4Layout::Gptq | Int4Layout::GptqV2 => {
                self.weights.take_groups(&format!("{prefix}.g_idx"), cols, group)?
            }
        };
        let source = Int4Source { layout, rows, cols, group, values, zeros, scales, group_of };
        Ok(self.ops.weight_int4(&source)?)
    }

    /// A matrix that is only looked up in, row by row.
    pub(crate) fn table(&mut self, name: &str, rows: usize, width: usize) -> Result<O::Weight, LoadError> {
        Ok(self.ops.table(self.weights.take(name, &[rows, width])?)?)
    }

    fn linear(&mut self, prefix: &str, out: usize, into: usize, bias: bool) -> Result<Linear<O>, LoadError> {
        let weight = self.matrix(prefix, out, into)?;
        let bias = if bias { Some(self.vector(&format!("{prefix}.bias"), out)?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// The four projections of attention under `prefix`.
    pub(crate) fn attention(&mut self, prefix: &str) -> Result<Projections<O>, LoadError> {
        let &ModelConfig { hidden, heads, kv_heads, head_dim, qkv_bias, output_bias, .. } = self.config;
        // What an eight-bit cache of floats would be scaled by.
        for of_cache in ["k_scale", "v_scale"] {
            self.weights.skip(&format!("{prefix}.{of_cache}"));
        }
        Ok(Projections {
            q: self.linear(&format!("{prefix}.q_proj"), heads * head_dim, hidden, qkv_bias)?,
            k: self.linear(&format!("{prefix}.k_proj"), kv_heads * head_dim, hidden, qkv_bias)?,
            v: self.linear(&format!("{prefix}.v_proj"), kv_heads * head_dim, hidden, qkv_bias)?,
            output: self.linear(&format!("{prefix}.o_proj"), hidden, heads * head_dim, output_bias)?,
        })
    }

    /// The gated feed-forward part under `prefix`.
    pub(crate) fn feed_forward(&mut self, prefix: &str) -> Result<FeedForward<O>, LoadError> {
        let &ModelConfig { hidden, intermediate, mlp_bias, .. } = self.config;
        Ok(FeedForward {
            gate: self.linear(&format!("{prefix}.gate_proj"), intermediate, hidden, mlp_bias)?,
            up: self.linear(&format!("{prefix}.up_proj"), intermediate, hidden, mlp_bias)?,
            down: self.linear(&format!("{prefix}.down_proj"), hidden, intermediate, mlp_bias)?,
        })
    }
}

/// `x · weightᵀ + bias`.
struct Linear<O: Ops> {
    weight: O::Weight,
    bias: Option<O::Weight>,
}

impl<O: Ops> Linear<O> {
    fn onto<'a>(&'a self, out: &'a mut O::Tensor) -> Projection<'a, O> {
        Projection { weight: &self.weight, bias: self.bias.as_ref(), out }
    }
}

/// The matrices around attention.
pub(crate) struct Projections<O: Ops> {
    q: Linear<O>,
    k: Linear<O>,
    v: Linear<O>,
    output: Linear<O>,
}

impl<O: Ops> Projections<O> {
    /// `normed` to q, k and v.
    pub(crate) fn qkv(&self, step: &mut Step<'_, O>) -> Result<(), Error> {
        let rows = &mut *step.rows;
        let mut onto = [self.q.onto(&mut rows.q), self.k.onto(&mut rows.k), self.v.onto(&mut rows.v)];
        step.ops.linear(&rows.normed, &mut onto)
    }

    /// What attention found, to `delta`.
    pub(crate) fn output(&self, step: &mut Step<'_, O>) -> Result<(), Error> {
        step.ops.linear(&step.rows.attended, &mut [self.output.onto(&mut step.rows.delta)])
    }
}

/// SwiGLU (arXiv 2002.05202): `down(silu(gate(x)) · up(x))`.
pub(crate) struct FeedForward<O: Ops> {
    gate: Linear<O>,
    up: Linear<O>,
    down: Linear<O>,
}

impl<O: Ops> FeedForward<O> {
    /// `normed` to `delta`.
    pub(crate) fn forward(&self, step: &mut Step<'_, O>) -> Result<(), Error> {
        let rows = &mut *step.rows;
        step.ops.linear(&rows.normed, &mut [self.gate.onto(&mut rows.gate), self.up.onto(&mut rows.up)])?;
        step.ops.silu_mul(&rows.gate, &rows.up, &mut rows.gated)?;
        step.ops.linear(&rows.gated, &mut [self.down.onto(&mut rows.delta)])
    }
}

/// The activations of one step, `[tokens, width]` each; made once, reused by every layer and step.
pub(crate) struct Rows<O: Ops> {
    /// The stream that every layer adds to.
    pub(crate) residual: O::Tensor,
    /// `residual`, normalised: what the next matrices read.
    pub(crate) normed: O::Tensor,
    /// What the last matrices found, not yet added to `residual`.
    delta: O::Tensor,
    q: O::Tensor,
    k: O::Tensor,
    v: O::Tensor,
    attended: O::Tensor,
    gate: O::Tensor,
    up: O::Tensor,
    gated: O::Tensor,
}

impl<O: Ops> Rows<O> {
    pub(crate) fn new(ops: &O, config: &ModelConfig, rows_max: usize) -> Result<Self, Error> {
        let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let tensor = |cols| ops.tensor(rows_max, cols);
        Ok(Self {
            residual: tensor(config.hidden)?,
            normed: tensor(config.hidden)?,
            delta: tensor(config.hidden)?,
            q: tensor(query)?,
            k: tensor(kv)?,
            v: tensor(kv)?,
            attended: tensor(query)?,
            gate: tensor(config.intermediate)?,
            up: tensor(config.intermediate)?,
            gated: tensor(config.intermediate)?,
        })
    }
}

/// Everything that one step of a forward pass reads and writes.
pub(crate) struct Step<'a, O: Ops> {
    pub(crate) ops: &'a O,
    pub(crate) config: &'a ModelConfig,
    pub(crate) rope: &'a O::RopeTable,
    pub(crate) batch: &'a O::Batch,
    pub(crate) pool: &'a mut O::KvPool,
    pub(crate) rows: &'a mut Rows<O>,
    /// The rows that go on to the head: after the last attention only they matter.
    pub(crate) logits_rows: &'a [u32],
    /// Rows of the step.
    pub(crate) tokens: usize,
}

impl<O: Ops> Step<'_, O> {
    /// `normed = norm(residual)`: before the first layer.
    pub(crate) fn norm(&mut self, weight: &O::Weight) -> Result<(), Error> {
        self.ops.rms_norm(&self.rows.residual, weight, self.config.rms_norm_eps, &mut self.rows.normed)
    }

    /// `residual += delta`, `normed = norm(residual)`: between any two halves of layers.
    pub(crate) fn add_norm(&mut self, weight: &O::Weight) -> Result<(), Error> {
        let rows = &mut *self.rows;
        let eps = self.config.rms_norm_eps;
        self.ops.add_rms_norm(&mut rows.residual, &rows.delta, weight, eps, &mut rows.normed)
    }

    /// Normalises every head of q and of k on its own.
    pub(crate) fn head_norms(&mut self, q: &O::Weight, k: &O::Weight) -> Result<(), Error> {
        self.ops.head_norm(&mut self.rows.q, q, self.config.rms_norm_eps)?;
        self.ops.head_norm(&mut self.rows.k, k, self.config.rms_norm_eps)
    }

    /// Turns q and k by their positions, keeps k and v in the cache, and attends over the sequence so far.
    pub(crate) fn attend(&mut self, layer: usize) -> Result<(), Error> {
        let config = self.config;
        let heads = Heads { query: config.heads, kv: config.kv_heads, dim: config.head_dim };
        #[expect(clippy::cast_precision_loss, reason = "a head is at most 256 wide")]
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let attention = Attention { heads, scale, window: config.windows[layer] };
        let Rows { q, k, v, attended, .. } = &mut *self.rows;
        self.ops.rope(self.batch, self.rope, q, k, heads)?;
        self.ops.append(self.pool, layer, self.batch, k, v)?;
        self.ops.attention(self.pool, layer, self.batch, q, attention, attended)?;
        if layer + 1 == config.layers { self.keep_logits_rows() } else { Ok(()) }
    }

    /// Drops the rows whose logits nobody asked for. From here on each row is on its own, so the others need not
    /// be computed: of a prompt, the last layer's matrices see one row.
    fn keep_logits_rows(&mut self) -> Result<(), Error> {
        let rows = &mut *self.rows;
        if self.logits_rows.len() == self.tokens
            && self.logits_rows.iter().copied().zip(0..).all(|(row, at)| row == at)
        {
            return Ok(());
        }
        self.ops.gather_rows(&rows.residual, self.logits_rows, &mut rows.delta)?;
        mem::swap(&mut rows.residual, &mut rows.delta);
        self.ops.gather_rows(&rows.attended, self.logits_rows, &mut rows.q)?;
        mem::swap(&mut rows.attended, &mut rows.q);
        Ok(())
    }
}

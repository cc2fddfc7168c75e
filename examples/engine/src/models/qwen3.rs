//! Qwen3: Llama with every head of q and k normalised before it turns, and heads of a width of their own.

use quayline_gpu_kernels::{Error, Ops};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::layers::{FeedForward, Loader, Projections, Step};

/// The layers of a Qwen3 and the norm after the last.
pub(crate) struct Qwen3<O: Ops> {
    layers: Vec<Layer<O>>,
    norm: O::Weight,
}

struct Layer<O: Ops> {
    attention_norm: O::Weight,
    attention: Projections<O>,
    q_norm: O::Weight,
    k_norm: O::Weight,
    feed_forward_norm: O::Weight,
    feed_forward: FeedForward<O>,
}

impl<O: Ops> Qwen3<O> {
    pub(crate) fn load(loader: &mut Loader<'_, O>) -> Result<Self, LoadError> {
        let layers =
            (0..loader.config.layers).map(|index| Layer::load(loader, &format!("model.layers.{index}")));
        let layers = layers.collect::<Result<_, _>>()?;
        Ok(Self { layers, norm: loader.vector("model.norm.weight", loader.config.hidden)? })
    }

    /// From the embedded tokens in `residual` to what the head reads, in `normed`.
    pub(crate) fn forward(&self, step: &mut Step<'_, O>) -> Result<(), Error> {
        step.norm(&self.layers[0].attention_norm)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attention.qkv(step)?;
            step.head_norms(&layer.q_norm, &layer.k_norm)?;
            step.attend(index)?;
            layer.attention.output(step)?;
            step.add_norm(&layer.feed_forward_norm)?;
            layer.feed_forward.forward(step)?;
            step.add_norm(self.layers.get(index + 1).map_or(&self.norm, |next| &next.attention_norm))?;
        }
        Ok(())
    }
}

impl<O: Ops> Layer<O> {
    fn load(loader: &mut Loader<'_, O>, prefix: &str) -> Result<Self, LoadError> {
        let &ModelConfig { hidden, head_dim, .. } = loader.config;
        Ok(Self {
            attention_norm: loader.vector(&format!("{prefix}.input_layernorm.weight"), hidden)?,
            attention: loader.attention(&format!("{prefix}.self_attn"))?,
            q_norm: loader.vector(&format!("{prefix}.self_attn.q_norm.weight"), head_dim)?,
            k_norm: loader.vector(&format!("{prefix}.self_attn.k_norm.weight"), head_dim)?,
            feed_forward_norm: loader.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden)?,
            feed_forward: loader.feed_forward(&format!("{prefix}.mlp"))?,
        })
    }
}

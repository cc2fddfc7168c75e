//! Llama 2 and 3, and by the same steps Mistral, Qwen2 and Qwen2.5.
//!
//! These differ in numbers, not in steps: which projections have a bias, which layers look through a window, how
//! the rotary frequencies are scaled. [`ModelConfig`] holds them.

use quayline_gpu_kernels::{Error, Ops};

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::layers::{FeedForward, Loader, Projections, Step};

/// The layers of a Llama and the norm after the last.
pub(crate) struct Llama<O: Ops> {
    layers: Vec<Layer<O>>,
    norm: O::Weight,
}

struct Layer<O: Ops> {
    attention_norm: O::Weight,
    attention: Projections<O>,
    feed_forward_norm: O::Weight,
    feed_forward: FeedForward<O>,
}

impl<O: Ops> Llama<O> {
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
        let &ModelConfig { hidden, .. } = loader.config;
        Ok(Self {
            attention_norm: loader.vector(&format!("{prefix}.input_layernorm.weight"), hidden)?,
            attention: loader.attention(&format!("{prefix}.self_attn"))?,
            feed_forward_norm: loader.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden)?,
            feed_forward: loader.feed_forward(&format!("{prefix}.mlp"))?,
        })
    }
}

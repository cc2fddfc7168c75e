//! One file per forward pass. A new architecture is a file here, a variant below and a name in `config.rs`.

mod llama;
mod qwen3;

use quayline_gpu_kernels::{Error, Ops};

use crate::config::Architecture;
use crate::error::LoadError;
use crate::layers::{Loader, Step};

/// The layers of a model, whichever it is.
pub(crate) enum Network<O: Ops> {
    Llama(llama::Llama<O>),
    Qwen3(qwen3::Qwen3<O>),
}

impl<O: Ops> Network<O> {
    pub(crate) fn load(loader: &mut Loader<'_, O>) -> Result<Self, LoadError> {
        match loader.config.architecture {
            Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => {
                Ok(Self::Llama(llama::Llama::load(loader)?))
            }
            Architecture::Qwen3 => Ok(Self::Qwen3(qwen3::Qwen3::load(loader)?)),
        }
    }

    pub(crate) fn forward(&self, step: &mut Step<'_, O>) -> Result<(), Error> {
        match self {
            Self::Llama(llama) => llama.forward(step),
            Self::Qwen3(qwen3) => qwen3.forward(step),
        }
    }
}

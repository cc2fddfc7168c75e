//! The language model that is served, as far as it costs time and memory: its shape.

use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

/// The shape of a dense decoder with 16-bit weights. The field names are those of a `config.json`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Model {
    /// Layers.
    #[serde(rename = "num_hidden_layers")]
    pub layers: u32,
    /// Width of the residual stream.
    #[serde(rename = "hidden_size")]
    pub hidden: u32,
    /// Query heads.
    #[serde(rename = "num_attention_heads")]
    pub heads: u32,
    /// Key and value heads; as many as query heads when not given.
    #[serde(rename = "num_key_value_heads")]
    kv_heads: Option<u32>,
    /// Width of a head; `hidden / heads` when not given.
    head_dim: Option<u32>,
    /// Width of the feed-forward part.
    #[serde(rename = "intermediate_size")]
    pub intermediate: u32,
    /// Rows of the output matrix.
    #[serde(rename = "vocab_size")]
    pub vocab: u32,
    /// The model has experts, which this does not describe.
    #[serde(alias = "num_local_experts", alias = "n_routed_experts")]
    num_experts: Option<u32>,
}

const KNOWN: &str =
    "known are llama-3.1-8b and -70b, qwen3-8b, -14b and -32b, others by their config.json (--model)";

/// Bytes of a weight, an activation, a key or a value: bfloat16.
const ELEMENT_BYTES: f64 = 2.0;

impl Model {
    /// Llama 3.1 with 8 billion parameters.
    pub const LLAMA_3_1_8B: Model = Model::dense(32, 4096, 32, 8, 14_336, 128_256);

    /// Llama 3.1 with 70 billion parameters.
    pub const LLAMA_3_1_70B: Model = Model::dense(80, 8192, 64, 8, 28_672, 128_256);

    /// Qwen3 with 8 billion parameters.
    pub const QWEN_3_8B: Model = Model::dense(36, 4096, 32, 8, 12_288, 151_936).heads_of(128);

    /// Qwen3 with 14 billion parameters.
    pub const QWEN_3_14B: Model = Model::dense(40, 5120, 40, 8, 17_408, 151_936).heads_of(128);

    /// Qwen3 with 32 billion parameters.
    pub const QWEN_3_32B: Model = Model::dense(64, 5120, 64, 8, 25_600, 151_936).heads_of(128);

    const fn heads_of(mut self, width: u32) -> Model {
        self.head_dim = Some(width);
        self
    }

    const fn dense(layers: u32, hidden: u32, heads: u32, kv_heads: u32, ffn: u32, vocab: u32) -> Model {
        let (kv_heads, head_dim, num_experts) = (Some(kv_heads), None, None);
        Model { layers, hidden, heads, kv_heads, head_dim, intermediate: ffn, vocab, num_experts }
    }

    /// Width of all query heads together.
    pub fn query_width(&self) -> f64 {
        f64::from(self.heads) * self.head_width()
    }

    fn head_width(&self) -> f64 {
        f64::from(self.head_dim.unwrap_or(self.hidden / self.heads.max(1)))
    }

    /// Bytes of keys and values of one token in one layer.
    pub fn layer_kv_bytes(&self) -> f64 {
        2.0 * f64::from(self.kv_heads.unwrap_or(self.heads)) * self.head_width() * ELEMENT_BYTES
    }

    /// Bytes of keys and values of one token in all layers.
    pub fn kv_bytes(&self) -> f64 {
        self.layer_kv_bytes() * f64::from(self.layers)
    }

    /// Weights of all layers that every token is multiplied with.
    pub fn layer_weights(&self) -> f64 {
        let (hidden, kv) = (f64::from(self.hidden), self.layer_kv_bytes() / ELEMENT_BYTES);
        let attention = hidden * (2.0 * self.query_width() + kv);
        let feed_forward = 3.0 * hidden * f64::from(self.intermediate);
        f64::from(self.layers) * (attention + feed_forward)
    }

    /// Weights that every token is multiplied with from which another is sampled.
    pub fn head_weights(&self) -> f64 {
        f64::from(self.hidden) * f64::from(self.vocab)
    }

    /// Bytes of all weights, the embedding's table among them.
    pub fn weight_bytes(&self) -> f64 {
        bytes(self.layer_weights() + 2.0 * self.head_weights())
    }
}

/// Bytes of so many weights or activations.
pub(crate) fn bytes(elements: f64) -> f64 {
    elements * ELEMENT_BYTES
}

/// A name of one of the built-in shapes, or the path of a `config.json`.
impl FromStr for Model {
    type Err = String;

    fn from_str(name: &str) -> Result<Model, String> {
        match name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase().trim_end_matches("-instruct") {
            "llama-3.1-8b" => Ok(Model::LLAMA_3_1_8B),
            "llama-3.1-70b" | "llama-3.3-70b" => Ok(Model::LLAMA_3_1_70B),
            "qwen3-8b" => Ok(Model::QWEN_3_8B),
            "qwen3-14b" => Ok(Model::QWEN_3_14B),
            "qwen3-32b" => Ok(Model::QWEN_3_32B),
            _ => read(Path::new(name)).map_err(|why| format!("{name}: {why}; {KNOWN}")),
        }
    }
}

fn read(path: &Path) -> Result<Model, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let model: Model = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    if model.num_experts.is_some_and(|experts| experts > 0) {
        return Err("the model has experts, and the cost model is for dense ones".to_owned());
    }
    if [model.layers, model.hidden, model.heads, model.intermediate, model.vocab].contains(&0) {
        return Err("a size of the model is zero".to_owned());
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_have_the_published_sizes() {
        let billions = |model: &Model| (model.weight_bytes() / 2e8).round() / 10.0;
        assert_eq!((billions(&Model::LLAMA_3_1_8B), billions(&Model::LLAMA_3_1_70B)), (8.0, 70.6));
        let qwen = [Model::QWEN_3_8B, Model::QWEN_3_14B, Model::QWEN_3_32B];
        assert_eq!(qwen.map(|model| billions(&model)), [8.2, 14.8, 32.8]);
        assert_eq!(Model::LLAMA_3_1_8B.kv_bytes(), 131_072.0);
    }

    #[test]
    fn a_model_is_known_by_its_name_or_its_file() {
        assert_eq!("meta-llama/Llama-3.1-8B".parse(), Ok(Model::LLAMA_3_1_8B));
        assert!("no such file".parse::<Model>().unwrap_err().contains("known are"));
    }
}

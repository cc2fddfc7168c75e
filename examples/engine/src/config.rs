//! `config.json` and `generation_config.json`, read into what the engine computes with.
//!
//! Both the older form of these files (`rope_theta` beside `rope_scaling`, `torch_dtype`) and the one of
//! transformers 5 (`rope_parameters`, `dtype`) are understood. Whatever would change the arithmetic and is
//! not computed here is refused by name: a wrong answer without a word is worse than none.

mod fields;
mod generation;
mod quantization;
mod rope;

use serde_json::{Map, Value};

pub use generation::GenerationConfig;
pub use quantization::{Fp8Scales, Quantization, QuantizationMethod};
pub use rope::{RopeConfig, RopeScaling};

use fields::{Fields, narrow, short};
use rope::{positions_max, rope};

/// The architectures that have a forward pass, as `config.json` spells them.
const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

/// Bounds on sizes. They are far above every published model, and low enough that no product of a few of
/// them overflows 64 bits.
const LAYERS_MAX: usize = 1024;
const HEADS_MAX: usize = 1024;
const HEAD_DIM_MAX: usize = 256;
const WIDTH_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 24;
const POSITIONS_MAX: usize = 1 << 26;

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The architecture has no forward pass here.
    #[error("architecture {found} is not supported (supported: {SUPPORTED})")]
    Architecture {
        /// The name found, or what stands in its place.
        found: String,
    },
    /// A field that decides the computation is absent.
    #[error("{field} is missing")]
    Missing {
        /// The field.
        field: String,
    },
    /// A field has a value outside its range or of the wrong kind.
    #[error("{field} is {found}, expected {expected}")]
    Value {
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A field asks for something that is not computed here; ignoring it would give wrong text.
    #[error("{field} is {found}: {what} is not supported")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        found: String,
        /// What it asks for.
        what: &'static str,
    },
}

/// Which forward pass a checkpoint asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// Llama 2 and 3, and the many models that share their form.
    Llama,
    /// Mistral: Llama with a sliding window in every layer.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3: normalised q and k heads, a head width of its own.
    Qwen3,
}

/// A decoder's sizes and switches, checked: every later product of them fits, every division is exact.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which forward pass.
    pub architecture: Architecture,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward part.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` (grouped-query attention, arXiv 2305.13245).
    pub kv_heads: usize,
    /// Width of one head, even.
    pub head_dim: usize,
    /// Rows of the embedding: token ids are below it.
    pub vocab: usize,
    /// The longest sequence the model was made for.
    pub positions_max: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f32,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether the embedding is also the output head.
    pub tied_embeddings: bool,
    /// For each layer, how many tokens back it sees (its own included); `None` sees all.
    pub windows: Vec<Option<u32>>,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// How its matrices were made small, if they were.
    pub quantization: Option<Quantization>,
    /// The token that starts a sequence, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end one. `generation_config.json` may name more.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads the fields of a `config.json`.
    ///
    /// # Errors
    /// When a size is absent or impossible, or a field asks for something that is not computed here.
    pub fn from_json(values: &Map<String, Value>) -> Result<Self, ConfigError> {
        Self::from_fields(&Fields { values, path: String::new() })
    }

    /// Bytes of K and V per token, over all layers, for elements of `element_bytes`.
    #[must_use]
    pub fn kv_bytes_per_token(&self, element_bytes: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * element_bytes
    }

    fn from_fields(fields: &Fields<'_>) -> Result<Self, ConfigError> {
        let architecture = architecture(fields)?;
        refuse_what_is_not_computed(fields)?;
        let layers = fields.size("num_hidden_layers", LAYERS_MAX)?;
        let hidden = fields.size("hidden_size", WIDTH_MAX)?;
        let heads = fields.size("num_attention_heads", HEADS_MAX)?;
        let kv_heads = fields.size_or("num_key_value_heads", HEADS_MAX, heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(
                fields.wrong("num_key_value_heads", format!("a divisor of num_attention_heads {heads}"))
            );
        }
        let head_dim = head_dim(fields, architecture, hidden, heads)?;
        let positions = fields.size("max_position_embeddings", POSITIONS_MAX)?;
        let rope = rope(fields, positions)?;
        let biases = biases(fields, architecture)?;
        Ok(Self {
            architecture,
            layers,
            hidden,
            intermediate: fields.size("intermediate_size", WIDTH_MAX)?,
            heads,
            kv_heads,
            head_dim,
            vocab: fields.size("vocab_size", VOCAB_MAX)?,
            positions_max: positions_max(positions, &rope),
            rms_norm_eps: rms_norm_eps(fields)?,
            qkv_bias: biases.qkv,
            output_bias: biases.output,
            mlp_bias: biases.mlp,
            tied_embeddings: fields.flag("tie_word_embeddings", false)?,
            windows: windows(fields, architecture, layers)?,
            rope,
            quantization: Quantization::from_fields(fields)?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
        })
    }
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ConfigError> {
    let refuse = |found: String| ConfigError::Architecture { found };
    let named = match fields.get("architectures") {
        Some(Value::Array(names)) if !names.is_empty() => names.first().and_then(Value::as_str),
        Some(other) => return Err(refuse(short(other))),
        None => None,
    };
    match named {
        Some("LlamaForCausalLM" | "LLaMAForCausalLM") => return Ok(Architecture::Llama),
        Some("MistralForCausalLM") => return Ok(Architecture::Mistral),
        Some("Qwen2ForCausalLM") => return Ok(Architecture::Qwen2),
        Some("Qwen3ForCausalLM") => return Ok(Architecture::Qwen3),
        Some(other) => return Err(refuse(other.to_owned())),
        None => {}
    }
    match fields.get("model_type").and_then(Value::as_str) {
        Some("llama") => Ok(Architecture::Llama),
        Some("mistral") => Ok(Architecture::Mistral),
        Some("qwen2") => Ok(Architecture::Qwen2),
        Some("qwen3") => Ok(Architecture::Qwen3),
        Some(other) => Err(refuse(format!("of model_type {other}"))),
        None => Err(ConfigError::Missing { field: "architectures".into() }),
    }
}

/// Fields that change the arithmetic in ways that no forward pass here follows.
fn refuse_what_is_not_computed(fields: &Fields<'_>) -> Result<(), ConfigError> {
    const PRESENT: &[(&str, &str)] = &[
        ("compression_config", "a compressed checkpoint"),
        ("num_local_experts", "a mixture of experts"),
        ("num_experts", "a mixture of experts"),
        ("n_routed_experts", "a mixture of experts"),
        ("num_experts_per_tok", "a mixture of experts"),
        ("moe_intermediate_size", "a mixture of experts"),
        ("attn_logit_softcapping", "soft-capping of attention scores"),
        ("final_logit_softcapping", "soft-capping of logits"),
        ("clip_qkv", "clipping of q, k and v"),
        ("kv_lora_rank", "multi-head latent attention"),
        ("vision_config", "image input"),
        ("audio_config", "audio input"),
        ("text_config", "a model inside a model"),
    ];
    for &(field, what) in PRESENT {
        if let Some(value) = fields.get(field) {
            let method = value.get("quant_method").filter(|method| method.is_string());
            return Err(ConfigError::Unsupported {
                field: field.into(),
                found: short(method.unwrap_or(value)),
                what,
            });
        }
    }
    const SWITCHES: &[(&str, bool, &str)] = &[
        ("is_causal", true, "attention that sees later tokens"),
        ("use_mrope", false, "rotary embedding over several axes"),
        ("qk_layernorm", false, "a layer norm on q and k"),
        ("use_qk_norm", false, "a norm on q and k"),
        ("use_bidirectional_attention", false, "attention that sees later tokens"),
    ];
    for &(field, computed, what) in SWITCHES {
        if fields.flag(field, computed)? != computed {
            return Err(ConfigError::Unsupported {
                field: field.into(),
                found: (!computed).to_string(),
                what,
            });
        }
    }
    const MULTIPLIERS: &[(&str, &str)] = &[
        ("partial_rotary_factor", "rotating a part of each head"),
        ("rope_pct", "rotating a part of each head"),
        ("logit_scale", "scaling of logits"),
        ("logits_scaling", "scaling of logits"),
        ("embedding_multiplier", "scaling of embeddings"),
        ("residual_multiplier", "scaling of residuals"),
        ("attention_multiplier", "a scale of its own for attention"),
    ];
    for &(field, what) in MULTIPLIERS {
        if fields.number(field)?.is_some_and(|value| value != 1.0) {
            let found = fields.get(field).map(short).unwrap_or_default();
            return Err(ConfigError::Unsupported { field: field.into(), found, what });
        }
    }
    match fields.get("hidden_act") {
        None => Ok(()),
        Some(Value::String(name)) if name == "silu" || name == "swish" => Ok(()),
        Some(other) => Err(ConfigError::Unsupported {
            field: "hidden_act".into(),
            found: short(other),
            what: "an activation other than silu",
        }),
    }
}

fn head_dim(
    fields: &Fields<'_>,
    architecture: Architecture,
    hidden: usize,
    heads: usize,
) -> Result<usize, ConfigError> {
    let head_dim = match fields.count("head_dim")? {
        Some(_) => fields.size("head_dim", HEAD_DIM_MAX)?,
        None if architecture == Architecture::Qwen3 => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(fields.wrong("hidden_size", format!("a multiple of num_attention_heads {heads}"))),
    };
    if !head_dim.is_multiple_of(2) || head_dim > HEAD_DIM_MAX {
        return Err(ConfigError::Value {
            field: "head_dim".into(),
            found: head_dim.to_string(),
            expected: format!("an even number up to {HEAD_DIM_MAX}: rotary embedding turns pairs"),
        });
    }
    Ok(head_dim)
}

fn rms_norm_eps(fields: &Fields<'_>) -> Result<f32, ConfigError> {
    let eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
    if eps > 0.0 && eps < 1.0 {
        return Ok(narrow(eps));
    }
    Err(fields.wrong("rms_norm_eps", "a number between 0 and 1"))
}

struct Biases {
    qkv: bool,
    output: bool,
    mlp: bool,
}

fn biases(fields: &Fields<'_>, architecture: Architecture) -> Result<Biases, ConfigError> {
    let attention = fields.flag("attention_bias", false)?;
    let mlp = fields.flag("mlp_bias", false)?;
    Ok(match architecture {
        Architecture::Llama => Biases { qkv: attention, output: attention, mlp },
        Architecture::Qwen3 => Biases { qkv: attention, output: attention, mlp: false },
        Architecture::Qwen2 => Biases { qkv: true, output: false, mlp: false },
        Architecture::Mistral => Biases { qkv: false, output: false, mlp: false },
    })
}

/// Which layers look through a window. Llama has none; Mistral has one everywhere (4096 if the field is
/// absent, none if it is null, as transformers reads it); Qwen has one in the layers that `layer_types` or
/// `max_window_layers` name, if `use_sliding_window` says so.
fn windows(
    fields: &Fields<'_>,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<u32>>, ConfigError> {
    let window = match fields.count("sliding_window")? {
        Some(0) => return Err(fields.wrong("sliding_window", "null or a positive number of tokens")),
        other => other,
    };
    match architecture {
        Architecture::Llama => Ok(vec![None; layers]),
        Architecture::Mistral => {
            let window = if fields.has("sliding_window") { window } else { Some(4096) };
            Ok(vec![window; layers])
        }
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let used = fields.flag("use_sliding_window", false)?;
            qwen_windows(fields, window.filter(|_| used), layers)
        }
    }
}

fn qwen_windows(
    fields: &Fields<'_>,
    window: Option<u32>,
    layers: usize,
) -> Result<Vec<Option<u32>>, ConfigError> {
    let Some(types) = fields.get("layer_types") else {
        let first = fields.count("max_window_layers")?.unwrap_or(28) as usize;
        return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    let expected = || format!("a list of {layers}, each full_attention or sliding_attention");
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or_else(|| fields.wrong("layer_types", expected()))?;
    types
        .iter()
        .map(|kind| match (kind.as_str(), window) {
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
            (Some("sliding_attention"), None) => Err(ConfigError::Missing {
                field: "sliding_window (with use_sliding_window), which layer_types asks for,".into(),
            }),
            _ => Err(fields.wrong("layer_types", expected())),
        })
        .collect()
}

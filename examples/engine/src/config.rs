//! `config.json` and `generation_config.json`, read into what the engine computes with.
//!
//! Both the older form of these files (`rope_theta` beside `rope_scaling`, `torch_dtype`) and the one of
//! transformers 5 (`rope_parameters`, `dtype`) are understood. Whatever would change the arithmetic and is
//! not computed here is refused by name: a wrong answer without a word is worse than none.

mod quantization;

use std::fmt;

use serde_json::{Map, Value};

pub use quantization::{Fp8Scales, Quantization, QuantizationMethod};

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

/// How rotary frequencies are stretched for long contexts. Formulas in `rope.rs`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// How much longer the context is than in training.
        factor: f64,
    },
    /// The base grows with the length, beyond `max_position_embeddings`; within it nothing changes, and the
    /// engine does not go beyond it.
    Dynamic {
        /// How much longer the context could be.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth passage between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length in training.
        original_positions: u32,
    },
    /// `YaRN` (arXiv 2309.00071): interpolation by parts, and a factor on q·k.
    Yarn {
        /// How much longer the context is than in training.
        factor: f64,
        /// Context length in training.
        original_positions: u32,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the two bounds are rounded to whole dimensions.
        truncate: bool,
    },
}

/// Rotary position embedding (arXiv 2104.09864) of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric row of wavelengths.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: RopeScaling,
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

/// The defaults for sampling that a checkpoint asks for in `generation_config.json`. `None` where it is silent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a sequence, beside those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Keep this many of the likeliest tokens.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens up to this probability in sum.
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the likeliest.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that have occurred.
    pub repetition_penalty: Option<f32>,
    /// How many tokens to generate at most.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// The fields that are read.
    pub const FIELDS: [&str; 7] =
        ["eos_token_id", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"];

    /// Reads the fields of a `generation_config.json`.
    ///
    /// # Errors
    /// When a field that it uses is of the wrong kind.
    pub fn from_json(values: &Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields { values, path: String::new() };
        Ok(Self {
            eos_token_ids: fields.token_ids("eos_token_id")?,
            temperature: fields.number("temperature")?.map(narrow),
            top_k: fields.count("top_k")?,
            top_p: fields.number("top_p")?.map(narrow),
            min_p: fields.number("min_p")?.map(narrow),
            repetition_penalty: fields.number("repetition_penalty")?.map(narrow),
            max_new_tokens: fields.count("max_new_tokens")?,
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

/// The longest sequence: what the model says, or what `YaRN` stretches the training length to.
fn positions_max(positions: usize, rope: &RopeConfig) -> usize {
    match rope.scaling {
        RopeScaling::Yarn { factor, original_positions, .. } => {
            let stretched = factor * f64::from(original_positions);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped to the bound"
            )]
            let stretched = stretched.clamp(0.0, 67_108_864.0) as usize;
            positions.max(stretched)
        }
        _ => positions,
    }
}

fn rope(fields: &Fields<'_>, positions: usize) -> Result<RopeConfig, ConfigError> {
    let outer_theta = fields.number("rope_theta")?;
    let (name, scaling) = match (fields.get("rope_scaling"), fields.get("rope_parameters")) {
        (Some(scaling), _) => ("rope_scaling", scaling),
        (None, Some(parameters)) => ("rope_parameters", parameters),
        (None, None) => {
            return Ok(RopeConfig {
                theta: checked_theta(outer_theta, "rope_theta")?,
                scaling: RopeScaling::None,
            });
        }
    };
    let expected = || ConfigError::Value {
        field: name.into(),
        found: short(scaling),
        expected: "an object with rope_type".into(),
    };
    let inner = Fields { values: scaling.as_object().ok_or_else(expected)?, path: format!("{name}.") };
    let theta = checked_theta(inner.number("rope_theta")?.or(outer_theta), "rope_theta")?;
    if inner.number("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
        return Err(ConfigError::Unsupported {
            field: inner.name("partial_rotary_factor"),
            found: inner.get("partial_rotary_factor").map(short).unwrap_or_default(),
            what: "rotating a part of each head",
        });
    }
    Ok(RopeConfig { theta, scaling: rope_scaling(&inner, fields, positions)? })
}

fn checked_theta(theta: Option<f64>, field: &str) -> Result<f64, ConfigError> {
    let theta = theta.unwrap_or(10_000.0);
    if theta > 1.0 && theta <= 1e15 {
        return Ok(theta);
    }
    Err(ConfigError::Value {
        field: field.into(),
        found: theta.to_string(),
        expected: "between 1 and 1e15".into(),
    })
}

fn rope_scaling(
    inner: &Fields<'_>,
    outer: &Fields<'_>,
    positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let kind = match inner.get("rope_type").or_else(|| inner.get("type")) {
        None => "default",
        Some(Value::String(kind)) => kind,
        Some(_) => return Err(inner.wrong("rope_type", "a string")),
    };
    let original = || -> Result<u32, ConfigError> {
        let from = if outer.has("original_max_position_embeddings") { outer } else { inner };
        let original = from.size_or("original_max_position_embeddings", POSITIONS_MAX, positions)?;
        u32::try_from(original).map_err(|_| from.wrong("original_max_position_embeddings", "a 32-bit number"))
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: inner.factor()? }),
        "dynamic" => Ok(RopeScaling::Dynamic { factor: inner.factor()? }),
        "llama3" => {
            let low_freq_factor = inner.positive("low_freq_factor")?;
            let high_freq_factor = inner.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(
                    inner.wrong("high_freq_factor", format!("above low_freq_factor {low_freq_factor}"))
                );
            }
            let (factor, original_positions) = (inner.factor()?, original()?);
            Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions })
        }
        "yarn" => yarn(inner, original()?, positions),
        other => Err(ConfigError::Unsupported {
            field: inner.name("rope_type"),
            found: other.to_owned(),
            what: "rotary scaling other than default, linear, dynamic, llama3 and yarn",
        }),
    }
}

#[expect(clippy::cast_precision_loss, reason = "positions are below 2^26")]
fn yarn(inner: &Fields<'_>, original_positions: u32, positions: usize) -> Result<RopeScaling, ConfigError> {
    let factor = match inner.get("factor") {
        Some(_) => inner.factor()?,
        None => positions as f64 / f64::from(original_positions),
    };
    let beta_fast = inner.number("beta_fast")?.filter(|&beta| beta != 0.0).unwrap_or(32.0);
    let beta_slow = inner.number("beta_slow")?.filter(|&beta| beta != 0.0).unwrap_or(1.0);
    if beta_slow <= 0.0 || beta_fast < beta_slow {
        return Err(inner.wrong("beta_fast", format!("at least beta_slow {beta_slow}, both positive")));
    }
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let attention_factor = match inner.number("attention_factor")? {
        Some(given) => given,
        None => match (inner.number("mscale")?, inner.number("mscale_all_dim")?) {
            (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
            _ => scale(1.0),
        },
    };
    if !(attention_factor > 0.0 && attention_factor < 1e3) {
        return Err(ConfigError::Value {
            field: inner.name("attention_factor"),
            found: attention_factor.to_string(),
            expected: "a positive number".into(),
        });
    }
    let truncate = inner.flag("truncate", true)?;
    Ok(RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, attention_factor, truncate })
}

/// A JSON object whose fields are asked for by name and kind. Null counts as absent, except for [`Fields::has`].
struct Fields<'a> {
    values: &'a Map<String, Value>,
    path: String,
}

impl Fields<'_> {
    fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    fn wrong(&self, field: &str, expected: impl fmt::Display) -> ConfigError {
        let found = self.values.get(field).map_or_else(|| "absent".into(), short);
        ConfigError::Value { field: self.name(field), found, expected: expected.to_string() }
    }

    /// Whether the field is written down at all, be it as null.
    fn has(&self, field: &str) -> bool {
        self.values.contains_key(field)
    }

    fn get(&self, field: &str) -> Option<&Value> {
        self.values.get(field).filter(|value| !value.is_null())
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    /// A finite number.
    fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(field, "a finite number")),
            },
            Some(_) => Err(self.wrong(field, "a number")),
        }
    }

    fn positive(&self, field: &str) -> Result<f64, ConfigError> {
        match self.number(field)? {
            Some(number) if number > 0.0 => Ok(number),
            Some(_) => Err(self.wrong(field, "a positive number")),
            None => Err(ConfigError::Missing { field: self.name(field) }),
        }
    }

    fn factor(&self) -> Result<f64, ConfigError> {
        let factor = self.positive("factor")?;
        if (1.0..=1e6).contains(&factor) {
            Ok(factor)
        } else {
            Err(self.wrong("factor", "between 1 and 1e6"))
        }
    }

    /// A whole number that fits 32 bits.
    fn count(&self, field: &str) -> Result<Option<u32>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|count| u32::try_from(count).ok()) {
                Some(count) => Ok(Some(count)),
                None => Err(self.wrong(field, "a whole number")),
            },
        }
    }

    fn size(&self, field: &str, max: usize) -> Result<usize, ConfigError> {
        match self.get(field) {
            None => Err(ConfigError::Missing { field: self.name(field) }),
            Some(value) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) if (1..=max).contains(&size) => Ok(size),
                _ => Err(self.wrong(field, format!("a whole number from 1 to {max}"))),
            },
        }
    }

    fn size_or(&self, field: &str, max: usize, default: usize) -> Result<usize, ConfigError> {
        if self.get(field).is_some() { self.size(field, max) } else { Ok(default) }
    }

    /// One token id or a list of them; absent is none.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.get(field) {
            None => return Ok(Vec::new()),
            // Old Llama files write -1 for "none".
            Some(Value::Number(number)) if number.as_i64() == Some(-1) => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(id).collect::<Option<Vec<u32>>>(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(field, "a token id or a list of them"))
    }
}

/// A value as one short piece of text.
fn short(value: &Value) -> String {
    const SHOWN_MAX: usize = 60;
    let text = match value {
        Value::Object(_) => "an object".into(),
        Value::String(text) => text.replace(['\n', '\r'], " "),
        other => other.to_string(),
    };
    if text.chars().count() <= SHOWN_MAX {
        return text;
    }
    text.chars().take(SHOWN_MAX).chain("…".chars()).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "settings are used in f32")]
fn narrow(number: f64) -> f32 {
    number as f32
}

//! `rope_scaling` and `rope_parameters`: how positions are turned into angles.

use serde_json::Value;

use super::fields::{Fields, short};
use super::{ConfigError, POSITIONS_MAX};

/// How rotary frequencies are stretched for long contexts. Formulas in `src/rope.rs`.
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

/// The longest sequence: what the model says, or what `YaRN` stretches the training length to.
pub(super) fn positions_max(positions: usize, rope: &RopeConfig) -> usize {
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

pub(super) fn rope(fields: &Fields<'_>, positions: usize) -> Result<RopeConfig, ConfigError> {
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

//! `quantization_config`: how a checkpoint's matrices were made small.

use quayline_gpu_kernels::Int4Layout;
use serde_json::{Map, Value};

use super::ConfigError;
use super::fields::{Fields, short};

const FIELD: &str = "quantization_config";

/// How a checkpoint's matrices were made small. A matrix that comes in floats all the same is taken as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quantization {
    /// 4-bit integers, as AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) leave them.
    Int4 {
        /// How the integers lie in words.
        layout: Int4Layout,
        /// Elements of a row with one scale; `None` is the whole row.
        group: Option<usize>,
    },
    /// E4M3 (arXiv 2209.05433). What a checkpoint says of activations is not done to them: they are not rounded.
    Fp8 {
        /// Whose form it is: `fp8` or `compressed-tensors`.
        method: QuantizationMethod,
        /// What a scale is for.
        scales: Fp8Scales,
    },
}

/// What the numbers of one scale are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8Scales {
    /// A whole matrix.
    Tensor,
    /// An output: a row of the matrix.
    Channel,
    /// So many outputs and inputs.
    Blocks(usize, usize),
}

/// `quant_method` of a checkpoint that is computed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizationMethod {
    /// 4-bit integers of AWQ.
    Awq,
    /// 4-bit integers of GPTQ.
    Gptq,
    /// E4M3 in the form of DeepSeek and Qwen, or with one scale for a matrix.
    Fp8,
    /// E4M3 in the form of llm-compressor.
    CompressedTensors,
}

impl QuantizationMethod {
    /// As `config.json` and command lines spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Awq => "awq",
            Self::Gptq => "gptq",
            Self::Fp8 => "fp8",
            Self::CompressedTensors => "compressed-tensors",
        }
    }
}

impl Quantization {
    /// The `quant_method` that says so.
    #[must_use]
    pub fn method(&self) -> QuantizationMethod {
        match *self {
            Self::Int4 { layout: Int4Layout::Awq, .. } => QuantizationMethod::Awq,
            Self::Int4 { .. } => QuantizationMethod::Gptq,
            Self::Fp8 { method, .. } => method,
        }
    }

    /// What a `config.json` says, if it says anything.
    pub(super) fn from_fields(outer: &Fields<'_>) -> Result<Option<Self>, ConfigError> {
        let Some(value) = outer.get(FIELD) else { return Ok(None) };
        let method = value.get("quant_method").filter(|method| method.is_string());
        let refuse = || ConfigError::Unsupported {
            field: FIELD.into(),
            found: short(method.unwrap_or(value)),
            what: "a quantised checkpoint",
        };
        let values = value.as_object().ok_or_else(refuse)?;
        let fields = Fields { values, path: format!("{FIELD}.") };
        match method.and_then(Value::as_str) {
            Some("awq") => awq(&fields).map(Some),
            Some("gptq") => gptq(&fields).map(Some),
            Some("fp8") => fp8(&fields).map(Some),
            Some("compressed-tensors") => compressed_tensors(&fields).map(Some),
            _ => Err(refuse()),
        }
    }
}

fn unsupported(fields: &Fields<'_>, field: &str, what: &'static str) -> ConfigError {
    let found = fields.get(field).map_or_else(|| "absent".into(), short);
    ConfigError::Unsupported { field: fields.name(field), found, what }
}

fn awq(fields: &Fields<'_>) -> Result<Quantization, ConfigError> {
    let version = fields.get("version").and_then(Value::as_str).unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(unsupported(fields, "version", "this order of integers"));
    }
    if fields.flag("desc_act", false)? {
        return Err(unsupported(fields, "desc_act", "a matrix whose inputs are reordered"));
    }
    int4(fields, Int4Layout::Awq)
}

fn gptq(fields: &Fields<'_>) -> Result<Quantization, ConfigError> {
    match fields.get("checkpoint_format").and_then(Value::as_str) {
        None | Some("gptq") => int4(fields, Int4Layout::Gptq),
        Some("gptq_v2") => int4(fields, Int4Layout::GptqV2),
        Some(_) => Err(unsupported(fields, "checkpoint_format", "this order of integers")),
    }
}

fn int4(fields: &Fields<'_>, layout: Int4Layout) -> Result<Quantization, ConfigError> {
    if fields.number("bits")? != Some(4.0) {
        return Err(unsupported(fields, "bits", "a width other than 4 bits"));
    }
    let group = match fields.get("group_size").map_or(Some(128), Value::as_i64) {
        Some(-1) => None,
        Some(group) if group > 0 && group % 8 == 0 => usize::try_from(group).ok(),
        _ => return Err(fields.wrong("group_size", "-1 or a positive multiple of 8")),
    };
    Ok(Quantization::Int4 { layout, group })
}

fn fp8(fields: &Fields<'_>) -> Result<Quantization, ConfigError> {
    one_of(fields, "fmt", &["e4m3", "float8_e4m3fn"], "a form of eight-bit floats other than e4m3")?;
    one_of(fields, "activation_scheme", &["dynamic", "static"], "this rounding of activations")?;
    let scales = match fields.get("weight_block_size") {
        None => Fp8Scales::Tensor,
        Some(_) => blocks(fields, "weight_block_size")?,
    };
    Ok(Quantization::Fp8 { method: QuantizationMethod::Fp8, scales })
}

fn compressed_tensors(fields: &Fields<'_>) -> Result<Quantization, ConfigError> {
    let format = fields.get("format").and_then(Value::as_str);
    if !matches!(format, Some("float-quantized" | "naive-quantized")) {
        return Err(unsupported(fields, "format", "this form of compressed-tensors"));
    }
    for (field, what) in [("sparsity_config", "a sparse matrix"), ("transform_config", "a rotated matrix")] {
        let none = |value: &Value| value.as_object().is_some_and(Map::is_empty);
        if fields.get(field).is_some_and(|value| !none(value)) {
            return Err(unsupported(fields, field, what));
        }
    }
    let groups = fields.get("config_groups").and_then(Value::as_object);
    let groups = groups.filter(|groups| !groups.is_empty());
    let groups = groups.ok_or_else(|| fields.wrong("config_groups", "an object with a group of matrices"))?;
    let mut found = None;
    for (name, group) in groups {
        let path = fields.name(&format!("config_groups.{name}.weights"));
        let weights = group.get("weights").and_then(Value::as_object);
        let weights = weights.ok_or_else(|| ConfigError::Missing { field: path.clone() })?;
        let scales = compressed_weights(&Fields { values: weights, path: format!("{path}.") })?;
        if found.is_some_and(|found| found != scales) {
            return Err(unsupported(fields, "config_groups", "more than one form of matrices"));
        }
        found = Some(scales);
    }
    let scales = found.expect("there is a group");
    Ok(Quantization::Fp8 { method: QuantizationMethod::CompressedTensors, scales })
}

/// A group's `weights`.
fn compressed_weights(fields: &Fields<'_>) -> Result<Fp8Scales, ConfigError> {
    if fields.get("type").and_then(Value::as_str) != Some("float") {
        return Err(unsupported(fields, "type", "a matrix other than of eight-bit floats"));
    }
    if fields.number("num_bits")? != Some(8.0) {
        return Err(unsupported(fields, "num_bits", "a width other than 8 bits"));
    }
    if !fields.flag("symmetric", true)? {
        return Err(unsupported(fields, "symmetric", "a zero point of floats"));
    }
    match fields.get("strategy").and_then(Value::as_str) {
        Some("tensor") => Ok(Fp8Scales::Tensor),
        Some("channel") => Ok(Fp8Scales::Channel),
        Some("block") => blocks(fields, "block_structure"),
        _ => Err(unsupported(fields, "strategy", "this choice of scales")),
    }
}

fn one_of(fields: &Fields<'_>, field: &str, known: &[&str], what: &'static str) -> Result<(), ConfigError> {
    match fields.get(field) {
        Some(value) if !value.as_str().is_some_and(|value| known.contains(&value)) => {
            Err(unsupported(fields, field, what))
        }
        _ => Ok(()),
    }
}

/// `[outputs, inputs]`.
fn blocks(fields: &Fields<'_>, field: &str) -> Result<Fp8Scales, ConfigError> {
    let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
    match fields.get(field).and_then(Value::as_array).map(Vec::as_slice) {
        Some([outputs, inputs]) => match (size(outputs), size(inputs)) {
            (Some(outputs @ 1..), Some(inputs @ 1..)) if inputs % 8 == 0 => {
                Ok(Fp8Scales::Blocks(outputs, inputs))
            }
            _ => Err(fields.wrong(field, "a positive number and a positive multiple of 8")),
        },
        _ => Err(fields.wrong(field, "a list of two numbers")),
    }
}

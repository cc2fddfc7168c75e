//! `quantization_config`: how a checkpoint's matrices were made small.

use quayline_gpu_kernels::Int4Layout;
use serde_json::Value;

use super::{ConfigError, Fields, short};

const FIELD: &str = "quantization_config";

/// Matrices of 4-bit integers, as AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) leave them. A matrix that comes in
/// floats all the same is taken as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// How the integers lie in words.
    pub layout: Int4Layout,
    /// Elements of a row with one scale; `None` is the whole row.
    pub group: Option<usize>,
}

impl Quantization {
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
        let unsupported = |field: &str, what| ConfigError::Unsupported {
            field: fields.name(field),
            found: fields.get(field).map_or_else(|| "absent".into(), short),
            what,
        };
        let layout =
            match (method.and_then(Value::as_str), fields.get("checkpoint_format").and_then(Value::as_str)) {
                (Some("awq"), _) => Int4Layout::Awq,
                (Some("gptq"), None | Some("gptq")) => Int4Layout::Gptq,
                (Some("gptq"), Some("gptq_v2")) => Int4Layout::GptqV2,
                (Some("gptq"), Some(_)) => {
                    return Err(unsupported("checkpoint_format", "this order of integers"));
                }
                _ => return Err(refuse()),
            };
        let version = fields.get("version").and_then(Value::as_str).unwrap_or("gemm");
        if layout == Int4Layout::Awq && !version.eq_ignore_ascii_case("gemm") {
            return Err(unsupported("version", "this order of integers"));
        }
        if fields.number("bits")? != Some(4.0) {
            return Err(unsupported("bits", "a width other than 4 bits"));
        }
        if fields.flag("desc_act", false)? {
            return Err(unsupported("desc_act", "a matrix whose inputs are reordered"));
        }
        let group = match fields.get("group_size").map_or(Some(128), Value::as_i64) {
            Some(-1) => None,
            Some(group) if group > 0 && group % 8 == 0 => usize::try_from(group).ok(),
            _ => return Err(fields.wrong("group_size", "-1 or a positive multiple of 8")),
        };
        Ok(Some(Self { layout, group }))
    }
}

//! What rows and weights of one byte an element ask of their arguments.

use super::number;
use crate::error::{multiple, same};
use crate::fp8;
use crate::{Error, QuantSource, RowStorage};

pub(crate) fn quant_tensor(storage: RowStorage) -> Result<(), Error> {
    let Some(scale) = storage.scale() else { return Ok(()) };
    number("quant_tensor", "a scale of", scale, scale > 0.0 && scale.is_finite(), "finite, above 0")
}

/// The elements of a matrix `[rows, cols]` and their scales, all of which are numbers. Cost: one pass over them.
pub(crate) fn weight_bytes(
    (rows, cols): (usize, usize),
    source: QuantSource<'_>,
) -> Result<(&[u8], &[f32]), Error> {
    let operator = "weight_bytes";
    multiple(operator, "out", rows, 1)?;
    multiple(operator, "in", cols, 1)?;
    let (elements, scales) = match source {
        QuantSource::Fp8 { elements, scales } => (elements, scales),
        QuantSource::Int8 { elements, scales } => (bytemuck::cast_slice(elements), scales),
    };
    same(operator, "elements", elements.len(), rows.saturating_mul(cols))?;
    if scales.len() != 1 {
        same(operator, "scales", scales.len(), rows)?;
    }
    if let Some(scale) = scales.iter().find(|scale| !scale.is_finite()) {
        number(operator, "a scale of", *scale, false, "finite numbers")?;
    }
    let (odd, supported): (fn(&u8) -> bool, _) = match source {
        QuantSource::Fp8 { .. } => (|&code| fp8::is_none(code), "finite numbers"),
        QuantSource::Int8 { .. } => (|&byte| byte.cast_signed() == i8::MIN, "-127 to 127"),
    };
    match elements.iter().position(odd) {
        None => Ok((elements, scales)),
        Some(at) => Err(Error::Unsupported {
            operator,
            what: "the element that is no number at",
            found: format!("[{}, {}]", at / cols, at % cols),
            supported,
        }),
    }
}

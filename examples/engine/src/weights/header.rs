//! The header of one safetensors file, checked against hostile content.
//!
//! ```text
//! 8 bytes: n, little endian | n bytes: JSON header | data
//!                             {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}
//! ```
//! The data ranges, sorted, must tile the rest of the file: no gap, no overlap, nothing left over. Each range
//! must be exactly as long as its shape and type say. Nothing is allocated in proportion to a number read
//! from a file before that number was compared with the file's length.

use std::collections::BTreeSet;
use std::fmt;

use safetensors::tensor::TensorInfo;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

const HEADER_BYTES_MAX: usize = 100_000_000;

/// The header's entries, checked, and where the data begins.
pub(super) fn read_header(bytes: &[u8]) -> Result<(usize, Vec<(String, TensorInfo)>), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are too few for a safetensors file", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    let length = match usize::try_from(length) {
        Ok(length) if length <= HEADER_BYTES_MAX => length,
        _ => return Err(format!("claims a header of {length} bytes, more than {HEADER_BYTES_MAX}")),
    };
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(format!("claims a header of {length} bytes, the file has {} bytes in all", bytes.len()));
    };
    let mut json = serde_json::Deserializer::from_slice(header);
    let entries = json.deserialize_map(Entries).map_err(|error| format!("header: {error}"))?;
    json.end().map_err(|error| format!("header: {error}"))?;
    check_layout(&entries, data.len())?;
    Ok((8 + length, entries))
}

/// The ranges tile the data exactly, and each fits its shape and type.
fn check_layout(entries: &[(String, TensorInfo)], data_bytes: usize) -> Result<(), String> {
    let mut in_order: Vec<&(String, TensorInfo)> = entries.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut end_before = 0;
    for (name, TensorInfo { dtype, shape, data_offsets: (begin, end) }) in in_order {
        if *end > data_bytes || begin > end {
            return Err(format!("truncated: tensor {name} is bytes {begin}..{end} of {data_bytes}"));
        }
        if *begin < end_before {
            return Err(format!(
                "tensor {name} begins at byte {begin}, inside the tensor that ends at {end_before}"
            ));
        }
        if *begin > end_before {
            return Err(format!("bytes {end_before}..{begin} before tensor {name} belong to no tensor"));
        }
        let elements = shape.iter().try_fold(1_usize, |product, &side| product.checked_mul(side));
        let bits = elements.and_then(|elements| elements.checked_mul(dtype.bitsize()));
        if bits != (end - begin).checked_mul(8) || bits.is_none() {
            return Err(format!(
                "tensor {name} of shape {shape:?} in {dtype:?} cannot be {} bytes",
                end - begin
            ));
        }
        end_before = *end;
    }
    if end_before != data_bytes {
        return Err(format!("{} bytes after the last tensor belong to none", data_bytes - end_before));
    }
    Ok(())
}

/// Reads the header's object entry by entry, so that a problem is reported with the tensor's name and a
/// name that occurs twice is noticed.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor {name} occurs twice")));
            }
            if name == "__metadata__" {
                map.next_value::<Value>()?;
                continue;
            }
            let info = map.next_value::<TensorInfo>();
            entries.push((
                name.clone(),
                info.map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?,
            ));
        }
        Ok(entries)
    }
}

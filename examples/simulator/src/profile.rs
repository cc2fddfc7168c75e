//! From measured kernel times to the constants of a [`Gpu`].
//!
//! A profile is a folder in the form of LLMServingSim's profiler: `dense.csv` (`layer,tokens,time_us`: one call
//! of each operator of a layer), `attention.csv` (`prefill_chunk,kv_prefill,n_decode,kv_decode,time_us`:
//! attention of one layer over a batch), plain or gzip. Each constant is the least-squares fit of the relative
//! error over the rows that it is about; nothing is fitted to a run of a whole engine.

use std::collections::BTreeMap;
use std::path::Path;

use crate::gpu::{DecodeAttention, Gpu, Matmul, MixedAttention};
use crate::model::{Model, bytes};
use crate::trace;

/// Kernel times of one model on one kind of GPU, split over `ranks` of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    ranks: f64,
    model: Model,
    /// Seconds of all layers without attention, by tokens.
    matmul: Vec<(f64, f64)>,
    attention: Vec<Row>,
}

/// Attention of one layer over a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Row {
    chunk_tokens: f64,
    chunk_start: f64,
    decodes: f64,
    decode_context: f64,
    seconds: f64,
}

/// Batches of which the fit learns: the lengths that requests have. Beyond, reading is all there is.
const CONTEXT: std::ops::RangeInclusive<f64> = 64.0..=4096.0;

impl Profile {
    /// Reads the folder of a profile of `model` on `ranks` GPUs: the one with the tables, or the one above that has a
    /// folder for each number of GPUs (`tp1`, `tp2`).
    ///
    /// # Errors
    /// When a file is missing, or not in the form, with its name.
    pub fn read(folder: &Path, model: &Model, ranks: u32) -> Result<Profile, String> {
        let above = folder.join(format!("tp{ranks}"));
        let folder = if above.is_dir() { &above } else { folder };
        let mut matmul: BTreeMap<u32, f64> = BTreeMap::new();
        let mut missing = vec!["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
        for row in rows::<3>(folder, "dense.csv", ["layer", "tokens", "time_us"])? {
            let [layer, tokens, time] = row;
            missing.retain(|product| layer != *product);
            let calls = match layer.as_str() {
                "embedding" | "final_layernorm" => 0.0,
                "layernorm" => 2.0,
                _ => 1.0,
            };
            let tokens =
                tokens.parse().map_err(|_| format!("dense.csv: {tokens:?} is no number of tokens"))?;
            *matmul.entry(tokens).or_default() +=
                calls * f64::from(model.layers) * seconds(&time).map_err(in_file("dense.csv"))?;
        }
        if let [product, ..] = *missing {
            return Err(format!("{}: dense.csv: nothing of {product}", folder.display()));
        }
        let names = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"];
        let mut attention = Vec::new();
        for row in rows(folder, "attention.csv", names)? {
            let seconds = seconds(&row[4]).map_err(in_file("attention.csv"))?;
            let [chunk_tokens, chunk_start, decodes, decode_context, _] = row.map(|field| number(&field));
            attention.push(Row {
                chunk_tokens: chunk_tokens.map_err(in_file("attention.csv"))?,
                chunk_start: chunk_start.map_err(in_file("attention.csv"))?,
                decodes: decodes.map_err(in_file("attention.csv"))?,
                decode_context: decode_context.map_err(in_file("attention.csv"))?,
                seconds,
            });
        }
        let matmul = matmul.into_iter().map(|(tokens, seconds)| (f64::from(tokens), seconds)).collect();
        Ok(Profile { ranks: f64::from(ranks), model: model.clone(), matmul, attention })
    }

    /// The constants; of what a profile does not tell (memory, link), those of `like`.
    ///
    /// # Errors
    /// When the rows do not determine them.
    pub fn gpu(&self, like: &Gpu) -> Result<Gpu, String> {
        let fitted = self.matmul().zip(self.decode()).zip(self.mixed());
        let ((matmul, decode), mixed) = fitted.ok_or("the profile has too few rows")?;
        let rates = [
            matmul.bytes_per_second,
            matmul.flops_per_second,
            decode.bytes_per_second,
            mixed.bytes_per_second,
            mixed.flops_per_second,
        ];
        if !rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) {
            return Err("by the rows of the profile, more work would take less time".to_owned());
        }
        Ok(Gpu { matmul, decode, mixed, ..like.clone() })
    }

    /// `seconds² = (weight bytes / bandwidth)² + (2 weights tokens / flops)²`.
    fn matmul(&self) -> Option<Matmul> {
        let weights = self.model.layer_weights() / self.ranks;
        let rows = self.matmul.iter();
        let squares = rows.map(|&(tokens, seconds)| ([1.0, tokens * tokens], seconds * seconds));
        let [read, compute] = fit(squares)?;
        Some(Matmul {
            bytes_per_second: bytes(weights) / read.sqrt(),
            flops_per_second: 2.0 * weights / compute.sqrt(),
        })
    }

    fn decode(&self) -> Option<DecodeAttention> {
        let rows = self.attention.iter();
        let rows = rows.filter(|row| row.chunk_tokens == 0.0 && CONTEXT.contains(&row.decode_context));
        let [call_seconds, request_seconds, byte_seconds] =
            fit(rows.map(|row| ([1.0, row.decodes, self.read_bytes(row)], row.seconds)))?;
        Some(DecodeAttention { call_seconds, request_seconds, bytes_per_second: 1.0 / byte_seconds })
    }

    /// First what chunks alone take, then what requests that generate take beside them.
    fn mixed(&self) -> Option<MixedAttention> {
        let chunks = self
            .attention
            .iter()
            .filter(|row| row.chunk_tokens > 0.0 && row.decodes == 0.0 && row.chunk_start <= *CONTEXT.end());
        let of_chunk = |row: &Row| {
            let pairs = row.chunk_tokens * (row.chunk_start + row.chunk_tokens / 2.0);
            let flops = 4.0 * self.model.query_width() / self.ranks * pairs;
            (row.chunk_start + row.chunk_tokens, flops)
        };
        let [_, key_seconds, flop_seconds] = fit(chunks.map(|row| {
            let (keys, flops) = of_chunk(row);
            ([1.0, keys, flops], row.seconds)
        }))?;
        let batches = self.attention.iter().filter(|row| {
            row.chunk_tokens > 0.0
                && row.decodes >= 8.0
                && row.decode_context >= 256.0
                && CONTEXT.contains(&row.decode_context)
                && row.chunk_start <= 2048.0
        });
        let beside = batches.filter_map(|row| {
            let (keys, flops) = of_chunk(row);
            let seconds = row.seconds - key_seconds * keys - flop_seconds * flops;
            (seconds > 0.0).then_some(([1.0, row.decodes, self.read_bytes(row)], seconds))
        });
        let [call_seconds, request_seconds, byte_seconds] = fit(beside)?;
        Some(MixedAttention {
            call_seconds,
            request_seconds,
            bytes_per_second: 1.0 / byte_seconds,
            flops_per_second: 1.0 / flop_seconds,
            key_seconds,
        })
    }

    fn read_bytes(&self, row: &Row) -> f64 {
        row.decodes * row.decode_context * self.model.layer_kv_bytes() / self.ranks
    }
}

/// Names the file that something is wrong with.
fn in_file(file: &'static str) -> impl Fn(String) -> String {
    move |why| format!("{file}: {why}")
}

/// A kernel's time, from microseconds.
fn seconds(field: &str) -> Result<f64, String> {
    let microseconds = number(field)?;
    if microseconds > 0.0 && microseconds.is_finite() {
        return Ok(microseconds * 1e-6);
    }
    Err(format!("{field:?} is no time of a kernel"))
}

fn number(field: &str) -> Result<f64, String> {
    field.trim().parse().map_err(|_| format!("{field:?} is no number"))
}

/// The named columns of a table, plain or as `.gz`.
fn rows<const N: usize>(folder: &Path, file: &str, names: [&str; N]) -> Result<Vec<[String; N]>, String> {
    let plain = folder.join(file);
    let packed = folder.join(format!("{file}.gz"));
    let path = if packed.exists() && !plain.exists() { packed } else { plain };
    let text = trace::text(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().split(',').map(str::trim).collect();
    let mut places = [0; N];
    for (place, name) in places.iter_mut().zip(names) {
        let found = header.iter().position(|column| *column == name);
        *place = found.ok_or_else(|| format!("{}: no column {name}", path.display()))?;
    }
    let mut table = Vec::new();
    for line in lines.filter(|line| !line.trim().is_empty()) {
        let fields: Vec<&str> = line.split(',').collect();
        if fields.len() < header.len() {
            return Err(format!("{}: {line:?} is too short", path.display()));
        }
        table.push(places.map(|place| fields[place].to_owned()));
    }
    Ok(table)
}

/// The weights `x` of `features` for which `features · x` is nearest to the value, by relative error. `None`
/// when the rows do not determine them.
fn fit<const N: usize>(rows: impl Iterator<Item = ([f64; N], f64)>) -> Option<[f64; N]> {
    let mut left = [[0.0; N]; N];
    let mut right = [0.0; N];
    for (features, value) in rows {
        let features = features.map(|feature| feature / value);
        for (i, a) in features.iter().enumerate() {
            right[i] += a;
            for (j, b) in features.iter().enumerate() {
                left[i][j] += a * b;
            }
        }
    }
    solve(left, right)
}

/// Gauss and Jordan, with the largest pivot.
fn solve<const N: usize>(mut left: [[f64; N]; N], mut right: [f64; N]) -> Option<[f64; N]> {
    for column in 0..N {
        let pivot = (column..N).max_by(|&a, &b| left[a][column].abs().total_cmp(&left[b][column].abs()))?;
        left.swap(column, pivot);
        right.swap(column, pivot);
        let divisor = left[column][column];
        if divisor == 0.0 || !divisor.is_finite() {
            return None;
        }
        left[column].iter_mut().for_each(|value| *value /= divisor);
        right[column] /= divisor;
        let (pivot_row, pivot_value) = (left[column], right[column]);
        for row in (0..N).filter(|&row| row != column) {
            let factor = left[row][column];
            left[row].iter_mut().zip(pivot_row).for_each(|(value, pivot)| *value -= factor * pivot);
            right[row] -= factor * pivot_value;
        }
    }
    Some(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_above_zero() {
        assert!((seconds(" 2.5 ").unwrap() - 2.5e-6).abs() < 1e-12);
        for wrong in ["0", "-3", "inf", "NaN", "", "many"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_fit_finds_what_made_the_rows() {
        let rows = (1..20u32).map(|n| {
            let n = f64::from(n);
            ([1.0, n, n * n], 3.0 + 0.5 * n + 0.25 * n * n)
        });
        let found = fit(rows).unwrap();
        for (found, made) in found.into_iter().zip([3.0, 0.5, 0.25]) {
            assert!((found - made).abs() < 1e-9, "{found} for {made}");
        }
        assert_eq!(fit::<2>(std::iter::repeat_n(([1.0, 2.0], 3.0), 5)), None);
        assert_eq!(fit::<1>(std::iter::empty()), None);
    }
}

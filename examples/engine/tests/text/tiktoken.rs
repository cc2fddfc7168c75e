//! A vocabulary in tiktoken's form (`base64 rank`, a line each) as a `tokenizer.json`. Ranks say in which
//! order byte strings are joined; the other form wants the pairs.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

/// How Llama 3 cuts text into words.
pub(crate) const LLAMA_3: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| \
    ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// Ranks of the whole and of both parts, then the parts.
type Merge<'a> = (u32, u32, u32, &'a [u8], &'a [u8]);

pub(crate) fn to_json(ranks: &[u8], words: &str) -> Vec<u8> {
    let ranks: HashMap<Vec<u8>, u32> = ranks.split(|&byte| byte == b'\n').filter_map(entry).collect();
    let mut merges: Vec<Merge<'_>> = Vec::new();
    for (token, &rank) in &ranks {
        for at in 1..token.len() {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ranks.get(left), ranks.get(right)) {
                merges.push((rank, l, r, left, right));
            }
        }
    }
    merges.sort_unstable();
    let merges: Vec<Value> =
        merges.iter().map(|(.., left, right)| json!([alphabet(left), alphabet(right)])).collect();
    let vocab: Map<String, Value> =
        ranks.iter().map(|(token, rank)| (alphabet(token), json!(rank))).collect();
    let split =
        json!({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false});
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
        "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocab, "merges": merges}});
    serde_json::to_vec(&tokenizer).unwrap()
}

fn entry(line: &[u8]) -> Option<(Vec<u8>, u32)> {
    let line = std::str::from_utf8(line).unwrap();
    let (token, rank) = line.split_once(' ')?;
    Some((base64(token), rank.trim().parse().unwrap()))
}

fn base64(text: &str) -> Vec<u8> {
    let digits = text.bytes().filter(|&byte| byte != b'=').map(|byte| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => panic!("{text:?} is not base64"),
    });
    let (mut out, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for digit in digits {
        (bits, held) = ((bits << 6) | u32::from(digit), held + 6);
        if held >= 8 {
            held -= 8;
            out.push(u8::try_from((bits >> held) & 0xFF).unwrap());
        }
    }
    out
}

/// Bytes in the byte-level alphabet.
fn alphabet(bytes: &[u8]) -> String {
    let of = |&byte: &u8| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7F..=0xA0 => char::from_u32(0x121 + u32::from(byte) - 0x7F).unwrap(),
        0xAD => '\u{143}',
    };
    bytes.iter().map(of).collect()
}

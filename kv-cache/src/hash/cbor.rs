//! Canonical CBOR (RFC 8949, section 4.2.1), as much of it as vLLM's block hashes need.

use super::vllm::Encode;

/// Encodes arrays of byte strings, texts, integers and nulls, each in the fewest bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Cbor {
    bytes: Vec<u8>,
}

/// Major types, in the upper three bits of an item's first byte.
const UNSIGNED: u8 = 0 << 5;
const NEGATIVE: u8 = 1 << 5;
const BYTES: u8 = 2 << 5;
const TEXT: u8 = 3 << 5;
const ARRAY: u8 = 4 << 5;
const NULL: u8 = 0xf6;

impl Cbor {
    /// A major type with its number: in the byte itself below 24, else behind it in 1, 2, 4 or 8 bytes.
    fn head(&mut self, major: u8, number: u64) {
        let bytes = number.to_be_bytes();
        let (low, width) = match number {
            0..24 => return self.bytes.push(major | bytes[7]),
            24..=0xff => (24, 1),
            0x100..=0xffff => (25, 2),
            0x1_0000..=0xffff_ffff => (26, 4),
            _ => (27, 8),
        };
        self.bytes.push(major | low);
        self.bytes.extend_from_slice(&bytes[8 - width..]);
    }
}

impl Encode for Cbor {
    fn begin(&mut self) {
        self.bytes.clear();
    }

    fn open(&mut self, items: usize) {
        self.head(ARRAY, items as u64);
    }

    fn close(&mut self, _items: usize) {}

    fn bytes(&mut self, bytes: &[u8]) {
        self.head(BYTES, bytes.len() as u64);
        self.bytes.extend_from_slice(bytes);
    }

    fn text(&mut self, text: &str) {
        self.head(TEXT, text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn tag(&mut self, tag: &'static str) {
        self.text(tag);
    }

    fn integer(&mut self, integer: i64) {
        match u64::try_from(integer) {
            Ok(positive) => self.head(UNSIGNED, positive),
            Err(_) => self.head(NEGATIVE, integer.unsigned_abs() - 1),
        }
    }

    fn none(&mut self) {
        self.bytes.push(NULL);
    }

    fn end(&mut self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_the_fewest_bytes() {
        let mut cbor = Cbor::default();
        cbor.open(3);
        cbor.bytes(&[1, 1]);
        cbor.open(4);
        for token in [1, 24, 256, 70000] {
            cbor.integer(token);
        }
        cbor.none();
        let expected = [0x83, 0x42, 1, 1, 0x84, 1, 0x18, 0x18, 0x19, 1, 0, 0x1a, 0, 1, 0x11, 0x70, 0xf6];
        assert_eq!(cbor.end(), expected);
        cbor.begin();
        for integer in [-1, -24, -25, -256, -257, 23, 1 << 32] {
            cbor.integer(integer);
        }
        let expected = [0x20, 0x37, 0x38, 0x18, 0x38, 0xff, 0x39, 1, 0, 0x17, 0x1b, 0, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(cbor.end(), expected);
    }
}

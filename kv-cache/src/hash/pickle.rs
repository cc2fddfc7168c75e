//! Python's pickle, protocol 5, as much of it as vLLM's block hashes need (CPython, `Modules/_pickle.c`).
//!
//! A pickle is a program for a stack machine. What makes the bytes of a value unique is how CPython writes it:
//!
//! - The opcodes stand in frames of 64 KiB and a little: a frame ends before the first value that begins behind its
//!   64 KiB. A text or byte string of 64 KiB or more stands between frames. A frame of less than four bytes has no
//!   header.
//! - Each string, byte string and tuple is put into a memo, numbered in the order of their ends. An object that comes
//!   a second time is fetched from there. Identity counts, not equality: of what vLLM hashes, its own tags
//!   ("mm" of several images) and strings of at most one Latin-1 character (which CPython has once each) are the same
//!   objects each time; everything else is taken for an object of its own.

use super::vllm::Encode;

const PROTOCOL_5: [u8; 2] = [0x80, 5];
const FRAME: u8 = 0x95;
const MARK: u8 = b'(';
const STOP: u8 = b'.';
const NONE: u8 = b'N';
const MEMOIZE: u8 = 0x94;
const BINGET: u8 = b'h';
const LONG_BINGET: u8 = b'j';
const BININT: u8 = b'J';
const BININT1: u8 = b'K';
const BININT2: u8 = b'M';
const LONG1: u8 = 0x8a;
const SHORT_BINBYTES: u8 = b'C';
const BINBYTES: u8 = b'B';
const SHORT_BINUNICODE: u8 = 0x8c;
const BINUNICODE: u8 = b'X';
const EMPTY_TUPLE: u8 = b')';
const TUPLE1: u8 = 0x85;
const TUPLE2: u8 = 0x86;
const TUPLE3: u8 = 0x87;
const TUPLE: u8 = b't';

/// Opcode and length of a frame.
const FRAME_HEADER: usize = 9;
const FRAME_BYTES_MIN: usize = 4;
const FRAME_BYTES_TARGET: usize = 64 * 1024;

/// Encodes tuples of byte strings, texts, integers and None.
#[derive(Clone, Debug, Default)]
pub(super) struct Pickle {
    bytes: Vec<u8>,
    /// Where the frame that is being written begins.
    frame: Option<usize>,
    /// Objects in the memo.
    memoized: u32,
    /// Those of them that may come again.
    shared: Vec<(String, u32)>,
}

impl Pickle {
    fn write(&mut self, bytes: &[u8]) {
        if self.frame.is_none() {
            self.frame = Some(self.bytes.len());
            self.bytes.extend_from_slice(&[0; FRAME_HEADER]);
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Called before each value: ends the frame if it is full.
    fn boundary(&mut self) {
        if self.frame.is_some_and(|start| self.bytes.len() - start - FRAME_HEADER >= FRAME_BYTES_TARGET) {
            self.end_frame();
        }
    }

    fn end_frame(&mut self) {
        let Some(start) = self.frame.take() else { return };
        let length = self.bytes.len() - start - FRAME_HEADER;
        if length < FRAME_BYTES_MIN {
            self.bytes.drain(start..start + FRAME_HEADER);
            return;
        }
        self.bytes[start] = FRAME;
        self.bytes[start + 1..start + FRAME_HEADER].copy_from_slice(&(length as u64).to_le_bytes());
    }

    /// A string under the opcode for its length, and into the memo.
    fn string(&mut self, short: u8, long: u8, content: &[u8]) {
        let mut head = [long, 0, 0, 0, 0];
        head[1..].copy_from_slice(&crate::id::count(content.len()).to_le_bytes());
        if content.len() < 256 {
            head[0] = short;
        }
        let head = if content.len() < 256 { &head[..2] } else { &head[..] };
        if content.len() >= FRAME_BYTES_TARGET {
            self.end_frame();
            self.bytes.extend_from_slice(head);
            self.bytes.extend_from_slice(content);
        } else {
            self.write(head);
            self.write(content);
        }
        self.memoize();
    }

    fn memoize(&mut self) {
        self.write(&[MEMOIZE]);
        self.memoized += 1;
    }

    /// A text that is one and the same object wherever it stands.
    fn shared(&mut self, text: &str) {
        if let Some(&(_, number)) = self.shared.iter().find(|(known, _)| known == text) {
            match u8::try_from(number) {
                Ok(number) => self.write(&[BINGET, number]),
                Err(_) => {
                    self.write(&[LONG_BINGET]);
                    self.write(&number.to_le_bytes());
                }
            }
            return;
        }
        self.shared.push((text.to_owned(), self.memoized));
        self.string(SHORT_BINUNICODE, BINUNICODE, text.as_bytes());
    }
}

impl Encode for Pickle {
    fn begin(&mut self) {
        self.bytes.clear();
        self.bytes.extend_from_slice(&PROTOCOL_5);
        self.frame = None;
        self.memoized = 0;
        self.shared.clear();
    }

    fn open(&mut self, items: usize) {
        self.boundary();
        if items > 3 {
            self.write(&[MARK]);
        }
    }

    fn close(&mut self, items: usize) {
        match items {
            0 => return self.write(&[EMPTY_TUPLE]),
            1 => self.write(&[TUPLE1]),
            2 => self.write(&[TUPLE2]),
            3 => self.write(&[TUPLE3]),
            _ => self.write(&[TUPLE]),
        }
        self.memoize();
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.boundary();
        self.string(SHORT_BINBYTES, BINBYTES, bytes);
    }

    fn text(&mut self, text: &str) {
        self.boundary();
        let mut letters = text.chars();
        match (letters.next(), letters.next()) {
            (None, _) => self.shared(text),
            (Some(only), None) if u32::from(only) < 256 => self.shared(text),
            _ => self.string(SHORT_BINUNICODE, BINUNICODE, text.as_bytes()),
        }
    }

    fn tag(&mut self, tag: &'static str) {
        self.boundary();
        self.shared(tag);
    }

    fn integer(&mut self, integer: i64) {
        self.boundary();
        if let Ok(small) = u8::try_from(integer) {
            self.write(&[BININT1, small]);
        } else if let Ok(medium) = u16::try_from(integer) {
            let [low, high] = medium.to_le_bytes();
            self.write(&[BININT2, low, high]);
        } else if let Ok(large) = i32::try_from(integer) {
            let [a, b, c, d] = large.to_le_bytes();
            self.write(&[BININT, a, b, c, d]);
        } else {
            let bytes = integer.to_le_bytes();
            let width = (1..8).find(|&width| fits(integer, width)).unwrap_or(8);
            self.write(&[LONG1, width]);
            self.write(&bytes[..usize::from(width)]);
        }
    }

    fn none(&mut self) {
        self.boundary();
        self.write(&[NONE]);
    }

    fn end(&mut self) -> &[u8] {
        self.write(&[STOP]);
        self.end_frame();
        &self.bytes
    }
}

/// Whether an integer fits into so many bytes of two's complement.
fn fits(integer: i64, bytes: u8) -> bool {
    let bits = 8 * u32::from(bytes) - 1;
    (-(1_i64 << bits)..1 << bits).contains(&integer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_two_images_is_what_python_writes() {
        let mut pickle = Pickle::default();
        pickle.begin();
        pickle.open(3);
        pickle.bytes(&[1; 32]);
        pickle.open(16);
        (0..16).for_each(|token| pickle.integer(token));
        pickle.close(16);
        pickle.open(2);
        for (id, offset) in [("aaa", -5), ("bbb", 14)] {
            pickle.open(3);
            pickle.tag("mm");
            pickle.text(id);
            pickle.integer(offset);
            pickle.close(3);
        }
        pickle.close(2);
        pickle.close(3);
        // pickle.dumps((b"\x01" * 32, tuple(range(16)), (("mm", "aaa", -5), ("mm", "bbb", 14))), protocol=5)
        let python = [
            "80059569000000000000004320",
            &"01".repeat(32),
            "94284b004b014b024b034b044b054b064b074b084b094b0a4b0b4b0c4b0d4b0e4b0f74948c026d6d948c03616161",
            "944afbffffff879468028c03626262944b0e8794869487942e",
        ];
        let hex: String = pickle.end().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, python.concat());
    }

    #[test]
    fn a_long_tuple_fills_several_frames() {
        // The places of the frames as pickletools.genops shows them for 20,000 integers of seven bytes.
        let mut pickle = Pickle::default();
        pickle.begin();
        pickle.open(3);
        pickle.bytes(&[1; 32]);
        pickle.open(20_000);
        (0..20_000).for_each(|token| pickle.integer((1 << 31) + token));
        pickle.close(20_000);
        pickle.none();
        pickle.close(3);
        let bytes = pickle.end();
        assert_eq!(bytes.len(), 140_071);
        for (place, length) in [(2, 65_542), (65_553, 65_541), (131_103, 8_959_u64)] {
            assert_eq!(bytes[place], FRAME);
            assert_eq!(bytes[place + 1..place + 9], length.to_le_bytes());
        }
    }
}

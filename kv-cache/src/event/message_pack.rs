//! MessagePack, as much of it as events need: each value in the fewest bytes, as `msgspec` and most others write it.

/// Values one behind the other. An array or a map is its head and then its items.
#[derive(Clone, Debug, Default)]
pub(super) struct MessagePack {
    pub(super) bytes: Vec<u8>,
}

impl MessagePack {
    pub(super) fn nil(&mut self) {
        self.bytes.push(0xc0);
    }

    pub(super) fn float(&mut self, value: f64) {
        self.bytes.push(0xcb);
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    pub(super) fn unsigned(&mut self, value: u64) {
        match value {
            0..0x80 => self.bytes.extend_from_slice(&value.to_be_bytes()[7..]),
            0x80..=0xff => self.number(0xcc, value, 1),
            0x100..=0xffff => self.number(0xcd, value, 2),
            0x1_0000..=0xffff_ffff => self.number(0xce, value, 4),
            _ => self.number(0xcf, value, 8),
        }
    }

    pub(super) fn signed(&mut self, value: i64) {
        let bits = value.cast_unsigned();
        match value {
            0.. => self.unsigned(bits),
            -0x20..0 => self.bytes.extend_from_slice(&value.to_be_bytes()[7..]),
            -0x80..-0x20 => self.number(0xd0, bits, 1),
            -0x8000..-0x80 => self.number(0xd1, bits, 2),
            -0x8000_0000..-0x8000 => self.number(0xd2, bits, 4),
            _ => self.number(0xd3, bits, 8),
        }
    }

    pub(super) fn text(&mut self, text: &str) {
        match text.len() as u64 {
            short @ 0..32 => self.number(0xa0, short, 0),
            length @ 32..=0xff => self.number(0xd9, length, 1),
            length @ 0x100..=0xffff => self.number(0xda, length, 2),
            length => self.number(0xdb, length, 4),
        }
        self.bytes.extend_from_slice(text.as_bytes());
    }

    pub(super) fn binary(&mut self, bytes: &[u8]) {
        match bytes.len() as u64 {
            length @ 0..=0xff => self.number(0xc4, length, 1),
            length @ 0x100..=0xffff => self.number(0xc5, length, 2),
            length => self.number(0xc6, length, 4),
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn array(&mut self, items: usize) {
        match items as u64 {
            few @ 0..16 => self.number(0x90, few, 0),
            items @ 16..=0xffff => self.number(0xdc, items, 2),
            items => self.number(0xdd, items, 4),
        }
    }

    /// Fields, each a name and a value, of a structure that has less than fifteen.
    pub(super) fn fields(&mut self, fields: u8) {
        debug_assert!(fields < 16, "{fields} fields need a longer head");
        self.number(0x80, fields.into(), 0);
    }

    /// Those of a structure that has more, even if most are left out: `msgspec` writes the head before it knows.
    pub(super) fn fields_of_many(&mut self, fields: u8) {
        self.number(0xde, fields.into(), 2);
    }

    pub(super) fn integers(&mut self, values: &[u32]) {
        self.array(values.len());
        values.iter().for_each(|&value| self.unsigned(value.into()));
    }

    /// A first byte and a number behind it, in so many bytes; none, and it is in the first byte itself.
    fn number(&mut self, first: u8, number: u64, width: usize) {
        let bytes = number.to_be_bytes();
        self.bytes.push(if width == 0 { first | bytes[7] } else { first });
        self.bytes.extend_from_slice(&bytes[8 - width..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut MessagePack)) -> String {
        let mut pack = MessagePack::default();
        write(&mut pack);
        pack.bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn integers_take_the_fewest_bytes() {
        let cases = [
            (0, "00"),
            (127, "7f"),
            (128, "cc80"),
            (255, "ccff"),
            (256, "cd0100"),
            (65_535, "cdffff"),
            (65_536, "ce00010000"),
            (1 << 32, "cf0000000100000000"),
            (-1, "ff"),
            (-32, "e0"),
            (-33, "d0df"),
            (-128, "d080"),
            (-129, "d1ff7f"),
            (-32_769, "d2ffff7fff"),
            (-(1 << 31) - 1, "d3ffffffff7fffffff"),
        ];
        for (value, expected) in cases {
            assert_eq!(written(|pack| pack.signed(value)), expected, "{value}");
        }
    }

    #[test]
    fn lengths_take_the_fewest_bytes() {
        for (length, head) in [(31, "bf"), (32, "d920"), (256, "da0100"), (65_536, "db00010000")] {
            assert!(written(|pack| pack.text(&"a".repeat(length))).starts_with(head), "{length}");
        }
        for (length, head) in [(0, "c400"), (256, "c50100"), (65_536, "c600010000")] {
            assert!(written(|pack| pack.binary(&vec![0; length])).starts_with(head), "{length}");
        }
        for (items, head) in [(15, "9f"), (16, "dc0010"), (65_536, "dd00010000")] {
            assert_eq!(written(|pack| pack.array(items)), head, "{items}");
        }
    }
}

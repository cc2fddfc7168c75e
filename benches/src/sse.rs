//! Server-sent events, cut out of a byte stream however the network split it.

/// Collects bytes and gives back the data of each whole event. Lines may end in LF, CR LF or CR; comments and
/// fields
/// other than `data` are skipped; an event that the stream leaves unfinished is never given.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    after_return: bool,
}

impl Events {
    /// Takes the next bytes of the stream and calls `each` with the data of every event that they complete.
    /// The data is lent from a buffer that is used again.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
        if bytes.is_empty() {
            return;
        }
        if std::mem::take(&mut self.after_return) && bytes[0] == b'\n' {
            bytes = &bytes[1..];
        }
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n' || byte == b'\r') {
            self.line.extend_from_slice(&bytes[..end]);
            self.end_line(&mut each);
            let returned = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            if returned && bytes.is_empty() {
                self.after_return = true;
            } else if returned && bytes[0] == b'\n' {
                bytes = &bytes[1..];
            }
        }
        self.line.extend_from_slice(bytes);
    }

    fn end_line(&mut self, each: &mut impl FnMut(&[u8])) {
        if self.line.is_empty() {
            if self.has_data {
                each(&self.data);
            }
            self.data.clear();
            self.has_data = false;
        } else if let Some(value) = data_field(&self.line) {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
            self.has_data = true;
        }
        self.line.clear();
    }
}

/// The value of a line `data: value`, without the one space after the colon.
fn data_field(line: &[u8]) -> Option<&[u8]> {
    let rest = line.strip_prefix(b"data")?;
    match rest.strip_prefix(b":") {
        Some(value) => Some(value.strip_prefix(b" ").unwrap_or(value)),
        None if rest.is_empty() => Some(rest),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<String> {
        let mut parser = Events::default();
        let mut found = Vec::new();
        for piece in pieces {
            parser.push(piece, |data| found.push(String::from_utf8(data.to_vec()).unwrap()));
        }
        found
    }

    const STREAMS: [(&str, &[&str]); 8] = [
        ("data: {\"a\":1}\n\ndata: [DONE]\n\n", &["{\"a\":1}", "[DONE]"]),
        ("data: one\r\n\r\ndata:two\r\n\r\n", &["one", "two"]),
        ("data: one\r\rdata: two\r\r", &["one", "two"]),
        (": keep-alive\n\nevent: x\nid: 7\ndata: a\ndata: b\n\n", &["a\nb"]),
        ("data\n\ndata:  two spaces\n\n", &["", " two spaces"]),
        ("datum: no\n\n\n\ndata: é ü 漢\n\n", &["é ü 漢"]),
        ("data: whole\n\ndata: cut off\n", &["whole"]),
        ("\r\n\n\rdata: mixed\r\n\ndata: x\n\r\n", &["mixed", "x"]),
    ];

    #[test]
    fn an_event_is_its_data_lines() {
        for (stream, expected) in STREAMS {
            assert_eq!(events(&[stream.as_bytes()]), expected, "{stream:?}");
        }
    }

    #[test]
    fn the_split_points_do_not_matter() {
        for (stream, expected) in STREAMS {
            let bytes = stream.as_bytes();
            for first in 0..=bytes.len() {
                for second in first..=bytes.len() {
                    let pieces = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                    assert_eq!(events(&pieces), expected, "{stream:?} cut at {first} and {second}");
                }
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(events(&single), expected, "{stream:?} byte by byte");
        }
    }
}

//! ZMTP 3.0 (ZeroMQ's RFC 23) without security, as much as a publisher and a replayer need: a greeting, a handshake,
//! and frames of flags, length and body. A message is its frames, all but the last of which say that more will come.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Socket {
    /// Sends to whoever subscribed.
    Pub,
    /// Answers requests.
    Router,
}

/// Part of a message, or a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) body: Vec<u8>,
    /// Whether the message goes on.
    pub(super) more: bool,
    pub(super) is_command: bool,
}

/// The largest frame that is read: subscriptions and requests are small.
const FRAME_BYTES_MAX: u64 = 1 << 16;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

const GREETING_BYTES: usize = 64;

impl Socket {
    fn name(self) -> &'static [u8] {
        match self {
            Socket::Pub => b"PUB",
            Socket::Router => b"ROUTER",
        }
    }

    fn suits(self, peer: &[u8]) -> bool {
        match self {
            Socket::Pub => matches!(peer, b"SUB" | b"XSUB"),
            Socket::Router => matches!(peer, b"REQ" | b"DEALER" | b"ROUTER"),
        }
    }
}

/// Ten bytes by which ZeroMQ is known, version 3.0, mechanism NULL, and zeros.
fn greeting() -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

/// Agrees with a new connection on what is spoken.
///
/// # Errors
/// It speaks something else, or is no socket for this one, or broke off.
pub(super) async fn shake_hands<S>(stream: &mut S, socket: Socket) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&greeting()).await?;
    let mut theirs = [0; GREETING_BYTES];
    stream.read_exact(&mut theirs).await?;
    if (theirs[0], theirs[9]) != (0xff, 0x7f) || theirs[10] < 3 {
        return Err(wrong("no ZMTP 3"));
    }
    if &theirs[12..32] != b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        return Err(wrong("another mechanism than NULL"));
    }
    let mut ready = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", socket.name()), ("Identity", b"")] {
        ready.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        ready.extend_from_slice(name.as_bytes());
        ready.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
        ready.extend_from_slice(value);
    }
    let mut bytes = Vec::new();
    put_frame(&mut bytes, COMMAND, &ready);
    stream.write_all(&bytes).await?;
    let answer = read_frame(stream).await?;
    let properties = answer.body.strip_prefix(b"\x05READY").filter(|_| answer.is_command);
    match properties.and_then(|properties| property(properties, b"socket-type")) {
        Some(peer) if socket.suits(peer) => Ok(()),
        _ => Err(wrong("another kind of socket")),
    }
}

/// The value of a property by its name, which may be written in capitals.
fn property<'a>(mut properties: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    loop {
        let (&length, rest) = properties.split_first()?;
        let (key, rest) = rest.split_at_checked(length.into())?;
        let (length, rest) = rest.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if key.eq_ignore_ascii_case(name) {
            return Some(value);
        }
        properties = rest;
    }
}

/// Reads the next frame.
///
/// # Errors
/// The connection ended, or what comes is none.
pub(super) async fn read_frame<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Frame> {
    let flags = stream.read_u8().await?;
    if flags & !(MORE | LONG | COMMAND) != 0 {
        return Err(wrong("no frame"));
    }
    let length = match flags & LONG {
        0 => stream.read_u8().await?.into(),
        _ => stream.read_u64().await?,
    };
    if length > FRAME_BYTES_MAX {
        return Err(wrong("a frame that is too large"));
    }
    let mut body = Vec::new();
    stream.take(length).read_to_end(&mut body).await?;
    if (body.len() as u64) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Frame { body, more: flags & MORE != 0, is_command: flags & COMMAND != 0 })
}

/// The bytes of a message of these frames; `more` of them are to follow.
pub(super) fn message(frames: &[&[u8]], more: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(frames.iter().map(|frame| frame.len() + 9).sum());
    for (index, frame) in frames.iter().enumerate() {
        let goes_on = more || index + 1 < frames.len();
        put_frame(&mut bytes, if goes_on { MORE } else { 0 }, frame);
    }
    bytes
}

/// The answer to a PING, which repeats what stands behind the two bytes of its time to live.
pub(super) fn pong(command: &Frame) -> Option<Vec<u8>> {
    let context = command.body.strip_prefix(b"\x04PING").filter(|_| command.is_command)?.get(2..)?;
    let mut bytes = Vec::new();
    put_frame(&mut bytes, COMMAND, &[b"\x04PONG", context].concat());
    Some(bytes)
}

fn put_frame(bytes: &mut Vec<u8>, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => bytes.extend_from_slice(&[flags, length]),
        Err(_) => {
            bytes.push(flags | LONG);
            bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(body);
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("it speaks {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a peer that sends `theirs` is told, and how it ends.
    async fn meet(socket: Socket, theirs: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let (mut ours, mut peer) = tokio::io::duplex(1 << 12);
        peer.write_all(theirs).await.unwrap();
        peer.shutdown().await.unwrap();
        let ended = shake_hands(&mut ours, socket).await;
        drop(ours);
        let mut told = Vec::new();
        peer.read_to_end(&mut told).await.unwrap();
        (told, ended)
    }

    fn ready(kind: &[u8]) -> Vec<u8> {
        let mut ready = b"\x05READY\x08identity\0\0\0\0\x0bsocket-TYPE\0\0\0".to_vec();
        ready.push(u8::try_from(kind.len()).unwrap());
        ready.extend_from_slice(kind);
        let mut bytes = greeting().to_vec();
        put_frame(&mut bytes, COMMAND, &ready);
        bytes
    }

    #[tokio::test]
    async fn sockets_that_suit_each_other_shake_hands() {
        let (told, ended) = meet(Socket::Pub, &ready(b"SUB")).await;
        ended.unwrap();
        assert_eq!(told[..64], greeting());
        assert_eq!(told[64..], *b"\x04\x26\x05READY\x0bSocket-Type\0\0\0\x03PUB\x08Identity\0\0\0\0");
        meet(Socket::Router, &ready(b"DEALER")).await.1.unwrap();
        for (socket, peer) in [(Socket::Pub, &b"REQ"[..]), (Socket::Router, b"SUB"), (Socket::Router, b"")] {
            let error = meet(socket, &ready(peer)).await.1.unwrap_err();
            assert!(error.to_string().contains("another kind of socket"), "{error}");
        }
    }

    #[tokio::test]
    async fn whoever_speaks_something_else_is_told_apart() {
        let mut curve = ready(b"SUB");
        curve[12..17].copy_from_slice(b"CURVE");
        let mut old = ready(b"SUB");
        old[10] = 2;
        let mut cut = greeting().to_vec();
        cut.extend_from_slice(b"\x04\x0b\x05READY\xffabc");
        let http = b"GET / HTTP/1.1\r\nHost: a-name-that-is-long-enough-for-a-greeting.example\r\n\r\n";
        for theirs in [&curve[..], &old, &cut, http, b"", b"\xff"] {
            assert!(meet(Socket::Pub, theirs).await.1.is_err(), "{theirs:?}");
        }
    }

    #[tokio::test]
    async fn frames_are_read_as_they_are_written() {
        let long = vec![7; 300];
        let bytes = message(&[b"", b"ab", &long], false);
        assert_eq!(bytes[..6], *b"\x01\x00\x01\x02ab");
        assert_eq!(bytes[6..15], *b"\x02\0\0\0\0\0\0\x01\x2c");
        let mut rest = &bytes[..];
        for (body, more) in [(&b""[..], true), (b"ab", true), (&long, false)] {
            let expected = Frame { body: body.to_vec(), more, is_command: false };
            assert_eq!(read_frame(&mut rest).await.unwrap(), expected);
        }
        assert!(read_frame(&mut rest).await.is_err(), "the end");
        for bad in [&b"\x08\x00"[..], b"\x00\x05abc", b"\x02\xff\xff\xff\xff\xff\xff\xff\xff"] {
            assert!(read_frame(&mut { bad }).await.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_ping_is_answered_with_what_it_brought() {
        let ping = |body: &[u8], is_command| Frame { body: body.to_vec(), more: false, is_command };
        assert_eq!(pong(&ping(b"\x04PING\0\x0ahey", true)).unwrap(), b"\x04\x08\x04PONGhey");
        assert_eq!(pong(&ping(b"\x04PING", true)), None);
        assert_eq!(pong(&ping(b"\x04PING\0\x0ahey", false)), None);
    }
}

//! The last batches, and whoever asks for them again.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::Counts;
use super::publisher::HANDSHAKE_MAX;
use super::zmtp::{self, Socket, read_frame};

/// What ends a replay in the place of a number: -1.
const END: [u8; 8] = [0xff; 8];

/// The frames of a request, with the empty one that a requester puts before it; more are none.
const REQUEST_FRAMES: usize = 2;

/// The last batches with their numbers, as they were sent.
#[derive(Debug)]
pub(super) struct Kept {
    batches: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
    most: usize,
}

impl Kept {
    pub(super) fn new(most: usize) -> Self {
        Self { batches: Mutex::default(), most }
    }

    /// Keeps a batch, and gives up the oldest if there are too many.
    pub(super) fn add(&self, number: u64, message: Arc<[u8]>) {
        let mut batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        batches.push_back((number, message));
        if batches.len() > self.most {
            batches.pop_front();
        }
    }

    /// Those that are left, from a number on.
    fn since(&self, number: u64) -> Vec<Arc<[u8]>> {
        let batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        let first = batches.partition_point(|&(kept, _)| kept < number);
        batches.range(first..).map(|(_, message)| Arc::clone(message)).collect()
    }
}

/// Sends one connection what it asks for, as fast as it reads. It holds up nobody else.
pub(super) async fn serve(stream: TcpStream, kept: Arc<Kept>, counts: Arc<Counts>) {
    if let Err(error) = talk(stream, &kept, &counts).await {
        tracing::debug!(%error, "who asked for a replay of events has gone");
    }
}

async fn talk(mut stream: TcpStream, kept: &Kept, counts: &Counts) -> io::Result<()> {
    stream.set_nodelay(true)?;
    tokio::time::timeout(HANDSHAKE_MAX, zmtp::shake_hands(&mut stream, Socket::Router)).await??;
    loop {
        let Some(start) = request(&mut stream).await? else { continue };
        for message in kept.since(start) {
            // Before what was published stands the empty frame that the requester's socket takes off.
            stream.write_all(&zmtp::message(&[b""], true)).await?;
            stream.write_all(&message).await?;
            counts.replayed_batches.add(1);
        }
        stream.write_all(&zmtp::message(&[b"", b"", &END, b""], false)).await?;
    }
}

/// The number from which on batches are asked for; none if that was no request.
async fn request(stream: &mut TcpStream) -> io::Result<Option<u64>> {
    let mut frames = Vec::new();
    loop {
        let frame = read_frame(stream).await?;
        if frame.is_command {
            if let Some(pong) = zmtp::pong(&frame) {
                stream.write_all(&pong).await?;
            }
            continue;
        }
        let more = frame.more;
        if frames.len() <= REQUEST_FRAMES {
            frames.push(frame.body);
        }
        if !more {
            return Ok(start(&frames));
        }
    }
}

/// An empty frame and a number, its most significant byte first.
fn start(frames: &[Vec<u8>]) -> Option<u64> {
    let [empty, number] = frames else { return None };
    if !empty.is_empty() || number.len() > 8 {
        return None;
    }
    Some(number.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_batches_are_kept() {
        let kept = Kept::new(3);
        let message = |number: u8| Arc::from([number]);
        // The number 3 never came: there was no room for it.
        for number in [0, 1, 2, 4, 5] {
            kept.add(number.into(), message(number));
        }
        let since = |number| kept.since(number).iter().map(|message| message[0]).collect::<Vec<_>>();
        assert_eq!(since(0), [2, 4, 5]);
        assert_eq!(since(3), [4, 5]);
        assert!(since(6).is_empty());
        let none = Kept::new(0);
        none.add(0, message(0));
        assert!(none.since(0).is_empty());
    }

    #[test]
    fn a_request_is_an_empty_frame_and_a_number() {
        let asked = |frames: &[&[u8]]| start(&frames.iter().map(|frame| frame.to_vec()).collect::<Vec<_>>());
        assert_eq!(asked(&[b"", b"\0\0\0\0\0\0\x01\x02"]), Some(258));
        assert_eq!(asked(&[b"", b"\x01\x02"]), Some(258));
        assert_eq!(asked(&[b"", b""]), Some(0));
        for wrong in
            [&[&b"\0\0\0\0\0\0\0\0"[..]][..], &[b"", b"", b"\x01"], &[b"a", b"\x01"], &[b"", &[0; 9]]]
        {
            assert_eq!(asked(wrong), None, "{wrong:?}");
        }
    }
}

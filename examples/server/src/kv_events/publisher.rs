//! The publisher: who subscribes, and what each of them is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{future, io};

use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::task::JoinSet;

use super::endpoint::Door;
use super::replay::{self, Kept};
use super::zmtp::{self, Frame, Socket, read_frame};
use super::{Batch, Counts, KvEventsConfig, bounded};

/// The most connections at a time, subscribers and who asks for a replay.
const PEERS_MAX: usize = 1024;

/// A new connection must say what it is within this time.
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// When a peer that one calls on is not there, it is called on again after this time.
const AGAIN: Duration = Duration::from_millis(500);

/// Takes batches and sends them to everybody.
#[derive(Debug)]
pub(super) struct Publisher {
    door: Door,
    replay: Option<TcpListener>,
    topic: Arc<[u8]>,
    queue_max: usize,
    subscribers: Vec<Subscriber>,
    kept: Arc<Kept>,
    counts: Arc<Counts>,
}

/// One connection, from when it was accepted.
#[derive(Debug)]
struct Subscriber {
    /// Whether it has subscribed to the topic.
    wants: Arc<AtomicBool>,
    queue: Sender<Arc<[u8]>>,
}

impl Publisher {
    pub(super) fn new(
        config: &KvEventsConfig,
        door: Door,
        replay: Option<TcpListener>,
        counts: Arc<Counts>,
    ) -> Self {
        Self {
            door,
            replay,
            topic: config.topic.as_bytes().into(),
            queue_max: config.hwm,
            subscribers: Vec::new(),
            kept: Arc::new(Kept::new(config.buffer_steps)),
            counts,
        }
    }

    /// Until no more batches can come, and subscribers have been sent those that came.
    pub(super) async fn run(mut self, mut batches: Receiver<Batch>) {
        let (mut subscribers, mut replays) = (JoinSet::new(), JoinSet::new());
        if let Door::Peer(address) = &self.door {
            let address = address.clone();
            let line = self.add_subscriber();
            subscribers.spawn(line.call_on(address));
        }
        loop {
            tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => self.publish(&batch),
                    None => break,
                },
                stream = accept(self.door.listener()) => if subscribers.len() < PEERS_MAX {
                    let line = self.add_subscriber();
                    subscribers.spawn(line.serve(stream));
                },
                stream = accept(self.replay.as_ref()) => if replays.len() < PEERS_MAX {
                    replays.spawn(replay::serve(stream, Arc::clone(&self.kept), Arc::clone(&self.counts)));
                },
                Some(_) = subscribers.join_next() => {}
                Some(_) = replays.join_next() => {}
            }
        }
        // Without a queue to wait for, a subscriber's line ends when it has been sent the rest.
        self.subscribers.clear();
        while subscribers.join_next().await.is_some() {}
    }

    fn add_subscriber(&mut self) -> Line {
        self.subscribers.retain(|subscriber| !subscriber.queue.is_closed());
        let (queue, waiting) = bounded(self.queue_max);
        let wants = Arc::new(AtomicBool::new(false));
        self.subscribers.push(Subscriber { wants: Arc::clone(&wants), queue });
        let (topic, counts) = (Arc::clone(&self.topic), Arc::clone(&self.counts));
        Line { topic, wants, waiting, counts }
    }

    /// Keeps a batch, and puts it into the queue of whoever wants it and has room.
    fn publish(&mut self, batch: &Batch) {
        let number = batch.number.to_be_bytes();
        let message: Arc<[u8]> = zmtp::message(&[&self.topic, &number, &batch.payload], false).into();
        self.kept.add(batch.number, Arc::clone(&message));
        self.subscribers.retain(|subscriber| {
            if !subscriber.wants.load(Ordering::Relaxed) {
                return !subscriber.queue.is_closed();
            }
            match subscriber.queue.try_send(Arc::clone(&message)) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    self.counts.missed_batches.add(1);
                    true
                }
                Err(TrySendError::Closed(_)) => false,
            }
        });
    }
}

/// The next connection; never, where none can come.
async fn accept(listener: Option<&TcpListener>) -> TcpStream {
    let Some(listener) = listener else { return future::pending().await };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for events");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// A subscriber's end of its queue.
struct Line {
    topic: Arc<[u8]>,
    wants: Arc<AtomicBool>,
    waiting: Receiver<Arc<[u8]>>,
    counts: Arc<Counts>,
}

impl Line {
    /// Serves who has come, until one of both ends it.
    async fn serve(mut self, stream: TcpStream) {
        if let Err(error) = self.talk(stream).await {
            tracing::debug!(%error, "a subscriber to events has gone");
        }
    }

    /// Serves who listens at an address, whenever it is there, until there is nothing more to tell.
    async fn call_on(mut self, address: String) {
        while !self.waiting.is_closed() || !self.waiting.is_empty() {
            if let Ok(stream) = TcpStream::connect(&address).await
                && let Err(error) = self.talk(stream).await
            {
                tracing::debug!(%error, address, "the subscriber to events has gone");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn talk(&mut self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        tokio::time::timeout(HANDSHAKE_MAX, zmtp::shake_hands(&mut stream, Socket::Pub)).await??;
        let (reader, writer) = stream.into_split();
        let mut subscriptions = Subscriptions::new(self);
        let (pongs_in, pongs) = bounded(8);
        tokio::select! {
            ended = subscriptions.hear(reader, pongs_in) => ended,
            ended = send(&mut self.waiting, pongs, writer) => ended,
        }
    }
}

/// Sends what comes, until nothing more can.
async fn send(
    waiting: &mut Receiver<Arc<[u8]>>,
    mut pongs: Receiver<Vec<u8>>,
    mut writer: OwnedWriteHalf,
) -> io::Result<()> {
    loop {
        tokio::select! {
            message = waiting.recv() => match message {
                Some(message) => writer.write_all(&message).await?,
                None => return writer.shutdown().await,
            },
            Some(pong) = pongs.recv() => writer.write_all(&pong).await?,
        }
    }
}

/// What one connection has subscribed to. Only beginnings of the topic matter, and of them only their length.
struct Subscriptions {
    topic: Arc<[u8]>,
    /// How often to each length.
    times: Vec<u32>,
    wants: Arc<AtomicBool>,
    counts: Arc<Counts>,
}

impl Subscriptions {
    fn new(line: &Line) -> Self {
        let (topic, wants, counts) =
            (Arc::clone(&line.topic), Arc::clone(&line.wants), Arc::clone(&line.counts));
        Self { times: vec![0; topic.len() + 1], topic, wants, counts }
    }

    async fn hear(&mut self, mut reader: OwnedReadHalf, pongs: Sender<Vec<u8>>) -> io::Result<()> {
        loop {
            let frame = read_frame(&mut reader).await?;
            if let Some(pong) = zmtp::pong(&frame) {
                // Whoever pings faster than it reads can do without an answer.
                let _ = pongs.try_send(pong);
            } else {
                self.note(&frame);
            }
        }
    }

    /// A message of one byte and a topic, or since ZMTP 3.1 a command and a topic.
    fn note(&mut self, frame: &Frame) {
        let (add, topic) = match (&*frame.body, frame.is_command) {
            ([1, topic @ ..], false)
            | ([9, b'S', b'U', b'B', b'S', b'C', b'R', b'I', b'B', b'E', topic @ ..], true) => (true, topic),
            ([0, topic @ ..], false) | ([6, b'C', b'A', b'N', b'C', b'E', b'L', topic @ ..], true) => {
                (false, topic)
            }
            _ => return,
        };
        if !self.topic.starts_with(topic) {
            return;
        }
        let times = &mut self.times[topic.len()];
        *times = if add { times.saturating_add(1) } else { times.saturating_sub(1) };
        self.set(self.times.iter().any(|&times| times > 0));
    }

    fn set(&self, wants: bool) {
        match (self.wants.swap(wants, Ordering::Relaxed), wants) {
            (false, true) => self.counts.subscribers.add(1),
            (true, false) => self.counts.subscribers.subtract(1),
            _ => {}
        }
    }
}

impl Drop for Subscriptions {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publisher(hwm: usize, topic: &str) -> Publisher {
        let config = KvEventsConfig { hwm, topic: topic.to_owned(), ..KvEventsConfig::default() };
        Publisher::new(&config, Door::Peer(String::new()), None, Arc::default())
    }

    fn batch(number: u64) -> Batch {
        Batch { number, payload: vec![7] }
    }

    fn said(frame: &[u8], is_command: bool) -> Frame {
        Frame { body: frame.to_vec(), more: false, is_command }
    }

    #[test]
    fn nobody_waits_for_a_subscriber_that_does_not_read() {
        let mut publisher = publisher(3, "");
        let [slow, mut quick] = [(); 2].map(|()| publisher.add_subscriber());
        for line in [&slow, &quick] {
            line.wants.store(true, Ordering::Relaxed);
        }
        for number in 0..10 {
            publisher.publish(&batch(number));
            assert!(quick.waiting.try_recv().unwrap().windows(8).any(|span| span == number.to_be_bytes()));
        }
        assert_eq!((slow.waiting.len(), publisher.counts.missed_batches.get()), (3, 7));
        drop(slow);
        publisher.publish(&batch(10));
        assert_eq!(publisher.subscribers.len(), 1, "whoever has gone is forgotten");
    }

    #[test]
    fn a_topic_is_wanted_by_whoever_subscribed_to_a_beginning_of_it() {
        let mut publisher = publisher(3, "kv@pod");
        let line = publisher.add_subscriber();
        let mut subscriptions = Subscriptions::new(&line);
        let mut wants_after = |frame: &[u8], is_command| {
            subscriptions.note(&said(frame, is_command));
            (line.wants.load(Ordering::Relaxed), line.counts.subscribers.get())
        };
        let (yes, no) = ((true, 1), (false, 0));
        assert_eq!(wants_after(b"\x01other", false), no);
        assert_eq!(wants_after(b"\x00kv@", false), no, "what was not subscribed to");
        assert_eq!(wants_after(b"\x01kv@", false), yes);
        assert_eq!(wants_after(b"\x09SUBSCRIBEkv@pod", true), yes);
        assert_eq!(wants_after(b"\x00kv@", false), yes, "the other subscription is still there");
        assert_eq!(wants_after(b"\x00kv@", false), yes);
        assert_eq!(wants_after(b"\x06CANCELkv@pod", true), no);
        assert_eq!(wants_after(b"\x01kv@pod and more", false), no);
        assert_eq!(wants_after(b"\x01", false), yes);
        drop(subscriptions);
        assert_eq!((line.wants.load(Ordering::Relaxed), line.counts.subscribers.get()), no);
    }
}

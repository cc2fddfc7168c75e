//! What the cache tells routers and indexers, as vLLM does: `--kv-events-config`, a publisher that nobody can make
//! wait, and a replay of what somebody missed.
//!
//! The engine's thread numbers batches and puts them into a queue. A task takes them out, keeps the last of them, and
//! hands each to the queue of every subscriber; where a queue is full the batch is dropped and counted. What did not
//! even get into the first queue is made up for: the next batch tells everything anew.

mod endpoint;
mod publisher;
mod replay;
mod zmtp;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use quayline_engine::{BlockNames, Engine, EventBatch, Options};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::task::JoinHandle;

use self::endpoint::{Door, Endpoint};
use self::publisher::Publisher;
use crate::config::{json, switch};

/// What the cache tells others.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Events")]
pub(crate) struct KvEventsFlags {
    /// Tell routers what the cache holds and loses:
    /// {"enable_kv_cache_events": true, "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}
    #[arg(long, value_parser = json::<KvEventsConfig>, value_name = "JSON")]
    kv_events_config: Option<KvEventsConfig>,
    /// Which of several servers of one model this is: told in every batch, and added to the ports of events
    #[arg(long, default_value_t = 0)]
    data_parallel_rank: u16,
    /// Name blocks by numbers of 64 bits; otherwise by bytes
    #[arg(long, env = "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", value_parser = switch, default_value = "1",
        action = clap::ArgAction::Set, hide = true)]
    kv_events_use_int_block_hashes: bool,
}

/// vLLM's `KVEventsConfig`, with its defaults.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct KvEventsConfig {
    enable_kv_cache_events: bool,
    /// Whoever turns events on wants `zmq`.
    publisher: Option<PublisherName>,
    endpoint: Endpoint,
    replay_endpoint: Option<Endpoint>,
    /// Batches kept for a replay.
    buffer_steps: usize,
    /// Batches that may wait for one subscriber; 0 is any number.
    hwm: usize,
    /// Batches that may wait to be published; 0 is any number.
    max_queue_size: usize,
    topic: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PublisherName {
    Null,
    Zmq,
}

impl Default for KvEventsConfig {
    fn default() -> Self {
        Self {
            enable_kv_cache_events: false,
            publisher: None,
            endpoint: Endpoint::bound(5557),
            replay_endpoint: None,
            buffer_steps: 10_000,
            hwm: 100_000,
            max_queue_size: 100_000,
            topic: String::new(),
        }
    }
}

impl KvEventsFlags {
    fn config(&self) -> Option<&KvEventsConfig> {
        let config = self.kv_events_config.as_ref()?;
        let on = config.enable_kv_cache_events && config.publisher != Some(PublisherName::Null);
        on.then_some(config)
    }

    /// Adds what these flags say.
    pub(crate) fn add_to(&self, options: Options) -> Options {
        Options { kv_events: self.config().is_some(), ..options }
    }

    /// Opens the ports and begins to serve them; none if nothing is to be told.
    ///
    /// # Errors
    /// Which port could not be opened, and why.
    pub(crate) async fn open(&self) -> Result<Option<KvEvents>, String> {
        let Some(config) = self.config() else { return Ok(None) };
        let rank = self.data_parallel_rank;
        let refused = |endpoint: &Endpoint| {
            let place = endpoint.to_string();
            move |error: io::Error| format!("cannot publish events on {place}: {error}")
        };
        let endpoint = config.endpoint.of_rank(rank);
        let door = endpoint.open().await.map_err(refused(&endpoint))?;
        let replay = match &config.replay_endpoint {
            Some(endpoint) => {
                let endpoint = endpoint.of_rank(rank);
                Some(endpoint.bind().await.map_err(refused(&endpoint))?)
            }
            None => None,
        };
        let names = match self.kv_events_use_int_block_hashes {
            true => BlockNames::Low64,
            false => BlockNames::Whole,
        };
        Ok(Some(KvEvents::start(config, door, replay, names, rank.into())))
    }
}

/// Events that are being published.
#[derive(Debug)]
pub(crate) struct KvEvents {
    /// The engine's end.
    pub(crate) outlet: Outlet,
    /// Where one subscribes, unless the subscriber is called on, and where one asks for a replay, if one can.
    pub(crate) ports: [Option<u16>; 2],
    /// Ends when the engine's end is gone and subscribers have what was told.
    pub(crate) publisher: JoinHandle<()>,
}

impl KvEvents {
    fn start(
        config: &KvEventsConfig,
        door: Door,
        replay: Option<TcpListener>,
        names: BlockNames,
        rank: u32,
    ) -> Self {
        let counts = Arc::new(Counts::default());
        let (queue, batches) = bounded(config.max_queue_size);
        let port = |listener: &TcpListener| listener.local_addr().ok().map(|address| address.port());
        let ports = [door.listener(), replay.as_ref()].map(|listener| listener.and_then(port));
        let publisher = Publisher::new(config, door, replay, Arc::clone(&counts));
        let outlet = Outlet { queue, names, rank, counts };
        Self { outlet, ports, publisher: tokio::spawn(publisher.run(batches)) }
    }
}

/// A batch with its number, encoded.
struct Batch {
    number: u64,
    payload: Vec<u8>,
}

/// A queue of so many places; 0 is any number.
fn bounded<T>(places: usize) -> (Sender<T>, Receiver<T>) {
    const MOST: usize = tokio::sync::Semaphore::MAX_PERMITS;
    mpsc::channel(if places == 0 { MOST } else { places.min(MOST) })
}

/// Where the engine's thread leaves what it has to tell.
pub(crate) struct Outlet {
    queue: Sender<Batch>,
    names: BlockNames,
    rank: u32,
    /// What `/metrics` shows.
    pub(crate) counts: Arc<Counts>,
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl Outlet {
    /// Tells what this engine's cache does; none if it has nothing to tell.
    pub(crate) fn of(self, engine: &Engine) -> Option<Teller> {
        Some(Teller { batch: engine.event_batch(self.names)?, next: 0, outlet: self })
    }
}

/// Tells what an engine's cache does.
#[derive(Debug)]
pub(crate) struct Teller {
    outlet: Outlet,
    batch: EventBatch,
    next: u64,
}

impl Teller {
    /// Sends what has happened since this was last called. It waits for nobody.
    pub(crate) fn tell(&mut self, engine: &mut Engine) {
        if !self.batch.is_whole() && self.outlet.queue.capacity() == 0 {
            // Everything is not told anew before there is room for it.
            return;
        }
        engine.tell(&mut self.batch);
        let (events, counts) = (self.batch.len(), &self.outlet.counts);
        let Some(payload) = self.batch.take(unix_seconds(), Some(self.outlet.rank)) else { return };
        let number = self.next;
        // A number that never comes shows that something is missing.
        self.next += 1;
        if self.outlet.queue.try_send(Batch { number, payload }).is_ok() {
            counts.batches.add(1);
            counts.events.add(events.into());
        } else {
            counts.unpublished_batches.add(1);
            self.batch.lose();
        }
    }
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |passed| passed.as_secs_f64())
}

/// What was published, and what was not.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Batches that were published.
    pub(crate) batches: Count,
    /// Events in them.
    pub(crate) events: Count,
    /// Batches that found no room in the queue of the publisher.
    pub(crate) unpublished_batches: Count,
    /// Batches that found no room in a subscriber's queue, for each subscriber.
    pub(crate) missed_batches: Count,
    /// Batches that were sent again.
    pub(crate) replayed_batches: Count,
    /// Connections that subscribed to the topic and are there.
    pub(crate) subscribers: Count,
}

/// A number that several threads change.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn subtract(&self, less: u64) {
        self.0.fetch_sub(less, Ordering::Relaxed);
    }

    /// As it is now.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use quayline_engine::{ModelFiles, Request, RequestId, Sampling, Tick};

    use super::*;

    /// Serves one prompt to its end, of one block and a half, that begins with `first`.
    fn serve(engine: &mut Engine, first: u32) {
        let prompt: Vec<u32> = (0..24).map(|token| token + first).collect();
        let sampling = Sampling { max_tokens: Some(1), ..Sampling::default() };
        engine.add(Request { sampling, ..Request::new(RequestId(first.into()), prompt) }).unwrap();
        let mut outputs = Vec::new();
        while engine.has_work() {
            engine.step(Tick(0), &mut outputs);
        }
    }

    fn says(batch: &Batch, word: &str) -> usize {
        batch.payload.windows(word.len()).filter(|span| *span == word.as_bytes()).count()
    }

    #[test]
    fn a_batch_that_finds_no_room_is_made_up_for() {
        let options = Options { kv_events: true, ..Options::default() };
        let mut engine = Engine::load(&ModelFiles::bundled(), &options).unwrap();
        let (queue, mut batches) = bounded(1);
        let counts = Arc::new(Counts::default());
        let outlet = Outlet { queue, names: BlockNames::Low64, rank: 0, counts: Arc::clone(&counts) };
        let mut teller = outlet.of(&engine).unwrap();
        for first in [0, 100, 200] {
            serve(&mut engine, first);
            teller.tell(&mut engine);
        }
        assert_eq!(
            [counts.batches.get(), counts.unpublished_batches.get()],
            [1, 1],
            "the third was not tried"
        );
        let first = batches.try_recv().unwrap();
        assert_eq!((first.number, says(&first, "BlockStored")), (0, 1));
        teller.tell(&mut engine);
        let anew = batches.try_recv().unwrap();
        let told = (anew.number, says(&anew, "AllBlocksCleared"), says(&anew, "BlockStored"));
        assert_eq!(told, (2, 1, 3), "number 1 never comes");
        teller.tell(&mut engine);
        assert!(batches.try_recv().is_err(), "nothing has happened since");
    }

    #[test]
    fn an_engine_that_does_not_tell_has_no_teller() {
        let engine = Engine::load(&ModelFiles::bundled(), &Options::default()).unwrap();
        let (queue, _batches) = bounded(1);
        let outlet = Outlet { queue, names: BlockNames::Low64, rank: 0, counts: Arc::default() };
        assert!(outlet.of(&engine).is_none());
    }
}

//! Events as vLLM sends them: `KVEventBatch` of `vllm/distributed/kv_events.py` (0.33), in MessagePack as its `msgspec`
//! writes it. Facts about the form: a batch is the array `[seconds, [event, …], rank]`, an event is a map that begins
//! with its `type`, and fields that say nothing are left out.

use super::message_pack::MessagePack;
use super::{Event, Location, Snapshot, Stored};
use crate::id::count;
use crate::tier::Medium;
use crate::{BlockSize, Digest, TokenIndex};

/// How blocks are named in a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockNames {
    /// By the last 64 bits of their digests ([`Digest::low64`]), as numbers: vLLM's way unless it is told otherwise.
    #[default]
    Low64,
    /// By their whole digests, as bytes: vLLM's with `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0`.
    Whole,
}

/// Events on their way to routers and indexers that understand vLLM's: what was [added](EventBatch::add) is
/// [taken](EventBatch::take) as the bytes of one message.
///
/// Such a listener knows where blocks lie by medium (`GPU`, `CPU`, `STORAGE`), and can forget everything or single
/// blocks. So a block that goes from one disk to another is not mentioned, and what this language has no word for (one
/// of several places was cleared, or events were lost) is told anew: `AllBlocksCleared`, then all that can be found.
///
/// ```
/// # use quayline_kv_cache::*;
/// # let config = Config { events_max: 100, ..Config::new(BlockSize::new(4)?, BlockCount(9)) };
/// # let mut cache = KvCache::new(config)?;
/// let mut batch = EventBatch::new(cache.config().hash_unit(), BlockNames::Low64);
/// // After each step:
/// cache.drain_events(|number, event| batch.add(number, &event));
/// if !batch.is_whole() {
///     batch.begin_anew(&cache.snapshot().expect("this cache tells"));
/// }
/// if let Some(message) = batch.take(1_700_000_000.5, Some(0)) {
///     println!("{} bytes to be sent", message.len());
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EventBatch {
    unit: BlockSize,
    names: BlockNames,
    events: MessagePack,
    count: u32,
    /// The number that the next event should have.
    next: u64,
    is_whole: bool,
}

impl EventBatch {
    /// For the events, from the first on, of a cache that hashes `unit` many tokens at a time
    /// ([`Config::hash_unit`](crate::Config::hash_unit)).
    pub fn new(unit: BlockSize, names: BlockNames) -> EventBatch {
        EventBatch { unit, names, events: MessagePack::default(), count: 0, next: 0, is_whole: true }
    }

    /// Adds an event with its number, as [`KvCache::drain_events`](crate::KvCache::drain_events) shows it.
    pub fn add<D: Digest>(&mut self, number: u64, event: &Event<'_, D>) {
        self.is_whole &= number == self.next;
        self.next = number + 1;
        match event {
            Event::Stored(stored) => self.stored(stored),
            Event::Removed { block, group, location } => self.removed(block, group.0, *location),
            // That it lies elsewhere as well was told when it came there.
            Event::Moved { block, group, from, to } if medium(*from) != medium(*to) => {
                self.removed(block, group.0, *from);
            }
            Event::Moved { .. } => {}
            Event::Cleared { .. } => self.is_whole = false,
        }
    }

    /// Whether everything that happened could be added. If not, [`begin_anew`](EventBatch::begin_anew) before the next
    /// batch is taken.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// A batch that was taken did not get where it should: from here on nothing that is added makes sense, until it is
    /// begun anew.
    pub fn lose(&mut self) {
        self.is_whole = false;
    }

    /// In the place of what was added: forget everything, and then what can be found now.
    pub fn begin_anew<D: Digest>(&mut self, snapshot: &Snapshot<D>) {
        self.events.bytes.clear();
        self.events.fields(1);
        self.tag("AllBlocksCleared");
        self.count = 1;
        snapshot.stored().for_each(|stored| self.stored(&stored));
        (self.next, self.is_whole) = (snapshot.next_event(), true);
    }

    /// How many events the next batch has.
    pub fn len(&self) -> u32 {
        self.count
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The bytes of a batch, at so many seconds after the beginning of 1970; none if nothing happened. `rank` says
    /// which of several caches that serve the same model this is; vLLM's is 0 where there is one.
    pub fn take(&mut self, seconds: f64, rank: Option<u32>) -> Option<Vec<u8>> {
        if self.is_empty() {
            return None;
        }
        let mut batch = MessagePack { bytes: Vec::with_capacity(self.events.bytes.len() + 20) };
        batch.array(3);
        batch.float(seconds);
        batch.array(self.count as usize);
        batch.bytes.append(&mut self.events.bytes);
        match rank {
            Some(rank) => batch.unsigned(rank.into()),
            None => batch.nil(),
        }
        self.count = 0;
        Some(batch.bytes)
    }

    fn stored<D: Digest>(&mut self, stored: &Stored<'_, D>) {
        // Of some blocks in tiers nothing is known but the name. vLLM tells of all its tiers' blocks so, with a size
        // of 0 (`take_events` of its offloading connector's scheduler).
        let is_known = !stored.tokens.is_empty();
        let looks_ahead = is_known && !stored.lookahead.is_empty();
        self.count += 1;
        self.events.fields_of_many(9 + u8::from(is_known) + u8::from(looks_ahead));
        self.tag("BlockStored");
        self.events.text("block_hashes");
        self.events.array(stored.blocks.len());
        stored.blocks.iter().for_each(|block| self.name(block));
        self.events.text("parent_block_hash");
        match &stored.parent {
            Some(parent) => self.name(parent),
            None => self.events.nil(),
        }
        self.events.text("token_ids");
        self.events.integers(stored.tokens);
        self.events.text("block_size");
        self.events.unsigned(size(stored) as u64);
        // An adapter's number is deprecated for its name.
        self.events.text("lora_id");
        self.events.nil();
        self.events.text("medium");
        self.events.text(medium(stored.location));
        self.events.text("lora_name");
        match stored.key.adapter {
            Some(adapter) => self.events.text(adapter.name),
            None => self.events.nil(),
        }
        if is_known {
            self.extra_keys(stored);
        }
        self.group(stored.group.0);
        if looks_ahead {
            self.lookahead(stored);
        }
    }

    /// Of each block what its name covers besides tokens; nil, if that is nothing.
    fn extra_keys<D>(&mut self, stored: &Stored<'_, D>) {
        let size = size(stored);
        self.events.text("extra_keys");
        self.events.array(stored.blocks.len());
        for block in 0..stored.blocks.len() {
            let first = TokenIndex(stored.first.0 + count(block * size));
            self.extra_keys_of(stored, first, size);
        }
    }

    fn extra_keys_of<D>(&mut self, stored: &Stored<'_, D>, first: TokenIndex, size: usize) {
        let unit = self.unit.len();
        let end = u64::from(first.0) + (size + stored.lookahead.len()) as u64;
        let index = first.0 as usize / unit;
        let extra = stored.key.extra(index, first, end);
        // The chain carries the salt of its first block on.
        let salt = extra.salt.filter(|_| first == TokenIndex(0));
        let units = if extra.embeds.is_some() { size.div_ceil(unit) } else { 0 };
        let keys = [extra.adapter.is_some(), salt.is_some()].map(usize::from).iter().sum::<usize>();
        if keys + extra.media.len() + units == 0 {
            return self.events.nil();
        }
        self.events.array(keys + extra.media.len() + units);
        if let Some(adapter) = extra.adapter {
            self.events.text(adapter.name);
        }
        for item in extra.media {
            self.events.array(2);
            self.events.text(&item.id);
            self.events.signed(item.offset_from(first));
        }
        if let Some(salt) = salt {
            self.events.text(salt);
        }
        for unit in index..index + units {
            if let Some(digest) = stored.key.extra(unit, first, end).embeds {
                self.events.binary(digest);
            }
        }
    }

    /// Behind each block the tokens that its name covers as well.
    fn lookahead<D>(&mut self, stored: &Stored<'_, D>) {
        let (size, ahead) = (size(stored), stored.lookahead.len());
        let all = [stored.tokens, stored.lookahead].concat();
        self.events.text("lookahead_token_ids");
        self.events.array(stored.blocks.len());
        for span in all.windows(size + ahead).step_by(size) {
            self.events.integers(&span[size..]);
        }
    }

    fn removed<D: Digest>(&mut self, block: &D, group: u8, location: Location) {
        self.count += 1;
        self.events.fields(4);
        self.tag("BlockRemoved");
        self.events.text("block_hashes");
        self.events.array(1);
        self.name(block);
        self.events.text("medium");
        self.events.text(medium(location));
        self.group(group);
    }

    fn tag(&mut self, name: &str) {
        self.events.text("type");
        self.events.text(name);
    }

    fn group(&mut self, group: u8) {
        self.events.text("group_idx");
        self.events.unsigned(group.into());
    }

    fn name<D: Digest>(&mut self, block: &D) {
        match self.names {
            BlockNames::Low64 => self.events.unsigned(block.low64()),
            BlockNames::Whole => self.events.binary(block.bytes()),
        }
    }
}

/// Tokens of each block.
fn size<D>(stored: &Stored<'_, D>) -> usize {
    stored.tokens.len() / stored.blocks.len().max(1)
}

fn medium(location: Location) -> &'static str {
    match location {
        Location::Device => "GPU",
        Location::Tier { medium: Medium::Host, .. } => "CPU",
        Location::Tier { .. } => "STORAGE",
    }
}

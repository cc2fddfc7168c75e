//! Pins: prefixes that stay in the cache though nobody uses them.

use std::collections::{BTreeMap, BTreeSet};

use crate::blocks::Leaving;
use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::id::count;
use crate::kind::Holds;
use crate::{BlockCount, BlockId, Error, GroupId, KvCache, PinId, SequenceId, Tick, TokenCount};

/// The answer to a wish to pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "what was refused is not pinned"]
pub enum Pinned {
    /// The blocks stay until the pin goes.
    Held {
        /// Blocks of this pin.
        blocks: BlockCount,
    },
    /// [`Config::pinned_blocks_max`](crate::Config::pinned_blocks_max) would be passed. Nothing has changed.
    OverCap {
        /// Blocks that all pins would hold together.
        need: BlockCount,
        /// Blocks that they hold.
        pinned: BlockCount,
        /// The most they may.
        max: BlockCount,
    },
    /// Free blocks would be pinned that are set aside for sequences whose K and V are on their way. Nothing has
    /// changed.
    SetAside {
        /// Free blocks that the pin would take.
        need: BlockCount,
        /// Free blocks that are not set aside.
        free: BlockCount,
    },
}

/// One pin.
#[derive(Clone, Debug)]
struct Pin {
    blocks: Vec<Leaving>,
    until: Option<Tick>,
}

/// All pins. Memory for the counts is taken with the first one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pins {
    pins: BTreeMap<PinId, Pin>,
    due: BTreeSet<(Tick, PinId)>,
    /// By block: pins that hold it.
    holds: Vec<u32>,
    /// Blocks that a pin holds, each counted once.
    distinct: u32,
}

impl Pins {
    /// Blocks that pins hold.
    pub(crate) fn blocks(&self) -> BlockCount {
        BlockCount(self.distinct)
    }

    /// Pins that hold `block`.
    pub(crate) fn of(&self, block: BlockId) -> u32 {
        self.holds.get(block.index()).copied().unwrap_or(0)
    }

    /// Whether the counts are what the pins say.
    pub(crate) fn is_sound(&self) -> bool {
        let mut holds = vec![0; self.holds.len()];
        for leaving in self.pins.values().flat_map(|pin| &pin.blocks) {
            holds[leaving.block.index()] += 1;
        }
        let distinct = holds.iter().filter(|&&holds| holds > 0).count();
        let due = self.pins.iter().filter_map(|(&id, pin)| Some((pin.until?, id))).collect();
        self.holds == holds && self.distinct as usize == distinct && self.due == due
    }

    fn hold(&mut self, blocks: &[Leaving]) {
        for leaving in blocks {
            let holds = &mut self.holds[leaving.block.index()];
            self.distinct += u32::from(*holds == 0);
            *holds += 1;
        }
    }

    fn let_go(&mut self, blocks: &[Leaving]) {
        for leaving in blocks {
            let holds = &mut self.holds[leaving.block.index()];
            *holds -= 1;
            self.distinct -= u32::from(*holds == 0);
        }
    }

    fn insert(&mut self, id: PinId, pin: Pin) {
        self.due.extend(pin.until.map(|until| (until, id)));
        self.pins.insert(id, pin);
    }

    fn remove(&mut self, id: PinId) -> Option<Pin> {
        let pin = self.pins.remove(&id)?;
        if let Some(until) = pin.until {
            self.due.remove(&(until, id));
        }
        Some(pin)
    }
}

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Keeps what can be found of a sequence's first `tokens` tokens in the cache, until [`unpin`](KvCache::unpin) or,
    /// if a time is given, until [`expire`](KvCache::expire) is told that it has come. A sequence that holds nothing
    /// pins what its lookup finds; after that it may be closed. A pin of the same name is replaced.
    ///
    /// Pinned blocks are neither free nor evicted, and count against
    /// [`Config::pinned_blocks_max`](crate::Config::pinned_blocks_max), a block of several pins once.
    ///
    /// Cost: O(blocks pinned).
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn pin(
        &mut self,
        pin: PinId,
        sequence: SequenceId,
        tokens: TokenCount,
        until: Option<Tick>,
    ) -> Result<Pinned, Error> {
        let place = self.sequences.place(sequence)?;
        let holds_nothing = self.sequences.at(place).tables.are_empty();
        if holds_nothing {
            self.find_prefix(place);
        }
        let mut blocks = Vec::new();
        for ((_, group), table) in self.groups.iter().zip(self.sequences.at(place).tables.iter()) {
            let table = if holds_nothing { &table.found } else { &table.blocks };
            let full = group.size.full_blocks(tokens).get() as usize;
            blocks.extend(self.leaving(&table[..full.min(table.len())], group.holds));
        }
        Ok(self.pin_blocks(pin, blocks, until))
    }

    /// Keeps the blocks of `hashes`, which are those of a sequence's beginning, as far as they are cached: in groups
    /// that keep every token up to the first that is not. Otherwise as [`pin`](KvCache::pin).
    pub fn pin_hashes(&mut self, pin: PinId, hashes: &[H::Digest], until: Option<Tick>) -> Pinned {
        let mut blocks = Vec::new();
        for (id, group) in self.groups.iter() {
            let stride = (group.size.get() / self.groups.unit.get()) as usize;
            let found = hashes.iter().skip(stride - 1).step_by(stride).map(|&hash| self.full_block(id, hash));
            let found: Vec<BlockId> = match group.holds {
                Holds::EveryToken => found.take_while(|&block| block != BlockId::NULL).collect(),
                _ => found.collect(),
            };
            blocks.extend(self.leaving(&found, group.holds));
        }
        self.pin_blocks(pin, blocks, until)
    }

    /// Ends a pin. Its blocks are free if nobody else holds them, in the order in which a sequence's would be. Answers
    /// how many it held.
    ///
    /// # Errors
    /// [`Error::NoSuchPin`].
    pub fn unpin(&mut self, pin: PinId) -> Result<BlockCount, Error> {
        let pin = self.pins.remove(pin).ok_or(Error::NoSuchPin { pin })?;
        Ok(self.end(pin))
    }

    /// Ends all pins whose time is `now` or was before. Answers how many blocks they held.
    ///
    /// Cost: O(1) when there is none.
    pub fn expire(&mut self, now: Tick) -> BlockCount {
        let mut blocks = 0;
        while let Some(&(_, id)) = self.pins.due.first().filter(|&&(until, _)| until <= now) {
            blocks += self.unpin(id).map_or(0, BlockCount::get);
        }
        BlockCount(blocks)
    }

    /// The pins by name: how many blocks each holds, and until when.
    pub fn pins(&self) -> impl Iterator<Item = (PinId, BlockCount, Option<Tick>)> + '_ {
        self.pins.pins.iter().map(|(&id, pin)| (id, BlockCount(count(pin.blocks.len())), pin.until))
    }

    /// Ends all pins, as the content that they keep is worth nothing any more.
    pub(crate) fn unpin_all(&mut self) {
        while let Some((&id, _)) = self.pins.pins.first_key_value() {
            self.unpin(id).expect("a pin that is listed can be ended");
        }
    }

    /// The oldest block that is found under `hash` in full, else the null block.
    fn full_block(&self, group: GroupId, hash: H::Digest) -> BlockId {
        let found = self.blocks.prefix.get(group, hash);
        found.filter(|&block| self.hash_of(block) == Some(hash)).unwrap_or(BlockId::NULL)
    }

    fn pin_blocks(&mut self, id: PinId, blocks: Vec<Leaving>, until: Option<Tick>) -> Pinned {
        let KvCache { pins, config, .. } = self;
        pins.holds.resize(config.block_count.get() as usize, 0);
        let old = pins.remove(id);
        let pinned = pins.blocks();
        pins.hold(&blocks);
        old.iter().for_each(|pin| pins.let_go(&pin.blocks));
        let refusal = self.refusal(&blocks, pinned);
        let pins = &mut self.pins;
        if let Some(refusal) = refusal {
            old.iter().for_each(|pin| pins.hold(&pin.blocks));
            pins.let_go(&blocks);
            old.into_iter().for_each(|pin| pins.insert(id, pin));
            return refusal;
        }
        let held = BlockCount(count(blocks.len()));
        blocks.iter().for_each(|leaving| self.blocks.pool.hold(leaving.block));
        pins.insert(id, Pin { blocks, until });
        if let Some(pin) = old {
            self.blocks.release(pin.blocks.into_iter().rev());
            self.drop_unwanted_copies();
        }
        Pinned::Held { blocks: held }
    }

    /// Why `blocks`, which are counted already, cannot be pinned.
    fn refusal(&self, blocks: &[Leaving], pinned: BlockCount) -> Option<Pinned> {
        let (need, max) = (self.pins.blocks(), self.config.pinned_blocks_max);
        if need > max && need > pinned {
            return Some(Pinned::OverCap { need, pinned, max });
        }
        let pool = &self.blocks.pool;
        let need = count(blocks.iter().filter(|leaving| pool.references(leaving.block) == 0).count());
        let free = pool.free().get() - self.reserved.get();
        (need > free).then_some(Pinned::SetAside { need: BlockCount(need), free: BlockCount(free) })
    }

    fn end(&mut self, pin: Pin) -> BlockCount {
        self.pins.let_go(&pin.blocks);
        let held = BlockCount(count(pin.blocks.len()));
        self.blocks.release(pin.blocks.into_iter().rev());
        self.drop_unwanted_copies();
        held
    }

    /// The blocks of a table that can be found, as they will leave it, each with the one that its content needs.
    fn leaving<'a>(&'a self, table: &'a [BlockId], holds: Holds) -> impl Iterator<Item = Leaving> + 'a {
        let is_kept = |block| block != BlockId::NULL && self.blocks.prefix.contains(block);
        let kept = table.iter().enumerate().filter(move |&(_, &block)| is_kept(block));
        kept.map(move |(index, &block)| {
            let before = index.checked_sub(1).map(|before| table[before]);
            let before = before.filter(|&before| holds == Holds::EveryToken && is_kept(before));
            Leaving { block, index: count(index), before }
        })
    }
}

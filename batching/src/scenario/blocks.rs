//! A small paged memory with a prefix cache, for scenarios and tests: written to be read, not to be fast.

use std::collections::BTreeMap;

use crate::{Memory, Need, RequestId, Room};

/// Keys and values in blocks of `block_tokens`, shared by content.
///
/// A block that a request fills is found by others from the moment room for its last token is granted.
/// Blocks that nobody uses stay until the room is needed; the one unused for longest goes first, of a text
/// the end before the beginning.
#[derive(Debug, Clone)]
pub struct BlockMemory {
    block_tokens: u32,
    blocks: u32,
    caching: bool,
    texts: BTreeMap<RequestId, Text>,
    /// By the whole text up to the end of the block.
    cached: BTreeMap<Vec<u64>, Cached>,
    clock: u64,
}

/// A request's tokens and what it holds.
#[derive(Debug, Clone, Default)]
struct Text {
    tokens: Vec<u64>,
    /// For each block whether it is one of the cached.
    held: Vec<bool>,
    /// Full blocks that were offered to others, now and before the last grant.
    offered: usize,
    offered_before: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cached {
    users: u32,
    last_use: u64,
}

impl BlockMemory {
    /// `blocks` blocks of `block_tokens` tokens. Without `caching` nothing is shared.
    ///
    /// # Panics
    /// If `block_tokens` is zero.
    pub fn new(blocks: u32, block_tokens: u32, caching: bool) -> BlockMemory {
        assert!(block_tokens > 0, "a block holds at least one token");
        BlockMemory {
            block_tokens,
            blocks,
            caching,
            texts: BTreeMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Tells the memory a request's prompt. A token is any number; equal numbers are equal tokens.
    pub fn open(&mut self, id: RequestId, prompt: Vec<u64>) {
        self.texts.insert(id, Text { tokens: prompt, ..Text::default() });
    }

    /// Tells the memory a token that a request generated.
    pub fn push(&mut self, id: RequestId, token: u64) {
        self.text_mut(id).tokens.push(token);
    }

    /// Forgets a request that holds nothing any more.
    pub fn close(&mut self, id: RequestId) {
        self.texts.remove(&id);
    }

    /// Blocks that can be had: empty ones, and cached ones that nobody uses.
    pub fn free(&self) -> u32 {
        let used = self.cached.values().filter(|cached| cached.users > 0).count();
        self.blocks - self.private() - len(used)
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.blocks
    }

    /// How many blocks a request holds.
    pub fn held(&self, id: RequestId) -> u32 {
        self.texts.get(&id).map_or(0, |text| len(text.held.len()))
    }

    fn text(&self, id: RequestId) -> &Text {
        self.texts.get(&id).expect("the memory was told of every request")
    }

    fn text_mut(&mut self, id: RequestId) -> &mut Text {
        self.texts.get_mut(&id).expect("the memory was told of every request")
    }

    fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// The text up to the end of the `block`th block.
    fn key(&self, id: RequestId, block: usize) -> Vec<u64> {
        self.text(id).tokens[..(block + 1) * self.block_tokens as usize].to_vec()
    }

    /// Blocks held by one request alone.
    fn private(&self) -> u32 {
        len(self.texts.values().flat_map(|text| &text.held).filter(|&&cached| !cached).count())
    }

    /// Leading blocks of a text that are here; not the one with the last token.
    fn hits(&self, id: RequestId) -> usize {
        let full = (self.text(id).tokens.len() - 1) / self.block_tokens as usize;
        if self.caching {
            (0..full).take_while(|&block| self.cached.contains_key(&self.key(id, block))).count()
        } else {
            0
        }
    }

    fn unused_among(&self, id: RequestId, hits: usize) -> u32 {
        len((0..hits).filter(|&block| self.cached[&self.key(id, block)].users == 0).count())
    }

    /// An empty block, by way of the cached one that is missed least.
    fn take_block(&mut self) {
        if self.private() + len(self.cached.len()) < self.blocks {
            return;
        }
        let unused = self.cached.iter().filter(|(_, cached)| cached.users == 0);
        let oldest = unused.min_by_key(|(key, cached)| (cached.last_use, std::cmp::Reverse(key.len())));
        let key = oldest.expect("free blocks were counted before one is taken").0.clone();
        self.cached.remove(&key);
    }

    /// Lets others find the full blocks among the first `tokens`.
    fn offer(&mut self, id: RequestId, tokens: u32) {
        let known = self.text(id).tokens.len();
        let full = (tokens as usize).min(known) / self.block_tokens as usize;
        let offered = self.text(id).offered;
        self.text_mut(id).offered_before = offered;
        for block in offered..full {
            let key = self.key(id, block);
            if !self.cached.contains_key(&key) {
                self.cached.insert(key, Cached { users: 1, last_use: self.clock });
                self.text_mut(id).held[block] = true;
            }
        }
        self.text_mut(id).offered = full.max(offered);
    }
}

impl Memory for BlockMemory {
    fn cached_tokens(&mut self, id: RequestId) -> u32 {
        len(self.hits(id)) * self.block_tokens
    }

    fn allocate(&mut self, id: RequestId, need: Need) -> Room {
        let held = self.text(id).held.len();
        let hits = if held == 0 { (need.computed_tokens / self.block_tokens) as usize } else { 0 };
        let target = self.blocks_for(need.held_tokens());
        let whole = self.blocks_for(need.whole_tokens.unwrap_or(0)).max(target);
        if whole > self.blocks {
            return Room::Never { need: whole, total: self.blocks };
        }
        let wanted = whole.saturating_sub(len(held + hits)) + self.unused_among(id, hits);
        let (need_blocks, free) = (wanted + self.blocks_for(need.watermark_tokens), self.free());
        if need_blocks > free {
            return Room::Short { need: need_blocks, free };
        }
        self.clock += 1;
        for block in 0..hits {
            let key = self.key(id, block);
            self.cached.get_mut(&key).expect("a hit is cached").users += 1;
            self.text_mut(id).held.push(true);
            self.text_mut(id).offered = block + 1;
        }
        for _ in held + hits..target as usize {
            self.take_block();
            self.text_mut(id).held.push(false);
        }
        if self.caching {
            self.offer(id, need.held_tokens());
            // It wants to be asked in every step, to offer a block in the step that fills it.
            return Room::Granted { covered_tokens: need.held_tokens() };
        }
        Room::Granted { covered_tokens: len(self.text(id).held.len()) * self.block_tokens }
    }

    fn withdraw(&mut self, id: RequestId) {
        let (from, to) = (self.text(id).offered_before, self.text(id).offered);
        for block in from..to {
            if std::mem::take(&mut self.text_mut(id).held[block]) {
                let key = self.key(id, block);
                self.cached.remove(&key);
            }
        }
        self.text_mut(id).offered = from;
    }

    fn release(&mut self, id: RequestId) {
        self.clock += 1;
        let clock = self.clock;
        let held = std::mem::take(&mut self.text_mut(id).held);
        for (block, _) in held.iter().enumerate().filter(|&(_, &cached)| cached) {
            let key = self.key(id, block);
            let cached = self.cached.get_mut(&key).expect("a block in use is not evicted");
            cached.users -= 1;
            cached.last_use = clock;
        }
        let text = self.text_mut(id);
        (text.offered, text.offered_before) = (0, 0);
    }
}

fn len(count: usize) -> u32 {
    u32::try_from(count).expect("scenarios are small")
}

//! A small paged memory with a prefix cache, for scenarios and tests: written to be read, not to be fast.

use std::collections::BTreeMap;

use crate::{Memory, Need, Remote, RequestId, Room};

/// Keys and values in blocks of `block_tokens`, shared by content.
///
/// A block that a request fills is found by others from the moment room for its last token is granted.
/// Blocks that nobody uses stay until the room is needed; the one unused for longest goes first, of a text
/// the end before the beginning.
#[derive(Debug, Clone)]
pub struct BlockMemory {
    block_tokens: u32,
    caching: bool,
    /// Tokens that attention looks back; blocks behind are given away.
    window: Option<u32>,
    blocks: Vec<Block>,
    /// By the whole text up to the end of the block.
    cached: BTreeMap<Vec<u64>, usize>,
    texts: BTreeMap<RequestId, Text>,
    host_blocks: u32,
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    users: u32,
    key: Option<Vec<u64>>,
    last_use: u64,
}

/// A request's tokens and what it holds.
#[derive(Debug, Clone)]
struct Text {
    tokens: Vec<u64>,
    /// `None` for a block that fell out of the window.
    table: Vec<Option<usize>>,
    /// Full blocks that were offered to others, now and before the last grant.
    offered: usize,
    offered_before: usize,
    swapped_blocks: Option<u32>,
    remote: Remote,
    closed: bool,
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
            caching,
            window: None,
            blocks: vec![Block::default(); blocks as usize],
            cached: BTreeMap::new(),
            texts: BTreeMap::new(),
            host_blocks: 0,
            clock: 0,
        }
    }

    /// With a slower tier of so many blocks.
    #[must_use]
    pub fn with_host_blocks(self, host_blocks: u32) -> BlockMemory {
        BlockMemory { host_blocks, ..self }
    }

    /// With attention that looks back so many tokens only.
    #[must_use]
    pub fn with_window(self, window: Option<u32>) -> BlockMemory {
        BlockMemory { window, ..self }
    }

    /// Tells the memory a request's prompt. A token is any number; equal numbers are equal tokens.
    pub fn open(&mut self, id: RequestId, prompt: Vec<u64>) {
        let text = Text {
            tokens: prompt,
            table: Vec::new(),
            offered: 0,
            offered_before: 0,
            swapped_blocks: None,
            remote: Remote::Nothing,
            closed: false,
        };
        self.texts.insert(id, text);
    }

    /// Tells the memory what another machine has of a request.
    pub fn set_remote(&mut self, id: RequestId, remote: Remote) {
        self.text_mut(id).remote = remote;
    }

    /// Tells the memory a token that a request generated.
    pub fn push(&mut self, id: RequestId, token: u64) {
        self.text_mut(id).tokens.push(token);
    }

    /// Tells the memory that a request knows the same tokens as another, which it was forked from.
    pub fn copy_text(&mut self, parent: RequestId, child: RequestId) {
        let tokens = self.text(parent).tokens.clone();
        if !self.texts.contains_key(&child) {
            self.open(child, Vec::new());
        }
        self.text_mut(child).tokens = tokens;
    }

    /// Forgets a request, as soon as it holds nothing any more.
    pub fn close(&mut self, id: RequestId) {
        if let Some(text) = self.texts.get_mut(&id) {
            text.closed = true;
            if text.table.is_empty() && text.swapped_blocks.is_none() {
                self.texts.remove(&id);
            }
        }
    }

    /// Blocks that can be had: empty ones, and cached ones that nobody uses.
    pub fn free(&self) -> u32 {
        len(self.blocks.iter().filter(|block| block.users == 0).count())
    }

    /// Blocks in all.
    pub fn total(&self) -> u32 {
        len(self.blocks.len())
    }

    /// Free blocks of the slower tier.
    pub fn host_free(&self) -> u32 {
        self.host_blocks
    }

    /// How many blocks a request holds.
    pub fn held(&self, id: RequestId) -> u32 {
        self.texts.get(&id).map_or(0, |text| len(text.table.iter().flatten().count()))
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

    /// Leading blocks of a text that are here; not the one with the last token.
    fn hits(&self, id: RequestId) -> usize {
        let full = (self.text(id).tokens.len() - 1) / self.block_tokens as usize;
        if self.caching {
            (0..full).take_while(|&block| self.cached.contains_key(&self.key(id, block))).count()
        } else {
            0
        }
    }

    fn hit(&self, id: RequestId, block: usize) -> usize {
        self.cached[&self.key(id, block)]
    }

    fn hold(&mut self, id: RequestId, block: usize) {
        self.blocks[block].users += 1;
        self.text_mut(id).table.push(Some(block));
    }

    fn let_go(&mut self, block: usize) {
        self.blocks[block].users -= 1;
        self.blocks[block].last_use = self.clock;
    }

    /// An empty block, by way of the cached one that is missed least.
    fn take_block(&mut self) -> usize {
        let unused = self.blocks.iter().enumerate().filter(|(_, block)| block.users == 0);
        let oldest = unused.min_by_key(|(_, block)| match &block.key {
            None => (0, std::cmp::Reverse(0)),
            Some(key) => (block.last_use, std::cmp::Reverse(key.len())),
        });
        let (place, _) = oldest.expect("free blocks were counted before one is taken");
        self.hide(place);
        place
    }

    /// Nobody finds the block any more.
    fn hide(&mut self, block: usize) {
        if let Some(key) = self.blocks[block].key.take() {
            self.cached.remove(&key);
        }
    }

    /// The block that the request writes into first, if it must have a copy of its own for that.
    fn copied_on_write(&self, id: RequestId, computed_tokens: u32) -> Option<usize> {
        let place = (computed_tokens / self.block_tokens) as usize;
        let block = (*self.text(id).table.get(place)?)?;
        (self.blocks[block].users > 1).then_some(place)
    }

    /// Lets others find the full blocks among the first `tokens`.
    fn offer(&mut self, id: RequestId, tokens: u32) {
        let known = self.text(id).tokens.len();
        let full = (tokens as usize).min(known) / self.block_tokens as usize;
        let offered = self.text(id).offered;
        self.text_mut(id).offered_before = offered;
        for place in offered..full {
            let key = self.key(id, place);
            if let Some(block) = self.text(id).table[place]
                && !self.cached.contains_key(&key)
                && self.blocks[block].key.is_none()
            {
                self.blocks[block].key = Some(key.clone());
                self.cached.insert(key, block);
            }
        }
        self.text_mut(id).offered = full.max(offered);
    }

    /// Takes back what was offered from the `from`th block on.
    fn hide_from(&mut self, id: RequestId, from: usize) {
        for place in from..self.text(id).offered {
            if let Some(block) = self.text(id).table[place] {
                self.hide(block);
            }
        }
        let text = self.text_mut(id);
        text.offered = text.offered.min(from);
    }

    /// Gives away what the window has left behind.
    fn leave_window(&mut self, id: RequestId, settled_tokens: u32) {
        let Some(window) = self.window else { return };
        let outside = (settled_tokens + 1).saturating_sub(window) / self.block_tokens;
        for place in 0..(outside as usize).min(self.text(id).table.len()) {
            if let Some(block) = self.text_mut(id).table[place].take() {
                self.let_go(block);
            }
        }
    }

    fn take_room(&mut self, id: RequestId, hits: usize, need: Need) -> Room {
        let held = self.text(id).table.len();
        let target = self.blocks_for(need.held_tokens());
        let whole = self.blocks_for(need.whole_tokens.unwrap_or(0)).max(target);
        if whole > self.total() {
            return Room::Never { need: whole, total: self.total() };
        }
        let copied = self.copied_on_write(id, need.computed_tokens);
        let unused = (0..hits).filter(|&place| self.blocks[self.hit(id, place)].users == 0).count();
        let wanted = whole.saturating_sub(len(held + hits)) + len(unused) + u32::from(copied.is_some());
        let spare = self.blocks_for(need.watermark_tokens) + self.blocks_for(need.reserved_tokens);
        let (need_blocks, free) = (wanted + spare, self.free());
        if need_blocks > free {
            return Room::Short { need: need_blocks, free };
        }
        self.clock += 1;
        for place in 0..hits {
            self.hold(id, self.hit(id, place));
            self.text_mut(id).offered = place + 1;
        }
        if let Some(place) = copied {
            let (former, own) = (self.text(id).table[place], self.take_block());
            self.blocks[own].users = 1;
            self.text_mut(id).table[place] = Some(own);
            former.into_iter().for_each(|former| self.let_go(former));
        }
        for _ in held + hits..target as usize {
            let block = self.take_block();
            self.hold(id, block);
        }
        if self.caching {
            // What another machine sends is not here before it has come.
            let loads = need.external_tokens > 0 && need.new_tokens == 0;
            self.offer(id, if loads { need.computed_tokens } else { need.findable_tokens() });
        }
        if self.caching || self.window.is_some() {
            // It wants to be asked in every step: to offer a block in the step that fills it, or to give
            // one away.
            return Room::Granted { covered_tokens: need.held_tokens() };
        }
        Room::Granted { covered_tokens: len(self.text(id).table.len()) * self.block_tokens }
    }
}

impl Memory for BlockMemory {
    fn cached_tokens(&mut self, id: RequestId) -> u32 {
        len(self.hits(id)) * self.block_tokens
    }

    fn allocate(&mut self, id: RequestId, need: Need) -> Room {
        self.leave_window(id, need.settled_tokens);
        let fresh = self.text(id).table.is_empty();
        let hits = if fresh { (need.computed_tokens / self.block_tokens) as usize } else { 0 };
        let room = self.take_room(id, hits, need);
        if matches!(room, Room::Granted { .. }) && need.external_tokens > 0 {
            self.text_mut(id).remote = Remote::Nothing;
        }
        room
    }

    fn withdraw(&mut self, id: RequestId) {
        let from = self.text(id).offered_before;
        self.hide_from(id, from);
    }

    fn release(&mut self, id: RequestId) {
        self.clock += 1;
        let table = std::mem::take(&mut self.text_mut(id).table);
        table.into_iter().flatten().for_each(|block| self.let_go(block));
        let text = self.text_mut(id);
        (text.offered, text.offered_before) = (0, 0);
        let swapped = text.swapped_blocks.take().unwrap_or(0);
        let closed = text.closed;
        self.host_blocks += swapped;
        if closed {
            self.texts.remove(&id);
        }
    }

    fn rounded_tokens(&self, tokens: u32) -> u32 {
        self.blocks_for(tokens) * self.block_tokens
    }

    fn swap_out(&mut self, id: RequestId, tokens: u32) -> u32 {
        let blocks = self.blocks_for(tokens);
        if blocks > self.host_blocks {
            return 0;
        }
        self.release(id);
        self.host_blocks -= blocks;
        self.text_mut(id).swapped_blocks = Some(blocks);
        tokens
    }

    fn swap_in(&mut self, id: RequestId, need: Need) -> Room {
        let room = self.take_room(id, 0, need);
        if matches!(room, Room::Granted { .. }) {
            self.host_blocks += self.text_mut(id).swapped_blocks.take().unwrap_or(0);
        }
        room
    }

    fn fork(&mut self, parent: RequestId, child: RequestId, tokens: u32) -> bool {
        // Who asked for another sample of a prompt has nothing of what the first has generated.
        let known = self.texts.get(&child).map(|text| text.tokens.len());
        self.copy_text(parent, child);
        self.text_mut(child).tokens.truncate(known.unwrap_or(usize::MAX));
        let blocks = self.blocks_for(tokens);
        for place in 0..blocks as usize {
            let block = self.text(parent).table[place];
            block.into_iter().for_each(|block| self.blocks[block].users += 1);
            self.text_mut(child).table.push(block);
        }
        let offered = self.text(parent).offered.min((tokens / self.block_tokens) as usize);
        let text = self.text_mut(child);
        (text.offered, text.offered_before) = (offered, offered);
        true
    }

    fn remote_tokens(&mut self, id: RequestId, _: u32) -> Remote {
        self.text(id).remote
    }

    fn publish(&mut self, id: RequestId, tokens: u32) {
        if self.caching {
            self.offer(id, tokens);
        }
    }

    fn truncate(&mut self, id: RequestId, tokens: u32) {
        self.hide_from(id, (tokens / self.block_tokens) as usize);
    }
}

fn len(count: usize) -> u32 {
    u32::try_from(count).expect("scenarios are small")
}

//! The longest cached prefix that every group can use.
//!
//! Groups that keep every token are asked first: what they have ends at the first hole. Each other group can only
//! make it shorter: a window needs the blocks before the end of the hit, a state needs the end itself. What one group
//! cut may cost another its window, so that they are asked in turn until nothing changes.

use crate::group::{Group, Groups};
use crate::kind::Holds;
use crate::prefix::Prefix;
use crate::sequence::{Table, Tables};
use crate::{BlockCount, BlockId, Digest, GroupId, Hit, TokenCount};

/// Where a search looks, and for whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search<'a, D> {
    pub(crate) groups: &'a Groups,
    pub(crate) prefix: &'a Prefix<D>,
    pub(crate) hashes: &'a [D],
    pub(crate) prompt: TokenCount,
    /// Tokens at the end of what is found that are computed again all the same.
    pub(crate) margin: TokenCount,
}

impl<D: Digest> Search<'_, D> {
    /// The longest hit of at most `limit` tokens. Its blocks are left in the tables as found.
    pub(crate) fn longest(self, limit: TokenCount, tables: &mut Tables) -> Hit {
        tables.iter_mut().for_each(|table| table.found.clear());
        let limit = self.groups.align(if self.groups.share_nothing() { TokenCount(0) } else { limit });
        let (mut whole, mut is_known) = (limit, false);
        for ((id, group), table) in self.groups.iter().zip(tables.iter_mut()) {
            if group.holds == Holds::EveryToken {
                whole = whole.min(self.unbroken(id, group, limit, &mut table.found));
                is_known = true;
            }
        }
        let whole = TokenCount(self.groups.align(whole).get().saturating_sub(self.margin.get()));
        let whole = self.agreed(whole, |holds| holds == Holds::EveryToken);
        let tokens = self.agreed(whole, |_| true);
        let mut blocks = 0;
        for ((id, group), table) in self.groups.iter().zip(tables.iter_mut()) {
            self.gather(id, group, tokens, table);
            blocks += table.found.iter().filter(|&&block| block != BlockId::NULL).count();
        }
        let junction = (is_known && whole > tokens).then_some(whole);
        Hit { tokens, blocks: BlockCount(crate::id::count(blocks)), junction }
    }

    /// What a group that keeps every token has, up to the first hole.
    fn unbroken(self, id: GroupId, group: &Group, limit: TokenCount, found: &mut Vec<BlockId>) -> TokenCount {
        let unit = self.groups.unit.get();
        let full = group.size.full_blocks(limit).get();
        let stride = group.size.get() / unit;
        self.prefix.longest(id, &self.hashes[..(full * stride) as usize], stride as usize, found);
        let mut tokens = group.size.tokens_in(BlockCount(crate::id::count(found.len())));
        if group.parts > 1 {
            let ends = (1..group.parts).map(|part| tokens.plus(group.entry.tokens_in(BlockCount(part))));
            let within = ends.filter(|&end| end <= limit);
            let last = within.rev().find_map(|end| Some((end, self.block_to(id, end)?)));
            if let Some((end, block)) = last {
                found.push(block);
                tokens = end;
            }
        }
        tokens
    }

    /// The longest length of at most `limit` at which all groups of these kinds have what they need.
    fn agreed(self, limit: TokenCount, kinds: impl Fn(Holds) -> bool) -> TokenCount {
        let mut tokens = limit;
        loop {
            let before = tokens;
            for (id, group) in self.groups.iter().filter(|(_, group)| kinds(group.holds)) {
                tokens = match group.holds {
                    Holds::Encoder => tokens,
                    Holds::EveryToken => self.last_end(id, group, tokens),
                    Holds::State => self.last_state(id, tokens),
                    Holds::NeededTokens => self.last_window(id, group, tokens),
                };
            }
            if tokens == before {
                return tokens;
            }
        }
    }

    /// Whole blocks are known to be there. In the middle of one, the part that a hit and its margin end with must be.
    fn last_end(self, id: GroupId, group: &Group, limit: TokenCount) -> TokenCount {
        let is_there =
            |end: TokenCount| end.get().is_multiple_of(group.size.get()) || self.block_to(id, end).is_some();
        let fits = |tokens: TokenCount| is_there(tokens) && is_there(tokens.plus(self.margin));
        let mut tokens = limit;
        while group.parts > 1 && tokens > TokenCount(0) && !fits(tokens) {
            tokens = self.shorter(tokens);
        }
        tokens
    }

    fn last_state(self, id: GroupId, limit: TokenCount) -> TokenCount {
        let mut tokens = limit;
        while tokens > TokenCount(0) && self.block_to(id, tokens).is_none() {
            tokens = self.shorter(tokens);
        }
        tokens
    }

    /// Looks at the blocks from right to left, each once. Where one is missing, a shorter hit is tried: what was seen
    /// behind the hole is of no use to it.
    fn last_window(self, id: GroupId, group: &Group, limit: TokenCount) -> TokenCount {
        let mut top = limit.plus(self.margin);
        let mut seen = top;
        while top > self.margin {
            let tokens = TokenCount(top.get() - self.margin.get());
            if seen == TokenCount(0) {
                return tokens;
            }
            let index = group.size.full_blocks(TokenCount(seen.get() - 1)).get();
            let start = group.size.tokens_in(BlockCount(index));
            let skipped = group.skipped_blocks(tokens, self.prompt);
            // A hit that ends in a block, before its margin, ends with what is found there.
            let ends = [seen, if tokens > start { tokens.min(seen) } else { seen }];
            if skipped.contains(&index) {
                seen = group.size.tokens_in(BlockCount(skipped.start));
            } else if ends.iter().all(|&end| self.block_to(id, end).is_some()) {
                seen = start;
            } else {
                top = self.shorter(seen);
                seen = top;
            }
        }
        TokenCount(0)
    }

    /// Puts the blocks of a hit of `tokens` tokens into the table.
    fn gather(self, id: GroupId, group: &Group, tokens: TokenCount, table: &mut Table) {
        let length = group.size.blocks_for(tokens).get();
        match group.holds {
            Holds::EveryToken => {
                table.found.truncate(length as usize);
                let is_cut = !tokens.get().is_multiple_of(group.size.get());
                if let (true, Some(last)) = (is_cut, table.found.last_mut()) {
                    *last = self.block_to(id, tokens).expect("the search has seen it");
                }
            }
            Holds::Encoder => (),
            Holds::State | Holds::NeededTokens => {
                let skipped = match group.holds {
                    Holds::State => 0..length.saturating_sub(1),
                    _ => group.skipped_blocks(tokens, self.prompt),
                };
                table.found.extend((0..length).map(|index| {
                    let end = group.size.tokens_in(BlockCount(index + 1)).min(tokens);
                    let block = || self.block_to(id, end).expect("the search has seen it");
                    if skipped.contains(&index) { BlockId::NULL } else { block() }
                }));
            }
        }
    }

    /// The block in which a prefix of `tokens` tokens ends.
    fn block_to(self, id: GroupId, tokens: TokenCount) -> Option<BlockId> {
        let hash = self.groups.unit.full_blocks(tokens).get() - 1;
        self.prefix.get(id, self.hashes[hash as usize])
    }

    /// The next usable length below.
    fn shorter(self, tokens: TokenCount) -> TokenCount {
        self.groups.align(TokenCount(tokens.get() - 1))
    }
}

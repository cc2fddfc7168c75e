//! The groups as the cache works with them: sizes checked, what follows from them computed once.

use std::ops::Range;
use std::sync::Arc;

use crate::id::count;
use crate::kind::{Holds, Kind, Progress};
use crate::{BlockCount, BlockId, BlockSize, Claim, Config, Error, GroupId, Retention, TokenCount};

/// All groups of a cache.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    pub(crate) all: Vec<Group>,
    /// Tokens per hash.
    pub(crate) unit: BlockSize,
    /// A hit ends at a multiple of this.
    pub(crate) alignment: BlockSize,
    /// Tokens at the end of a hit that are computed again all the same.
    pub(crate) margin: TokenCount,
    /// Tokens behind a unit that its hash covers as well.
    pub(crate) lookahead: TokenCount,
    retention: Retention,
}

/// One group.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) kind: Arc<dyn Kind>,
    pub(crate) holds: Holds,
    pub(crate) size: BlockSize,
    /// Tokens that one entry of the index stands for: a block, or a part of it.
    pub(crate) entry: BlockSize,
    /// Entries per block.
    pub(crate) parts: u32,
    /// Hashes per block.
    pub(crate) hashes: u32,
}

/// What is known of a sequence that decides where its blocks stay usable.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landmarks {
    pub(crate) prompt: TokenCount,
    pub(crate) junction: TokenCount,
}

/// Groups are numbered in a byte.
const GROUPS_MAX: usize = 255;

impl Groups {
    pub(crate) fn new(config: &Config) -> Result<Groups, Error> {
        let count = config.groups.len();
        if count == 0 || count > GROUPS_MAX {
            return Err(Error::GroupCount { groups: count, max: GROUPS_MAX });
        }
        let unit = config.hash_unit();
        let all: Vec<Group> = config
            .groups
            .iter()
            .map(|group| {
                let (size, holds) = (group.size(config.block_size), group.kind.holds());
                let entry = if config.match_unit.is_some() && holds != Holds::State { unit } else { size };
                let [parts, hashes] = [entry, unit].map(|part| size.get() / part.get());
                Group { kind: group.kind.clone(), holds, size, entry, parts, hashes }
            })
            .collect();
        if let Some(odd) = all.iter().find(|group| !group.size.get().is_multiple_of(unit.get())) {
            return Err(Error::MatchUnit { unit, block_size: odd.size });
        }
        let hits = all.iter().filter(|group| group.holds != Holds::Encoder);
        let alignment = hits.map(|group| group.entry).reduce(BlockSize::common_multiple).unwrap_or(unit);
        let margin = TokenCount(if config.draft_head { alignment.get() } else { 0 });
        let retention = match config.retention {
            Retention::Every(TokenCount(0)) => Retention::Prompt,
            other => other,
        };
        Ok(Groups { all, unit, alignment, margin, lookahead: config.hash_lookahead, retention })
    }

    #[inline]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (GroupId, &Group)> + '_ {
        (0..).map(GroupId).zip(&self.all)
    }

    /// The longest usable length of at most `tokens`.
    #[inline]
    pub(crate) fn align(&self, tokens: TokenCount) -> TokenCount {
        self.alignment.tokens_in(self.alignment.full_blocks(tokens))
    }

    /// Whether no group holds anything of the tokens themselves.
    #[inline]
    pub(crate) fn share_nothing(&self) -> bool {
        self.all.iter().all(|group| group.holds == Holds::Encoder)
    }

    /// Where a prompt of `prompt` tokens is found to end, by whoever repeats it and by whoever goes on behind it: the
    /// last token is computed, the last block has no name before the tokens ahead are known, and a margin is lost.
    fn ends_of(&self, prompt: TokenCount) -> [TokenCount; 2] {
        [self.lookahead.get().max(1), 0].map(|unusable| {
            let usable = self.align(TokenCount(prompt.get().saturating_sub(unusable)));
            TokenCount(usable.get().saturating_sub(self.margin.get()))
        })
    }

    /// The first length of at least `tokens`, and one, at which a prefix is to stay usable.
    fn retained_from(&self, tokens: TokenCount, marks: Landmarks) -> Option<TokenCount> {
        let tokens = tokens.max(TokenCount(1));
        let next = |step: BlockSize| step.tokens_in(step.blocks_for(tokens));
        let [repeated, continued] = self.ends_of(marks.prompt);
        let prompt =
            [repeated, continued, marks.junction].into_iter().filter(|&length| length >= tokens).min();
        match self.retention {
            Retention::Prompt => prompt,
            Retention::Dense => Some(next(self.alignment)),
            Retention::Every(every) => {
                let every = BlockSize::new(every.get()).expect("every 0 tokens is never");
                let periodic = next(self.alignment.common_multiple(every));
                Some(prompt.map_or(periodic, |prompt| prompt.min(periodic)))
            }
        }
    }

    /// Where a step of `tokens` tokens behind `computed` ones should end, so that the states worth keeping are left.
    pub(crate) fn cut(&self, computed: TokenCount, tokens: TokenCount, marks: Landmarks) -> TokenCount {
        let end = computed.plus(tokens);
        let cut = match self.retention {
            Retention::Dense => Some(self.align(end)),
            _ => {
                let periodic = match self.retention {
                    Retention::Every(_) => self.retained_from(computed.plus(TokenCount(1)), marks),
                    _ => None,
                };
                let [_, prompt] = self.ends_of(marks.prompt);
                let ends = [Some(marks.junction), Some(prompt), periodic];
                ends.into_iter().flatten().filter(|&cut| cut > computed).min()
            }
        };
        cut.filter(|&cut| computed < cut && cut < end)
            .map_or(tokens, |cut| TokenCount(cut.get() - computed.get()))
    }

    /// Whether the entry of `group` that ends at `end` tokens may be published, when a step ends at `computed`.
    #[inline]
    pub(crate) fn retains(
        &self,
        group: &Group,
        end: TokenCount,
        computed: TokenCount,
        marks: Landmarks,
    ) -> bool {
        match group.holds {
            Holds::EveryToken => true,
            Holds::Encoder => false,
            Holds::State => end == computed && self.retained_from(end, marks) == Some(end),
            Holds::NeededTokens => {
                // The margin behind a hit must be there as well.
                let from = TokenCount(end.get().saturating_sub(self.margin.get()));
                self.retained_from(from, marks).is_some_and(|length| {
                    let skipped = group.skipped(length, marks.prompt);
                    end.get() - group.entry.get() < skipped.start || end.get() > skipped.end
                })
            }
        }
    }
}

impl Group {
    /// The tokens that nobody attends to once `computed` are computed.
    pub(crate) fn skipped(&self, computed: TokenCount, prompt: TokenCount) -> Range<u32> {
        let range = self.kind.skipped(Progress { computed, prompt });
        range.start.0..range.end.0
    }

    /// The blocks that hold nothing but such tokens.
    pub(crate) fn skipped_blocks(&self, computed: TokenCount, prompt: TokenCount) -> Range<u32> {
        let Range { start, end } = self.skipped(computed, prompt);
        let first = self.size.blocks_for(TokenCount(start)).get();
        first..self.size.full_blocks(TokenCount(end)).get().max(first)
    }

    /// Blocks that a hit of `tokens` tokens puts into the table, null ones counted.
    #[inline]
    pub(crate) fn hit_blocks(&self, tokens: TokenCount) -> u32 {
        if self.holds == Holds::Encoder { 0 } else { self.size.blocks_for(tokens).get() }
    }

    /// Entries of the index that such a hit covers.
    #[inline]
    pub(crate) fn hit_entries(&self, tokens: TokenCount) -> u32 {
        if self.holds == Holds::Encoder { 0 } else { self.entry.full_blocks(tokens).get() }
    }

    /// How long a table of `length` blocks is once a claim is granted.
    #[inline]
    pub(crate) fn length_after(
        &self,
        length: u32,
        claim: Claim,
        encoder: TokenCount,
        tokens_max: TokenCount,
    ) -> u32 {
        let tokens = match self.holds {
            Holds::Encoder => encoder,
            _ => claim.computed_after().plus(claim.lookahead).min(tokens_max),
        };
        length + self.size.blocks_beyond(BlockCount(length), tokens).get()
    }

    /// Blocks that a sequence of `known` tokens needs beyond the `has` of a table of `length`: at its longest, or at
    /// once, if the group gives back what it skips.
    #[inline]
    pub(crate) fn whole(
        &self,
        length: u32,
        has: u32,
        known: TokenCount,
        encoder: TokenCount,
        step: TokenCount,
    ) -> u32 {
        let tokens = if self.holds == Holds::Encoder { encoder } else { known };
        let beyond = self.size.blocks_beyond(BlockCount(length), tokens).get();
        match self.holds {
            Holds::EveryToken | Holds::Encoder => beyond,
            _ => beyond.min(self.kind.blocks_max(tokens, step, self.size).get().saturating_sub(has)),
        }
    }

    /// Which entries from `has` on stay empty when a claim is granted: those that nobody will attend to.
    #[inline]
    pub(crate) fn unneeded(&self, claim: Claim, prompt: TokenCount) -> Unneeded {
        let start = claim.computed.plus(claim.external);
        match self.holds {
            Holds::EveryToken | Holds::Encoder => Unneeded { blocks: 0..0, but: None },
            Holds::NeededTokens => Unneeded { blocks: self.skipped_blocks(start, prompt), but: None },
            Holds::State => {
                let but = (claim.external > TokenCount(0)).then(|| self.last_block(start));
                Unneeded { blocks: 0..self.last_block(claim.computed_after()), but }
            }
        }
    }

    /// Which of the `held` blocks a claim writes into, other than what they are published to hold: the first
    /// `published` entries of the table are rewritten as they are, if at all. A load may write all of a block, and may
    /// fail.
    #[inline]
    pub(crate) fn written_blocks<'a>(
        &self,
        claim: Claim,
        shared_from: Option<TokenCount>,
        held: &'a [BlockId],
        published: u32,
    ) -> impl Iterator<Item = Written> + use<'a> {
        let first = match self.holds {
            Holds::EveryToken | Holds::NeededTokens => {
                let from = shared_from.map_or(claim.computed, |from| from.min(claim.computed));
                self.size.full_blocks(from).get()
            }
            Holds::State => self.last_block(claim.computed_after()),
            Holds::Encoder => u32::MAX,
        };
        let parts = self.parts;
        let loads = claim.external > TokenCount(0);
        let published = if loads { published.min(first.saturating_mul(parts)) } else { published };
        (0..).zip(held).skip(first as usize).filter_map(move |(index, &block)| {
            let first_part = published.saturating_sub(index * parts);
            (block != BlockId::NULL && first_part < parts).then_some(Written { index, block, first_part })
        })
    }

    /// Whether `blocks` have a hole where the step of a claim reads or writes.
    pub(crate) fn misses(&self, blocks: &[BlockId], prompt: TokenCount, claim: Claim) -> bool {
        let (held, before) = (count(blocks.len()), self.size.blocks_for(claim.computed).get());
        // Behind what is held is room to be taken, not a hole; what was computed should be held.
        let is_hole = |index: u32| match blocks.get(index as usize) {
            Some(&block) => block == BlockId::NULL,
            None => index < before,
        };
        match self.holds {
            Holds::EveryToken | Holds::Encoder => false,
            Holds::State => [claim.computed, claim.computed_after()]
                .into_iter()
                .any(|tokens| tokens > TokenCount(0) && is_hole(self.last_block(tokens))),
            Holds::NeededTokens => {
                let room = claim.computed_after().plus(claim.lookahead);
                let end = self.size.blocks_for(room).get().min(held).max(before);
                let skipped = self.skipped_blocks(claim.computed, prompt);
                (0..skipped.start.min(end)).chain(skipped.end..end).any(is_hole)
            }
        }
    }

    /// The block in which a load from `begin` to `to` leaves a gap, if there is one: it has the tokens before `begin`,
    /// and those behind are not loaded, as nobody attends to them at the end of the load.
    pub(crate) fn gap(&self, begin: TokenCount, to: TokenCount, prompt: TokenCount) -> Option<u32> {
        let block = self.size.full_blocks(begin);
        let is_gap = self.holds == Holds::NeededTokens
            && self.size.tokens_in(block) < begin
            && self.skipped_blocks(to, prompt).contains(&block.get());
        is_gap.then_some(block.get())
    }

    /// The block that the last of `tokens` tokens is in.
    #[inline]
    pub(crate) fn last_block(&self, tokens: TokenCount) -> u32 {
        self.size.full_blocks(TokenCount(tokens.get().saturating_sub(1))).get()
    }
}

/// A block that a claim writes into, from the part on that the sequence has not published.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    pub(crate) index: u32,
    pub(crate) block: BlockId,
    pub(crate) first_part: u32,
}

/// Entries of a table that stay empty.
#[derive(Clone, Debug)]
pub(crate) struct Unneeded {
    blocks: Range<u32>,
    but: Option<u32>,
}

impl Unneeded {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    #[inline]
    pub(crate) fn contains(&self, index: u32) -> bool {
        self.blocks.contains(&index) && self.but != Some(index)
    }

    /// How many of the entries `from..to` are needed.
    #[inline]
    pub(crate) fn needed(&self, from: u32, to: u32) -> u32 {
        let (first, last) = (self.blocks.start.max(from), self.blocks.end.min(to));
        let empty = last.saturating_sub(first);
        let filled = self.but.is_some_and(|but| (first..last).contains(&but));
        to.saturating_sub(from) - empty + u32::from(filled)
    }
}

//! What is found: whole texts compared, and every length tried.

use quayline_kv_cache::*;

use super::{Group, Kind, Model, Sequence, Text, real};

impl<P: Eviction> Model<P> {
    /// The oldest block of `group` in which the first `end` tokens of a sequence end.
    pub(super) fn find(&self, group: usize, sequence: &Sequence, end: u32) -> Option<BlockId> {
        self.oldest(group, &self.text(sequence, end)?)
    }

    /// What the name of the first `end` tokens of a sequence covers, if they are known and those ahead.
    pub(super) fn text(&self, sequence: &Sequence, end: u32) -> Option<Text> {
        sequence.key.text(&sequence.tokens, end, self.config.hash_lookahead.0, self.unit)
    }

    /// The first `end` tokens of a sequence in full.
    pub(crate) fn prefix(&self, id: u64, end: u32) -> Option<Text> {
        self.sequences[&id].key.text(&self.sequences[&id].tokens, end, 0, self.unit)
    }

    /// The oldest block of `group` that is found under the name for this.
    pub(super) fn oldest(&self, group: usize, wanted: &Text) -> Option<BlockId> {
        let blocks = (0..).map(BlockId).zip(&self.content);
        let copies =
            blocks.flat_map(|(block, parts)| parts.iter().flatten().map(move |content| (content, block)));
        copies
            .filter(|(content, _)| content.group == group && content.text == *wanted)
            .map(|(content, block)| (content.published_as, block))
            .min()
            .map(|(_, block)| block)
    }

    /// The blocks that a hit of `tokens` tokens takes in `group`, if they are all there. The `margin` tokens behind it
    /// have to be there as well.
    pub(super) fn hit_in(
        &self,
        group: usize,
        sequence: &Sequence,
        tokens: u32,
        margin: u32,
    ) -> Option<Vec<BlockId>> {
        let Group { kind, size } = self.groups[group];
        let mut blocks = Vec::new();
        let end = if kind == Kind::State { tokens } else { tokens + margin };
        for start in (0..end).step_by(size as usize).filter(|_| kind != Kind::Cross) {
            let block_end = (start + size).min(end);
            let needed = (start..start + size).any(|token| kind.needs(token, tokens, sequence.prompt));
            let block = if needed { self.find(group, sequence, block_end)? } else { BlockId::NULL };
            blocks.push(block);
        }
        // What the margin needed is not taken; where the hit ends in a block, it ends with what is found there.
        blocks.truncate(tokens.div_ceil(size) as usize);
        if let Some(last) = blocks.last_mut().filter(|last| **last != BlockId::NULL) {
            *last = self.find(group, sequence, tokens)?;
        }
        Some(blocks)
    }

    pub(super) fn hits(&self, sequence: &Sequence, tokens: u32) -> Option<Vec<Vec<BlockId>>> {
        (0..self.groups.len()).map(|group| self.hit_in(group, sequence, tokens, self.margin)).collect()
    }

    /// The longest hit and its blocks, by trying all.
    pub(super) fn hit(&self, id: u64) -> (Hit, Vec<Vec<BlockId>>) {
        let sequence = &self.sequences[&id];
        let shares = self.groups.iter().any(|group| group.kind != Kind::Cross);
        let reads = self.config.prefix_caching && sequence.reuse == Reuse::ReadWrite && shares;
        let named = sequence.known().saturating_sub(self.config.hash_lookahead.0) / self.unit * self.unit;
        let limit = if reads { sequence.known().saturating_sub(1).min(named) } else { 0 };
        let lengths =
            || (0..=limit.saturating_sub(self.margin) / self.alignment).rev().map(|n| n * self.alignment);
        let fits = |length: u32| length == 0 || length + self.margin <= limit;
        let (tokens, blocks) = lengths()
            .filter(|&length| fits(length))
            .find_map(|length| if length == 0 { None } else { Some((length, self.hits(sequence, length)?)) })
            .unwrap_or_else(|| (0, vec![Vec::new(); self.groups.len()]));
        let full: Vec<usize> =
            (0..self.groups.len()).filter(|&g| self.groups[g].kind == Kind::Full).collect();
        let whole = lengths().filter(|&length| fits(length)).find(|&length| {
            length == 0
                || full.iter().all(|&group| self.hit_in(group, sequence, length, self.margin).is_some())
        });
        let junction = whole.filter(|&whole| !full.is_empty() && whole > tokens).map(TokenCount);
        let count = blocks.iter().map(|blocks| real(blocks)).sum();
        (Hit { tokens: TokenCount(tokens), blocks: BlockCount(count), junction }, blocks)
    }

    pub(crate) fn lookup(&mut self, id: u64) -> Result<Hit, Error> {
        self.must_be_empty(id)?;
        let hit = self.hit(id).0;
        self.get(id)?.junction = hit.junction.unwrap_or_default().0;
        Ok(hit)
    }
}

//! Carrying out what was reserved: share, copy, take, publish.

use crate::blocks::{Blocks, name};
use crate::claim::{BlockCopy, Need, Plan};
use crate::evict::{Eviction, Wanted};
use crate::group::{Groups, Landmarks, Unneeded, Written};
use crate::hash::{BlockHasher, Digest};
use crate::kind::Holds;
use crate::publish::publish;
use crate::sequence::{Loading, Sequence, Table};
use crate::{BlockCount, BlockId, Claim, Config, Grant, GroupId, KvCache, Reuse, TenantId, TokenCount};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Carries a plan out. Its numbers were checked by `reserve` and nothing has happened since.
    ///
    /// All groups take what they share before any takes a new block, so that no new block is one of the shared.
    #[inline]
    pub(crate) fn commit(&mut self, plan: Plan) -> Grant<'_> {
        let Plan { place, claim, need } = plan;
        let copies_before = self.copies.len();
        let mut cached = TokenCount(0);
        if self.sequences.at(place).tables.are_empty() {
            cached = claim.computed;
            self.count_admission(place, cached);
            self.share(place, cached);
        }
        if need.copies > 0 {
            self.copy_shared(place, claim);
        }
        let KvCache { config, groups, blocks, sequences, reserved, fresh, .. } = self;
        let sequence = sequences.at_mut(place);
        sequence.shared_from = None;
        for ((id, group), table) in groups.iter().zip(sequence.tables.iter_mut()) {
            table.length_before = table.held();
            let after = group.length_after(table.held(), claim, sequence.encoder, config.sequence_tokens_max);
            let unneeded = group.unneeded(claim, sequence.prompt);
            extend(table, after, blocks, unneeded, sequence.keys.tenant, |index| {
                let last = (index as usize + 1) * group.hashes as usize - 1;
                sequence.hashes.get(last).map(|hash| name(id, hash))
            });
        }
        if claim.external > TokenCount(0) {
            let (begin, to) = (claim.computed, claim.computed.plus(claim.external));
            let computed = claim.computed_after().min(sequence.known);
            sequence.loading = Some(Loading { begin, from: begin, to, computed });
        }
        let rest = set_aside(sequence, claim, need);
        reserved.0 = reserved.0 - sequence.set_aside.0 + rest;
        sequence.set_aside = BlockCount(rest);
        sequence.computed = claim.computed_after();
        if config.prefix_caching {
            sequence.tables.iter_mut().for_each(|table| table.published_before = table.published);
            publish(sequence, sequence.computed, groups, blocks, Some(fresh));
        }
        let covered = covered(sequence, groups, config);
        Grant::new(cached, covered, &self.sequences.at(place).tables, &self.copies[copies_before..])
    }

    /// Whether a block that is to be written into belongs to somebody else as well: to more than `own` tables, or to
    /// those who may find it. Copies that are yet to be made of it do not count, they come before the writing; nor do
    /// pins, which keep what is found in it and nothing else.
    #[inline]
    pub(crate) fn is_shared(&self, written: Written, own: u32) -> bool {
        let Written { block, first_part, .. } = written;
        let references = self.blocks.pool.references(block);
        let copied = || self.copies.iter().filter(|copy| copy.from == block).count();
        let others = || references as usize - copied() - self.pins.of(block) as usize;
        (references > own && others() > own as usize) || self.blocks.prefix.contains_from(block, first_part)
    }

    /// Takes the blocks that the lookup found for the first `tokens` tokens.
    #[inline]
    fn share(&mut self, place: u32, tokens: TokenCount) {
        let KvCache { groups, blocks, sequences, .. } = self;
        for (group, table) in groups.all.iter().zip(sequences.at_mut(place).tables.iter_mut()) {
            let length = group.hit_blocks(tokens) as usize;
            table.blocks.extend_from_slice(&table.found[..length]);
            for &block in table.blocks.iter().filter(|&&block| block != BlockId::NULL) {
                blocks.pool.share(block);
            }
            if let Some(watch) = &mut blocks.watch {
                table.blocks.iter().for_each(|&block| watch.found(block));
            }
            table.published = group.hit_entries(tokens);
        }
    }

    /// Gives the sequence a block of its own for each that it is about to write into and that is not its alone. The
    /// copy keeps the sequence's hold of the old one.
    fn copy_shared(&mut self, place: u32, claim: Claim) {
        for id in (0..self.groups.all.len()).map(GroupId::of) {
            let mut next = 0;
            while let Some(written) = self.next_shared(place, id, claim, next) {
                let group = &self.groups.all[id.index()];
                let Written { index, block: from, .. } = written;
                let start = group.size.tokens_in(BlockCount(index)).get();
                let tokens = claim.computed.get().saturating_sub(start).min(group.size.get());
                let tenant = self.sequences.at(place).keys.tenant;
                let to = self.blocks.take_one(Wanted { content: None, tenant });
                let tables = &mut self.sequences.at_mut(place).tables;
                let table = &mut tables[id.index()];
                table.blocks[index as usize] = to;
                table.published = table.published.min(index * group.parts);
                self.copies.push(BlockCopy { group: id, index, from, to, tokens: TokenCount(tokens) });
                next = index + 1;
            }
        }
    }

    fn next_shared(&self, place: u32, id: GroupId, claim: Claim, next: u32) -> Option<Written> {
        let sequence = self.sequences.at(place);
        let table = &sequence.tables[id.index()];
        let group = &self.groups.all[id.index()];
        let from = sequence.shared_from;
        let mut written = group.written_blocks(claim, from, &table.blocks, table.published);
        written.find(|written| written.index >= next && self.is_shared(*written, 1))
    }

    #[inline]
    fn count_admission(&mut self, place: u32, cached: TokenCount) {
        let sequence = self.sequences.at(place);
        if !self.config.prefix_caching || sequence.reuse == Reuse::WriteOnly {
            return;
        }
        let stats = if sequence.was_released { &mut self.counted.again } else { &mut self.counted.first };
        stats.count(sequence.known.0, cached.0);
    }
}

/// Adds new blocks up to the length `after`, and the null block where none is needed. `content` says what a
/// block is to hold.
#[inline]
fn extend<D: Digest>(
    table: &mut Table,
    after: u32,
    blocks: &mut Blocks<D, impl Eviction>,
    unneeded: Unneeded,
    tenant: TenantId,
    content: impl Fn(u32) -> Option<u32>,
) {
    let before = table.held();
    if unneeded.is_empty() {
        blocks.take(tenant, before..after, content, &mut table.blocks);
        return;
    }
    for index in before..after {
        let wanted = || Wanted { content: content(index), tenant };
        let block = if unneeded.contains(index) { BlockId::NULL } else { blocks.take_one(wanted()) };
        table.blocks.push(block);
    }
}

/// What stays set aside for a sequence that waits for a load: the rest of what it asked for, less all that it has got.
#[inline]
fn set_aside<D: Digest>(sequence: &Sequence<D>, claim: Claim, need: Need) -> u32 {
    let Need { new, copies, revived, beyond, .. } = need;
    let still = sequence.set_aside.get().saturating_sub(new + copies + revived);
    if claim.external > TokenCount(0) { beyond - new } else { still }
}

/// How far a sequence can be computed before it fills another block or needs one.
#[inline]
fn covered<D: Digest>(sequence: &Sequence<D>, groups: &Groups, config: &Config) -> TokenCount {
    let mut covered = TokenCount(u32::MAX);
    for (group, table) in groups.all.iter().zip(sequence.tables.iter()) {
        if group.holds == Holds::Encoder {
            continue;
        }
        covered = covered.min(group.size.tokens_in(BlockCount(table.held())));
        if config.prefix_caching {
            let fills_next = group.entry.tokens_in(BlockCount(table.published + 1));
            covered = covered.min(TokenCount(fills_next.get() - 1));
        }
    }
    covered.max(sequence.computed)
}

impl<D: Digest> Sequence<D> {
    pub(crate) fn landmarks(&self) -> Landmarks {
        Landmarks { prompt: self.prompt, junction: self.hit.junction.unwrap_or_default() }
    }
}

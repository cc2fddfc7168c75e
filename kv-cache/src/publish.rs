//! Letting others find what is full of known tokens.

use crate::blocks::Blocks;
use crate::event::{Location, Stored};
use crate::evict::Eviction;
use crate::group::Groups;
use crate::hash::Digest;
use crate::id::count;
use crate::kind::Holds;
use crate::prefix::{AT_ONCE, Due};
use crate::sequence::Sequence;
use crate::{BlockCount, BlockId, TokenCount, TokenIndex};

/// Lets others find what is full of known tokens, and has its K and V once the step that is being planned is computed.
/// Nothing of a block into which something is on its way is found, nor one with a gap. States that are published join
/// `fresh`.
#[inline]
pub(crate) fn publish<D: Digest>(
    sequence: &mut Sequence<D>,
    computed: TokenCount,
    groups: &Groups,
    blocks: &mut Blocks<D, impl Eviction>,
    mut fresh: Option<&mut Vec<BlockId>>,
) {
    let there = sequence.loading.map_or(computed, |loading| loading.from);
    let tokens = there.min(groups.unit.tokens_in(BlockCount(count(sequence.hashes.len()))));
    let (marks, loading, prompt) = (sequence.landmarks(), sequence.loading, sequence.prompt);
    let Sequence { id: sequence, tables, hashes, tokens: known, keys, .. } = sequence;
    for ((id, group), table) in groups.iter().zip(tables.iter_mut()) {
        if group.holds == Holds::Encoder {
            continue;
        }
        let (parts, stride) = (group.parts, (group.hashes / group.parts) as usize);
        let last_hash = |entry: u32| (entry as usize + 1) * stride - 1;
        let is_kept =
            |entry: u32| groups.retains(group, group.entry.tokens_in(BlockCount(entry + 1)), there, marks);
        let whole_blocks = group.size.tokens_in(group.size.full_blocks(tokens));
        let full = group.entry.full_blocks(if loading.is_some() { whole_blocks } else { tokens }).get();
        let gap = loading.and_then(|loading| group.gap(loading.begin, loading.to, prompt));
        while table.published < full {
            let entries = table.published..full.min(table.published + count(AT_ONCE));
            table.published = entries.end;
            let (mut due, mut len) = ([Due::default(); AT_ONCE], 0);
            for from in entries {
                let (index, part) = if parts == 1 { (from, 0) } else { (from / parts, from % parts) };
                let block = table.blocks[index as usize];
                let is_kept = || group.holds == Holds::EveryToken || is_kept(from);
                if block == BlockId::NULL || gap == Some(index) || !is_kept() {
                    continue;
                }
                // A name covers the tokens ahead, which may be others for each that holds the state; and no copy of it
                // was made, as states go on elsewhere.
                let is_ambiguous = groups.lookahead > TokenCount(0) && blocks.pool.references(block) > 1;
                if group.holds == Holds::State && is_ambiguous {
                    continue;
                }
                if let (Holds::State, Some(fresh)) = (group.holds, fresh.as_deref_mut()) {
                    fresh.push(block);
                }
                let entry = blocks.prefix.entry(block, part);
                due[len] = Due { hash: hashes[last_hash(from)], entry, from };
                len += usize::from(!blocks.prefix.entries[entry as usize].is_found());
            }
            blocks.publish(id, &due[..len], |&Due { from, .. }| {
                let (last, size) = (last_hash(from), group.entry.len());
                let first = from as usize * size;
                let (tokens, behind) = known[first..].split_at(size);
                Stored {
                    blocks: &hashes[last..=last],
                    parent: last.checked_sub(stride).map(|before| hashes[before]),
                    tokens,
                    lookahead: &behind[..groups.lookahead.get() as usize],
                    first: TokenIndex(count(first)),
                    group: id,
                    location: Location::Device,
                    sequence: Some(*sequence),
                    key: keys.as_key(),
                }
            });
        }
    }
}

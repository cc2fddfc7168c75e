//! The audit: everything that must hold between two calls, looked at from the beginning.

use crate::group::Group;
use crate::kind::Holds;
use crate::sequence::{Sequence, Table};
use crate::{BlockCount, BlockHasher, BlockId, Digest, Eviction, GroupId, KvCache, SequenceId, TokenCount};

/// An invariant that does not hold. Seeing one means that this crate has a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The links of the free list disagree, or it never ends.
    #[error("the free list is broken at block {block}")]
    FreeList {
        /// Where it was noticed.
        block: BlockId,
    },
    /// The free list is not as long as the free count says.
    #[error("{listed} blocks are in the free list, {counted} are counted as free")]
    FreeCount {
        /// Blocks in the list.
        listed: BlockCount,
        /// The count.
        counted: BlockCount,
    },
    /// A block that somebody holds is in the free list, or one that nobody holds is not.
    #[error("block {block} has {references} users, in the free list: {free}")]
    FreeUse {
        /// The block.
        block: BlockId,
        /// Its reference count.
        references: u32,
        /// Whether the free list has it.
        free: bool,
    },
    /// A reference count that is not the number of tables and pins that hold the block, and of copies to be made of it.
    #[error(
        "block {block} is in {tables} tables and copies and {pins} pins, its reference count is {references}"
    )]
    References {
        /// The block.
        block: BlockId,
        /// Tables that hold it, and copies.
        tables: u32,
        /// Pins that hold it.
        pins: u32,
        /// Its reference count.
        references: u32,
    },
    /// The counts of the pins are not what the pins hold.
    #[error("{pinned} blocks are counted as pinned, the pins hold others")]
    Pins {
        /// The count.
        pinned: BlockCount,
    },
    /// A published block that its hash does not lead to, or a ring of copies that is broken.
    #[error("block {block} is published but not found under its hash")]
    Unfindable {
        /// The block.
        block: BlockId,
    },
    /// The index has other entries than are published, or counts other blocks.
    #[error(
        "{published} entries are published, {indexed} are in the index; {cached} blocks are, {counted} are counted"
    )]
    PublishedCount {
        /// Entries with a place in a ring of copies.
        published: usize,
        /// Entries reachable from the index.
        indexed: usize,
        /// Blocks with such entries.
        cached: BlockCount,
        /// The count.
        counted: BlockCount,
    },
    /// The index counts other buckets than it has.
    #[error("{used} buckets of the index are in use, {counted} are counted")]
    Buckets {
        /// Buckets in use.
        used: usize,
        /// The count.
        counted: usize,
    },
    /// A sequence that its id does not lead to.
    #[error("sequence {sequence} is open but not found under its id")]
    Unlisted {
        /// The sequence.
        sequence: SequenceId,
    },
    /// A sequence whose tokens and hashes do not add up.
    #[error("sequence {sequence} knows {known} tokens, keeps {kept} and {hashes} hashes")]
    Tokens {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens it knows.
        known: TokenCount,
        /// Tokens it keeps.
        kept: TokenCount,
        /// Hashes of full units.
        hashes: BlockCount,
    },
    /// Blocks are set aside that are not free, or for nobody.
    #[error("{reserved} blocks are set aside, sequences wait for {waited_for}, {free} are free")]
    Reserved {
        /// Blocks counted as set aside.
        reserved: BlockCount,
        /// The sum over all sequences.
        waited_for: BlockCount,
        /// Free blocks.
        free: BlockCount,
    },
    /// A copy to be made into a block that no sequence has for its own.
    #[error("block {from} is to be copied to {to}, which has {references} users")]
    Copy {
        /// The source.
        from: BlockId,
        /// The destination.
        to: BlockId,
        /// Users of the destination.
        references: u32,
    },
    /// A sequence that published more blocks than it holds or can hash, or more than the longest may hold.
    #[error("sequence {sequence} holds {held} blocks and published {published}")]
    Published {
        /// The sequence.
        sequence: SequenceId,
        /// Blocks in its table.
        held: BlockCount,
        /// Blocks published or shared.
        published: BlockCount,
    },
    /// A block is found under a hash that is not the one of its place in the table, or before it is full.
    #[error("block {block} of sequence {sequence} is published under a hash that is not its own")]
    WrongHash {
        /// The sequence.
        sequence: SequenceId,
        /// The block.
        block: BlockId,
    },
}

/// Free list, references, index, sequences, in this order.
pub(crate) fn check<H: BlockHasher, E: Eviction>(cache: &KvCache<H, E>) -> Result<(), Violation> {
    let free = check_free_list(cache)?;
    check_references(cache, &free)?;
    check_index(cache)?;
    check_sequences(cache)
}

/// Whether each block is in the free list.
fn check_free_list<H: BlockHasher, E: Eviction>(cache: &KvCache<H, E>) -> Result<Vec<bool>, Violation> {
    let pool = &cache.blocks.pool;
    pool.policy.check().map_err(|block| Violation::FreeList { block })?;
    if let Some(&block) = pool.worthless.iter().find(|&&block| cache.blocks.prefix.contains(block)) {
        return Err(Violation::FreeList { block });
    }
    let mut free = vec![false; pool.references.len()];
    let mut listed = 0;
    for block in pool.free_blocks() {
        if block == BlockId::NULL || std::mem::replace(&mut free[block.index()], true) {
            return Err(Violation::FreeList { block });
        }
        listed += 1;
    }
    let (listed, counted) = (BlockCount(listed), pool.free());
    if listed == counted { Ok(free) } else { Err(Violation::FreeCount { listed, counted }) }
}

/// References are table entries, pins and copies to be made; what has none is free, so `free + used + pinned +
/// null` is the whole pool.
fn check_references<H: BlockHasher, E: Eviction>(
    cache: &KvCache<H, E>,
    free: &[bool],
) -> Result<(), Violation> {
    let mut tables = vec![0; free.len()];
    let tables_of_all = cache.sequences.iter().flat_map(|sequence| sequence.tables.iter());
    let held = tables_of_all.flat_map(|table| table.blocks.iter().copied());
    let copied = cache.copies.iter().map(|copy| copy.from);
    let transferred =
        cache.kept.iter().flat_map(|(&block, &(times, _))| std::iter::repeat_n(block, times as usize));
    for block in held.chain(copied).chain(transferred).filter(|&block| block != BlockId::NULL) {
        tables[block.index()] += 1;
    }
    if !cache.pins.is_sound() {
        return Err(Violation::Pins { pinned: cache.pins.blocks() });
    }
    for (block, (&tables, &free)) in (0..).map(BlockId).zip(tables.iter().zip(free)) {
        let references = cache.blocks.pool.references(block);
        let pins = cache.pins.of(block);
        if tables + pins != references {
            return Err(Violation::References { block, tables, pins, references });
        }
        if free != (references == 0) && block != BlockId::NULL {
            return Err(Violation::FreeUse { block, references, free });
        }
    }
    Ok(())
}

/// Every published block is reached from its hash, and nothing else is.
fn check_index<H: BlockHasher, E: Eviction>(cache: &KvCache<H, E>) -> Result<(), Violation> {
    let prefix = &cache.blocks.prefix;
    let published = prefix.entries.iter().filter(|entry| entry.is_found()).count();
    let mut indexed = 0;
    for (group, index) in (0..).map(GroupId).zip(&prefix.index) {
        let (used, counted) = (index.all().count(), index.len());
        if used != counted {
            return Err(Violation::Buckets { used, counted });
        }
        for bucket in index.all() {
            let oldest = bucket.number as usize;
            let (hash, block) = (prefix.entries[oldest].hash, prefix.block(bucket.number));
            if bucket.tag != hash.tag() || prefix.get(group, hash) != Some(block) {
                return Err(Violation::Unfindable { block });
            }
            let mut entry = oldest;
            loop {
                let next = prefix.entries[entry].next as usize;
                indexed += 1;
                let is_copy =
                    prefix.entries[next].prev as usize == entry && prefix.entries[next].hash == hash;
                if indexed > published || !is_copy || prefix.group(prefix.block(bucket.number)) != group {
                    return Err(Violation::Unfindable { block });
                }
                if next == oldest {
                    break;
                }
                entry = next;
            }
        }
    }
    let blocks = (0..).map(BlockId).take(cache.config.block_count.get() as usize);
    let cached = blocks.filter(|&block| prefix.contains(block)).count();
    let (cached, counted) = (BlockCount(crate::id::count(cached)), prefix.blocks());
    if published == indexed && cached == counted {
        Ok(())
    } else {
        Err(Violation::PublishedCount { published, indexed, cached, counted })
    }
}

fn check_sequences<H: BlockHasher, E: Eviction>(cache: &KvCache<H, E>) -> Result<(), Violation> {
    let mut waited_for = BlockCount(0);
    for (place, sequence) in (0..).zip(cache.sequences.iter()) {
        let id = sequence.id;
        if cache.sequences.place(id) != Ok(place) {
            return Err(Violation::Unlisted { sequence: id });
        }
        let hashes = BlockCount(crate::id::count(sequence.hashes.len()));
        let kept = TokenCount(crate::id::count(sequence.tokens.len()));
        let expected = if cache.config.prefix_caching { sequence.known } else { TokenCount(0) };
        let named = expected.get().saturating_sub(cache.config.hash_lookahead.get());
        let hashed = cache.groups.unit.full_blocks(TokenCount(named));
        if kept != expected || hashes != hashed {
            return Err(Violation::Tokens { sequence: id, known: sequence.known, kept, hashes });
        }
        for (group, table) in cache.groups.all.iter().zip(sequence.tables.iter()) {
            check_table(cache, sequence, group, table)?;
        }
        waited_for.0 += sequence.set_aside.0;
    }
    let (reserved, free) = (cache.reserved, cache.blocks.pool.free());
    if reserved != waited_for || reserved > free {
        return Err(Violation::Reserved { reserved, waited_for, free });
    }
    for copy in &cache.copies {
        let references = cache.blocks.pool.references(copy.to);
        if references == 0 || copy.from == copy.to {
            return Err(Violation::Copy { from: copy.from, to: copy.to, references });
        }
    }
    Ok(())
}

/// What a table has published is found under the hashes of its own tokens, and nothing else of it is, but for a tail
/// that it shares until it writes.
fn check_table<H: BlockHasher, E: Eviction>(
    cache: &KvCache<H, E>,
    sequence: &Sequence<H::Digest>,
    group: &Group,
    table: &Table,
) -> Result<(), Violation> {
    let id = sequence.id;
    let (held, published) = (BlockCount(table.held()), table.published);
    let entries = group.entry.full_blocks(sequence.known).get().min(held.get().saturating_mul(group.parts));
    let is_ordered = table.published_before <= published && published <= entries;
    let room_max = group.size.blocks_for(cache.config.sequence_tokens_max);
    if !is_ordered || (held > room_max && group.holds != Holds::Encoder) {
        return Err(Violation::Published { sequence: id, held, published: BlockCount(published) });
    }
    let stride = group.entry.get() / cache.groups.unit.get();
    for (index, &block) in (0..).zip(&table.blocks) {
        for part in (0..group.parts).filter(|_| block != BlockId::NULL) {
            let entry = index * group.parts + part;
            let own = sequence.hashes.get(((entry + 1) * stride - 1) as usize);
            let found_as = cache.blocks.prefix.hash(block, part);
            let is_cut = entry >= published && sequence.shared_from.is_some();
            if found_as.is_some() && found_as.as_ref() != own && !is_cut {
                return Err(Violation::WrongHash { sequence: id, block });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evict::{Facts, Wanted};
    use crate::{Admission, BlockHash, BlockSize, Claim, Config, Reuse, SequenceKey};

    /// Two sequences that share a block, and one whose blocks are free and cached.
    fn busy() -> KvCache {
        let mut cache = KvCache::new(Config::new(BlockSize::new(4).unwrap(), BlockCount(12))).unwrap();
        for (id, tokens) in [(1, vec![1; 6]), (2, vec![1; 7]), (3, vec![3; 9])] {
            let id = SequenceId(id);
            cache.open(id, SequenceKey::default(), &tokens, Reuse::ReadWrite).unwrap();
            let computed = cache.lookup(id).unwrap().tokens;
            let new_tokens = TokenCount(cache.known(id).unwrap().0 - computed.0);
            match cache.reserve(id, Claim { computed, new_tokens, ..Claim::default() }).unwrap() {
                Admission::Admit(reservation) => drop(reservation.commit()),
                no => panic!("eleven blocks are enough: {no:?}"),
            }
        }
        cache.release(SequenceId(3)).unwrap();
        cache.check().unwrap();
        cache
    }

    const FACTS: Facts = Facts { index: 0, before: None, content: 0 };

    /// The violation to expect, and how to bring it about.
    type Damage = (&'static str, fn(&mut KvCache));

    #[test]
    fn every_kind_of_damage_is_found() {
        let damages: [Damage; 12] = [
            ("FreeList", |cache| cache.blocks.pool.policy.free([(BlockId(4), FACTS)].into_iter())),
            ("FreeList", |cache| cache.blocks.pool.worthless.push(BlockId(7))),
            ("FreeList", |cache| cache.blocks.pool.worthless.push(BlockId(1))),
            ("FreeCount", |cache| _ = cache.blocks.pool.policy.pick(Wanted::default())),
            ("References", |cache| cache.blocks.pool.references[1] += 1),
            ("FreeUse", |cache| {
                let block = cache.sequences.at_mut(1).tables[0].blocks.pop().unwrap();
                cache.blocks.pool.references[block.index()] -= 1;
            }),
            ("Unfindable", |cache| cache.blocks.prefix.entries[1].hash = BlockHash::default()),
            ("PublishedCount", |cache| {
                (cache.blocks.prefix.entries[2].next, cache.blocks.prefix.entries[2].prev) = (2, 2)
            }),
            ("Tokens", |cache| cache.sequences.at_mut(0).known.0 += 1),
            ("Published", |cache| cache.sequences.at_mut(0).tables[0].published = 7),
            ("Reserved", |cache| cache.reserved.0 += 1),
            ("WrongHash", |cache| cache.sequences.at_mut(0).hashes[0] = BlockHash::default()),
        ];
        for (name, damage) in damages {
            let mut cache = busy();
            damage(&mut cache);
            let found = format!("{:?}", cache.check());
            assert!(found.contains(name), "{name} expected, {found}");
        }
    }
}

//! The audit: everything that must hold between two calls, looked at from the beginning.

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
    /// A reference count that is not the number of tables that hold the block.
    #[error("block {block} is in {tables} tables, its reference count is {references}")]
    References {
        /// The block.
        block: BlockId,
        /// Tables that hold it.
        tables: u32,
        /// Its reference count.
        references: u32,
    },
    /// A published block that its hash does not lead to, or a ring of copies that is broken.
    #[error("block {block} is published but not found under its hash")]
    Unfindable {
        /// The block.
        block: BlockId,
    },
    /// The index counts other blocks than are published.
    #[error("{published} blocks are published, {indexed} are in the index, {counted} are counted")]
    PublishedCount {
        /// Blocks with a place in a ring of copies.
        published: BlockCount,
        /// Blocks reachable from the index.
        indexed: BlockCount,
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
    /// A sequence whose tokens, hashes, and tail do not add up.
    #[error("sequence {sequence} knows {known} tokens, {hashes} hashed blocks and a tail of {tail}")]
    Tokens {
        /// The sequence.
        sequence: SequenceId,
        /// Tokens it knows.
        known: TokenCount,
        /// Full blocks hashed.
        hashes: BlockCount,
        /// Tokens behind them.
        tail: TokenCount,
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
    let pool = &cache.pool;
    pool.policy.check().map_err(|block| Violation::FreeList { block })?;
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

/// References are table entries; what has none is free, so `free + used + null` is the whole pool.
fn check_references<H: BlockHasher, E: Eviction>(
    cache: &KvCache<H, E>,
    free: &[bool],
) -> Result<(), Violation> {
    let mut tables = vec![0; free.len()];
    for block in cache.sequences.iter().flat_map(|sequence| &sequence.table) {
        tables[block.index()] += 1;
    }
    for (block, (&tables, &free)) in (0..).map(BlockId).zip(tables.iter().zip(free)) {
        let references = cache.pool.references(block);
        if tables != references {
            return Err(Violation::References { block, tables, references });
        }
        if free != (references == 0) && block != BlockId::NULL {
            return Err(Violation::FreeUse { block, references, free });
        }
    }
    Ok(())
}

/// Every published block is reached from its hash, and nothing else is.
fn check_index<H: BlockHasher, E: Eviction>(cache: &KvCache<H, E>) -> Result<(), Violation> {
    let prefix = &cache.prefix;
    let published =
        (0..).map(BlockId).take(prefix.next.len()).filter(|&block| prefix.contains(block)).count();
    let mut indexed = 0;
    for (group, index) in (0..).map(GroupId).zip(&prefix.index) {
        let (used, counted) = (index.all().count(), index.len());
        if used != counted {
            return Err(Violation::Buckets { used, counted });
        }
        for bucket in index.all() {
            let oldest = BlockId(bucket.number);
            let hash = prefix.hash[oldest.index()];
            if bucket.tag != hash.tag() || prefix.get(group, hash) != Some(oldest) {
                return Err(Violation::Unfindable { block: oldest });
            }
            let mut block = oldest;
            loop {
                let next = BlockId(prefix.next[block.index()]);
                indexed += 1;
                if indexed > published
                    || prefix.prev[next.index()] != block.get()
                    || prefix.hash(next) != Some(hash)
                    || prefix.group(next) != group
                {
                    return Err(Violation::Unfindable { block });
                }
                if next == oldest {
                    break;
                }
                block = next;
            }
        }
    }
    let [published, indexed] = [published, indexed].map(|blocks| BlockCount(crate::id::count(blocks)));
    let counted = prefix.blocks();
    if published == indexed && indexed == counted {
        Ok(())
    } else {
        Err(Violation::PublishedCount { published, indexed, counted })
    }
}

fn check_sequences<H: BlockHasher, E: Eviction>(cache: &KvCache<H, E>) -> Result<(), Violation> {
    let size = cache.config.block_size;
    for (place, sequence) in (0..).zip(cache.sequences.iter()) {
        let id = sequence.id;
        if cache.sequences.place(id) != Ok(place) {
            return Err(Violation::Unlisted { sequence: id });
        }
        let hashes = BlockCount(crate::id::count(sequence.hashes.len()));
        let tail = TokenCount(crate::id::count(sequence.tail.len()));
        let hashed = u64::from(hashes.0) * u64::from(size.get()) + u64::from(tail.0);
        let expected = if cache.config.prefix_caching { u64::from(sequence.known.0) } else { 0 };
        let named_late = cache.config.hash_lookahead.0;
        if hashed != expected || tail.0 >= size.get() + named_late {
            return Err(Violation::Tokens { sequence: id, known: sequence.known, hashes, tail });
        }
        let (held, published) = (sequence.held(), BlockCount(sequence.published));
        let ordered = sequence.published_before <= published.0 && published <= held && published <= hashes;
        if !ordered || held > size.blocks_for(cache.config.sequence_tokens_max) {
            return Err(Violation::Published { sequence: id, held, published });
        }
        for (index, &block) in sequence.table.iter().enumerate() {
            let own = sequence.hashes.get(index).copied().filter(|_| index < sequence.published as usize);
            if cache.hash_of(block).is_some_and(|hash| Some(hash) != own) {
                return Err(Violation::WrongHash { sequence: id, block });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evict::Wanted;
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

    /// The violation to expect, and how to bring it about.
    type Damage = (&'static str, fn(&mut KvCache));

    #[test]
    fn every_kind_of_damage_is_found() {
        let damages: [Damage; 9] = [
            ("FreeList", |cache| cache.pool.policy.revive(BlockId(1))),
            ("FreeCount", |cache| cache.pool.policy.pick(std::iter::once(Wanted::default()), |_| ())),
            ("References", |cache| cache.pool.references[1] += 1),
            ("FreeUse", |cache| {
                let block = cache.sequences.at_mut(1).table.pop().unwrap();
                cache.pool.references[block.index()] -= 1;
            }),
            ("Unfindable", |cache| cache.prefix.hash[1] = BlockHash::default()),
            ("PublishedCount", |cache| (cache.prefix.next[10], cache.prefix.prev[10]) = (10, 10)),
            ("Tokens", |cache| cache.sequences.at_mut(0).known.0 += 1),
            ("Published", |cache| cache.sequences.at_mut(0).published = 7),
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

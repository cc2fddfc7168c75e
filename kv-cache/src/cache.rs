//! The cache: sequences ask for room, get blocks, share what is equal.

use crate::blocks::Blocks;
use crate::claim::BlockCopy;
use crate::event::Events;
use crate::evict::{Eviction, Lru};
use crate::group::Groups;
use crate::hash::{BlockHasher, Digest, Xxh3};
use crate::hit::Search;
use crate::id::count;
use crate::kept::Kept;
use crate::keys::in_order;
use crate::kind::Holds;
use crate::pin::Pins;
use crate::pool::Pool;
use crate::prefix::Prefix;
use crate::residency::Watch;
use crate::sequence::{Sequence, Sequences};
use crate::{
    BlockCount, BlockId, BlockTable, Config, Error, GroupId, Hit, Media, Reuse, SequenceId, SequenceKey,
    Stats, TokenCount, TokenId, Violation,
};

/// Decides which physical block holds which tokens of which sequence.
///
/// A sequence's life: [`open`](KvCache::open) with its prompt; [`lookup`](KvCache::lookup) what is cached;
/// [`reserve`](KvCache::reserve) and [`commit`](crate::Reservation::commit) before every step that computes some of
/// its tokens; [`push`](KvCache::push) the tokens that come out; [`release`](KvCache::release) when it must
/// yield, after which it starts over; [`close`](KvCache::close).
///
/// `H` names the blocks, `E` chooses which free block is handed out next.
#[derive(Clone, Debug)]
pub struct KvCache<H: BlockHasher = Xxh3, E: Eviction = Lru> {
    pub(crate) config: Config,
    pub(crate) groups: Groups,
    pub(crate) blocks: Blocks<H::Digest, E>,
    pub(crate) sequences: Sequences<H::Digest>,
    /// Copies that the step being planned begins with. Each holds its source.
    pub(crate) copies: Vec<BlockCopy>,
    /// Blocks whose state the step being planned leaves: nobody can begin from it in the same step.
    pub(crate) fresh: Vec<BlockId>,
    /// Free blocks that are set aside for sequences that wait for a load.
    pub(crate) reserved: BlockCount,
    /// What the last `settle` gave back.
    pub(crate) settled: Vec<BlockId>,
    /// Blocks that transfers are at work on.
    pub(crate) kept: Kept,
    pub(crate) counted: Stats,
    pub(crate) pins: Pins,
    hasher: H,
}

/// Block ids, and numbers one past them, are `u32`; the index is half as long again.
const BLOCK_COUNT_MAX: u32 = 1 << 31;

impl KvCache {
    /// An empty cache. Allocates 56 bytes a block.
    ///
    /// # Errors
    /// [`Error::PoolSize`] for fewer than two blocks (one is the null block) or more than 2^31, parts of blocks that
    /// are shared counted as blocks; [`Error::GroupCount`], [`Error::MatchUnit`].
    pub fn new(config: Config) -> Result<KvCache, Error> {
        let hasher = Xxh3::new(config.hash_seed);
        KvCache::with(config, hasher, Lru::new)
    }
}

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// An empty cache whose blocks are named by `hasher`, which is given [`Config::hash_unit`] tokens at a time, and
    /// chosen by the policy that `eviction` makes for so many blocks.
    ///
    /// # Errors
    /// As for [`new`](KvCache::new).
    pub fn with(
        config: Config,
        hasher: H,
        eviction: impl FnOnce(BlockCount) -> E,
    ) -> Result<KvCache<H, E>, Error> {
        let groups = Groups::new(&config)?;
        let parts: Vec<u32> = groups.all.iter().map(|group| group.parts).collect();
        let parts_max = parts.iter().copied().max().unwrap_or(1);
        let (blocks, max) = (config.block_count, BlockCount(BLOCK_COUNT_MAX / parts_max));
        if blocks < BlockCount(2) || blocks > max {
            return Err(Error::PoolSize { blocks, max });
        }
        Ok(KvCache {
            blocks: Blocks {
                pool: Pool::new(blocks, eviction(blocks)),
                prefix: Prefix::new(blocks, parts, events(&config, &groups)),
                evictions: 0,
                lost: Vec::new(),
                report_lost: config.report_lost,
                watch: watch(&config),
            },
            sequences: Sequences::new(groups.all.len()),
            copies: Vec::new(),
            fresh: Vec::new(),
            reserved: BlockCount(0),
            settled: Vec::new(),
            kept: Kept::new(),
            counted: Stats::default(),
            pins: Pins::default(),
            hasher,
            groups,
            config,
        })
    }

    /// What the cache was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Makes a sequence known, with the tokens it begins with. It holds no block yet.
    ///
    /// Cost: the hash of every full block, about 19 ns each for 16 tokens.
    ///
    /// # Errors
    /// [`Error::AlreadyOpen`], [`Error::TooManyTokens`]; [`Error::Media`] for items out of order.
    pub fn open(
        &mut self,
        sequence: SequenceId,
        key: SequenceKey<'_>,
        tokens: &[TokenId],
        reuse: Reuse,
    ) -> Result<(), Error> {
        if self.sequences.place(sequence).is_ok() {
            return Err(Error::AlreadyOpen { sequence });
        }
        self.must_fit(sequence, TokenCount(0), tokens)?;
        in_order(sequence, 0, key.media)?;
        let place = self.sequences.open(sequence, &key, reuse);
        self.learn(place, tokens);
        self.sequences.at_mut(place).prompt = TokenCount(count(tokens.len()));
        Ok(())
    }

    /// Says how many tokens the output of a sequence's encoder has: the room that it gets in groups of
    /// [cross-attention](crate::kind::Cross), with its first claim.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::Started`] when the sequence holds blocks.
    pub fn encoder(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<(), Error> {
        let place = self.must_hold_nothing(sequence)?;
        self.sequences.at_mut(place).encoder = tokens;
        Ok(())
    }

    /// Tells the cache the tokens that follow: what was sampled, or a user's next turn. They get their room
    /// with the next claim.
    ///
    /// # Errors
    /// [`Error::NotOpen`], [`Error::TooManyTokens`].
    pub fn push(&mut self, sequence: SequenceId, tokens: &[TokenId]) -> Result<(), Error> {
        let place = self.sequences.place(sequence)?;
        self.must_fit(sequence, self.sequences.at(place).known, tokens)?;
        self.learn(place, tokens);
        Ok(())
    }

    /// Tells the cache which images and the like stand among the tokens that follow. Called before their tokens are
    /// pushed; those of the prompt are in the [`SequenceKey`].
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::Media`] for items out of order, or that begin among tokens which a hash covers
    /// already.
    pub fn add_media(&mut self, sequence: SequenceId, media: &[Media]) -> Result<(), Error> {
        let place = self.sequences.place(sequence)?;
        let of = self.sequences.at_mut(place);
        let hashed = of.hashes.len() as u64 * u64::from(self.groups.unit.get());
        // The last name covers the tokens ahead of its block as well.
        let ahead = if hashed > 0 { u64::from(self.config.hash_lookahead.get()) } else { 0 };
        in_order(sequence, (hashed + ahead).max(of.keys.media_end()), media)?;
        of.keys.add(media);
        Ok(())
    }

    /// The longest cached prefix of a sequence that holds no blocks. Takes nothing and promises nothing, but is
    /// remembered: a [`reserve`](KvCache::reserve) before the index changes does not look again.
    ///
    /// Cost: one probe of the index per cached block.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::Started`] when the sequence holds blocks.
    pub fn lookup(&mut self, sequence: SequenceId) -> Result<Hit, Error> {
        let place = self.must_hold_nothing(sequence)?;
        self.find_prefix(place);
        Ok(self.sequences.at(place).hit)
    }

    /// How many of the `new_tokens` behind `computed` a step should compute, so that it ends where a state is worth
    /// keeping: at the end of the prompt's last whole block, at a junction, at a period of the configuration. All of
    /// them when no group holds states.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn chunk(
        &self,
        sequence: SequenceId,
        computed: TokenCount,
        new_tokens: TokenCount,
    ) -> Result<TokenCount, Error> {
        let sequence = self.sequences.get(sequence)?;
        let holds_states = self.groups.all.iter().any(|group| group.holds == Holds::State);
        if !holds_states || !self.config.prefix_caching {
            return Ok(new_tokens);
        }
        Ok(self.groups.cut(computed, new_tokens, sequence.landmarks()))
    }

    /// The blocks that a sequence holds in the first group.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    #[inline]
    pub fn table(&self, sequence: SequenceId) -> Result<BlockTable<'_>, Error> {
        self.table_in(sequence, GroupId(0))
    }

    /// The blocks that a sequence holds in `group`: the null block where the group needs none.
    ///
    /// # Errors
    /// [`Error::NotOpen`], [`Error::NoSuchGroup`].
    #[inline]
    pub fn table_in(&self, sequence: SequenceId, group: GroupId) -> Result<BlockTable<'_>, Error> {
        let sequence = self.sequences.get(sequence)?;
        let none = || Error::NoSuchGroup { group, groups: self.groups.all.len() };
        let table = sequence.tables.get(group.index()).ok_or_else(none)?;
        Ok(BlockTable::new(&table.blocks, self.groups.all[group.index()].size))
    }

    /// The hashes of a sequence's full blocks ([`Config::hash_unit`] tokens each), by which routers and indexers know
    /// them. Empty without prefix caching.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn hashes(&self, sequence: SequenceId) -> Result<&[H::Digest], Error> {
        Ok(&self.sequences.get(sequence)?.hashes)
    }

    /// How many tokens a sequence knows: its prompt and what was pushed.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn known(&self, sequence: SequenceId) -> Result<TokenCount, Error> {
        Ok(self.sequences.get(sequence)?.known)
    }

    /// Takes back what the last commit of a sequence published: the step it was for will not be computed, so
    /// those blocks must not be found. The sequence keeps its blocks.
    ///
    /// Call it, before [`release`](KvCache::release), for a sequence that yields in the very step it was
    /// admitted to; and for every sequence of a step that failed. Without it, others would find blocks that
    /// nobody has written.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn withdraw(&mut self, sequence: SequenceId) -> Result<(), Error> {
        let place = self.sequences.place(sequence)?;
        let KvCache { blocks, sequences, groups, .. } = self;
        for ((_, group), table) in groups.iter().zip(sequences.at_mut(place).tables.iter_mut()) {
            let parts = group.parts;
            for entry in table.published_before..table.published {
                let block = table.blocks[(entry / parts) as usize];
                if block != BlockId::NULL {
                    blocks.prefix.remove_part(block, entry % parts);
                }
            }
            table.published = table.published_before;
        }
        Ok(())
    }

    /// Gives back all blocks of a sequence, which stays open and may start over: it finds its own blocks in
    /// the cache if nobody needed them meanwhile.
    ///
    /// Blocks go in reverse order, so that of a prefix the end is lost before the beginning. Those that hold
    /// nothing worth keeping are the next to be handed out, the others the last. Releasing a sequence that
    /// holds nothing does nothing.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    #[inline]
    pub fn release(&mut self, sequence: SequenceId) -> Result<(), Error> {
        let place = self.sequences.place(sequence)?;
        let held_something = !self.sequences.at(place).tables.are_empty();
        self.give_back(place, |_| (0, 0));
        let sequence = self.sequences.at_mut(place);
        sequence.was_released |= held_something;
        sequence.release();
        self.reserved.0 -= std::mem::take(&mut sequence.set_aside).0;
        Ok(())
    }

    /// Releases a sequence and forgets it. What it published stays in the cache.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn close(&mut self, sequence: SequenceId) -> Result<(), Error> {
        self.release(sequence)?;
        let place = self.sequences.place(sequence)?;
        self.sequences.close(place);
        Ok(())
    }

    /// The numbers of this moment.
    pub fn stats(&self) -> Stats {
        let (blocks, free) = (self.blocks.pool.usable(), self.blocks.pool.free());
        Stats {
            blocks,
            free,
            used: BlockCount(blocks.0 - free.0 - self.pins.blocks().0),
            pinned: self.pins.blocks(),
            cached: self.blocks.prefix.blocks(),
            reserved: self.reserved,
            sequences: self.sequences.len(),
            evictions: self.blocks.evictions,
            ..self.counted
        }
    }

    /// The free blocks, next to be handed out first. Takes O(n) to walk: for reports and tests.
    pub fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.blocks.pool.free_blocks()
    }

    /// How many sequences hold `block`, copies that are to be made of it, and transfers that are at work on it; 0 for
    /// the null block and for one that does not exist.
    pub fn references(&self, block: BlockId) -> u32 {
        if self.exists(block) { self.blocks.pool.references(block) } else { 0 }
    }

    /// Whether others can find something of `block`.
    pub fn is_cached(&self, block: BlockId) -> bool {
        self.exists(block) && self.blocks.prefix.contains(block)
    }

    /// The hash under which others find `block` in full, if they do.
    pub fn hash_of(&self, block: BlockId) -> Option<H::Digest> {
        if self.exists(block) {
            self.blocks.prefix.content(block).map(|content| content.digest)
        } else {
            None
        }
    }

    pub(crate) fn exists(&self, block: BlockId) -> bool {
        block != BlockId::NULL && block.get() < self.config.block_count.get()
    }

    /// Audits every invariant of the cache. O(blocks + blocks held by sequences).
    ///
    /// # Errors
    /// The first [`Violation`] found: a bug of this crate.
    pub fn check(&self) -> Result<(), Violation> {
        crate::check::check(self)
    }

    fn must_fit(&self, sequence: SequenceId, known: TokenCount, tokens: &[TokenId]) -> Result<(), Error> {
        let max = self.config.sequence_tokens_max;
        let tokens = u64::from(known.0) + tokens.len() as u64;
        if tokens > u64::from(max.0) { Err(Error::TooManyTokens { sequence, tokens, max }) } else { Ok(()) }
    }

    fn must_hold_nothing(&self, sequence: SequenceId) -> Result<u32, Error> {
        let place = self.sequences.place(sequence)?;
        if self.sequences.at(place).tables.are_empty() {
            return Ok(place);
        }
        Err(Error::Started { sequence, held: self.sequences.at(place).held() })
    }

    fn learn(&mut self, place: u32, tokens: &[TokenId]) {
        let KvCache { sequences, hasher, config, groups, .. } = self;
        let sequence = sequences.at_mut(place);
        if config.prefix_caching {
            sequence.learn(tokens, hasher, groups.unit, config.hash_lookahead);
        } else {
            sequence.known.0 += count(tokens.len());
        }
    }

    /// The longest usable prefix, looked up unless the last answer still holds.
    pub(crate) fn find_prefix(&mut self, place: u32) {
        if self.sequences.at(place).found_at != Some(self.blocks.prefix.version()) {
            self.find_prefix_within(place, TokenCount(u32::MAX));
            self.sequences.at_mut(place).found_at = Some(self.blocks.prefix.version());
        }
    }

    /// The longest usable prefix of at most `limit` tokens.
    pub(crate) fn find_prefix_within(&mut self, place: u32, limit: TokenCount) {
        let KvCache { blocks, sequences, config, groups, .. } = self;
        let Sequence { known, reuse, hashes, tables, hit, prompt, found_at, .. } = sequences.at_mut(place);
        let reads = config.prefix_caching && *reuse == Reuse::ReadWrite;
        let hashed = groups.unit.tokens_in(BlockCount(count(hashes.len())));
        let all_but_one = if reads { known.get().saturating_sub(1).min(hashed.get()) } else { 0 };
        let margin = groups.margin;
        let search = Search { groups, prefix: &blocks.prefix, hashes, prompt: *prompt, margin };
        *hit = search.longest(limit.min(TokenCount(all_but_one)), tables);
        *found_at = None;
    }
}

fn watch(config: &Config) -> Option<Box<Watch>> {
    let (blocks, every) = (config.block_count.get(), config.residency_every);
    (every > 0).then(|| Box::new(Watch::new(blocks, every)))
}

fn events<D: Digest>(config: &Config, groups: &Groups) -> Option<Box<Events<D>>> {
    let parts = groups.all.iter().map(|group| group.parts).max().unwrap_or(1);
    let tokens = groups.all.iter().map(|group| group.entry.len()).max().unwrap_or(0);
    let entries = config.block_count.get() as usize * parts as usize;
    let ahead = config.hash_lookahead.get() as usize;
    (config.events_max > 0).then(|| Box::new(Events::new(entries, tokens, ahead, config.events_max)))
}

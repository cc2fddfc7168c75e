//! The cache: sequences ask for room, get blocks, share what is equal.

use crate::claim::Plan;
use crate::evict::{Eviction, Facts, Lru, Wanted};
use crate::hash::{BlockHasher, Digest, Xxh3};
use crate::id::count;
use crate::keys::in_order;
use crate::pool::Pool;
use crate::prefix::Prefix;
use crate::sequence::{Loading, Sequence, Sequences};
use crate::{
    Admission, BlockCount, BlockId, BlockSize, BlockTable, Claim, Config, Error, Grant, GroupId, Hit, Lost,
    Media, Reservation, Reuse, SequenceId, SequenceKey, Stats, TokenCount, TokenId, Violation,
};

/// Decides which physical block holds which tokens of which sequence.
///
/// A sequence's life: [`open`](KvCache::open) with its prompt; [`lookup`](KvCache::lookup) what is cached;
/// [`reserve`](KvCache::reserve) and [`commit`](Reservation::commit) before every step that computes some of
/// its tokens; [`push`](KvCache::push) the tokens that come out; [`release`](KvCache::release) when it must
/// yield, after which it starts over; [`close`](KvCache::close).
///
/// `H` names the blocks, `E` chooses which free block is handed out next.
#[derive(Clone, Debug)]
pub struct KvCache<H: BlockHasher = Xxh3, E: Eviction = Lru> {
    pub(crate) config: Config,
    pub(crate) pool: Pool<E>,
    pub(crate) prefix: Prefix<H::Digest>,
    pub(crate) sequences: Sequences<H::Digest>,
    hasher: H,
    counted: Stats,
    lost: Vec<Lost<H::Digest>>,
}

/// Block ids, and numbers one past them, are `u32`; the index is half as long again.
const BLOCK_COUNT_MAX: BlockCount = BlockCount(1 << 31);

/// The only group there is.
const GROUP: GroupId = GroupId(0);

impl KvCache {
    /// An empty cache. Allocates 52 bytes a block.
    ///
    /// # Errors
    /// [`Error::PoolSize`] for fewer than two blocks (one is the null block) or more than 2^31.
    pub fn new(config: Config) -> Result<KvCache, Error> {
        KvCache::with(config, Xxh3::new(config.hash_seed), Lru::new)
    }
}

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// An empty cache whose blocks are named by `hasher` and chosen by the policy that `eviction` makes for so
    /// many blocks.
    ///
    /// # Errors
    /// As for [`new`](KvCache::new).
    pub fn with(
        config: Config,
        hasher: H,
        eviction: impl FnOnce(BlockCount) -> E,
    ) -> Result<KvCache<H, E>, Error> {
        let blocks = config.block_count;
        if blocks < BlockCount(2) || blocks > BLOCK_COUNT_MAX {
            return Err(Error::PoolSize { blocks, max: BLOCK_COUNT_MAX });
        }
        Ok(KvCache {
            config,
            pool: Pool::new(blocks, eviction(blocks)),
            prefix: Prefix::new(blocks, 1),
            sequences: Sequences::new(),
            hasher,
            counted: Stats::default(),
            lost: Vec::new(),
        })
    }

    /// What the cache was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Makes a sequence known, with the tokens it begins with. It holds no block yet.
    ///
    /// Cost: the hash of every full block, about 10 ns each.
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
    /// [`Error::NotOpen`]; [`Error::Media`] for items out of order, or that begin in a block which is hashed already.
    pub fn add_media(&mut self, sequence: SequenceId, media: &[Media]) -> Result<(), Error> {
        let place = self.sequences.place(sequence)?;
        let of = self.sequences.at_mut(place);
        let hashed = u64::from(of.known.0) - of.tail.len() as u64;
        in_order(sequence, hashed.max(of.keys.media_end()), media)?;
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
        let place = self.sequences.place(sequence)?;
        let held = self.sequences.at(place).held();
        if held > BlockCount(0) {
            return Err(Error::Started { sequence, held });
        }
        let blocks = BlockCount(self.find_prefix(place));
        Ok(Hit { tokens: self.config.block_size.tokens_in(blocks), blocks })
    }

    /// Asks for room for a sequence's next tokens. The claim is granted in full or not at all, and nothing
    /// changes before the reservation is committed.
    ///
    /// Needed are the blocks for `computed + new_tokens + lookahead` tokens (no more than the longest
    /// sequence may have) beyond those it holds or finds in the cache; and the cached blocks that are free now,
    /// because they will not be free then.
    ///
    /// Cost: O(cached blocks claimed) for the first claim of a sequence, plus a lookup if the last one is out
    /// of date; O(1) for later ones.
    ///
    /// # Errors
    /// [`Error::NotOpen`], [`Error::EmptyClaim`]; [`Error::NotCached`] and [`Error::NoRoomBefore`] when
    /// `computed` counts tokens that the sequence cannot have.
    #[inline]
    pub fn reserve(&mut self, sequence: SequenceId, claim: Claim) -> Result<Admission<'_, H, E>, Error> {
        let place = self.sequences.place(sequence)?;
        if claim.new_tokens == TokenCount(0) && claim.external == TokenCount(0) {
            return Err(Error::EmptyClaim { sequence });
        }
        let hits = match self.sequences.at(place).held() {
            BlockCount(0) => self.hits_of_first_claim(place, claim.computed)?,
            held => self.no_hits_later(sequence, held, claim.computed)?,
        };
        let (size, sequence) = (self.config.block_size, self.sequences.at(place));
        let has = BlockCount(sequence.held().0 + hits);
        let new_blocks = size.blocks_beyond(has, self.room(claim)).0;
        let whole = if claim.whole_sequence { size.blocks_beyond(has, sequence.known).0 } else { 0 };
        let beyond = new_blocks.max(whole);
        let need = BlockCount(beyond + self.unused_among(place, hits));
        let free = self.pool.free();
        if u64::from(need.0) + u64::from(claim.watermark.0) > u64::from(free.0) {
            let (alone, blocks) = (BlockCount(has.0 + beyond), self.pool.usable());
            if alone > blocks {
                return Ok(Admission::Never { need: alone, blocks });
            }
            return Ok(Admission::Wait { need, watermark: claim.watermark, free });
        }
        Ok(Admission::Admit(Reservation::new(self, Plan { place, hits, new_blocks, claim })))
    }

    /// The blocks that a sequence holds.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn table(&self, sequence: SequenceId) -> Result<BlockTable<'_>, Error> {
        Ok(BlockTable::new(&self.sequences.get(sequence)?.table, self.config.block_size))
    }

    /// The hashes of a sequence's full blocks, by which routers and indexers know them. Empty without prefix
    /// caching.
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
        let KvCache { prefix, sequences, .. } = self;
        let sequence = sequences.at_mut(place);
        for &block in &sequence.table[sequence.published_before as usize..sequence.published as usize] {
            prefix.remove(block);
        }
        sequence.published = sequence.published_before;
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
    pub fn release(&mut self, sequence: SequenceId) -> Result<(), Error> {
        let place = self.sequences.place(sequence)?;
        let KvCache { pool, prefix, sequences, .. } = self;
        let sequence = sequences.at_mut(place);
        pool.release(indexed(&sequence.table).rev(), facts(&sequence.table, prefix));
        sequence.loading = None;
        sequence.was_released |= !sequence.table.is_empty();
        sequence.table.clear();
        (sequence.published, sequence.published_before) = (0, 0);
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

    /// The K and V of a sequence's first `tokens` tokens are there: those that its claim called `external` have
    /// arrived, all or the first of them. Blocks that they fill are published.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::NotLoading`] when nothing of the sequence is on its way, or not this much.
    pub fn loaded(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<(), Error> {
        let place = self.loading(sequence, tokens)?;
        let KvCache { prefix, sequences, config, .. } = self;
        let sequence = sequences.at_mut(place);
        sequence.loading = sequence
            .loading
            .filter(|loading| tokens < loading.to)
            .map(|loading| Loading { from: tokens, ..loading });
        if config.prefix_caching {
            publish(sequence, config.block_size, prefix);
        }
        Ok(())
    }

    /// Only the first `tokens` tokens of a sequence have their K and V: what should have come behind them did
    /// not. The sequence keeps the blocks that these fill, gives back all others, and goes on from the answer.
    ///
    /// # Errors
    /// As for [`loaded`](KvCache::loaded).
    pub fn load_failed(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<TokenCount, Error> {
        let place = self.loading(sequence, tokens)?;
        let KvCache { pool, prefix, sequences, config, .. } = self;
        let sequence = sequences.at_mut(place);
        let good = config.block_size.full_blocks(tokens);
        let keep = good.0 as usize;
        let gone = indexed(&sequence.table).skip(keep).rev();
        pool.release(gone, facts(&sequence.table, prefix));
        sequence.table.truncate(keep);
        sequence.loading = None;
        sequence.computed = config.block_size.tokens_in(good);
        if config.prefix_caching {
            publish(sequence, config.block_size, prefix);
        }
        Ok(sequence.computed)
    }

    /// What was lost since the last call: cached content whose block was handed out. Whoever wants to keep it
    /// elsewhere copies it before the step writes. Empty unless [`Config::report_lost`].
    pub fn drain_lost(&mut self) -> impl Iterator<Item = Lost<H::Digest>> + '_ {
        self.lost.drain(..)
    }

    /// Forgets all cached content, as after a change of weights. Refuses, with `false` and no change, while
    /// any sequence holds a block. The order of the free blocks stays as it is.
    pub fn reset(&mut self) -> bool {
        let idle = self.pool.free() == self.pool.usable();
        if idle {
            self.prefix.clear();
            self.pool.policy.reset();
        }
        idle
    }

    /// The numbers of this moment.
    pub fn stats(&self) -> Stats {
        let (blocks, free) = (self.pool.usable(), self.pool.free());
        Stats {
            blocks,
            free,
            used: BlockCount(blocks.0 - free.0),
            cached: self.prefix.blocks(),
            sequences: self.sequences.len(),
            ..self.counted
        }
    }

    /// The free blocks, next to be handed out first. Takes O(n) to walk: for reports and tests.
    pub fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.pool.free_blocks()
    }

    /// How many sequences hold `block`; 0 for the null block and for one that does not exist.
    pub fn references(&self, block: BlockId) -> u32 {
        if block.index() < self.pool.references.len() { self.pool.references(block) } else { 0 }
    }

    /// The hash under which others find `block`, if they do.
    pub fn hash_of(&self, block: BlockId) -> Option<H::Digest> {
        if block.index() < self.prefix.hash.len() { self.prefix.hash(block) } else { None }
    }

    /// Audits every invariant of the cache. O(blocks + blocks held by sequences).
    ///
    /// # Errors
    /// The first [`Violation`] found: a bug of this crate.
    pub fn check(&self) -> Result<(), Violation> {
        crate::check::check(self)
    }

    /// Carries a plan out. Its numbers were checked by `reserve` and nothing has happened since.
    #[inline]
    pub(crate) fn commit(&mut self, plan: Plan) -> Grant<'_> {
        let admitted = self.sequences.at(plan.place).table.is_empty();
        if admitted {
            self.count_admission(plan);
        }
        let KvCache { pool, prefix, sequences, config, counted, lost, .. } = self;
        let sequence = sequences.at_mut(plan.place);
        if admitted {
            share(sequence, plan.hits, pool);
        }
        let first_new = sequence.table.len();
        let Sequence { table, hashes, .. } = sequence;
        let wanted = (0..plan.new_blocks as usize).map(|new| Wanted {
            content: hashes.get(first_new + new).map(|hash| name(GROUP, hash)),
            ..Wanted::default()
        });
        pool.take(wanted, |block| {
            if prefix.contains(block) {
                if config.report_lost {
                    lost.push(Lost { digest: prefix.hash[block.index()], group: GROUP, block });
                }
                prefix.remove(block);
                counted.evictions += 1;
            }
            table.push(block);
        });
        let Claim { computed, external, .. } = plan.claim;
        if external > TokenCount(0) {
            sequence.loading = Some(Loading { from: computed, to: computed.plus(external) });
        }
        sequence.computed = plan.claim.computed_after();
        if config.prefix_caching {
            sequence.published_before = sequence.published;
            publish(sequence, config.block_size, prefix);
        }
        let covered = covered(sequence, config);
        Grant {
            cached: config.block_size.tokens_in(BlockCount(plan.hits)),
            new_blocks: &self.sequences.at(plan.place).table[first_new..],
            covered,
        }
    }

    /// The place of a sequence of which the tokens from `tokens` on may be on their way.
    fn loading(&self, sequence: SequenceId, tokens: TokenCount) -> Result<u32, Error> {
        let place = self.sequences.place(sequence)?;
        match self.sequences.at(place).loading {
            Some(Loading { from, to }) if from <= tokens && tokens <= to => Ok(place),
            loading => Err(Error::NotLoading {
                sequence,
                tokens,
                from: loading.map_or(TokenCount(0), |loading| loading.from),
                to: loading.map_or(TokenCount(0), |loading| loading.to),
            }),
        }
    }

    fn must_fit(&self, sequence: SequenceId, known: TokenCount, tokens: &[TokenId]) -> Result<(), Error> {
        let max = self.config.sequence_tokens_max;
        let tokens = u64::from(known.0) + tokens.len() as u64;
        if tokens > u64::from(max.0) { Err(Error::TooManyTokens { sequence, tokens, max }) } else { Ok(()) }
    }

    fn learn(&mut self, place: u32, tokens: &[TokenId]) {
        let KvCache { sequences, hasher, config, .. } = self;
        let sequence = sequences.at_mut(place);
        if config.prefix_caching {
            sequence.learn(tokens, hasher, config.block_size, config.hash_lookahead);
        } else {
            sequence.known.0 += count(tokens.len());
        }
    }

    /// Blocks of the longest usable prefix, looked up unless the last answer still holds.
    fn find_prefix(&mut self, place: u32) -> u32 {
        let KvCache { prefix, sequences, config, .. } = self;
        let sequence = sequences.at_mut(place);
        if sequence.found_at != Some(prefix.version()) {
            sequence.found.clear();
            let limit = config.block_size.full_blocks(TokenCount(sequence.known.0.saturating_sub(1)));
            let limit = sequence.hashes.len().min(limit.0 as usize);
            if sequence.reuse == Reuse::ReadWrite {
                prefix.longest(GROUP, &sequence.hashes[..limit], &mut sequence.found);
            }
            sequence.found_at = Some(prefix.version());
        }
        count(sequence.found.len())
    }

    fn hits_of_first_claim(&mut self, place: u32, computed: TokenCount) -> Result<u32, Error> {
        let found = self.find_prefix(place);
        let size = self.config.block_size;
        let hits = size.full_blocks(computed);
        if hits.0 > found || size.tokens_in(hits) != computed {
            let sequence = self.sequences.at(place).id;
            return Err(Error::NotCached { sequence, computed, cached: size.tokens_in(BlockCount(found)) });
        }
        Ok(hits.0)
    }

    fn no_hits_later(
        &self,
        sequence: SequenceId,
        held: BlockCount,
        computed: TokenCount,
    ) -> Result<u32, Error> {
        let room = self.config.block_size.tokens_in(held);
        if computed > room { Err(Error::NoRoomBefore { sequence, computed, room }) } else { Ok(0) }
    }

    /// Tokens that the sequence must have room for.
    fn room(&self, claim: Claim) -> TokenCount {
        claim.computed_after().plus(claim.lookahead).min(self.config.sequence_tokens_max)
    }

    /// How many of the first `hits` cached blocks are free, and will leave the free list when taken.
    fn unused_among(&self, place: u32, hits: u32) -> u32 {
        let found = &self.sequences.at(place).found[..hits as usize];
        count(found.iter().filter(|&&block| self.pool.references(block) == 0).count())
    }

    fn count_admission(&mut self, plan: Plan) {
        let sequence = self.sequences.at(plan.place);
        if !self.config.prefix_caching || sequence.reuse == Reuse::WriteOnly {
            return;
        }
        let stats = if sequence.was_released { &mut self.counted.again } else { &mut self.counted.first };
        stats.count(sequence.known.0, self.config.block_size.tokens_in(BlockCount(plan.hits)).0);
    }
}

/// Takes the first `hits` blocks that the lookup found.
fn share<D: Digest>(sequence: &mut Sequence<D>, hits: u32, pool: &mut Pool<impl Eviction>) {
    let Sequence { table, found, .. } = sequence;
    table.extend_from_slice(&found[..hits as usize]);
    for &block in table.iter() {
        pool.share(block);
    }
    (sequence.published, sequence.published_before) = (hits, hits);
}

/// Lets others find the blocks that are full of known tokens, have a name, and whose K and V are there, or are
/// computed by the step that is being planned.
fn publish<D: Digest>(sequence: &mut Sequence<D>, block_size: BlockSize, prefix: &mut Prefix<D>) {
    let there = sequence.loading.map_or(sequence.computed, |loading| loading.from);
    let tokens = there.min(sequence.known);
    while block_size.is_full(sequence.published, tokens) {
        let index = sequence.published as usize;
        let Some(&hash) = sequence.hashes.get(index) else { break };
        prefix.insert(GROUP, hash, sequence.table[index]);
        sequence.published += 1;
    }
}

/// How far a sequence can be computed before it fills another block or needs one.
fn covered<D: Digest>(sequence: &Sequence<D>, config: &Config) -> TokenCount {
    let room = config.block_size.tokens_in(sequence.held());
    if !config.prefix_caching {
        return room.max(sequence.computed);
    }
    let fills_next = config.block_size.tokens_in(BlockCount(sequence.published + 1));
    TokenCount(fills_next.0 - 1).min(room).max(sequence.computed)
}

/// What the eviction policy may know of a block that leaves `table`.
fn facts<D: Digest>(table: &[BlockId], prefix: &Prefix<D>) -> impl Fn(u32, BlockId) -> Option<Facts> {
    move |index, block| {
        prefix.contains(block).then(|| Facts {
            index,
            before: index.checked_sub(1).and_then(|before| table.get(before as usize).copied()),
            content: name(prefix.group(block), &prefix.hash[block.index()]),
        })
    }
}

/// 32 bits by which policies know a content.
fn name(group: GroupId, hash: &impl Digest) -> u32 {
    hash.tag() ^ u32::from(group.0).wrapping_mul(0x9E37_79B9)
}

/// The blocks of a table with their indices.
fn indexed(table: &[BlockId]) -> impl DoubleEndedIterator<Item = (u32, BlockId)> + ExactSizeIterator + '_ {
    table.iter().enumerate().map(|(index, &block)| (count(index), block))
}

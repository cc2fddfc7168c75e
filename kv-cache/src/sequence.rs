//! What the cache remembers of a sequence, and where it finds it.

use std::ops::{Deref, DerefMut, Range};

use crate::blocks::Leaving;
use crate::buckets::Buckets;
use crate::hash::{BlockHasher, Digest};
use crate::id::count;
use crate::keys::Keys;
use crate::{
    BlockCount, BlockId, BlockSize, Content, Error, Hit, Reuse, SequenceId, SequenceKey, TokenCount, TokenId,
    TokenIndex,
};

/// One open sequence.
///
/// ```text
///  tokens   |----------------- known -----------------|
///           |-- hashes: full units ---|
///  blocks   |---- a table per group -----------------------------| room for what is computed next
///           |-- published --|                                      hashed, found by others
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Sequence<D> {
    pub(crate) id: SequenceId,
    pub(crate) reuse: Reuse,
    /// Tokens known: prompt and output.
    pub(crate) known: TokenCount,
    /// Tokens that had K and V, or were promised them, at the last commit.
    pub(crate) computed: TokenCount,
    pub(crate) tables: Tables,
    /// One hash per full unit of known tokens.
    pub(crate) hashes: Vec<D>,
    /// The known tokens. Without prefix caching nobody asks for them.
    pub(crate) tokens: Vec<TokenId>,
    /// What it is besides its tokens.
    pub(crate) keys: Keys,
    /// How many tokens it was opened with.
    pub(crate) prompt: TokenCount,
    /// How long its encoder's output is.
    pub(crate) encoder: TokenCount,
    /// Tokens that the last lookup found, their blocks being in the tables ...
    pub(crate) hit: Hit,
    /// ... and the index version that it saw; none when the sequence has changed since.
    pub(crate) found_at: Option<u64>,
    /// Whether it held blocks once and had to give them back.
    pub(crate) was_released: bool,
    /// Blocks that hold tokens from here on, or from the computed ones on, are written into by the next claim and are,
    /// perhaps, also somebody else's.
    pub(crate) shared_from: Option<TokenCount>,
    /// Tokens whose K and V are still on their way from elsewhere.
    pub(crate) loading: Option<Loading>,
    /// Free blocks that nobody else gets, because it will need them once its load is there.
    pub(crate) set_aside: BlockCount,
}

/// The block tables of a sequence, by group. Most caches have one, whose table is found without a detour.
#[derive(Clone, Debug)]
pub(crate) enum Tables {
    One([Table; 1]),
    Several(Box<[Table]>),
}

/// The blocks of a sequence in one group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    /// In token order; the null block where none is needed.
    pub(crate) blocks: Vec<BlockId>,
    /// How far the table has been looked at for publication, in entries of the index.
    pub(crate) published: u32,
    /// What `published` was before the last commit.
    pub(crate) published_before: u32,
    /// How long the table was before the last commit.
    pub(crate) length_before: u32,
    /// Blocks before this one that nobody attends to are given back.
    settled: u32,
    /// What the last lookup found.
    pub(crate) found: Vec<BlockId>,
}

/// Tokens that were claimed as external. Nothing past `from` is published before the tokens up to `to` have arrived.
///
/// ```text
///  0                begin            from                      to
///  |-- had K and V --|-- reported ----|-- still on their way ---|
/// ```
///
/// Groups that forget have room for what is needed to go on from `begin`, where the load began, and from `to`: if the
/// rest never comes, the sequence may have to go back to `begin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loading {
    pub(crate) begin: TokenCount,
    pub(crate) from: TokenCount,
    pub(crate) to: TokenCount,
    /// What is computed behind it in the same step and was known when it was claimed: others may find it then.
    pub(crate) computed: TokenCount,
}

impl Tables {
    fn new(groups: usize) -> Self {
        match groups {
            1 => Tables::One(Default::default()),
            _ => Tables::Several(vec![Table::default(); groups].into()),
        }
    }

    /// Whether no room was ever claimed, or all was given back.
    #[inline]
    pub(crate) fn are_empty(&self) -> bool {
        self.iter().all(|table| table.blocks.is_empty())
    }
}

impl Deref for Tables {
    type Target = [Table];

    #[inline]
    fn deref(&self) -> &[Table] {
        match self {
            Tables::One(table) => table,
            Tables::Several(tables) => tables,
        }
    }
}

impl DerefMut for Tables {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Table] {
        match self {
            Tables::One(table) => table,
            Tables::Several(tables) => tables,
        }
    }
}

impl Table {
    #[inline]
    pub(crate) fn held(&self) -> u32 {
        count(self.blocks.len())
    }

    /// How many blocks are held, or would be with what was found.
    pub(crate) fn filled(&self, first: bool) -> u32 {
        let blocks = if first { &self.found } else { &self.blocks };
        count(blocks.iter().filter(|&&block| block != BlockId::NULL).count())
    }

    /// What the last commit added.
    #[inline]
    pub(crate) fn new_blocks(&self) -> &[BlockId] {
        &self.blocks[self.length_before as usize..]
    }

    /// Puts the null block in the place of `dropped` blocks, the last one first, and gives them with their indices.
    /// Those that an earlier call dropped are not looked at again.
    #[inline]
    pub(crate) fn drop_blocks(&mut self, dropped: Range<u32>) -> impl Iterator<Item = Leaving> + '_ {
        let end = dropped.end.min(self.held());
        let first = dropped.start.max(self.settled).min(end);
        self.settled = self.settled.max(end);
        let blocks = &mut self.blocks[first as usize..end as usize];
        let dropped = (first..end).zip(blocks).rev();
        dropped
            .map(|(index, block)| Leaving { block: std::mem::take(block), index, before: None })
            .filter(|leaving| leaving.block != BlockId::NULL)
    }

    /// Puts the null block in the place of one.
    pub(crate) fn drop_block(&mut self, index: u32) -> Option<Leaving> {
        let block = std::mem::take(&mut self.blocks[index as usize]);
        (block != BlockId::NULL).then_some(Leaving { block, index, before: None })
    }

    /// Forgets blocks that were given back: all but the first `keep`.
    #[inline]
    pub(crate) fn truncate(&mut self, keep: u32, published_max: u32) {
        self.blocks.truncate(keep as usize);
        self.published = self.published.min(published_max);
        self.published_before = self.published_before.min(published_max);
        self.length_before = self.length_before.min(keep);
        self.settled = self.settled.min(keep);
    }
}

impl<D: Digest> Sequence<D> {
    /// Blocks held, all groups together, each once.
    pub(crate) fn held(&self) -> BlockCount {
        let null = BlockId::NULL;
        let held = |table: &Table| table.blocks.iter().filter(|&&block| block != null).count();
        BlockCount(count(self.tables.iter().map(held).sum()))
    }

    /// Learns further tokens, and hashes the units that they fill, once the `lookahead` tokens behind each are
    /// known too.
    ///
    /// ```text
    ///  tokens   |--unit--|~ahead~|
    ///                    |--unit--|~ahead~|
    /// ```
    pub(crate) fn learn(
        &mut self,
        tokens: &[TokenId],
        hasher: &mut impl BlockHasher<Digest = D>,
        unit: BlockSize,
        lookahead: TokenCount,
    ) {
        self.known.0 += count(tokens.len());
        self.found_at = None;
        let Sequence { tokens: all, hashes, keys, .. } = self;
        all.extend_from_slice(tokens);
        let (unit, span) = (unit.len(), unit.len() + lookahead.get() as usize);
        let mut rest = &all[hashes.len() * unit..];
        if keys.is_plain() && unit == span {
            return hasher.run(rest, unit, hashes);
        }
        let mut parent = hashes.last().copied();
        while rest.len() >= span {
            let (tokens, lookahead) = rest[..span].split_at(unit);
            let content = Content { lookahead, ..Content::plain(tokens) };
            let hash = if keys.is_plain() {
                hasher.block(parent, &content)
            } else {
                let first = TokenIndex(count(hashes.len() * unit));
                let extra = keys.extra(hashes.len(), first, u64::from(first.0) + span as u64);
                hasher.block(parent, &Content { extra: Some(&extra), ..content })
            };
            hashes.push(hash);
            parent = Some(hash);
            rest = &rest[unit..];
        }
    }

    /// Forgets all known tokens but the first `keep`.
    pub(crate) fn forget_tokens(&mut self, keep: TokenCount, unit: BlockSize, lookahead: TokenCount) {
        (self.known, self.prompt) = (keep, self.prompt.min(keep));
        self.tokens.truncate(keep.get() as usize);
        let named = keep.get().saturating_sub(lookahead.get());
        self.hashes.truncate(unit.full_blocks(TokenCount(named)).get() as usize);
        self.keys.truncate(keep);
        self.found_at = None;
    }

    /// Becomes another sequence that knows and holds the same. The blocks get no further user by this.
    pub(crate) fn copy(&mut self, parent: &Sequence<D>) {
        self.keys = parent.keys.clone();
        self.reuse = parent.reuse;
        (self.known, self.computed) = (parent.known, parent.computed);
        (self.prompt, self.encoder) = (parent.prompt, parent.encoder);
        self.hashes.extend_from_slice(&parent.hashes);
        self.tokens.extend_from_slice(&parent.tokens);
        for (table, of_parent) in self.tables.iter_mut().zip(parent.tables.iter()) {
            table.blocks.extend_from_slice(&of_parent.blocks);
            (table.published, table.published_before) = (of_parent.published, of_parent.published);
            (table.length_before, table.settled) = (of_parent.held(), of_parent.settled);
        }
        self.hit.junction = parent.hit.junction;
        self.shared_from = parent.shared_from;
    }

    /// Notes that what it writes from `tokens` on may be in blocks that others hold, or find.
    pub(crate) fn share_from(&mut self, tokens: TokenCount) {
        self.shared_from = Some(self.shared_from.map_or(tokens, |from| from.min(tokens)));
    }

    /// Forgets what it held; it may start over.
    #[inline]
    pub(crate) fn release(&mut self) {
        for table in self.tables.iter_mut() {
            table.truncate(0, 0);
        }
        self.computed = TokenCount(0);
        self.loading = None;
        self.shared_from = None;
    }

    /// Forgets all but the buffers' memory.
    fn restart(&mut self, id: SequenceId, key: &SequenceKey<'_>, reuse: Reuse) {
        self.release();
        (self.id, self.reuse) = (id, reuse);
        self.keys.set(key);
        (self.known, self.prompt, self.encoder) = (TokenCount(0), TokenCount(0), TokenCount(0));
        self.hashes.clear();
        self.tokens.clear();
        self.hit = Hit::default();
        self.found_at = None;
        self.was_released = false;
    }
}

/// The open sequences. Closed ones leave their buffers for the next to be opened.
#[derive(Clone, Debug)]
pub(crate) struct Sequences<D> {
    open: Vec<Sequence<D>>,
    closed: Vec<Sequence<D>>,
    /// Place in `open`, plus one, by id.
    index: Buckets,
    groups: usize,
}

impl<D: Digest> Sequences<D> {
    pub(crate) fn new(groups: usize) -> Self {
        Sequences { open: Vec::new(), closed: Vec::new(), index: Buckets::with_room_for(64), groups }
    }

    /// The place of an open sequence, valid until a sequence is closed.
    #[inline]
    pub(crate) fn place(&self, id: SequenceId) -> Result<u32, Error> {
        self.bucket(id).map(|bucket| self.index.number(bucket) - 1).ok_or(Error::NotOpen { sequence: id })
    }

    #[inline]
    pub(crate) fn at(&self, place: u32) -> &Sequence<D> {
        &self.open[place as usize]
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, place: u32) -> &mut Sequence<D> {
        &mut self.open[place as usize]
    }

    pub(crate) fn get(&self, id: SequenceId) -> Result<&Sequence<D>, Error> {
        self.place(id).map(|place| self.at(place))
    }

    pub(crate) fn len(&self) -> u32 {
        count(self.open.len())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence<D>> + '_ {
        self.open.iter()
    }

    /// Opens a sequence that is not open, and gives its place.
    pub(crate) fn open(&mut self, id: SequenceId, key: &SequenceKey<'_>, reuse: Reuse) -> u32 {
        let mut sequence = self.closed.pop().unwrap_or_else(|| Sequence {
            id,
            reuse,
            known: TokenCount(0),
            computed: TokenCount(0),
            tables: Tables::new(self.groups),
            hashes: Vec::new(),
            tokens: Vec::new(),
            keys: Keys::default(),
            prompt: TokenCount(0),
            encoder: TokenCount(0),
            hit: Hit::default(),
            found_at: None,
            was_released: false,
            shared_from: None,
            loading: None,
            set_aside: BlockCount(0),
        });
        sequence.restart(id, key, reuse);
        let place = self.len();
        self.open.push(sequence);
        self.index.insert(tag(id), place + 1);
        place
    }

    /// Opens a sequence that is not open, with all that the one at `parent` knows and holds.
    pub(crate) fn fork(&mut self, parent: u32, id: SequenceId) -> u32 {
        let reuse = self.at(parent).reuse;
        let place = self.open(id, &SequenceKey::default(), reuse);
        let (others, child) = self.open.split_at_mut(place as usize);
        child[0].copy(&others[parent as usize]);
        place
    }

    /// Closes the sequence at `place`; the last one opened moves there.
    pub(crate) fn close(&mut self, place: u32) {
        let bucket = self.bucket(self.at(place).id).expect("an open sequence is indexed");
        self.index.remove(bucket);
        let last = self.len();
        if place + 1 < last {
            let moved = self.open[self.open.len() - 1].id;
            let bucket = self.bucket(moved).expect("an open sequence is indexed");
            self.index.replace(bucket, place + 1);
        }
        self.closed.push(self.open.swap_remove(place as usize));
    }

    #[inline]
    fn bucket(&self, id: SequenceId) -> Option<usize> {
        self.index.find(tag(id), |number| self.open[number as usize - 1].id == id)
    }
}

/// Spreads ids that count up over the whole range (Fibonacci hashing).
fn tag(id: SequenceId) -> u32 {
    (id.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32
}

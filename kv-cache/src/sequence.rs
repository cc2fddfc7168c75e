//! What the cache remembers of a sequence, and where it finds it.

use crate::buckets::Buckets;
use crate::hash::{BlockHasher, Digest};
use crate::id::count;
use crate::keys::Keys;
use crate::{
    BlockCount, BlockId, BlockSize, Content, Error, Reuse, SequenceId, SequenceKey, TokenCount, TokenId,
    TokenIndex,
};

/// One open sequence.
///
/// ```text
///  tokens   |----------------- known -----------------|
///           |-- hashes: full blocks --|---- tail -----|
///  blocks   |---- table ----------------------------------------| room for what is computed next
///           |-- published --|                                     hashed, found by others
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Sequence<D> {
    pub(crate) id: SequenceId,
    pub(crate) reuse: Reuse,
    /// Tokens known: prompt and output.
    pub(crate) known: TokenCount,
    /// The blocks held, in token order.
    pub(crate) table: Vec<BlockId>,
    /// How many blocks at the head of the table are shared or published.
    pub(crate) published: u32,
    /// What `published` was before the last commit.
    pub(crate) published_before: u32,
    /// One hash per full block of known tokens.
    pub(crate) hashes: Vec<D>,
    /// The known tokens behind the last hashed block.
    pub(crate) tail: Vec<TokenId>,
    /// What it is besides its tokens.
    pub(crate) keys: Keys,
    /// The cached blocks found by the last lookup ...
    pub(crate) found: Vec<BlockId>,
    /// ... and the index version that it saw; none when the sequence has changed since.
    pub(crate) found_at: Option<u64>,
    /// Whether it held blocks once and had to give them back.
    pub(crate) was_released: bool,
    /// Tokens whose K and V are still on their way from elsewhere.
    pub(crate) loading: Option<Loading>,
    /// Tokens that had K and V, or were promised them, at the last commit.
    pub(crate) computed: TokenCount,
}

/// Nothing past `from` is published before the tokens up to `to` have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loading {
    pub(crate) from: TokenCount,
    pub(crate) to: TokenCount,
}

impl<D: Digest> Sequence<D> {
    pub(crate) fn held(&self) -> BlockCount {
        BlockCount(count(self.table.len()))
    }

    /// Learns further tokens, and hashes the blocks that they fill, once the `lookahead` tokens behind each are
    /// known too.
    ///
    /// ```text
    ///  tail   |----------|                          its blocks are completed in place
    ///  tokens             |------------------|      all others are hashed where they are
    ///  blocks |--block--|~ahead~|
    ///                   |--block--|~ahead~|
    /// ```
    pub(crate) fn learn(
        &mut self,
        tokens: &[TokenId],
        hasher: &mut impl BlockHasher<Digest = D>,
        block_size: BlockSize,
        lookahead: TokenCount,
    ) {
        self.known.0 += count(tokens.len());
        self.found_at = None;
        let (block, span) = (block_size.len(), block_size.len() + lookahead.0 as usize);
        let held = self.tail.len();
        if held + tokens.len() < span {
            self.tail.extend_from_slice(tokens);
            return;
        }
        let Sequence { tail, hashes, keys, .. } = self;
        let plain = keys.is_plain();
        let mut hash = |span: &[TokenId]| {
            let (tokens, lookahead) = span.split_at(block);
            let parent = hashes.last().copied();
            let content = Content { lookahead, ..Content::plain(tokens) };
            hashes.push(if plain {
                hasher.block(parent, &content)
            } else {
                let first = TokenIndex(count(hashes.len() * block));
                let extra = keys.extra(hashes.len(), first, u64::from(first.0) + span.len() as u64);
                hasher.block(parent, &Content { extra: Some(&extra), ..content })
            });
        };
        let mut begin = 0;
        if held > 0 {
            let last_begin = (held - 1) / block * block;
            let missing = tokens.len().min(last_begin + span - held);
            tail.extend_from_slice(&tokens[..missing]);
            while begin < held && begin + span <= tail.len() {
                hash(&tail[begin..begin + span]);
                begin += block;
            }
            if begin < held {
                tail.drain(..begin);
                return;
            }
        }
        let mut rest = &tokens[begin - held..];
        while rest.len() >= span {
            hash(&rest[..span]);
            rest = &rest[block..];
        }
        tail.clear();
        tail.extend_from_slice(rest);
    }

    /// Forgets all but the buffers' memory.
    fn restart(&mut self, id: SequenceId, key: &SequenceKey<'_>, reuse: Reuse) {
        (self.id, self.reuse) = (id, reuse);
        self.keys.set(key);
        self.known = TokenCount(0);
        (self.published, self.published_before) = (0, 0);
        self.table.clear();
        self.hashes.clear();
        self.tail.clear();
        self.found_at = None;
        self.was_released = false;
        self.loading = None;
        self.computed = TokenCount(0);
    }
}

/// The open sequences. Closed ones leave their buffers for the next to be opened.
#[derive(Clone, Debug)]
pub(crate) struct Sequences<D> {
    open: Vec<Sequence<D>>,
    closed: Vec<Sequence<D>>,
    /// Place in `open`, plus one, by id.
    index: Buckets,
}

impl<D: Digest> Sequences<D> {
    pub(crate) fn new() -> Self {
        Sequences { open: Vec::new(), closed: Vec::new(), index: Buckets::with_room_for(64) }
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
            table: Vec::new(),
            published: 0,
            published_before: 0,
            hashes: Vec::new(),
            tail: Vec::new(),
            keys: Keys::default(),
            found: Vec::new(),
            found_at: None,
            was_released: false,
            loading: None,
            computed: TokenCount(0),
        });
        sequence.restart(id, key, reuse);
        let place = self.len();
        self.open.push(sequence);
        self.index.insert(tag(id), place + 1);
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

//! A model of the cache that is dumb and obviously right: it keeps whole token lists and compares them, counts users by
//! looking into every table, and finds a hit by trying every length. It knows no hash, no linked list and no index.

#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

pub(crate) mod afar;
pub(crate) mod behind;
mod blocks;
mod claims;
mod hits;
mod pins;
mod steps;
pub(crate) mod text;

use std::collections::BTreeMap;

use quayline_kv_cache::*;
pub(crate) use text::{Key, Text};

/// A kind of attention, as a question about single tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Full,
    Window { window: u32, sinks: u32 },
    WindowBehindPrompt { window: u32 },
    Local { chunk: u32 },
    State,
    Cross,
}

impl Kind {
    /// Whether the token at `token` is attended to by one at `from` or later.
    fn needs(self, token: u32, from: u32, prompt: u32) -> bool {
        match self {
            Kind::Full | Kind::Cross => true,
            Kind::Window { window, sinks } => token < sinks || token + window > from,
            Kind::WindowBehindPrompt { window } => prompt == 0 || token < prompt || token + window > from,
            Kind::Local { chunk } => token >= from / chunk * chunk,
            Kind::State => token + 1 >= from,
        }
    }

    fn drops(self) -> bool {
        !matches!(self, Kind::Full | Kind::Cross)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) kind: Kind,
    pub(crate) size: u32,
}

/// What the model must know of the configuration.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) config: Config,
    pub(crate) groups: Vec<Group>,
}

#[derive(Debug)]
pub(crate) enum Verdict {
    Admit {
        hits: u32,
        new: u32,
    },
    NextStep,
    OverLimit(OverLimit),
    /// Need, reserved, free.
    Wait(u32, u32, u32),
    Never(u32),
}

/// What a granted claim changed.
pub(crate) struct Granted {
    pub(crate) cached: u32,
    pub(crate) new: Vec<Vec<BlockId>>,
    pub(crate) copies: Vec<BlockCopy>,
}

pub(crate) struct Model<P> {
    config: Config,
    groups: Vec<Group>,
    unit: u32,
    alignment: u32,
    margin: u32,
    /// The free blocks that hold nothing, the next to be handed out first.
    pub(crate) worthless: Vec<BlockId>,
    /// The other free blocks, as the plain twin of the policy keeps them.
    pub(crate) policy: P,
    /// Numbers for contents, by which a policy remembers what is gone.
    pub(crate) names: BTreeMap<(usize, Text), u32>,
    pins: BTreeMap<u64, pins::Pin>,
    pub(crate) behind: Option<behind::Behind>,
    /// By block and part: what others find in it.
    pub(crate) content: Vec<Vec<Option<Content>>>,
    pub(crate) sequences: BTreeMap<u64, Sequence>,
    pub(crate) copies: Vec<BlockCopy>,
    fresh: Vec<BlockId>,
    publications: u64,
    pub(crate) first: HitStats,
    pub(crate) again: HitStats,
    pub(crate) evictions: u64,
    planned: Planned,
}

/// What the last admitted claim comes to.
#[derive(Default)]
struct Planned {
    blocks: Vec<Vec<BlockId>>,
    copies: u32,
    rest: u32,
    taken: u32,
}

/// What others find in a block: all that its name covers.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) group: usize,
    pub(crate) text: Text,
    published_as: u64,
}

#[derive(Clone)]
pub(crate) struct Sequence {
    key: Key,
    tenant: TenantId,
    reuse: Reuse,
    pub(crate) tokens: Vec<TokenId>,
    prompt: u32,
    encoder: u32,
    pub(crate) tables: Vec<Table>,
    pub(crate) computed: u32,
    junction: u32,
    loading: Option<Loading>,
    set_aside: u32,
    shared_from: Option<u32>,
    was_released: bool,
}

/// Where a load began, how far it was reported, where it ends, and how far known tokens were claimed with it.
#[derive(Clone, Copy)]
pub(crate) struct Loading {
    begin: u32,
    from: u32,
    to: u32,
    computed: u32,
}

/// A block that somebody lets go of: where it was, and what its content hung on.
#[derive(Clone, Copy)]
struct Leaving {
    block: BlockId,
    index: u32,
    before: Option<BlockId>,
}

impl Leaving {
    /// The block that a copy was made of.
    fn source(copy: BlockCopy) -> Leaving {
        Leaving { block: copy.from, index: copy.index, before: None }
    }
}

#[derive(Clone, Default)]
pub(crate) struct Table {
    pub(crate) blocks: Vec<BlockId>,
    published: u32,
    published_before: u32,
}

impl Sequence {
    fn known(&self) -> u32 {
        self.tokens.len() as u32
    }

    fn is_empty(&self) -> bool {
        self.tables.iter().all(|table| table.blocks.is_empty())
    }

    fn held(&self) -> u32 {
        self.tables.iter().map(|table| real(&table.blocks)).sum()
    }
}

fn real(blocks: &[BlockId]) -> u32 {
    blocks.iter().filter(|&&block| block != BlockId::NULL).count() as u32
}

impl<P: Eviction> Model<P> {
    pub(crate) fn new(shape: &Shape, policy: P) -> Self {
        let Shape { config, groups } = shape.clone();
        let unit = config.hash_unit().get();
        let mut model = Model {
            unit,
            alignment: 1,
            margin: 0,
            worthless: (1..config.block_count.0).map(BlockId).collect(),
            policy,
            names: BTreeMap::new(),
            pins: BTreeMap::new(),
            behind: None,
            content: Vec::new(),
            sequences: BTreeMap::new(),
            copies: Vec::new(),
            fresh: Vec::new(),
            publications: 0,
            first: HitStats::default(),
            again: HitStats::default(),
            evictions: 0,
            planned: Planned::default(),
            config,
            groups,
        };
        let entries: Vec<u32> = (0..model.groups.len())
            .filter(|&g| model.groups[g].kind != Kind::Cross)
            .map(|g| model.entry(g))
            .collect();
        model.alignment = (1..).find(|n| entries.iter().all(|entry| n % entry == 0)).unwrap();
        if entries.is_empty() {
            model.alignment = unit;
        }
        let parts = (0..model.groups.len()).map(|group| model.parts(group)).max().unwrap();
        model.content = vec![vec![None; parts as usize]; model.config.block_count.0 as usize];
        model.margin = if model.config.draft_head { model.alignment } else { 0 };
        model
    }

    /// Tokens per piece that can be found.
    pub(crate) fn entry(&self, group: usize) -> u32 {
        let Group { kind, size } = self.groups[group];
        if self.config.match_unit.is_some() && kind != Kind::State { self.unit } else { size }
    }

    fn hit_entries(&self, group: usize, tokens: u32) -> u32 {
        if self.groups[group].kind == Kind::Cross { 0 } else { tokens / self.entry(group) }
    }

    fn parts(&self, group: usize) -> u32 {
        self.groups[group].size / self.entry(group)
    }

    pub(crate) fn users(&self, block: BlockId) -> u32 {
        let copied = self.copies.iter().filter(|copy| copy.from == block).count() as u32;
        let kept = self.behind.as_ref().map_or(0, |behind| behind.keeps(block));
        self.holders(block) + copied + self.pins_of(block) + kept
    }

    pub(crate) fn is_free(&self, block: BlockId) -> bool {
        block != BlockId::NULL && self.users(block) == 0
    }

    pub(crate) fn free(&self) -> u32 {
        (1..self.content.len() as u32).filter(|&block| self.is_free(BlockId(block))).count() as u32
    }

    fn holders(&self, block: BlockId) -> u32 {
        let tables = self.sequences.values().flat_map(|sequence| &sequence.tables);
        tables.map(|table| table.blocks.iter().filter(|&&held| held == block).count() as u32).sum()
    }

    pub(crate) fn is_cached(&self, block: BlockId) -> bool {
        self.content[block.0 as usize].iter().any(Option::is_some)
    }

    /// What `block` holds in full.
    pub(crate) fn whole_content(&self, block: BlockId) -> Option<&Content> {
        let parts = &self.content[block.0 as usize];
        let group = parts.iter().flatten().next()?.group;
        parts[self.parts(group) as usize - 1].as_ref()
    }

    pub(crate) fn set_aside(&self) -> u32 {
        self.sequences.values().map(|sequence| sequence.set_aside).sum()
    }

    pub(super) fn get(&mut self, id: u64) -> Result<&mut Sequence, Error> {
        self.sequences.get_mut(&id).ok_or(Error::NotOpen { sequence: SequenceId(id) })
    }

    fn must_fit(&self, id: u64, tokens: usize) -> Result<(), Error> {
        let (tokens, max) = (tokens as u64, self.config.sequence_tokens_max);
        if tokens <= max.0.into() {
            Ok(())
        } else {
            Err(Error::TooManyTokens { sequence: SequenceId(id), tokens, max })
        }
    }

    pub(crate) fn open(
        &mut self,
        id: u64,
        (key, tenant): (&Key, TenantId),
        tokens: &[TokenId],
        reuse: Reuse,
    ) -> Result<(), Error> {
        if self.sequences.contains_key(&id) {
            return Err(Error::AlreadyOpen { sequence: SequenceId(id) });
        }
        self.must_fit(id, tokens.len())?;
        let sequence = Sequence {
            key: key.clone(),
            tenant,
            reuse,
            tokens: tokens.to_vec(),
            prompt: tokens.len() as u32,
            encoder: 0,
            tables: vec![Table::default(); self.groups.len()],
            computed: 0,
            junction: 0,
            loading: None,
            set_aside: 0,
            shared_from: None,
            was_released: false,
        };
        self.sequences.insert(id, sequence);
        Ok(())
    }

    pub(crate) fn encoder(&mut self, id: u64, tokens: u32) -> Result<(), Error> {
        self.must_be_empty(id)?;
        self.get(id)?.encoder = tokens;
        Ok(())
    }

    pub(crate) fn push(&mut self, id: u64, tokens: &[TokenId]) -> Result<(), Error> {
        let known = self.get(id)?.tokens.len();
        self.must_fit(id, known + tokens.len())?;
        self.get(id)?.tokens.extend(tokens);
        Ok(())
    }

    /// Further items, behind all that is named or told of already.
    pub(crate) fn add_media(&mut self, id: u64, media: &[Media]) -> Result<(), Error> {
        let (unit, ahead, caches) = (self.unit, self.config.hash_lookahead.0, self.config.prefix_caching);
        let sequence = self.get(id)?;
        let named = if caches { sequence.known().saturating_sub(ahead) / unit * unit } else { 0 };
        let named = if named > 0 { named + ahead } else { 0 };
        let end = |item: &Media| item.first.0 + item.tokens.0;
        let mut free_from = sequence.key.media.iter().map(end).max().unwrap_or(0).max(named);
        for item in media {
            if item.tokens.0 == 0 || item.first.0 < free_from {
                let (sequence, free_from) = (SequenceId(id), free_from.into());
                return Err(Error::Media { sequence, first: item.first, tokens: item.tokens, free_from });
            }
            free_from = end(item);
        }
        sequence.key.media.extend_from_slice(media);
        Ok(())
    }

    fn must_be_empty(&mut self, id: u64) -> Result<(), Error> {
        let sequence = self.get(id)?;
        if sequence.is_empty() {
            return Ok(());
        }
        Err(Error::Started { sequence: SequenceId(id), held: BlockCount(sequence.held()) })
    }

    /// Tokens of a sequence whose steps are done.
    pub(crate) fn settled(&self, id: u64) -> u32 {
        self.sequences.get(&id).map_or(0, |of| of.loading.map_or(of.computed, |loading| loading.from))
    }

    pub(crate) fn usual_start(&mut self, id: u64) -> TokenCount {
        match self.sequences.get(&id) {
            None => TokenCount(0),
            Some(sequence) if sequence.is_empty() => self.hit(id).0.tokens,
            Some(sequence) => TokenCount(sequence.computed),
        }
    }
}

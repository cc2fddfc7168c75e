//! A model of the cache that is dumb and obviously right: it keeps whole token lists and compares them, counts users by
//! looking into every table, and finds a hit by trying every length. It knows no hash, no linked list and no index.

#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

mod steps;

use std::collections::BTreeMap;

use quayline_kv_cache::*;

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

pub(crate) struct Model {
    config: Config,
    groups: Vec<Group>,
    unit: u32,
    alignment: u32,
    margin: u32,
    pub(crate) free: Vec<BlockId>,
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
    new: u32,
}

/// All tokens that the name covers, under the key they were computed with.
#[derive(Clone)]
pub(crate) struct Content {
    pub(crate) group: usize,
    pub(crate) tokens: (usize, Vec<TokenId>),
    published_as: u64,
}

#[derive(Clone)]
pub(crate) struct Sequence {
    key: usize,
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

/// Where a load began, how far it was reported, where it ends.
#[derive(Clone, Copy)]
pub(crate) struct Loading {
    begin: u32,
    from: u32,
    to: u32,
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

impl Model {
    pub(crate) fn new(shape: &Shape) -> Self {
        let Shape { config, groups } = shape.clone();
        let unit = config.hash_unit().get();
        let mut model = Model {
            unit,
            alignment: 1,
            margin: 0,
            free: (1..config.block_count.0).map(BlockId).collect(),
            content: vec![vec![None; 64]; config.block_count.0 as usize],
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
        self.holders(block) + self.copies.iter().filter(|copy| copy.from == block).count() as u32
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

    fn get(&mut self, id: u64) -> Result<&mut Sequence, Error> {
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
        key: usize,
        tokens: &[TokenId],
        reuse: Reuse,
    ) -> Result<(), Error> {
        if self.sequences.contains_key(&id) {
            return Err(Error::AlreadyOpen { sequence: SequenceId(id) });
        }
        self.must_fit(id, tokens.len())?;
        let sequence = Sequence {
            key,
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

    fn must_be_empty(&mut self, id: u64) -> Result<(), Error> {
        let sequence = self.get(id)?;
        if sequence.is_empty() {
            return Ok(());
        }
        Err(Error::Started { sequence: SequenceId(id), held: BlockCount(sequence.held()) })
    }

    /// The oldest block of `group` in which the first `end` tokens of a sequence end.
    fn find(&self, group: usize, sequence: &Sequence, end: u32) -> Option<BlockId> {
        let covered = end + self.config.hash_lookahead.0;
        let wanted = (sequence.key, sequence.tokens.get(..covered as usize)?.to_vec());
        let blocks = (0..).map(BlockId).zip(&self.content);
        let copies =
            blocks.flat_map(|(block, parts)| parts.iter().flatten().map(move |content| (content, block)));
        copies
            .filter(|(content, _)| content.group == group && content.tokens == wanted)
            .map(|(content, block)| (content.published_as, block))
            .min()
            .map(|(_, block)| block)
    }

    /// The blocks that a hit of `tokens` tokens takes in `group`, if they are all there. The `margin` tokens behind it
    /// have to be there as well.
    fn hit_in(&self, group: usize, sequence: &Sequence, tokens: u32, margin: u32) -> Option<Vec<BlockId>> {
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

    fn hits(&self, sequence: &Sequence, tokens: u32) -> Option<Vec<Vec<BlockId>>> {
        (0..self.groups.len()).map(|group| self.hit_in(group, sequence, tokens, self.margin)).collect()
    }

    /// The longest hit and its blocks, by trying all.
    fn hit(&self, id: u64) -> (Hit, Vec<Vec<BlockId>>) {
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

    pub(crate) fn usual_start(&mut self, id: u64) -> TokenCount {
        match self.sequences.get(&id) {
            None => TokenCount(0),
            Some(sequence) if sequence.is_empty() => self.hit(id).0.tokens,
            Some(sequence) => TokenCount(sequence.computed),
        }
    }

    /// Blocks of a group that a claim adds, null ones too.
    fn added(&self, group: usize, sequence: &Sequence, length: u32, claim: Claim) -> Vec<bool> {
        let Group { kind, size } = self.groups[group];
        let after = claim.computed.0 + claim.external.0 + claim.new_tokens.0;
        let room = (after + claim.lookahead.0).min(self.config.sequence_tokens_max.0);
        let room = if kind == Kind::Cross { sequence.encoder } else { room };
        let start = claim.computed.0 + claim.external.0;
        (length..room.div_ceil(size).max(length))
            .map(|index| match kind {
                Kind::Full | Kind::Cross => true,
                Kind::State => {
                    let last = |tokens: u32| tokens.saturating_sub(1) / size;
                    index >= last(after) || (claim.external.0 > 0 && index == last(start))
                }
                _ => {
                    (index * size..(index + 1) * size).any(|token| kind.needs(token, start, sequence.prompt))
                }
            })
            .collect()
    }

    /// What the whole sequence would add in a group: as many blocks as the rest has, or as it holds at once.
    fn whole(&self, group: usize, sequence: &Sequence, blocks: &[BlockId]) -> u32 {
        let Group { kind, size } = self.groups[group];
        let tokens = if kind == Kind::Cross { sequence.encoder } else { sequence.known() };
        let step = u64::from(self.config.step_tokens_max.0);
        let size64 = u64::from(size);
        let beyond = u64::from(tokens.div_ceil(size).saturating_sub(blocks.len() as u32));
        let all = u64::from(tokens.div_ceil(size));
        let at_once = match kind {
            Kind::Full | Kind::Cross | Kind::WindowBehindPrompt { .. } => all,
            Kind::Window { window, sinks } => {
                (u64::from(window) - 1 + step).div_ceil(size64) + 1 + u64::from(sinks.div_ceil(size))
            }
            Kind::Local { chunk } => (u64::from(chunk) + step).div_ceil(size64),
            Kind::State => 2,
        };
        let has = if kind.drops() && kind != Kind::State { real(blocks) } else { blocks.len() as u32 };
        if matches!(kind, Kind::Full | Kind::Cross) {
            return beyond as u32;
        }
        beyond.min(at_once.min(all).saturating_sub(has.into())) as u32
    }

    /// Entries of `blocks` that a claim writes into and that are not the sequence's alone.
    fn to_copy(
        &self,
        group: usize,
        blocks: &[BlockId],
        published: u32,
        claim: Claim,
        shared_from: Option<u32>,
        own: u32,
    ) -> Vec<u32> {
        let Group { kind, size } = self.groups[group];
        let after = claim.computed.0 + claim.external.0 + claim.new_tokens.0;
        let written = match kind {
            Kind::Cross => return Vec::new(),
            Kind::State => after.saturating_sub(1) / size,
            _ => claim.computed.0.min(shared_from.unwrap_or(u32::MAX)) / size,
        };
        let parts = self.parts(group);
        (written..blocks.len() as u32)
            .filter(|&index| {
                let block = blocks[index as usize];
                let first_part = published.saturating_sub(index * parts);
                let later = self.content[block.0 as usize].iter().skip(first_part as usize);
                let is_shared = self.holders(block) > own || later.flatten().next().is_some();
                block != BlockId::NULL && first_part < parts && is_shared
            })
            .collect()
    }

    pub(crate) fn reserve(&mut self, id: u64, claim: Claim) -> Result<Verdict, Error> {
        let sequence = SequenceId(id);
        let is_empty = self.get(id)?.is_empty();
        if claim.new_tokens.0 == 0 && claim.external.0 == 0 {
            return Err(Error::EmptyClaim { sequence });
        }
        let computed = claim.computed;
        let mut blocks: Vec<Vec<BlockId>> =
            self.sequences[&id].tables.iter().map(|table| table.blocks.clone()).collect();
        let mut published: Vec<u32> =
            self.sequences[&id].tables.iter().map(|table| table.published).collect();
        if is_empty {
            let (hit, found) = self.hit(id);
            self.get(id)?.junction = hit.junction.unwrap_or_default().0;
            let refused = Err(Error::NotCached { sequence, computed, cached: hit.tokens });
            blocks = found;
            if computed != hit.tokens {
                if computed > hit.tokens || !computed.0.is_multiple_of(self.alignment) {
                    return refused;
                }
                let shorter = if computed.0 == 0 { Some(vec![Vec::new(); blocks.len()]) } else { None };
                match shorter.or_else(|| self.hits(&self.sequences[&id], computed.0)) {
                    Some(shorter) => blocks = shorter,
                    None => return refused,
                }
                if self.groups.iter().any(|group| group.kind != Kind::Full)
                    || self.config.match_unit.is_some()
                {
                    // The shorter hit was looked up anew, and says anew where groups part.
                    self.get(id)?.junction = 0;
                }
            }
            published = (0..blocks.len()).map(|group| self.hit_entries(group, computed.0)).collect();
            let fresh = |group: usize| {
                self.groups[group].kind == Kind::State
                    && blocks[group].last().is_some_and(|state| self.fresh.contains(state))
            };
            if computed.0 > 0 && (0..blocks.len()).any(fresh) {
                return Ok(Verdict::NextStep);
            }
        } else {
            if let (Some(Loading { from, to, .. }), true) =
                (self.sequences[&id].loading, claim.external.0 > 0)
            {
                return Err(Error::Loading { sequence, from: TokenCount(from), to: TokenCount(to) });
            }
            let rooms = self.groups.iter().zip(&blocks).filter(|(group, _)| group.kind != Kind::Cross);
            let room = rooms.map(|(group, blocks)| blocks.len() as u32 * group.size).min();
            if let Some(room) = room.filter(|&room| computed.0 > room) {
                return Err(Error::NoRoomBefore { sequence, computed, room: TokenCount(room) });
            }
        }
        let of = &self.sequences[&id];
        let (mut hits, mut revived, mut new, mut beyond, mut copies) = (0, 0, 0, 0, 0);
        for (group, blocks) in blocks.iter().enumerate() {
            if is_empty {
                hits += real(blocks);
                revived += blocks.iter().filter(|block| self.free.contains(block)).count() as u32;
            }
            let added =
                self.added(group, of, blocks.len() as u32, claim).into_iter().filter(|&real| real).count();
            new += added as u32;
            let whole = if claim.whole_sequence { self.whole(group, of, blocks) } else { 0 };
            beyond += whole.max(added as u32);
            if is_empty || of.shared_from.is_some() {
                copies += self
                    .to_copy(group, blocks, published[group], claim, of.shared_from, u32::from(!is_empty))
                    .len() as u32;
            }
        }
        let need = revived + copies + beyond;
        let (reserved, free) = (self.set_aside() - of.set_aside, self.free.len() as u32);
        if need + claim.watermark.0 + reserved > free {
            let alone = if is_empty { hits } else { of.held() } + beyond;
            if alone >= self.content.len() as u32 {
                return Ok(Verdict::Never(alone));
            }
            return Ok(Verdict::Wait(need, reserved, free));
        }
        self.planned = Planned { blocks, copies, rest: beyond - new, new };
        Ok(Verdict::Admit { hits, new: new + copies })
    }
}

//! Claims: what is asked, what it comes to, and how it is carried out.

use quayline_kv_cache::evict::Wanted;
use quayline_kv_cache::*;

use super::{Granted, Group, Kind, Loading, Model, Planned, Sequence, Verdict, real};

impl<P: Eviction> Model<P> {
    pub(crate) fn commit(&mut self, id: u64, claim: Claim) -> Granted {
        let Planned { blocks, copies, rest, taken } = std::mem::take(&mut self.planned);
        let mut granted = Granted { cached: 0, new: Vec::new(), copies: Vec::new() };
        if self.sequences[&id].is_empty() {
            granted.cached = claim.computed.0;
            self.count_admission(id, claim.computed.0);
            for (group, blocks) in blocks.into_iter().enumerate() {
                for &block in blocks.iter().filter(|&&block| block != BlockId::NULL) {
                    if self.users(block) == 0 { self.policy.revive(block) } else { self.policy.reused(block) }
                }
                let published = self.hit_entries(group, claim.computed.0);
                let table = &mut self.of(id).tables[group];
                (table.blocks, table.published) = (blocks, published);
            }
        }
        for group in (0..self.groups.len()).filter(|_| copies > 0) {
            let shared_from = self.sequences[&id].shared_from;
            let table = self.sequences[&id].tables[group].clone();
            for index in self.to_copy(group, &table.blocks, table.published, claim, shared_from, 1) {
                let tenant = self.sequences[&id].tenant;
                let (from, to) = (table.blocks[index as usize], self.take(Wanted { content: None, tenant }));
                let parts = self.parts(group);
                let table = &mut self.of(id).tables[group];
                table.blocks[index as usize] = to;
                table.published = table.published.min(index * parts);
                let size = self.groups[group].size;
                let tokens = TokenCount(claim.computed.0.saturating_sub(index * size).min(size));
                let copy = BlockCopy { group: GroupId(group as u8), index, from, to, tokens };
                self.copies.push(copy);
                granted.copies.push(copy);
            }
        }
        for group in 0..self.groups.len() {
            let length = self.sequences[&id].tables[group].blocks.len();
            let added = self.added(group, &self.sequences[&id], length as u32, claim);
            for (index, is_real) in (length as u32..).zip(added) {
                let wanted = self.wanted(id, group, index);
                let block = if is_real { self.take(wanted) } else { BlockId::NULL };
                self.of(id).tables[group].blocks.push(block);
            }
            granted.new.push(self.sequences[&id].tables[group].blocks[length..].to_vec());
        }
        let sequence = self.of(id);
        sequence.shared_from = None;
        if claim.external.0 > 0 {
            let (begin, to) = (claim.computed.0, claim.computed.0 + claim.external.0);
            let computed = sequence.known().min(to + claim.new_tokens.0);
            sequence.loading = Some(Loading { begin, from: begin, to, computed });
        }
        let still = sequence.set_aside.saturating_sub(taken);
        sequence.set_aside = if claim.external.0 > 0 { rest } else { still };
        sequence.computed = claim.computed.0 + claim.external.0 + claim.new_tokens.0;
        sequence.tables.iter_mut().for_each(|table| table.published_before = table.published);
        self.publish(id, self.sequences[&id].computed, true);
        granted
    }

    /// The block of a window that a load begins within and leaves unfilled, as nobody needs it at its end.
    pub(super) fn gap(&self, id: u64, group: usize, Loading { begin, to, .. }: Loading) -> Option<u32> {
        let (Group { kind, size }, prompt) = (self.groups[group], self.sequences[&id].prompt);
        let block = begin / size;
        let is_window = !matches!(kind, Kind::Full | Kind::Cross | Kind::State);
        let is_needed = (block * size..(block + 1) * size).any(|token| kind.needs(token, to, prompt));
        (is_window && begin % size > 0 && !is_needed).then_some(block)
    }

    /// The last number of computed tokens that neither fills a block nor needs one.
    pub(crate) fn covered(&self, id: u64) -> u32 {
        let sequence = &self.sequences[&id];
        let changes_something = |tokens: u32| {
            let groups = (0..self.groups.len()).filter(|&group| self.groups[group].kind != Kind::Cross);
            groups.into_iter().any(|group| {
                let table = &sequence.tables[group];
                let fills = self.config.prefix_caching && tokens >= (table.published + 1) * self.entry(group);
                fills || tokens > table.blocks.len() as u32 * self.groups[group].size
            })
        };
        let mut all = sequence.computed + 1..sequence.computed + 1000;
        all.find(|&tokens| changes_something(tokens)).map_or(u32::MAX, |tokens| tokens - 1)
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
        // What is loaded may be whole blocks.
        let published = if claim.external.0 > 0 { published.min(written * parts) } else { published };
        (written..blocks.len() as u32)
            .filter(|&index| {
                let block = blocks[index as usize];
                let first_part = published.saturating_sub(index * parts);
                let later = self.content[block.0 as usize].iter().skip(first_part as usize);
                let kept = self.behind.as_ref().map_or(0, |behind| behind.keeps(block));
                let is_shared = self.holders(block) + kept > own || later.flatten().next().is_some();
                block != BlockId::NULL && first_part < parts && is_shared
            })
            .collect()
    }

    /// Whether a claim that goes back finds every block that it reads or writes.
    fn must_begin_again(&self, id: u64, claim: Claim) -> Result<(), Error> {
        let (of, from) = (&self.sequences[&id], claim.computed.0);
        if from >= of.computed {
            return Ok(());
        }
        if let Some(Loading { from: there, to, .. }) = of.loading.filter(|loading| from < loading.to) {
            let [from, to] = [there, to].map(TokenCount);
            return Err(Error::Loading { sequence: SequenceId(id), from, to });
        }
        let tables = (0..).zip(&of.tables).filter(|(group, _)| self.groups[*group].kind != Kind::Cross);
        let published = tables.map(|(group, table)| table.published * self.entry(group)).max();
        if let Some(published) = published.filter(|&there| claim.external.0 > 0 && from < there) {
            let [computed, published] = [from, published].map(TokenCount);
            return Err(Error::AlreadyPublished { sequence: SequenceId(id), computed, published });
        }
        let to = from + claim.new_tokens.0 + claim.external.0;
        for (group, table) in of.tables.iter().enumerate() {
            let Group { kind, size } = self.groups[group];
            let is_used = |token: u32| match kind {
                Kind::Full | Kind::Cross => false,
                Kind::State => token + 1 == from || token + 1 == to,
                _ => kind.needs(token, from, of.prompt) && token < to + claim.lookahead.0,
            };
            let mut holes = (0..).zip(&table.blocks).filter(|(_, block)| **block == BlockId::NULL);
            if holes.any(|(index, _)| (index * size..(index + 1) * size).any(is_used)) {
                return Err(Error::Gone {
                    sequence: SequenceId(id),
                    tokens: claim.computed,
                    computed: TokenCount(of.computed),
                    group: GroupId(group as u8),
                });
            }
        }
        Ok(())
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
            self.must_begin_again(id, claim)?;
        }
        let of = &self.sequences[&id];
        let (mut hits, mut revived, mut new, mut beyond, mut copies) = (0, Vec::new(), 0, 0, 0);
        for (group, blocks) in blocks.iter().enumerate() {
            if is_empty {
                hits += real(blocks);
                revived.extend(blocks.iter().copied().filter(|&block| self.is_free(block)));
            }
            let added =
                self.added(group, of, blocks.len() as u32, claim).into_iter().filter(|&real| real).count();
            new += added as u32;
            let whole = if claim.whole_sequence { self.whole(group, of, blocks) } else { 0 };
            beyond += whole.max(added as u32);
            if is_empty || of.shared_from.is_some() || claim.external.0 > 0 {
                copies += self
                    .to_copy(group, blocks, published[group], claim, of.shared_from, u32::from(!is_empty))
                    .len() as u32;
            }
        }
        let need = revived.len() as u32 + copies + beyond;
        let taken = BlockCount(beyond + copies);
        if let Err(refusal) = self.policy.admits(of.tenant, taken, revived.into_iter()) {
            return Ok(Verdict::OverLimit(refusal));
        }
        let (reserved, free) = (self.set_aside() - of.set_aside, self.free());
        if need + claim.watermark.0 + reserved > free {
            let alone = if is_empty { hits } else { of.held() } + beyond;
            if alone >= self.content.len() as u32 {
                return Ok(Verdict::Never(alone));
            }
            return Ok(Verdict::Wait(need, reserved, free));
        }
        self.planned = Planned { blocks, copies, rest: beyond - new, taken: need - (beyond - new) };
        Ok(Verdict::Admit { hits, new: new + copies })
    }
}

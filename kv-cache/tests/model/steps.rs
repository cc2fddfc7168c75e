//! What changes the model: claims that are carried out, blocks that come and go, content that is found or forgotten.

use quayline_kv_cache::*;

use super::{Content, Kind, Leaving, Loading, Model, Retention, Sequence};

impl<P: Eviction> Model<P> {
    pub(crate) fn withdraw(&mut self, id: u64) -> Result<(), Error> {
        self.get(id)?;
        for group in 0..self.groups.len() {
            let parts = self.parts(group);
            let table = &mut self.of(id).tables[group];
            let taken_back = table.published_before..table.published;
            table.published = table.published_before;
            let blocks = table.blocks.clone();
            for entry in taken_back {
                let block = blocks[(entry / parts) as usize];
                self.content[block.0 as usize][(entry % parts) as usize] = None;
            }
        }
        Ok(())
    }

    pub(crate) fn release(&mut self, id: u64) -> Result<(), Error> {
        let was_empty = self.get(id)?.is_empty();
        self.give_back(id, |_, _| (0, 0));
        let sequence = self.of(id);
        sequence.was_released |= !was_empty;
        (sequence.computed, sequence.set_aside, sequence.loading) = (0, 0, None);
        sequence.shared_from = None;
        Ok(())
    }

    pub(crate) fn close(&mut self, id: u64) -> Result<(), Error> {
        self.release(id)?;
        self.sequences.remove(&id);
        Ok(())
    }

    pub(crate) fn fork(&mut self, parent: u64, child: u64) -> Result<(), Error> {
        self.must_be_settled(parent)?;
        if self.sequences.contains_key(&child) {
            return Err(Error::AlreadyOpen { sequence: SequenceId(child) });
        }
        let of = &self.sequences[&parent];
        let named = of.known().saturating_sub(self.config.hash_lookahead.0);
        let from = of.shared_from.map_or(named, |from| from.min(named));
        self.of(parent).shared_from = Some(from);
        let mut sequence = self.sequences[&parent].clone();
        sequence.tables.iter_mut().for_each(|table| table.published_before = table.published);
        (sequence.set_aside, sequence.was_released) = (0, false);
        self.sequences.insert(child, sequence);
        Ok(())
    }

    pub(crate) fn truncate(&mut self, id: u64, keep: u32) -> Result<(), Error> {
        self.must_be_settled(id)?;
        let known = self.sequences[&id].known();
        if keep > known {
            let (tokens, known) = (TokenCount(keep), TokenCount(known));
            return Err(Error::PastTheStart { sequence: SequenceId(id), tokens, known });
        }
        self.must_go_on_from(id, keep)?;
        let ahead = if keep < known { self.config.hash_lookahead.0 } else { 0 };
        self.keep_room(id, keep, keep.saturating_sub(ahead));
        for group in (0..self.groups.len()).filter(|&group| self.groups[group].kind == Kind::State) {
            let size = self.groups[group].size;
            for entry in keep.saturating_sub(ahead) / size..keep / size {
                let block = self.sequences[&id].tables[group].blocks.get(entry as usize).copied();
                self.content[block.unwrap_or(BlockId::NULL).0 as usize].fill(None);
            }
        }
        let sequence = self.of(id);
        sequence.tokens.truncate(keep as usize);
        sequence.key.media.retain(|item| item.first.0 < keep);
        sequence.prompt = sequence.prompt.min(keep);
        Ok(())
    }

    pub(crate) fn rollback(&mut self, id: u64, tokens: u32) -> Result<(), Error> {
        let known = self.get(id)?.known();
        if tokens > known {
            let (tokens, known) = (TokenCount(tokens), TokenCount(known));
            return Err(Error::PastTheStart { sequence: SequenceId(id), tokens, known });
        }
        self.truncate(id, known - tokens)
    }

    pub(crate) fn trim(&mut self, id: u64, room: u32) -> Result<(), Error> {
        self.must_be_settled(id)?;
        self.must_go_on_from(id, room)?;
        self.keep_room(id, room, room);
        Ok(())
    }

    pub(crate) fn settle(&mut self, id: u64, tokens: u32) -> Result<Vec<BlockId>, Error> {
        let sequence = self.get(id)?;
        let computed = sequence.loading.map_or(sequence.computed, |loading| loading.begin);
        if tokens > computed {
            let (tokens, computed) = (TokenCount(tokens), TokenCount(computed));
            return Err(Error::NotComputed { sequence: SequenceId(id), tokens, computed });
        }
        let mut settled = Vec::new();
        for group in 0..self.groups.len() {
            let super::Group { kind, size } = self.groups[group];
            let prompt = self.sequences[&id].prompt;
            let table = &mut self.of(id).tables[group];
            let done = |index: u32| {
                !(index * size..(index + 1) * size).any(|token| kind.needs(token, tokens, prompt))
            };
            let mut gone = Vec::new();
            for index in (0..table.blocks.len()).rev().filter(|&index| done(index as u32)) {
                let block = std::mem::take(&mut table.blocks[index]);
                gone.push(Leaving { block, index: index as u32, before: None });
            }
            gone.retain(|leaving| leaving.block != BlockId::NULL);
            self.let_go(&gone);
            settled.extend(gone.iter().map(|leaving| leaving.block));
        }
        self.drop_unwanted_copies();
        Ok(settled)
    }

    pub(crate) fn loaded(&mut self, id: u64, tokens: u32) -> Result<(), Error> {
        let loading = self.must_be_loading(id, tokens)?;
        let Loading { to, computed, .. } = loading;
        if tokens == to {
            self.give_back_gaps(id, loading);
        }
        self.of(id).loading = (tokens < to).then_some(Loading { from: tokens, ..loading });
        self.publish(id, tokens, false);
        self.of(id).tables.iter_mut().for_each(|table| table.published_before = table.published);
        if tokens == to {
            self.publish(id, computed, false);
        }
        Ok(())
    }

    fn give_back_gaps(&mut self, id: u64, loading: Loading) {
        for group in 0..self.groups.len() {
            let Some(gap) = self.gap(id, group, loading) else { continue };
            let block = std::mem::take(&mut self.of(id).tables[group].blocks[gap as usize]);
            if block != BlockId::NULL {
                self.let_go(&[Leaving { block, index: gap, before: None }]);
            }
        }
        self.drop_unwanted_copies();
    }

    pub(crate) fn load_failed(&mut self, id: u64, tokens: u32) -> Result<TokenCount, Error> {
        let loading = match self.get(id)?.loading {
            // What was there before is gone, too.
            Some(loading) if loading.from == loading.begin && tokens < loading.begin => loading,
            _ => self.must_be_loading(id, tokens)?,
        };
        let Loading { begin, to, .. } = loading;
        let floor = if tokens < begin { 0 } else { begin };
        // One state per block: the state at the end of the load may take the place of the one at its beginning.
        let is_lost = |group: &super::Group| {
            group.kind == Kind::State
                && begin < to
                && (begin..to).all(|token| token / group.size == begin.saturating_sub(1) / group.size)
        };
        let else_from = if self.groups.iter().any(is_lost) { 0 } else { floor };
        let mut aligned = (floor + 1..=tokens).rev().filter(|good| good.is_multiple_of(self.alignment));
        let needs_a_gap = |good: u32| {
            let mut groups = 0..self.groups.len();
            good > begin
                && groups.any(|group| {
                    let super::Group { kind, size } = self.groups[group];
                    let needs = |token| kind.needs(token, good, self.sequences[&id].prompt);
                    let gap = self.gap(id, group, loading);
                    gap.is_some_and(|block| (block * size..(block + 1) * size).any(needs))
                })
        };
        let good = aligned
            .find(|&good| !needs_a_gap(good) && self.must_go_on_from(id, good).is_ok())
            .unwrap_or(else_from);
        let free_before = self.free();
        self.keep_room(id, good, good);
        if good > begin {
            self.give_back_gaps(id, loading);
        }
        let gone = self.free() - free_before;
        let sequence = self.of(id);
        sequence.loading = None;
        if sequence.set_aside > 0 {
            sequence.set_aside += gone;
        }
        self.publish(id, good, false);
        self.of(id).tables.iter_mut().for_each(|table| table.published_before = table.published);
        Ok(TokenCount(good))
    }

    pub(crate) fn evict(&mut self, blocks: &[BlockId]) -> Result<BlockCount, Error> {
        let last = BlockId(self.content.len() as u32 - 1);
        if let Some(&block) = blocks.iter().find(|&&block| block == BlockId::NULL || block > last) {
            return Err(Error::NoSuchBlock { block, last });
        }
        let before = self.cached();
        blocks.iter().for_each(|&block| self.forget(block));
        Ok(BlockCount(before - self.cached()))
    }

    /// Forgets all copies of what the first hashes of a sequence, up to the one at `index`, are for.
    pub(crate) fn evict_hash(&mut self, id: u64, index: usize) -> BlockCount {
        let sequence = &self.sequences[&id];
        let wanted = self.text(sequence, (index as u32 + 1) * self.unit).expect("it is named");
        let before = self.cached();
        for group in 0..self.groups.len() {
            while let Some(block) = self.oldest(group, &wanted) {
                self.forget(block);
            }
        }
        BlockCount(before - self.cached())
    }

    pub(crate) fn reset(&mut self) -> bool {
        let idle = self.copies.is_empty() && self.sequences.values().all(Sequence::is_empty);
        if idle {
            self.unpin_all();
            self.content.iter_mut().for_each(|parts| parts.fill(None));
            let mut let_go = Vec::new();
            self.policy.reset(&mut let_go);
            self.worthless.splice(0..0, let_go.into_iter().rev());
        }
        idle
    }

    pub(crate) fn end_step(&mut self) {
        self.fresh.clear();
        let sources: Vec<Leaving> = self.copies.drain(..).map(Leaving::source).collect();
        self.let_go(&sources);
    }

    pub(crate) fn cached(&self) -> u32 {
        (0..self.content.len() as u32).filter(|&block| self.is_cached(BlockId(block))).count() as u32
    }

    pub(super) fn of(&mut self, id: u64) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("the call has checked that it is open")
    }

    pub(super) fn keep_room(&mut self, id: u64, room: u32, named: u32) {
        self.give_back(id, |model, group| match model.groups[group].kind {
            Kind::Cross => (usize::MAX, u32::MAX),
            _ => (room.div_ceil(model.groups[group].size) as usize, named / model.entry(group)),
        });
        let sequence = self.of(id);
        sequence.computed = sequence.computed.min(room);
        sequence.shared_from = Some(sequence.shared_from.map_or(named, |from| from.min(named)));
    }

    pub(super) fn must_be_settled(&mut self, id: u64) -> Result<(), Error> {
        match self.get(id)?.loading {
            Some(Loading { from, to, .. }) => {
                Err(Error::Loading { sequence: SequenceId(id), from: TokenCount(from), to: TokenCount(to) })
            }
            None => Ok(()),
        }
    }

    pub(super) fn must_be_loading(&mut self, id: u64, tokens: u32) -> Result<Loading, Error> {
        let loading = self.get(id)?.loading;
        if let Some(loading) = loading.filter(|loading| (loading.from..=loading.to).contains(&tokens)) {
            return Ok(loading);
        }
        let (from, to) = loading.map_or((0, 0), |loading| (loading.from, loading.to));
        let (tokens, from, to) = (TokenCount(tokens), TokenCount(from), TokenCount(to));
        Err(Error::NotLoading { sequence: SequenceId(id), tokens, from, to })
    }

    pub(super) fn must_go_on_from(&self, id: u64, tokens: u32) -> Result<(), Error> {
        let sequence = &self.sequences[&id];
        for (group, table) in sequence.tables.iter().enumerate().filter(|_| tokens < sequence.computed) {
            let super::Group { kind, size } = self.groups[group];
            let is_missing = |start: u32| {
                let block = table.blocks.get((start / size) as usize).copied().unwrap_or(BlockId::NULL);
                let is_state = kind != Kind::State || (tokens.is_multiple_of(size) && self.is_cached(block));
                block == BlockId::NULL || !is_state
            };
            let needed =
                |start: u32| (start..start + size).any(|token| kind.needs(token, tokens, sequence.prompt));
            if kind.drops()
                && (0..tokens).step_by(size as usize).any(|start| needed(start) && is_missing(start))
            {
                return Err(Error::Gone {
                    sequence: SequenceId(id),
                    tokens: TokenCount(tokens),
                    computed: TokenCount(sequence.computed),
                    group: GroupId(group as u8),
                });
            }
        }
        Ok(())
    }

    pub(super) fn publish(&mut self, id: u64, computed: u32, in_this_step: bool) {
        if !self.config.prefix_caching {
            return;
        }
        let sequence = self.sequences[&id].clone();
        let ahead = self.config.hash_lookahead.0;
        let there = sequence.loading.map_or(computed, |loading| loading.from);
        let tokens = there.min(sequence.known().saturating_sub(ahead) / self.unit * self.unit);
        for group in 0..self.groups.len() {
            let (parts, entry) = (self.parts(group), self.entry(group));
            if self.groups[group].kind == Kind::Cross {
                continue;
            }
            // Of blocks that something is on its way to, nothing is found.
            let size = self.groups[group].size;
            let tokens = if sequence.loading.is_some() { tokens / size * size } else { tokens };
            for published in sequence.tables[group].published..tokens / entry {
                let end = (published + 1) * entry;
                self.of(id).tables[group].published = published + 1;
                let index = published / parts;
                let block = sequence.tables[group].blocks[index as usize];
                let gap = sequence.loading.and_then(|loading| self.gap(id, group, loading));
                if block == BlockId::NULL || gap == Some(index) || !self.retains(group, end, there, &sequence)
                {
                    continue;
                }
                // Who holds it as well may name it by other tokens ahead.
                if self.groups[group].kind == Kind::State && ahead > 0 && self.users(block) > 1 {
                    continue;
                }
                let text = self.text(&sequence, end).expect("it is named");
                let place = &mut self.content[block.0 as usize][(published % parts) as usize];
                if place.is_none() {
                    *place = Some(Content { group, text, published_as: self.publications });
                    self.publications += 1;
                }
                if self.groups[group].kind == Kind::State && in_this_step {
                    self.fresh.push(block);
                }
            }
        }
    }

    /// Whether what ends at `end` tokens is worth keeping, when the tokens up to `computed` are there.
    fn retains(&self, group: usize, end: u32, computed: u32, sequence: &Sequence) -> bool {
        let kind = self.groups[group].kind;
        match kind {
            Kind::Full => true,
            Kind::State => end == computed && self.is_retained(end, sequence),
            _ => (end.saturating_sub(self.margin).max(1)..end + 200).any(|length| {
                let needed = |token| kind.needs(token, length, sequence.prompt);
                self.is_retained(length, sequence) && (end - self.entry(group)..end).any(needed)
            }),
        }
    }

    /// Whether a prefix of this length is to stay usable.
    fn is_retained(&self, length: u32, sequence: &Sequence) -> bool {
        let align = |tokens: u32| tokens / self.alignment * self.alignment;
        let ahead = self.config.hash_lookahead.0.max(1);
        let ends = [sequence.prompt.saturating_sub(ahead), sequence.prompt];
        let [repeated, continued] = ends.map(|end| align(end).saturating_sub(self.margin));
        let of_prompt = [repeated, continued, sequence.junction];
        let periodic = match self.config.retention {
            Retention::Prompt => false,
            Retention::Dense => true,
            Retention::Every(every) => every.0 > 0 && length.is_multiple_of(every.0),
        };
        length.is_multiple_of(self.alignment) && (periodic || of_prompt.contains(&length))
    }

    pub(super) fn count_admission(&mut self, id: u64, cached: u32) {
        let sequence = &self.sequences[&id];
        if self.config.prefix_caching && sequence.reuse == Reuse::ReadWrite {
            let stats = if sequence.was_released { &mut self.again } else { &mut self.first };
            stats.admissions += 1;
            stats.tokens += u64::from(sequence.known());
            stats.hit_tokens += u64::from(cached);
        }
    }
}

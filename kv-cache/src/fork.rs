//! Sharing inside a request, and going back: forks, rollbacks, and the copies they bring about.

use crate::blocks::Leaving;
use crate::evict::Eviction;
use crate::group::Group;
use crate::hash::BlockHasher;
use crate::kind::Holds;
use crate::sequence::{Loading, Sequence};
use crate::{BlockCopy, BlockCount, BlockId, Claim, Error, GroupId, KvCache, SequenceId, TokenCount};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Opens `child` as a second sequence that knows and holds the same as `parent`: for samples of one prompt, and
    /// for beams. No block is taken. Whichever of the two first writes into a block that both hold, the partly filled
    /// last one as a rule, gets a copy of its own with that claim.
    ///
    /// Cost: O(tokens known and blocks held).
    ///
    /// # Errors
    /// [`Error::NotOpen`], [`Error::AlreadyOpen`]; [`Error::Loading`] while something of the parent is on its way.
    pub fn fork(&mut self, parent: SequenceId, child: SequenceId) -> Result<(), Error> {
        let place = self.settled_place(parent)?;
        if self.sequences.place(child).is_ok() {
            return Err(Error::AlreadyOpen { sequence: child });
        }
        // What is not known yet, each will learn for itself; and names cover the tokens ahead.
        let ahead = self.config.hash_lookahead.get();
        let sequence = self.sequences.at_mut(place);
        sequence.share_from(TokenCount(sequence.known.get().saturating_sub(ahead)));
        let new = self.sequences.fork(place, child);
        let blocks = self.sequences.at(new).tables.iter().flat_map(|table| &table.blocks);
        for &block in blocks.filter(|&&block| block != BlockId::NULL) {
            self.blocks.pool.hold(block);
        }
        Ok(())
    }

    /// Forgets all known tokens of a sequence but the first `keep`, and gives back the blocks behind them: what was
    /// guessed wrong, or a turn that is told anew.
    ///
    /// What others can find of the blocks given back, or of the one that is cut, they still can.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::PastTheStart`] when it knows fewer; [`Error::Gone`] when a group has given back
    /// what would be needed to go on from there; [`Error::Loading`].
    pub fn truncate(&mut self, sequence: SequenceId, keep: TokenCount) -> Result<(), Error> {
        let place = self.settled_place(sequence)?;
        let known = self.sequences.at(place).known;
        if keep > known {
            return Err(Error::PastTheStart { sequence, tokens: keep, known });
        }
        self.must_go_on_from(place, keep)?;
        let (unit, lookahead) = (self.groups.unit, self.config.hash_lookahead);
        // Names cover the tokens ahead, which will be others: what was named by them is named, and written, anew.
        let named = TokenCount(keep.get().saturating_sub(if keep < known { lookahead.get() } else { 0 }));
        self.keep_room(place, keep, named);
        self.unname_states(place, keep, named);
        self.sequences.at_mut(place).forget_tokens(keep, unit, lookahead);
        Ok(())
    }

    /// Forgets the last `tokens` known tokens of a sequence, as [`truncate`](KvCache::truncate) does.
    ///
    /// # Errors
    /// As for [`truncate`](KvCache::truncate).
    pub fn rollback(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<(), Error> {
        let known = self.known(sequence)?;
        match known.get().checked_sub(tokens.get()) {
            Some(keep) => self.truncate(sequence, TokenCount(keep)),
            None => Err(Error::PastTheStart { sequence, tokens, known }),
        }
    }

    /// Gives back the blocks of a sequence behind the first `room` tokens: lookahead that was not used, or K and V that
    /// will be computed again. Its tokens stay known.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::Gone`] as for [`truncate`](KvCache::truncate); [`Error::Loading`].
    pub fn trim(&mut self, sequence: SequenceId, room: TokenCount) -> Result<(), Error> {
        let place = self.settled_place(sequence)?;
        self.must_go_on_from(place, room)?;
        self.keep_room(place, room, room);
        Ok(())
    }

    /// What must be copied before the step that is being planned writes, in this order.
    pub fn copies(&self) -> &[BlockCopy] {
        &self.copies
    }

    /// The step that was planned has begun its work, in order: blocks that were copied are let go, and later steps may
    /// begin from the states that it leaves. Call it once per step where sequences fork, parts of blocks are shared or
    /// a group holds states; elsewhere it does nothing.
    pub fn end_step(&mut self) {
        self.fresh.clear();
        let KvCache { copies, blocks, .. } = self;
        blocks.release(copies.drain(..).map(Leaving::source));
    }

    /// Gives back, in reverse, all blocks of a sequence behind those that `keep` names for each group: how many blocks,
    /// and how many entries of the index.
    #[inline]
    pub(crate) fn give_back(&mut self, place: u32, keep: impl Fn(&Group) -> (u32, u32)) {
        let KvCache { groups, blocks, sequences, .. } = self;
        for (group, table) in groups.all.iter().zip(sequences.at_mut(place).tables.iter_mut()) {
            let (keep, published_max) = keep(group);
            blocks.release_behind(&table.blocks, keep);
            table.truncate(keep, published_max);
        }
        self.drop_unwanted_copies();
    }

    /// A copy into a block that nobody holds any more is not made.
    #[inline]
    pub(crate) fn drop_unwanted_copies(&mut self) {
        let KvCache { blocks, copies, .. } = self;
        // Later ones may have been made of the block of an earlier one.
        for index in (0..copies.len()).rev() {
            if blocks.pool.references(copies[index].to) == 0 {
                let source = Leaving::source(copies.remove(index));
                blocks.release(std::iter::once(source));
            }
        }
    }

    /// Gives back what lies behind the first `room` tokens, of which the first `named` keep their names.
    pub(crate) fn keep_room(&mut self, place: u32, room: TokenCount, named: TokenCount) {
        self.give_back(place, |group| match group.holds {
            Holds::Encoder => (u32::MAX, u32::MAX),
            _ => (group.size.blocks_for(room).get(), group.entry.full_blocks(named).get()),
        });
        let sequence = self.sequences.at_mut(place);
        sequence.computed = sequence.computed.min(room);
        sequence.share_from(named);
    }

    /// A state that was named by tokens which are gone cannot be copied and named anew, as it goes on elsewhere: nobody
    /// finds it any more.
    fn unname_states(&mut self, place: u32, keep: TokenCount, named: TokenCount) {
        let KvCache { groups, blocks, sequences, .. } = self;
        let tables = sequences.at(place).tables.iter();
        for (group, table) in groups.all.iter().zip(tables).filter(|(group, _)| group.holds == Holds::State) {
            let from = group.entry.full_blocks(named).get() as usize;
            let named_late =
                table.blocks.iter().take(group.entry.full_blocks(keep).get() as usize).skip(from);
            named_late
                .filter(|&&block| block != BlockId::NULL)
                .for_each(|&block| _ = blocks.prefix.remove(block));
        }
    }

    /// The place of a sequence of which nothing is on its way.
    fn settled_place(&self, sequence: SequenceId) -> Result<u32, Error> {
        let place = self.sequences.place(sequence)?;
        match self.sequences.at(place).loading {
            Some(loading) => Err(Error::Loading { sequence, from: loading.from, to: loading.to }),
            None => Ok(place),
        }
    }

    /// Whether every group still has what the token behind `tokens` tokens attends to.
    pub(crate) fn must_go_on_from(&self, place: u32, tokens: TokenCount) -> Result<(), Error> {
        let sequence = self.sequences.at(place);
        if tokens >= sequence.computed {
            return Ok(());
        }
        let there = Claim { computed: tokens, ..Claim::default() };
        for ((id, group), table) in self.groups.iter().zip(sequence.tables.iter()) {
            let last = || table.blocks[group.last_block(tokens) as usize];
            let is_other = || tokens > TokenCount(0) && !self.is_state_after(last(), group, tokens);
            if group.misses(&table.blocks, sequence.prompt, there)
                || (group.holds == Holds::State && is_other())
            {
                return Err(gone(sequence, tokens, id));
            }
        }
        Ok(())
    }

    /// Whether a claim that begins before what was promised last (drafts were wrong, a step was withdrawn) finds all
    /// blocks that it reads and writes, nothing there is on its way, and no load would write into what others can find.
    /// Which of the states in a block it goes on from is the caller's to know.
    #[cold]
    pub(crate) fn must_begin_again(&self, place: u32, claim: Claim) -> Result<(), Error> {
        let sequence = self.sequences.at(place);
        if let Some(Loading { from, to, .. }) = sequence.loading.filter(|loading| claim.computed < loading.to)
        {
            return Err(Error::Loading { sequence: sequence.id, from, to });
        }
        let tables = self.groups.all.iter().zip(sequence.tables.iter());
        let published = tables.map(|(group, table)| group.entry.tokens_in(BlockCount(table.published)));
        if let Some(published) = published.max().filter(|&published| claim.computed < published)
            && claim.external > TokenCount(0)
        {
            let computed = claim.computed;
            return Err(Error::AlreadyPublished { sequence: sequence.id, computed, published });
        }
        let tables = self.groups.iter().zip(sequence.tables.iter());
        let mut misses = tables
            .filter(|((_, group), table)| group.misses(&table.blocks, sequence.prompt, claim))
            .map(|((id, _), _)| gone(sequence, claim.computed, id));
        misses.next().map_or(Ok(()), Err)
    }

    /// Whether the state in `block` is the one after `tokens` tokens: it is if it was published there, because states
    /// that go on do so in another block.
    fn is_state_after(&self, block: BlockId, group: &Group, tokens: TokenCount) -> bool {
        group.size.tokens_in(group.size.full_blocks(tokens)) == tokens && self.blocks.prefix.contains(block)
    }
}

fn gone<D>(of: &Sequence<D>, tokens: TokenCount, group: GroupId) -> Error {
    Error::Gone { sequence: of.id, tokens, computed: of.computed, group }
}

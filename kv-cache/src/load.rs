//! K and V that come from elsewhere: room was claimed for them, and then they arrive, or not.

use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::kind::Holds;
use crate::publish::publish;
use crate::sequence::Loading;
use crate::{Error, KvCache, SequenceId, TokenCount};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// The K and V of a sequence's first `tokens` tokens are there: those that its claim called `external` have
    /// arrived, all or the first of them. What they fill is published. When all are there, a block of a window that the
    /// load began within and did not fill is given back: nobody attends to it any more. What an
    /// [`Offload`](crate::tier::Offload) loads, it reports itself.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::NotLoading`] when nothing of the sequence is on its way, or not this much.
    pub fn loaded(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<(), Error> {
        let (place, loading) = self.loading(sequence, tokens)?;
        if tokens == loading.to {
            self.give_back_gaps(place, loading);
        }
        let KvCache { blocks, sequences, groups, config, .. } = self;
        let sequence = sequences.at_mut(place);
        sequence.loading = (tokens < loading.to).then_some(Loading { from: tokens, ..loading });
        if config.prefix_caching {
            publish(sequence, tokens, groups, blocks, None);
            sequence.tables.iter_mut().for_each(|table| table.published_before = table.published);
            if tokens == loading.to {
                publish(sequence, loading.computed, groups, blocks, None);
            }
        }
        Ok(())
    }

    /// Only the first `tokens` tokens of a sequence have their K and V: what should have come behind them did
    /// not. The sequence keeps the blocks that these fill, gives back all others, and goes on from the answer.
    ///
    /// They may be fewer than before the load, if none was reported: a load that begins within a block may have written
    /// over its beginning. (The block is the sequence's own; nobody else finds anything of it meanwhile.)
    ///
    /// The answer is less than `tokens` where a window or a state is missing: groups that forget only got room for what
    /// is needed at the end of the load. It is less than what [`loaded`](KvCache::loaded) was told before if need be,
    /// down to where the load began; and 0 where a state to begin from has been written over. What was reported stays
    /// in the cache. Room that was set aside for the sequence stays so, with what it gave back.
    ///
    /// # Errors
    /// As for [`loaded`](KvCache::loaded).
    pub fn load_failed(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<TokenCount, Error> {
        let place = self.sequences.place(sequence)?;
        let loading = match self.sequences.at(place).loading {
            Some(loading) if loading.from == loading.begin && tokens < loading.begin => loading,
            _ => self.loading(sequence, tokens)?.1,
        };
        let floor = if tokens < loading.begin { TokenCount(0) } else { loading.begin };
        let mut good = self.groups.align(tokens);
        while good > floor
            && (self.needs_a_gap(place, loading, good) || self.must_go_on_from(place, good).is_err())
        {
            good = self.groups.align(TokenCount(good.get() - 1));
        }
        if good <= floor {
            good = if self.writes_over_its_state(loading) { TokenCount(0) } else { floor };
        }
        let free_before = self.blocks.pool.free().get();
        self.keep_room(place, good, good);
        if good > loading.begin {
            self.give_back_gaps(place, loading);
        }
        let gone = self.blocks.pool.free().get() - free_before;
        let KvCache { blocks, sequences, groups, config, reserved, .. } = self;
        let sequence = sequences.at_mut(place);
        sequence.loading = None;
        if sequence.set_aside.get() > 0 {
            sequence.set_aside.0 += gone;
            reserved.0 += gone;
        }
        if config.prefix_caching {
            publish(sequence, good, groups, blocks, None);
            sequence.tables.iter_mut().for_each(|table| table.published_before = table.published);
        }
        Ok(good)
    }

    /// Gives back the blocks with a gap ([`crate::group::Group::gap`]).
    fn give_back_gaps(&mut self, place: u32, Loading { begin, to, .. }: Loading) {
        let KvCache { blocks, sequences, groups, .. } = self;
        let sequence = sequences.at_mut(place);
        for (group, table) in groups.all.iter().zip(sequence.tables.iter_mut()) {
            if let Some(gap) = group.gap(begin, to, sequence.prompt) {
                blocks.release(table.drop_block(gap).into_iter());
            }
        }
        self.drop_unwanted_copies();
    }

    /// Whether the token behind `tokens` tokens attends to some that a load has left out.
    fn needs_a_gap(&self, place: u32, Loading { begin, to, .. }: Loading, tokens: TokenCount) -> bool {
        let prompt = self.sequences.at(place).prompt;
        tokens > begin
            && self.groups.all.iter().any(|group| {
                let gap = group.gap(begin, to, prompt);
                gap.is_some_and(|block| !group.skipped_blocks(tokens, prompt).contains(&block))
            })
    }

    /// Whether the state that a load ends with goes where the one is that the sequence had.
    fn writes_over_its_state(&self, Loading { begin, to, .. }: Loading) -> bool {
        let states = self.groups.all.iter().filter(|group| group.holds == Holds::State);
        begin < to && states.into_iter().any(|group| group.last_block(begin) == group.last_block(to))
    }

    /// The place of a sequence of which the tokens from `tokens` on may be on their way.
    fn loading(&self, sequence: SequenceId, tokens: TokenCount) -> Result<(u32, Loading), Error> {
        let place = self.sequences.place(sequence)?;
        match self.sequences.at(place).loading {
            Some(loading) if (loading.from..=loading.to).contains(&tokens) => Ok((place, loading)),
            loading => {
                let (from, to) = loading.map_or_else(Default::default, |loading| (loading.from, loading.to));
                Err(Error::NotLoading { sequence, tokens, from, to })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind::{Full, Recurrent, SlidingWindow};
    use crate::{
        Admission, BlockCount, BlockId, BlockSize, Claim, Config, Group, GroupId, Reuse, SequenceKey,
    };

    const A: SequenceId = SequenceId(1);

    /// A sequence of 40 tokens in blocks of 2, of which the first `computed` are computed and the `external` ones
    /// behind them are on their way.
    fn loading(groups: Vec<Group>, computed: u32, external: u32) -> KvCache {
        let size = BlockSize::new(2).unwrap();
        let mut cache = KvCache::new(Config { groups, ..Config::new(size, BlockCount(64)) }).unwrap();
        cache.open(A, SequenceKey::default(), &[7; 40], Reuse::ReadWrite).unwrap();
        let step = |computed, external, new_tokens| Claim {
            computed: TokenCount(computed),
            external: TokenCount(external),
            new_tokens: TokenCount(new_tokens),
            ..Claim::default()
        };
        let claims = [step(0, 0, computed), step(computed, external, 0)];
        for claim in claims.into_iter().filter(|claim| claim.computed_after() > claim.computed) {
            match cache.reserve(A, claim).unwrap() {
                Admission::Admit(room) => drop(room.commit()),
                no => panic!("there is room: {no:?}"),
            }
        }
        cache
    }

    fn full_and_window() -> Vec<Group> {
        vec![Group::new(Full), Group::new(SlidingWindow::new(TokenCount(4)).unwrap())]
    }

    fn holes(cache: &KvCache, tokens: u32) -> usize {
        let window = cache.table_in(A, GroupId(1)).unwrap().blocks();
        (tokens.saturating_sub(3)..tokens)
            .filter(|&token| window[token as usize / 2] == BlockId::NULL)
            .count()
    }

    #[test]
    fn a_load_that_fails_after_a_part_was_reported_leaves_no_hole_in_a_window() {
        for (reported, good) in [(4, 4), (10, 4), (16, 4), (20, 20)] {
            let mut cache = loading(full_and_window(), 4, 20 - 4);
            cache.loaded(A, TokenCount(reported)).unwrap();
            if reported < 20 {
                let going_on = cache.load_failed(A, TokenCount(reported)).unwrap();
                assert_eq!(going_on, TokenCount(good), "{reported} were reported");
            }
            assert_eq!(holes(&cache, good), 0);
            cache.check().unwrap();
        }
    }

    #[test]
    fn what_lies_before_a_load_is_kept_until_it_ends() {
        let mut cache = loading(full_and_window(), 4, 16);
        cache.loaded(A, TokenCount(10)).unwrap();
        let (tokens, computed) = (TokenCount(10), TokenCount(4));
        assert_eq!(cache.settle(A, tokens), Err(Error::NotComputed { sequence: A, tokens, computed }));
        assert_eq!(cache.settle(A, computed).map(<[_]>::len), Ok(0));
        cache.loaded(A, TokenCount(20)).unwrap();
        assert_eq!(cache.settle(A, TokenCount(20)).map(<[_]>::len), Ok(2), "the window before the load");
    }

    #[test]
    fn a_failed_load_goes_on_from_its_first_bad_block_where_every_token_is_held() {
        let mut cache = loading(vec![Group::new(Full)], 4, 16);
        cache.loaded(A, TokenCount(10)).unwrap();
        assert_eq!(cache.load_failed(A, TokenCount(15)), Ok(TokenCount(14)));
        assert_eq!(cache.table(A).unwrap().blocks().len(), 7);
        cache.check().unwrap();
    }

    #[test]
    fn a_state_that_a_load_may_have_written_over_is_not_gone_on_from() {
        let wide = || vec![Group::new(Recurrent).with_block_size(BlockSize::new(8).unwrap())];
        for (computed, external, good) in [(4, 4, 0), (4, 8, 4), (8, 8, 8)] {
            let mut cache = loading(wide(), computed, external);
            let failed = cache.load_failed(A, TokenCount(computed)).unwrap();
            assert_eq!(failed, TokenCount(good), "{computed} and {external}");
            cache.check().unwrap();
        }
    }
}

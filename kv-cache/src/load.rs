//! K and V that come from elsewhere: room was claimed for them, and then they arrive, or not.

use crate::commit::publish;
use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::sequence::Loading;
use crate::{Error, KvCache, SequenceId, TokenCount};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// The K and V of a sequence's first `tokens` tokens are there: those that its claim called `external` have
    /// arrived, all or the first of them. What they fill is published.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::NotLoading`] when nothing of the sequence is on its way, or not this much.
    pub fn loaded(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<(), Error> {
        let (place, loading) = self.loading(sequence, tokens)?;
        let KvCache { blocks, sequences, groups, config, .. } = self;
        let sequence = sequences.at_mut(place);
        sequence.loading = None;
        if config.prefix_caching {
            publish(sequence, tokens, groups, blocks, None);
            sequence.tables.iter_mut().for_each(|table| table.published_before = table.published);
            if tokens == loading.to {
                publish(sequence, sequence.computed, groups, blocks, None);
            }
        }
        if tokens < loading.to {
            sequence.loading = Some(Loading { from: tokens, to: loading.to });
        }
        Ok(())
    }

    /// Only the first `tokens` tokens of a sequence have their K and V: what should have come behind them did
    /// not. The sequence keeps the blocks that these fill, gives back all others, and goes on from the answer, which is
    /// less where a window or a state is missing. Room that
    /// was set aside for it stays so, with what it gave back.
    ///
    /// # Errors
    /// As for [`loaded`](KvCache::loaded).
    pub fn load_failed(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<TokenCount, Error> {
        let (place, loading) = self.loading(sequence, tokens)?;
        let mut good = self.groups.align(tokens);
        while good > loading.from && self.must_go_on_from(place, good).is_err() {
            good = self.groups.align(TokenCount(good.get() - 1));
        }
        let good = good.max(loading.from);
        let free_before = self.blocks.pool.free().get();
        self.keep_room(place, good, good);
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

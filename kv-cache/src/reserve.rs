//! What a claim comes to: the blocks that it needs, and whether it can have them.

use crate::claim::{Need, Plan};
use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::id::count;
use crate::kind::Holds;
use crate::sequence::Sequence;
use crate::{
    Admission, BlockCount, BlockId, Claim, Error, KvCache, OverLimit, Refusal, Reservation, SequenceId,
    TokenCount,
};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Asks for room for a sequence's next tokens. The claim is granted in full or not at all, and nothing
    /// changes before the reservation is committed.
    ///
    /// Needed are the blocks for `computed + external + new_tokens + lookahead` tokens (no more than the longest
    /// sequence may have) beyond those it holds or finds in the cache; the cached blocks that are free now,
    /// because they will not be free then; and a copy of each block that it will write into and that is not its alone.
    ///
    /// Cost: O(cached blocks claimed) for the first claim of a sequence, plus a lookup if the last one is out
    /// of date; O(1) for later ones.
    ///
    /// # Errors
    /// [`Error::NotOpen`], [`Error::EmptyClaim`]; [`Error::NotCached`] and [`Error::NoRoomBefore`] when
    /// `computed` counts tokens that the sequence cannot have; [`Error::Gone`] when it lies where a window or a chunk
    /// has been given back, or where a state was never left; [`Error::Loading`] when something external is claimed
    /// while something is on its way, or what is on its way would be computed; [`Error::AlreadyPublished`] when what
    /// is external would come into blocks that others can find.
    #[inline]
    pub fn reserve(&mut self, sequence: SequenceId, claim: Claim) -> Result<Admission<'_, H, E>, Error> {
        let place = self.sequences.place(sequence)?;
        if claim.new_tokens == TokenCount(0) && claim.external == TokenCount(0) {
            return Err(Error::EmptyClaim { sequence });
        }
        let first = self.sequences.at(place).tables.are_empty();
        if first {
            self.must_be_cached(place, claim.computed)?;
            if self.begins_from_fresh_state(place, claim.computed) {
                self.counted.refusals.next_step += 1;
                return Ok(Admission::NextStep);
            }
        } else {
            self.must_have_room_before(place, claim)?;
        }
        let need = self.need(place, claim, first);
        if let Err(refusal) = self.within_limit(place, claim, need, first) {
            self.counted.refusals.over_limit += 1;
            return Ok(Admission::OverLimit(refusal));
        }
        let (free, sequence) = (self.blocks.pool.free(), self.sequences.at(place));
        let reserved = BlockCount(self.reserved.0 - sequence.set_aside.0);
        let must_be_free = u64::from(need.blocks()) + u64::from(claim.watermark.0) + u64::from(reserved.0);
        if must_be_free > u64::from(free.0) {
            let has = if first { need.hits } else { sequence.held().0 };
            let (alone, blocks) = (BlockCount(has + need.beyond), self.blocks.pool.usable());
            if alone > blocks {
                self.counted.refusals.never += 1;
                return Ok(Admission::Never { need: alone, blocks });
            }
            let need = BlockCount(need.blocks());
            let watermark = claim.watermark;
            let refusal = Refusal { sequence: sequence.id, need, watermark, reserved, free };
            self.counted.refusals.wait(refusal);
            return Ok(Admission::Wait { need, watermark: claim.watermark, reserved, free });
        }
        Ok(Admission::Admit(Reservation::new(self, Plan { place, claim, need })))
    }

    /// A first claim counts as computed what the lookup found, or less of it.
    #[inline]
    fn must_be_cached(&mut self, place: u32, computed: TokenCount) -> Result<(), Error> {
        self.find_prefix(place);
        let cached = self.sequences.at(place).hit.tokens;
        if computed == cached {
            return Ok(());
        }
        let sequence = self.sequences.at(place).id;
        if computed < cached && self.groups.align(computed) == computed {
            // Groups that keep every token have all shorter prefixes as well; others must be asked again.
            if self.groups.all.iter().all(|group| group.holds == Holds::EveryToken && group.parts == 1) {
                return Ok(());
            }
            self.find_prefix_within(place, computed.plus(self.groups.margin));
            let shorter = self.sequences.at(place).hit.tokens;
            if shorter == computed {
                return Ok(());
            }
            self.find_prefix(place);
        }
        Err(Error::NotCached { sequence, computed, cached })
    }

    #[inline]
    fn must_have_room_before(&self, place: u32, claim: Claim) -> Result<(), Error> {
        let Sequence { id: sequence, tables, loading, .. } = self.sequences.at(place);
        let sequence = *sequence;
        if let (Some(loading), true) = (loading, claim.external > TokenCount(0)) {
            return Err(Error::Loading { sequence, from: loading.from, to: loading.to });
        }
        let rooms =
            self.groups.all.iter().zip(tables.iter()).filter(|(group, _)| group.holds != Holds::Encoder);
        let room = rooms.map(|(group, table)| group.size.tokens_in(BlockCount(table.held()))).min();
        match room {
            Some(room) if claim.computed > room => {
                Err(Error::NoRoomBefore { sequence, computed: claim.computed, room })
            }
            _ if claim.computed < self.sequences.at(place).computed => self.must_begin_again(place, claim),
            _ => Ok(()),
        }
    }

    #[inline]
    fn begins_from_fresh_state(&self, place: u32, computed: TokenCount) -> bool {
        let tables = &self.sequences.at(place).tables;
        computed > TokenCount(0)
            && !self.fresh.is_empty()
            && self.groups.all.iter().zip(tables.iter()).any(|(group, table)| {
                let state = table.found.last().filter(|_| group.holds == Holds::State);
                state.is_some_and(|state| self.fresh.contains(state))
            })
    }

    /// Whether the tenant of a sequence may have what it claims.
    #[inline]
    fn within_limit(&self, place: u32, claim: Claim, need: Need, first: bool) -> Result<(), OverLimit> {
        let (sequence, pool) = (self.sequences.at(place), &self.blocks.pool);
        let found =
            sequence.tables.iter().filter(|_| first).zip(&self.groups.all).flat_map(|(table, group)| {
                table.found.iter().take(group.hit_blocks(claim.computed) as usize).copied()
            });
        let revived = found.filter(|&block| block != BlockId::NULL && pool.references(block) == 0);
        pool.policy.admits(sequence.keys.tenant, BlockCount(need.beyond + need.copies), revived)
    }

    /// What a claim comes to, all groups together.
    #[inline]
    fn need(&self, place: u32, claim: Claim, first: bool) -> Need {
        let sequence = self.sequences.at(place);
        let mut need = Need::default();
        for ((_, group), table) in self.groups.iter().zip(sequence.tables.iter()) {
            let mut length = table.held();
            if first {
                length = group.hit_blocks(claim.computed);
                need.count_hits(&table.found[..length as usize], |block| self.blocks.pool.references(block));
            }
            let after = group.length_after(length, claim, sequence.encoder, self.config.sequence_tokens_max);
            let new = group.unneeded(claim, sequence.prompt).needed(length, after);
            need.new += new;
            need.beyond += if claim.whole_sequence {
                let has = if group.holds == Holds::NeededTokens { table.filled(first) } else { length };
                new.max(group.whole(
                    length,
                    has,
                    sequence.known,
                    sequence.encoder,
                    self.config.step_tokens_max,
                ))
            } else {
                new
            };
            if first || sequence.shared_from.is_some() || claim.external > TokenCount(0) {
                let held = if first { &table.found[..length as usize] } else { &table.blocks[..] };
                let published = if first { group.hit_entries(claim.computed) } else { table.published };
                let written = group.written_blocks(claim, sequence.shared_from, held, published);
                let own = u32::from(!first);
                need.copies += count(written.filter(|written| self.is_shared(*written, own)).count());
            }
        }
        need
    }
}

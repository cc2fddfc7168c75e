//! What a sequence finds in the tiers, and what it leaves there.

use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use super::behind::Needed;
use super::{Kind, Loading, Model};
use crate::shelves::{Content, Plan};

/// What the model expects of a load.
pub(crate) enum Start {
    Nothing,
    Later(BlockId),
    Gone(u32),
    Begun(Vec<Needed>, Vec<u32>),
}

/// What the model expects a sequence to hear of the tiers.
pub(crate) struct Found {
    pub(crate) advice: Advice,
    pub(crate) promotes: bool,
}

impl<P: Eviction> Model<P> {
    /// What a sequence that has computed `tokens` offers, and what comes of it.
    pub(crate) fn offer(&mut self, id: u64, tokens: u32) -> Result<(Vec<Needed>, Plan), Error> {
        let known = self.get(id)?.known();
        let to = self.whole_blocks(tokens.min(known));
        let from = self.behind().afar.get(&id).map_or(0, |afar| afar.offered);
        if to <= from {
            return Ok((Vec::new(), Plan::Nothing));
        }
        let found = self.findable(id, from, to);
        let items: Vec<_> = found.iter().map(|found| (found.content, found.leaving.block)).collect();
        let behind = self.behind();
        let wanted = behind.shelves.wanted(Occasion::Use, &items);
        behind.of(id).offered = to;
        Ok((found, behind.shelves.room_for(0, &wanted).expect("there is a tier")))
    }

    /// What was pushed out of the device, as far as there is room for it, what went last first.
    pub(crate) fn rescue(&mut self) -> Plan {
        let behind = self.behind();
        behind.note_busy();
        let lost = std::mem::take(&mut behind.lost);
        // What was claimed and is about to be loaded stays.
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            let loading = self.sequences[&id].loading.filter(|_| self.behind().load_of(id).is_none());
            if let Some(Loading { from, to, .. }) = loading {
                let to = self.whole_blocks(to).min(self.named_to(id)).max(from);
                for content in self.keys(id, from, to) {
                    let behind = self.behind();
                    if matches!(behind.shelves.lookup(content), Lookup::Hit(_) | Lookup::Pending(_)) {
                        let place = behind.shelves.nearest(content);
                        behind.shelves.note_busy(place);
                    }
                }
            }
        }
        let behind = self.behind();
        let wanted = behind.shelves.wanted(Occasion::Leaving, &lost);
        let plan = match behind.shelves.room_for(0, &wanted).expect("there is a tier") {
            Plan::NoRoom([_, free, evictable]) if free + evictable > 0 => {
                let rest = &wanted[wanted.len() - (free + evictable).min(wanted.len())..];
                behind.shelves.room_for(0, rest).expect("there is a tier")
            }
            plan => plan,
        };
        behind.note_busy();
        plan
    }

    /// What a sequence stores to find it again.
    pub(crate) fn leave(&mut self, id: u64, tokens: u32) -> Result<(Vec<Needed>, Plan), Error> {
        let known = self.get(id)?.known();
        let found = self.findable(id, 0, self.whole_blocks(tokens.min(known)));
        let keys: Vec<Content> = found.iter().map(|found| found.content).collect();
        let plan = self.behind().shelves.room_for(0, &keys).expect("there is a tier");
        Ok((found, plan))
    }

    /// Keeps all of it, in place of what was kept for the sequence before.
    pub(crate) fn keep_for(&mut self, id: u64, found: &[Needed]) {
        self.behind().of(id).pinned = None;
        self.pin_for(id, &found.iter().map(|found| found.content).collect::<Vec<_>>());
    }

    fn pin_for(&mut self, id: u64, keys: &[Content]) {
        let behind = self.behind();
        if behind.of(id).pinned.is_none() && !keys.is_empty() {
            behind.of(id).pinned = Some(keys.iter().map(|&key| behind.shelves.nearest(key)).collect());
        }
    }

    /// Whether a sequence waits for content.
    pub(crate) fn has_waited(&self, id: u64) -> bool {
        let behind = self.behind.as_ref().expect("there are tiers");
        behind.afar.get(&id).is_some_and(|afar| afar.waits_since.is_some())
    }

    /// How far a sequence could be loaded: its last token is computed.
    fn loadable_to(&self, id: u64) -> u32 {
        self.whole_blocks(self.sequences[&id].known().saturating_sub(1)).min(self.named_to(id))
    }

    /// The longest that a sequence could go on from if it had what `is` says of the tiers, by trying all.
    fn extent(&mut self, id: u64, from: u32, is: impl Fn(&Model<P>, Content) -> bool) -> u32 {
        let (to, margin) = (self.loadable_to(id), self.margin);
        for end in (from + 1..=to).rev().filter(|&end| self.whole_blocks(end) == end).collect::<Vec<_>>() {
            if end + margin > to {
                continue;
            }
            let mut needed: Vec<Content> =
                self.needed(id, from, end).into_iter().map(|needed| needed.content).collect();
            for group in 0..self.groups.len() {
                let super::Group { kind, size } = self.groups[group];
                let margin_end = if kind == Kind::Full { (end + margin).div_ceil(size) } else { 0 };
                for index in end / size..margin_end {
                    needed.push(self.content_of(id, group, index).expect("it is named"));
                }
            }
            if needed.iter().all(|&content| is(self, content)) {
                return end;
            }
        }
        from
    }

    /// The keys of what a sequence needs to go on from `end`.
    fn keys(&mut self, id: u64, from: u32, end: u32) -> Vec<Content> {
        self.needed(id, from, end).into_iter().map(|needed| needed.content).collect()
    }

    fn found(&self, content: Content) -> Lookup {
        self.behind.as_ref().expect("there are tiers").shelves.lookup(content)
    }

    /// Whether something that is needed is being asked for; a sequence that has not asked before asks.
    fn ask(&mut self, id: u64, from: u32) -> bool {
        let before = std::mem::replace(&mut self.behind().of(id).asked, true);
        let (to, mut asked) = (self.loadable_to(id), false);
        for group in 0..self.groups.len() {
            let needed = self.needed(id, from, to);
            let of_group = needed.into_iter().filter(|needed| needed.group == group);
            let keys: Vec<Content> = of_group.map(|needed| needed.content).collect();
            if !before {
                self.behind().shelves.reach(&keys);
            }
            let mut found = keys.iter().map(|&key| self.found(key));
            asked |= found.find(|found| !matches!(found, Lookup::Hit(_) | Lookup::Pending(_)))
                == Some(Lookup::Retry);
        }
        asked
    }

    /// What is brought near for a sequence, once while it waits: what only far tiers have.
    fn promotion(&mut self, id: u64, from: u32) -> Option<Plan> {
        let end = self.extent(id, from, |model, content| matches!(model.found(content), Lookup::Hit(_)));
        let keys = self.keys(id, from, end);
        let is_near =
            |model: &Model<P>, key: Content| model.behind.as_ref().expect("there are tiers").is_readable(key);
        let far = keys.iter().filter(|&&key| !is_near(self, key)).count();
        let (promote_min, tried) = (self.behind().fetch.promote_min.0, self.behind().of(id).promoted);
        if tried || far == 0 || far < promote_min as usize {
            return None;
        }
        self.behind().of(id).promoted = true;
        let nearest = Lookup::Hit(TierId(0));
        let keys: Vec<Content> =
            keys.into_iter().filter(|&key| !is_near(self, key) || self.found(key) == nearest).collect();
        self.behind().shelves.promotion(0, &keys).ok().filter(|plan| matches!(plan, Plan::Copy { .. }))
    }

    /// What a sequence finds behind its hit. The job that began to bring it near, if one did, is noted by `begin`.
    pub(crate) fn external(
        &mut self,
        id: u64,
        now: u64,
        begin: impl FnOnce(&mut Model<P>, Plan),
    ) -> Result<Found, Error> {
        let from = self.lookup(id)?.tokens.0;
        self.behind().note_busy();
        let shares = self.groups.iter().any(|group| group.kind != Kind::Cross);
        let reads = self.sequences[&id].reuse == Reuse::ReadWrite && self.loadable_to(id) > from && shares;
        let asked = reads && self.ask(id, from);
        let plan = if reads { self.promotion(id, from) } else { None };
        let promotes = plan.is_some();
        if let Some(plan) = plan {
            begin(self, plan);
        }
        let is_near = |model: &Model<P>, content| {
            model.behind.as_ref().is_some_and(|behind| behind.is_readable(content))
        };
        let (mut loadable, mut coming) = (from, from);
        if reads {
            loadable = self.extent(id, from, is_near);
            coming = self.extent(id, from, |model, content| {
                is_near(model, content) || matches!(model.found(content), Lookup::Pending(_))
            });
        }
        let size = self.config.block_size.get();
        let Fetch { load_min, patience, .. } = self.behind().fetch;
        let worth = |end: u32| end > from && (end - from) / size >= load_min.0;
        if asked || (coming > loadable && worth(coming)) {
            let wanted = u64::from((coming - from) / size) + u64::from(asked);
            let arrived = u64::from((loadable - from) / size);
            let began = *self.behind().of(id).waits_since.get_or_insert(now);
            let until = match patience {
                Patience::BestEffort => Some(0),
                Patience::WaitComplete => None,
                Patience::Timeout { base, per_block } => Some(began + base + per_block * wanted),
            };
            if arrived < wanted && until.is_none_or(|until| now < until) {
                let keys = self.keys(id, from, coming);
                self.pin_for(id, &keys);
                let [loadable, coming] = [loadable, coming].map(|end| TokenCount(end - from));
                let advice = Advice::Wait { loadable, coming, until: until.map(Tick) };
                return Ok(Found { advice, promotes });
            }
        }
        if worth(loadable) {
            return Ok(Found { advice: Advice::Load(TokenCount(loadable - from)), promotes });
        }
        self.behind().of(id).pinned = None;
        Ok(Found { advice: Advice::Compute, promotes })
    }

    /// A store that others fill has something or not. What it is taken to have lies at `slot`.
    pub(crate) fn answer(&mut self, tier: u8, content: Content, present: bool, slot: impl FnOnce() -> u32) {
        let behind = self.behind();
        behind.note_busy();
        let room = behind.shelves.room_for(tier, &[content]).expect("it exists");
        let shelf = &mut behind.shelves.tiers[usize::from(tier)];
        match room {
            Plan::Nothing => {}
            Plan::Copy { victims, .. } if present => {
                victims.into_iter().for_each(|victim| shelf.evict(victim));
                shelf.enter(content, crate::shelves::Entry { slot: slot(), writer: None });
            }
            _ => shelf.deny(content),
        }
    }

    /// What a load of all that a sequence waits for comes to.
    pub(crate) fn start(&mut self, id: u64) -> Result<Start, Error> {
        let loading = self.get(id)?.loading;
        let under_way = self.behind().load_of(id).is_some();
        let Some(Loading { from, to, .. }) = loading.filter(|_| !under_way) else {
            return Ok(Start::Nothing);
        };
        let (before, to) = (self.whole_blocks(from), self.whole_blocks(to).min(self.named_to(id)).max(from));
        let mut needed = self.needed(id, from, to);
        needed.sort_by_key(|needed| needed.start);
        let behind = self.behind();
        if let Some(busy) = needed.iter().find(|needed| behind.is_busy(needed.leaving.block)) {
            return Ok(Start::Later(busy.leaving.block));
        }
        let is_there =
            |needed: &&Needed| needed.leaving.block != BlockId::NULL && behind.is_readable(needed.content);
        let there = needed.iter().take_while(is_there).count();
        let end = needed.get(there).map_or(to, |gone| gone.start.max(from));
        needed.truncate(there);
        if needed.is_empty() {
            behind.of(id).pinned = None;
            return Ok(Start::Gone(self.load_failed(id, from)?.0));
        }
        let start = |needed: &Needed| if needed.start < from { before } else { needed.start };
        let tokens = needed.iter().map(start).chain([end]).collect();
        needed.iter().rev().for_each(|needed| behind.shelves.touch(needed.content));
        Ok(Start::Begun(needed, tokens))
    }
}

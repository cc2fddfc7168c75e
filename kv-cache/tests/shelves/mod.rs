//! Tiers as lists: what should be where, and what goes first. Dumb and obviously right.

#![allow(dead_code, reason = "two tests share it, and neither needs all")]

use std::collections::{BTreeMap, BTreeSet};

use quayline_kv_cache::tier::*;
use quayline_kv_cache::{BlockCount, BlockId};

/// A number for what lies in a slot.
pub(crate) type Content = u32;

/// What should be where, in lists.
pub(crate) struct Model {
    pub(crate) tiers: Vec<ModelTier>,
    pub(crate) questions: Vec<(TierId, Content)>,
    /// What the events say.
    pub(crate) known: BTreeSet<(TierId, Content)>,
}

pub(crate) struct ModelTier {
    pub(crate) config: TierConfig,
    pub(crate) entries: BTreeMap<Content, Entry>,
    pub(crate) once: Vec<Content>,
    pub(crate) again: Vec<Content>,
    pub(crate) once_ghosts: Vec<Content>,
    pub(crate) again_ghosts: Vec<Content>,
    pub(crate) target: usize,
    pub(crate) offers: Vec<(Content, u32)>,
    pub(crate) due: Vec<Content>,
    pub(crate) asked: Vec<Content>,
    pub(crate) denied: Vec<Content>,
    /// Slots that jobs are at work on.
    pub(crate) busy: BTreeSet<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) slot: u32,
    pub(crate) writer: Option<JobId>,
}

#[derive(Debug)]
pub(crate) enum Plan {
    Nothing,
    Copy { tier: usize, keys: Vec<Content>, victims: Vec<Content> },
    NoRoom([usize; 3]),
}

impl Model {
    pub(crate) fn new(configs: &[TierConfig]) -> Model {
        let tiers = configs.iter().map(|&config| ModelTier::new(config)).collect();
        Model { tiers, questions: Vec::new(), known: BTreeSet::new() }
    }

    pub(crate) fn exists(&self, tier: u8) -> Result<(), TierError> {
        let tiers = self.tiers.len();
        let error = TierError::NoTier { tier: TierId(tier), tiers };
        if usize::from(tier) < tiers { Ok(()) } else { Err(error) }
    }

    /// Whether something was found where the device reads.
    pub(crate) fn is_near(&self, found: Lookup) -> bool {
        matches!(found, Lookup::Hit(tier) if !self.tiers[usize::from(tier.0)].config.staged)
    }

    /// A job is at work on a place, or keeps it.
    pub(crate) fn note_busy(&mut self, place: Place) {
        if let Place::Tier(place) = place {
            self.tiers[usize::from(place.tier.0)].busy.insert(place.slot);
        }
    }

    pub(crate) fn readable(&self) -> BTreeSet<(TierId, Content)> {
        let tiers = (0..).map(TierId).zip(&self.tiers);
        tiers
            .flat_map(|(id, tier)| {
                tier.entries.keys().filter(|&&key| tier.ready(key)).map(move |&key| (id, key))
            })
            .collect()
    }

    pub(crate) fn lookup(&self, key: Content) -> Lookup {
        let (mut near, mut far) = (Vec::new(), Vec::new());
        for (id, tier) in (0..).map(TierId).zip(&self.tiers) {
            let list = if tier.config.staged { &mut far } else { &mut near };
            match tier.entries.get(&key) {
                Some(Entry { writer: Some(job), .. }) => list.push(Lookup::Pending(*job)),
                Some(_) => list.push(Lookup::Hit(id)),
                None => {}
            }
        }
        let hit = |list: &[Lookup]| list.iter().find(|found| matches!(found, Lookup::Hit(_))).copied();
        let awaited = self.tiers.iter().any(|tier| tier.asked.contains(&key));
        let nowhere = if awaited { Lookup::Retry } else { Lookup::Miss };
        let waiting = || near.first().copied().or_else(|| hit(&far));
        hit(&near).or_else(waiting).or_else(|| far.first().copied()).unwrap_or(nowhere)
    }

    /// A lookup that asks.
    pub(crate) fn ask(&mut self, key: Content) -> Lookup {
        if self.lookup(key) == Lookup::Miss {
            for (id, tier) in (0..).map(TierId).zip(&mut self.tiers) {
                if tier.would_ask(key) {
                    tier.asked.push(key);
                    self.questions.push((id, key));
                }
            }
        }
        self.lookup(key)
    }

    pub(crate) fn reach(&mut self, keys: &[Content]) -> Reach {
        let found: Vec<Lookup> = keys.iter().map(|&key| self.lookup(key)).collect();
        let leading = |is: &dyn Fn(&Lookup) -> bool| {
            BlockCount(found.iter().take_while(|found| is(found)).count() as u32)
        };
        let staged = |tier: &TierId| self.tiers[usize::from(tier.0)].config.staged;
        let coming = leading(&|found| matches!(found, Lookup::Hit(_) | Lookup::Pending(_)));
        let mut reach = Reach {
            loadable: leading(&|found| matches!(found, Lookup::Hit(tier) if !staged(tier))),
            present: leading(&|found| matches!(found, Lookup::Hit(_))),
            coming,
            asked: false,
        };
        let mut behind = keys[coming.0 as usize..].iter();
        if let Some(&next) = behind.next()
            && self.ask(next) == Lookup::Retry
        {
            reach.asked = true;
            behind.for_each(|&key| _ = self.ask(key));
        }
        reach
    }

    pub(crate) fn nearest(&self, key: Content) -> Place {
        let tiers = (0..).map(TierId).zip(&self.tiers);
        let mut places = tiers.filter_map(|(id, tier)| {
            tier.entries.get(&key).map(|entry| Place::Tier(TierSlot { tier: id, slot: entry.slot }))
        });
        places.next().unwrap()
    }

    pub(crate) fn wanted(&mut self, occasion: Occasion, items: &[(Content, BlockId)]) -> Vec<Content> {
        let keys = items.iter().map(|item| item.0);
        match (occasion, self.tiers[0].config.write) {
            (Occasion::Leaving, Write::Back { .. }) => keys.collect(),
            (Occasion::Use, Write::After { .. }) => keys.filter(|&key| self.tiers[0].offered(key)).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether content may go from a tier: not before the next has it, if that one is written back.
    pub(crate) fn may_go(&self, tier: usize, key: Content) -> bool {
        let below = &self.tiers[tier + 1..];
        let back = below.first().is_some_and(|next| matches!(next.config.write, Write::Back { .. }));
        !back || below.iter().any(|tier| tier.ready(key))
    }

    pub(crate) fn room_for(&self, tier: u8, keys: &[Content]) -> Result<Plan, TierError> {
        self.room_beside(tier, keys, keys)
    }

    /// Room for what of `keys` is not there, given up by others than `kept`.
    pub(crate) fn room_beside(
        &self,
        tier: u8,
        keys: &[Content],
        kept: &[Content],
    ) -> Result<Plan, TierError> {
        let index = usize::from(tier);
        let tier = &self.tiers[index];
        let mut new: Vec<Content> = Vec::new();
        for &key in keys {
            if !tier.has(key) && !new.contains(&key) {
                new.push(key);
            }
        }
        if new.is_empty() {
            return Ok(Plan::Nothing);
        }
        let free = tier.free();
        let needed = new.len().saturating_sub(free);
        let victims = tier.victims(needed, |key| !kept.contains(&key) && self.may_go(index, key));
        if victims.len() < needed {
            return Ok(Plan::NoRoom([new.len(), free, victims.len()]));
        }
        Ok(Plan::Copy { tier: index, keys: new, victims })
    }

    pub(crate) fn promotion(&self, tier: u8, keys: &[Content]) -> Result<Plan, TierError> {
        self.exists(tier)?;
        let (near, far) = self.tiers.split_at(usize::from(tier) + 1);
        let mut new = Vec::new();
        for (index, &key) in keys.iter().enumerate() {
            if near.iter().any(|tier| tier.has(key)) {
                continue;
            }
            if !far.iter().any(|tier| tier.ready(key)) {
                return Err(TierError::NotThere { index });
            }
            new.push(key);
        }
        self.room_beside(tier, &new, keys)
    }

    pub(crate) fn flush(&mut self, tier: u8, most: usize) -> Result<Plan, TierError> {
        self.exists(tier)?;
        if tier == 0 {
            return Err(TierError::NoTier { tier: TierId(0), tiers: self.tiers.len() });
        }
        let (here, above) = (usize::from(tier), usize::from(tier) - 1);
        let mut keys: Vec<Content> = match self.tiers[here].config.write {
            Write::Back { ahead } => {
                let upper = &self.tiers[above];
                let next = upper.all_in_order((ahead as usize).min(most).saturating_sub(upper.free()));
                let missing = |key: &Content| upper.ready(*key) && !self.may_go(above, *key);
                next.into_iter().filter(missing).filter(|&key| !self.tiers[here].has(key)).collect()
            }
            Write::After { .. } => {
                // What comes to the tier above again is due again, behind what was due meanwhile.
                let mut keys = Vec::new();
                for key in self.tiers[here].due.clone() {
                    if keys.len() == most {
                        break;
                    }
                    if self.tiers[above].ready(key) {
                        keys.push(key);
                    } else {
                        self.tiers[here].due.retain(|&due| due != key);
                    }
                }
                keys
            }
        };
        let victims = self.tiers[here].victims(keys.len().saturating_sub(self.tiers[here].free()), |key| {
            !keys.contains(&key) && self.may_go(here, key)
        });
        keys.truncate(self.tiers[here].free() + victims.len());
        self.room_for(tier, &keys)
    }

    pub(crate) fn offer_below(&mut self, tier: usize, key: Content) {
        if let Some(below) = self.tiers.get_mut(tier + 1)
            && !below.has(key)
            && matches!(below.config.write, Write::After { .. })
            && below.offered(key)
            && !below.due.contains(&key)
        {
            below.due.push(key);
        }
    }

    pub(crate) fn touch(&mut self, key: Content) {
        for tier in 0..self.tiers.len() {
            if self.tiers[tier].ready(key) {
                self.tiers[tier].touch(key);
                self.offer_below(tier, key);
            }
        }
    }

    pub(crate) fn settle(&mut self, key: Content) {
        for tier in &mut self.tiers {
            for list in [&mut tier.once, &mut tier.again] {
                if let Some(place) = list.iter().position(|&other| other == key) {
                    list.remove(place);
                    list.push(key);
                }
            }
        }
    }

    pub(crate) fn written(&mut self, tier: usize, key: Content, good: bool) {
        if good {
            self.tiers[tier].entries.get_mut(&key).unwrap().writer = None;
            self.offer_below(tier, key);
        } else {
            self.tiers[tier].forget(key);
        }
    }

    pub(crate) fn reset(&mut self) {
        for tier in &mut self.tiers {
            *tier = ModelTier::new(tier.config);
        }
        self.questions.clear();
    }
}

impl ModelTier {
    pub(crate) fn new(config: TierConfig) -> ModelTier {
        ModelTier {
            config,
            entries: BTreeMap::new(),
            once: Vec::new(),
            again: Vec::new(),
            once_ghosts: Vec::new(),
            again_ghosts: Vec::new(),
            target: 0,
            offers: Vec::new(),
            due: Vec::new(),
            asked: Vec::new(),
            denied: Vec::new(),
            busy: BTreeSet::new(),
        }
    }

    pub(crate) fn has(&self, key: Content) -> bool {
        self.entries.contains_key(&key)
    }

    pub(crate) fn ready(&self, key: Content) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.writer.is_none())
    }

    pub(crate) fn free(&self) -> usize {
        let mut used = self.busy.clone();
        used.extend(self.entries.values().map(|entry| entry.slot));
        self.config.slots.0 as usize - used.len()
    }

    pub(crate) fn would_ask(&self, key: Content) -> bool {
        let asks = matches!(self.config.contents, Contents::Asked { .. });
        asks && !self.has(key) && !self.asked.contains(&key) && !self.denied.contains(&key)
    }

    pub(crate) fn order(&self) -> Vec<Content> {
        self.once.iter().chain(&self.again).copied().filter(|&key| self.ready(key)).collect()
    }

    /// The rule of ARC, of which LRU is the case that never uses the second list.
    pub(crate) fn all_in_order(&self, most: usize) -> Vec<Content> {
        let (mut once, mut again) = (self.once.clone(), self.again.clone());
        let mut order = Vec::new();
        while order.len() < most && !(once.is_empty() && again.is_empty()) {
            let from_once = if once.len() >= self.target { !once.is_empty() } else { again.is_empty() };
            order.push(if from_once { once.remove(0) } else { again.remove(0) });
        }
        order
    }

    pub(crate) fn victims(&self, count: usize, may: impl Fn(Content) -> bool) -> Vec<Content> {
        let idle =
            |key: &Content| self.ready(*key) && !self.busy.contains(&self.entries[key].slot) && may(*key);
        let mut once: Vec<Content> = self.once.iter().copied().filter(idle).collect();
        let mut again: Vec<Content> = self.again.iter().copied().filter(idle).collect();
        let mut left = self.once.len();
        let mut victims = Vec::new();
        while victims.len() < count && !(once.is_empty() && again.is_empty()) {
            if (left >= self.target && !once.is_empty()) || again.is_empty() {
                victims.push(once.remove(0));
                left -= 1;
            } else {
                victims.push(again.remove(0));
            }
        }
        victims
    }

    pub(crate) fn offered(&mut self, key: Content) -> bool {
        let Write::After { offers, tracked } = self.config.write else { unreachable!("it is written back") };
        let counted = self.offers.iter().find(|offer| offer.0 == key).map_or(0, |offer| offer.1) + 1;
        self.offers.retain(|offer| offer.0 != key);
        self.offers.push((key, counted));
        let surplus = self.offers.len().saturating_sub(tracked as usize);
        self.offers.drain(..surplus);
        counted >= offers
    }

    pub(crate) fn enter(&mut self, key: Content, entry: Entry) {
        let (once, again) = (self.once_ghosts.len(), self.again_ghosts.len());
        let slots = self.config.slots.0 as usize;
        if self.once_ghosts.contains(&key) {
            self.target = slots.min(self.target + (again / once).max(1));
            self.again.push(key);
        } else if self.again_ghosts.contains(&key) {
            self.target = self.target.saturating_sub((once / again).max(1));
            self.again.push(key);
        } else {
            self.once.push(key);
        }
        for list in
            [&mut self.once_ghosts, &mut self.again_ghosts, &mut self.due, &mut self.asked, &mut self.denied]
        {
            list.retain(|&other| other != key);
        }
        assert!(self.entries.insert(key, entry).is_none());
    }

    pub(crate) fn touch(&mut self, key: Content) {
        self.once.retain(|&other| other != key);
        self.again.retain(|&other| other != key);
        match self.config.eviction {
            TierEviction::Lru => self.once.push(key),
            TierEviction::Arc => self.again.push(key),
        }
    }

    pub(crate) fn evict(&mut self, key: Content) {
        let arc = self.config.eviction == TierEviction::Arc;
        let ghosts = if self.once.contains(&key) { &mut self.once_ghosts } else { &mut self.again_ghosts };
        if arc {
            ghosts.push(key);
            let surplus = ghosts.len().saturating_sub(self.config.slots.0 as usize);
            ghosts.drain(..surplus);
        }
        self.forget(key);
    }

    pub(crate) fn forget(&mut self, key: Content) {
        self.entries.remove(&key).unwrap();
        self.once.retain(|&other| other != key);
        self.again.retain(|&other| other != key);
    }

    pub(crate) fn lose(&mut self, key: Content, slot: u32) {
        if self.entries.get(&key).is_some_and(|entry| entry.slot == slot) {
            self.forget(key);
        }
    }

    pub(crate) fn deny(&mut self, key: Content) {
        let Contents::Asked { remembered } = self.config.contents else { unreachable!("nobody asked") };
        self.asked.retain(|&other| other != key);
        self.denied.retain(|&other| other != key);
        self.denied.push(key);
        let surplus = self.denied.len().saturating_sub(remembered as usize);
        self.denied.drain(..surplus);
    }
}

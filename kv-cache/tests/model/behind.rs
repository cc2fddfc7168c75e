//! Tiers behind the model: what a sequence finds there, and what it leaves there. What lies in a slot has the number of
//! its whole token list.

use std::collections::{BTreeMap, BTreeSet};

use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use super::{Kind, Leaving, Model};
use crate::shelves::{self, Content, Entry};

/// Tiers, and the jobs under way.
pub(crate) struct Behind {
    pub(crate) shelves: shelves::Model,
    pub(crate) jobs: BTreeMap<JobId, Flight>,
    /// Blocks that jobs read or write, by how many, and how they go.
    kept: BTreeMap<BlockId, (u32, Leaving)>,
    pub(super) afar: BTreeMap<u64, Afar>,
    /// What blocks held that were handed out since this was last asked.
    pub(super) lost: Vec<(Content, BlockId)>,
    pub(super) fetch: Fetch,
}

/// What is under way for a sequence.
#[derive(Clone, Default)]
pub(super) struct Afar {
    /// Tokens whose blocks it has offered.
    pub(super) offered: u32,
    pub(super) load: Option<JobId>,
    pub(super) waits_since: Option<u64>,
    pub(super) promoted: bool,
    pub(super) asked: bool,
    /// Where what it will find again is kept.
    pub(super) pinned: Option<Vec<Place>>,
}

/// A job: its copies, the first of which were reported, and the blocks that it keeps.
#[derive(Clone)]
pub(crate) struct Flight {
    pub(crate) copies: Vec<(Content, Place, Place)>,
    pub(crate) reported: usize,
    pub(crate) late: bool,
    held: Vec<BlockId>,
    /// Whose load it is, and how many tokens are there after so many leading copies.
    pub(crate) load: Option<(u64, Vec<u32>)>,
}

/// A block that a sequence needs: its content, its first token, and where it goes.
#[derive(Clone, Copy)]
pub(crate) struct Needed {
    pub(crate) content: Content,
    pub(super) group: usize,
    pub(super) start: u32,
    pub(super) leaving: Leaving,
}

impl Behind {
    pub(crate) fn new(configs: &[TierConfig], fetch: Fetch) -> Behind {
        Behind {
            shelves: shelves::Model::new(configs),
            jobs: BTreeMap::new(),
            kept: BTreeMap::new(),
            afar: BTreeMap::new(),
            lost: Vec::new(),
            fetch,
        }
    }

    pub(super) fn of(&mut self, id: u64) -> &mut Afar {
        self.afar.entry(id).or_default()
    }

    pub(super) fn load_of(&self, id: u64) -> Option<JobId> {
        self.afar.get(&id).and_then(|afar| afar.load)
    }

    pub(super) fn keeps(&self, block: BlockId) -> u32 {
        self.kept.get(&block).map_or(0, |kept| kept.0)
    }

    /// Notes which slots jobs are at work on.
    pub(crate) fn note_busy(&mut self) {
        self.shelves.tiers.iter_mut().for_each(|tier| tier.busy.clear());
        for flight in self.jobs.values() {
            let copies = flight.copies[flight.reported..].iter().flat_map(|copy| [copy.1, copy.2]);
            copies.for_each(|place| self.shelves.note_busy(place));
        }
        let pinned = self.afar.values().flat_map(|afar| afar.pinned.iter().flatten());
        pinned.for_each(|&place| self.shelves.note_busy(place));
    }

    pub(super) fn is_busy(&self, block: BlockId) -> bool {
        let place = Place::Device(block);
        let mut flights = self.jobs.values();
        flights.any(|flight| {
            flight.copies[flight.reported..].iter().any(|copy| copy.1 == place || copy.2 == place)
        })
    }

    /// Whether the device can read it.
    pub(super) fn is_readable(&self, content: Content) -> bool {
        self.shelves.is_near(self.shelves.lookup(content))
    }
}

impl<P: Eviction> Model<P> {
    pub(super) fn behind(&mut self) -> &mut Behind {
        self.behind.as_mut().expect("there are tiers")
    }

    /// Where all groups have whole blocks.
    pub(super) fn whole_blocks(&self, tokens: u32) -> u32 {
        let sizes: Vec<u32> =
            self.groups.iter().filter(|group| group.kind != Kind::Cross).map(|group| group.size).collect();
        let whole = (1..).find(|n| sizes.iter().all(|size| n % size == 0)).expect("sizes have a multiple");
        let whole = if sizes.is_empty() { self.unit } else { whole };
        tokens / whole * whole
    }

    /// How far the blocks of a sequence have names.
    pub(super) fn named_to(&self, id: u64) -> u32 {
        let named = self.sequences[&id].known().saturating_sub(self.config.hash_lookahead.0);
        if self.config.prefix_caching { self.whole_blocks(named / self.unit * self.unit) } else { 0 }
    }

    /// What a whole block of a sequence holds.
    pub(crate) fn content_of(&mut self, id: u64, group: usize, index: u32) -> Option<Content> {
        let sequence = &self.sequences[&id];
        let text = self.text(sequence, (index + 1) * self.groups[group].size)?;
        Some(self.name(group, text))
    }

    pub(super) fn leaving(&self, id: u64, group: usize, index: u32) -> Leaving {
        let blocks = &self.sequences[&id].tables[group].blocks;
        let at = |index: u32| blocks.get(index as usize).copied();
        Leaving { block: at(index).unwrap_or_default(), index, before: index.checked_sub(1).and_then(at) }
    }

    /// The blocks behind `from` that are needed to go on from `to`, group by group.
    pub(crate) fn needed(&mut self, id: u64, from: u32, to: u32) -> Vec<Needed> {
        let mut needed = Vec::new();
        for group in 0..self.groups.len() {
            let super::Group { kind, size } = self.groups[group];
            let prompt = self.sequences[&id].prompt;
            for index in from / size..to / size {
                let wanted = match kind {
                    Kind::Full => true,
                    Kind::Cross => false,
                    Kind::State => index == to.saturating_sub(1) / size,
                    _ => (index * size..(index + 1) * size).any(|token| kind.needs(token, to, prompt)),
                };
                if wanted {
                    let content = self.content_of(id, group, index).expect("it is named");
                    needed.push(Needed {
                        content,
                        group,
                        start: index * size,
                        leaving: self.leaving(id, group, index),
                    });
                }
            }
        }
        needed
    }

    /// The full blocks of a sequence between two lengths that others can find.
    pub(super) fn findable(&mut self, id: u64, from: u32, to: u32) -> Vec<Needed> {
        let mut found = Vec::new();
        for group in 0..self.groups.len() {
            let super::Group { kind, size } = self.groups[group];
            let end = if kind == Kind::Cross { from } else { to };
            for index in from / size..end / size {
                let Some(content) = self.content_of(id, group, index) else { break };
                let leaving = self.leaving(id, group, index);
                let held = self.whole_content(leaving.block).map(|held| held.text.clone());
                if held.is_some_and(|text| self.name(group, text) == content) {
                    found.push(Needed { content, group, start: index * size, leaving });
                }
            }
        }
        found
    }

    /// Whether a job is at work that brings what a sequence waits for.
    pub(crate) fn is_loaded_by_tiers(&self, id: u64) -> bool {
        self.behind.as_ref().is_some_and(|behind| behind.load_of(id).is_some())
    }

    /// Notes a job that has begun: its slots, and the blocks it keeps.
    pub(crate) fn fly(
        &mut self,
        job: JobId,
        copies: Vec<(Content, Place, Place)>,
        kept: &[Needed],
        load: Option<(u64, Vec<u32>)>,
    ) {
        let behind = self.behind.as_mut().expect("there are tiers");
        for &(content, _, to) in &copies {
            if let Place::Tier(TierSlot { tier, slot }) = to {
                let tier = &mut behind.shelves.tiers[usize::from(tier.0)];
                assert!(tier.entries.values().all(|entry| entry.slot != slot), "slot {slot} holds content");
                tier.enter(content, Entry { slot, writer: Some(job) });
            }
        }
        let copied: BTreeSet<Content> = copies.iter().map(|copy| copy.0).collect();
        let kept: Vec<Leaving> =
            kept.iter().filter(|kept| copied.contains(&kept.content)).map(|kept| kept.leaving).collect();
        for &leaving in &kept {
            behind.kept.entry(leaving.block).or_insert((0, leaving)).0 += 1;
        }
        if let Some((id, _)) = load {
            behind.afar.insert(id, Afar { load: Some(job), ..Afar::default() });
        }
        let held = kept.iter().map(|leaving| leaving.block).collect();
        behind.jobs.insert(job, Flight { copies, reported: 0, late: false, held, load });
    }

    /// Copies up to, not including, `to` are over: those that `made` says are there, those that are `blamed` are gone.
    fn settle_copies(&mut self, job: JobId, to: usize, made: impl Fn(usize) -> bool, blamed: bool) {
        let behind = self.behind();
        let flight = behind.jobs[&job].clone();
        for copy in flight.reported..to {
            let (content, from, to) = flight.copies[copy];
            if let Place::Tier(from) = from
                && blamed
                && !made(copy)
                && !flight.late
            {
                behind.shelves.tiers[usize::from(from.tier.0)].lose(content, from.slot);
            }
            if let Place::Tier(to) = to
                && !flight.late
            {
                behind.shelves.written(usize::from(to.tier.0), content, made(copy));
            }
        }
        behind.jobs.get_mut(&job).expect("it is under way").reported = to;
    }

    pub(crate) fn progress(&mut self, job: JobId, made: usize) {
        self.settle_copies(job, made, |_| true, false);
        let Some((id, tokens)) = self.behind().jobs[&job].load.clone() else { return };
        if self.behind().load_of(id) == Some(job) && tokens.len() > made + 1 {
            let there = self.whole_blocks(tokens[made]);
            if self.sequences[&id].loading.is_some_and(|loading| there > loading.from) {
                self.loaded(id, there).expect("it is loading");
            }
        }
    }

    /// A job ends, of whose copies so many leading ones, or all but some, were made.
    pub(crate) fn complete(&mut self, job: JobId, made: impl Fn(usize) -> bool, blamed: bool) -> Finished {
        let copies = self.behind().jobs[&job].copies.len();
        let first = self.behind().jobs[&job].reported;
        self.settle_copies(job, copies, &made, blamed);
        let Flight { held, load, late, .. } = self.behind().jobs.remove(&job).expect("it was under way");
        for block in held.into_iter().rev() {
            let kept = self.behind().kept.get_mut(&block).expect("it was kept");
            kept.0 -= 1;
            let (times, leaving) = *kept;
            if times == 0 {
                self.behind().kept.remove(&block);
            }
            self.let_go(&[leaving]);
            self.drop_unwanted_copies();
        }
        let is_made = |copy: &usize| *copy < first || made(*copy);
        let leading = if late { 0 } else { (0..copies).take_while(is_made).count() };
        let Some((id, tokens)) = load else {
            let all = (0..copies).filter(is_made).count() as u32;
            return if late { Finished::Late } else { Finished::Moved(BlockCount(all)) };
        };
        if self.behind().load_of(id) != Some(job) {
            return Finished::LoadedForNobody;
        }
        self.behind().of(id).load = None;
        let there = tokens[leading];
        let whole = self.sequences[&id].loading.is_some_and(|loading| loading.to == there);
        let computed = if whole {
            self.loaded(id, there).expect("it is loading");
            TokenCount(there)
        } else {
            self.load_failed(id, there).expect("it is loading")
        };
        Finished::Loaded { sequence: SequenceId(id), computed }
    }

    /// A sequence gives its room back, or is forgotten; what it left is put in order.
    pub(crate) fn part(&mut self, id: u64, closes: bool) -> Result<(), Error> {
        if self.behind.is_some() {
            self.get(id)?;
            let needed = self.needed(id, 0, self.named_to(id));
            let behind = self.behind();
            needed.iter().rev().for_each(|needed| behind.shelves.settle(needed.content));
            let afar = behind.afar.remove(&id).unwrap_or_default();
            if !closes {
                behind.afar.insert(id, Afar { pinned: afar.pinned, ..Afar::default() });
            }
        }
        if closes { self.close(id) } else { self.release(id) }
    }

    pub(crate) fn reset_all(&mut self) -> bool {
        let idle = self.reset();
        if let (true, Some(behind)) = (idle, &mut self.behind) {
            behind.shelves.reset();
            behind.jobs.values_mut().for_each(|flight| flight.late = true);
            behind.afar.values_mut().for_each(|afar| afar.pinned = None);
        }
        idle
    }
}

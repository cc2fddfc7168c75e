//! Who waits, in the order of admission.

use std::collections::BTreeMap;

use crate::id::{AdapterId, RequestId, Tick};
use crate::line::{Head, Key, Line};
use crate::order::{Lane, Order};
use crate::sequences::Slot;

/// What admission may be closed for, whoever asks: each class waits in a line of its own, so that others
/// pass without a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Class {
    pub(crate) adapter: Option<AdapterId>,
    /// Found to have a long prompt, when no more of them might run.
    pub(crate) long: bool,
}

/// A place in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Place {
    pub(crate) class: Class,
    pub(crate) lane: Lane,
    pub(crate) key: Key,
    /// When it came, or was preempted.
    pub(crate) since: Tick,
    /// As `since`, but for one that was preempted after it had lost patience: that one is as old as it was.
    pub(crate) age: Tick,
}

type ByAge = BTreeMap<(Tick, RequestId), Slot>;

/// The waiting requests that nothing but room and turn holds back.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queue {
    lines: BTreeMap<Class, Line>,
    /// How many wait in each lane, over all lines.
    lanes: Vec<u32>,
    /// By how long they have waited, class by class; kept only if that can matter.
    by_age: Option<BTreeMap<Class, ByAge>>,
    len: usize,
}

impl Queue {
    /// `by_age`: whoever has waited for too long goes first.
    pub(crate) fn new(by_age: bool) -> Queue {
        Queue { by_age: by_age.then(BTreeMap::new), ..Queue::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn join(&mut self, order: &mut impl Order, place: Place, slot: Slot) {
        let lane = place.lane;
        if self.lanes.get(lane.0 as usize).is_none_or(|&waiting| waiting == 0) {
            let lowest = self.lowest_level(order);
            order.wakes(lane, lowest);
        }
        self.put(order, place, slot);
    }

    /// As [`join`](Queue::join), for one who was here before.
    pub(crate) fn put(&mut self, order: &impl Order, place: Place, slot: Slot) {
        let Place { class, lane, key, age, .. } = place;
        let index = lane.0 as usize;
        if self.lanes.len() <= index {
            self.lanes.resize(index + 1, 0);
        }
        self.lanes[index] += 1;
        self.lines.entry(class).or_default().join(order.level(lane), lane, key, slot);
        if let Some(by_age) = &mut self.by_age {
            by_age.entry(class).or_default().insert((age, key.id), slot);
        }
        self.len += 1;
    }

    pub(crate) fn leave(&mut self, place: Place) {
        let Place { class, lane, key, age, .. } = place;
        let line = self.lines.get_mut(&class).expect("who waits has a line");
        line.leave(lane, key);
        if line.len() == 0 && class != Class::default() {
            self.lines.remove(&class);
        }
        self.lanes[lane.0 as usize] -= 1;
        if let Some(by_age) = &mut self.by_age {
            let class_by_age = by_age.get_mut(&class).expect("who waits has an age");
            class_by_age.remove(&(age, key.id));
            if class_by_age.is_empty() {
                by_age.remove(&class);
            }
        }
        self.len -= 1;
    }

    /// The first of all whose class is `open`.
    pub(crate) fn first(&mut self, order: &impl Order, open: impl Fn(Class) -> bool) -> Option<Slot> {
        let lines = self.lines.iter_mut().filter(|&(&class, _)| open(class));
        lines.filter_map(|(_, line)| line.first(order)).min().map(|(_, slot)| slot)
    }

    /// Who has waited longest of all whose class is `open`, if that is since before `moment`.
    pub(crate) fn oldest_before(&self, moment: Tick, open: impl Fn(Class) -> bool) -> Option<Slot> {
        let classes = self.by_age.as_ref()?.iter().filter(|&(&class, _)| open(class));
        let oldest = classes.filter_map(|(_, by_age)| by_age.first_key_value()).min()?;
        let (&(age, _), &slot) = oldest;
        (age < moment).then_some(slot)
    }

    /// The first of each class that is not `open`.
    pub(crate) fn heads_of_closed<'a>(
        &'a mut self,
        order: &'a impl Order,
        open: impl Fn(Class) -> bool + 'a,
    ) -> impl Iterator<Item = (Class, Slot)> + 'a {
        let lines = self.lines.iter_mut().filter(move |&(&class, _)| !open(class));
        lines.filter_map(|(&class, line)| line.first(order).map(|(_, slot)| (class, slot)))
    }

    /// How many are before `place`, as the order stands now. Cost: O(n).
    pub(crate) fn ahead_of(&self, order: &impl Order, place: Place) -> usize {
        let head = |lane: Lane, key: Key| Head { level: order.level(lane), key, lane };
        let own = head(place.lane, place.key);
        self.iter().filter(|&(lane, key, _)| head(lane, key) < own).count()
    }

    /// Who waits, in no particular order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Lane, Key, Slot)> {
        self.lines.values().flat_map(Line::iter)
    }

    /// Who waits, first to last as the order stands now. Cost: O(n log n).
    pub(crate) fn in_order(&self, order: &impl Order) -> Vec<Slot> {
        let heads = self.iter().map(|(lane, key, slot)| (Head { level: order.level(lane), key, lane }, slot));
        let mut heads: Vec<(Head, Slot)> = heads.collect();
        heads.sort_unstable();
        heads.into_iter().map(|(_, slot)| slot).collect()
    }

    fn lowest_level(&mut self, order: &impl Order) -> Option<u128> {
        let firsts = self.lines.values_mut().filter_map(|line| line.first(order));
        firsts.map(|(head, _)| head.level).min()
    }
}

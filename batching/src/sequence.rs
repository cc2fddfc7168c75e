//! One request's life: it waits, it runs, perhaps it waits again.

use std::collections::BTreeMap;

use crate::id::{RequestId, Tick, TokenId};
use crate::queue::Rank;
use crate::request::{FinishReason, Request};

/// Where a sequence is kept. Lists of sequences are lists of slots; a slot on a list is occupied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(u32);

/// A request and how far it has come.
///
/// ```text
///   |<------- known_tokens: prompt and generated ------->|
///   |<-- computed_tokens -->|<-- wanted in this step --->|
/// ```
///
/// There is no phase: a long prompt wants many tokens, one that generates wants the one it generated last.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) request: Request,
    pub(crate) known_tokens: u32,
    /// It was scheduled up to its last known token, and what follows has not been applied yet.
    pub(crate) output_pending: bool,
    pub(crate) preemptions: u32,
    pub(crate) state: State,
}

/// What is true of a sequence now.
#[derive(Debug, Clone, Copy)]
pub(crate) enum State {
    /// It holds no room.
    Waiting { since: Tick, rank: Rank },
    /// It holds room for `covered_tokens`. The first `computed_tokens` are computed, or planned to be.
    Running { computed_tokens: u32, covered_tokens: u32 },
}

impl Sequence {
    pub(crate) fn new(request: Request, rank: Rank) -> Sequence {
        let state = State::Waiting { since: request.arrival, rank };
        Sequence {
            known_tokens: request.prompt_tokens,
            output_pending: false,
            preemptions: 0,
            state,
            request,
        }
    }

    pub(crate) fn id(&self) -> RequestId {
        self.request.id
    }

    /// Tokens generated so far.
    pub(crate) fn new_tokens(&self) -> u32 {
        self.known_tokens - self.request.prompt_tokens
    }

    /// Computed and covered tokens of a sequence that runs.
    pub(crate) fn progress(&self) -> (u32, u32) {
        match self.state {
            State::Running { computed_tokens, covered_tokens } => (computed_tokens, covered_tokens),
            State::Waiting { .. } => unreachable!("request {} is listed as running, but waits", self.id()),
        }
    }

    /// Takes a generated token, and says whether it was the last.
    pub(crate) fn append(&mut self, token: TokenId, model_tokens_max: u32) -> Option<FinishReason> {
        self.known_tokens += 1;
        self.request.stop.verdict(token, self.new_tokens(), self.known_tokens, model_tokens_max)
    }
}

/// All sequences, by slot and by id.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sequences {
    slots: Vec<Option<Sequence>>,
    vacant: Vec<Slot>,
    by_id: BTreeMap<RequestId, Slot>,
}

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn find(&self, id: RequestId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Sequence> {
        self.slots[slot.0 as usize].as_ref()
    }

    pub(crate) fn at(&self, slot: Slot) -> &Sequence {
        self.slots[slot.0 as usize].as_ref().expect("a slot on a list is occupied")
    }

    pub(crate) fn at_mut(&mut self, slot: Slot) -> &mut Sequence {
        self.slots[slot.0 as usize].as_mut().expect("a slot on a list is occupied")
    }

    /// Takes in a sequence whose id is not here yet.
    pub(crate) fn insert(&mut self, sequence: Sequence) -> Slot {
        let id = sequence.id();
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            Slot(u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 requests"))
        });
        self.slots[slot.0 as usize] = Some(sequence);
        let former = self.by_id.insert(id, slot);
        assert!(former.is_none(), "request {id} was added twice");
        slot
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Sequence {
        let sequence = self.slots[slot.0 as usize].take().expect("a slot on a list is occupied");
        self.by_id.remove(&sequence.id());
        self.vacant.push(slot);
        sequence
    }

    /// Every sequence with its slot, in the order of ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Sequence)> {
        self.by_id.values().map(|&slot| (slot, self.at(slot)))
    }

    /// True if the occupied and the vacant slots are all slots, once each.
    pub(crate) fn is_consistent(&self) -> bool {
        let occupied = self.slots.iter().filter(|slot| slot.is_some()).count();
        occupied == self.by_id.len()
            && occupied + self.vacant.len() == self.slots.len()
            && self.vacant.iter().all(|&slot| self.get(slot).is_none())
            && self
                .by_id
                .iter()
                .all(|(&id, &slot)| self.get(slot).is_some_and(|sequence| sequence.id() == id))
    }
}

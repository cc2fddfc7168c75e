//! Everything a batcher knows, as data: a run that is restored from it goes on as the other would have.

use crate::batcher::{Batcher, Flow, Turns};
use crate::check::Violation;
use crate::config::Config;
use crate::encoder::Encoder;
use crate::error::ConfigError;
use crate::flight::{Flight, Flown};
use crate::gates::Gates;
use crate::id::{RequestId, StepId, Tick};
use crate::order::Order;
use crate::plan::Note;
use crate::queue::{Class, Queue};
use crate::remains::AllRemains;
use crate::sequence::{At, Sequence, State};
use crate::sequences::{Sequences, Slot};
use crate::standing::Counts;
use crate::timers::Timers;

/// The state of a [`Batcher`], as plain data. With the feature `serde` it can be written and read in any
/// format that has integers of 128 bits.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Dump<O> {
    config: Config,
    order: O,
    flow: Flow,
    now: Tick,
    generations: Vec<u32>,
    vacant: Vec<u32>,
    sequences: Vec<(Slot, Sequence)>,
    running: Vec<Slot>,
    arrived: Vec<Slot>,
    plans: Vec<Flown>,
    departed: Vec<(RequestId, StepId)>,
    remains: AllRemains,
    timers: Vec<(Tick, RequestId)>,
    encoder: Encoder,
    turns: Turns,
    unseen: Vec<RequestId>,
    seen: Option<RequestId>,
    held: Option<Note>,
    gone: Vec<RequestId>,
    ended: Vec<Note>,
    counts: Counts,
}

/// A dump that no batcher has written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    /// Its limits contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its lists contradict each other.
    #[error("the lists of the dump contradict each other")]
    Lists,
    /// An invariant does not hold.
    #[error(transparent)]
    Broken(#[from] Violation),
}

impl<O: Order + Clone> Batcher<O> {
    /// Everything it knows. Cost: O(n log n).
    pub fn dump(&self) -> Dump<O> {
        let (generations, vacant, sequences) = self.sequences.parts();
        Dump {
            config: self.config.clone(),
            order: self.order.clone(),
            flow: self.flow,
            now: self.now,
            generations,
            vacant,
            sequences,
            running: self.running.clone(),
            arrived: self.arrived.clone(),
            plans: self.flight.plans().iter().cloned().collect(),
            departed: self.flight.departed().to_vec(),
            remains: self.remains.clone(),
            timers: self.timers.sorted(),
            encoder: self.encoder.clone(),
            turns: self.turns,
            unseen: self.unseen.iter().copied().collect(),
            seen: self.seen,
            held: self.held,
            gone: self.gone.clone(),
            ended: self.ended.clone(),
            counts: self.counts,
        }
    }
}

impl<O: Order> Batcher<O> {
    /// A batcher that goes on where the dump was made. The memory must be as it was then; what it holds of
    /// each request is the caller's to keep, or to compute again.
    ///
    /// # Errors
    /// [`DumpError`] if the dump contradicts itself.
    pub fn restore(dump: Dump<O>) -> Result<Batcher<O>, DumpError> {
        let mut batcher = Batcher::with_order(dump.config, dump.order)?;
        let sequences = Sequences::from_parts(dump.generations, dump.vacant, dump.sequences);
        batcher.sequences = sequences.ok_or(DumpError::Lists)?;
        let lists = dump.running.iter().chain(&dump.arrived);
        let planned = dump.plans.iter().flat_map(|flown| flown.parts.iter().map(|part| &part.slot));
        let known = |slot: &Slot| batcher.sequences.contains(*slot);
        let present = lists.clone().all(|&slot| known(&slot) && batcher.sequences.get(slot).is_some());
        if !present || !planned.copied().all(|slot| known(&slot)) {
            return Err(DumpError::Lists);
        }
        batcher.flow = dump.flow;
        batcher.now = dump.now;
        batcher.running = dump.running;
        batcher.arrived = dump.arrived;
        batcher.flight = Flight::restore(dump.plans.into(), dump.departed);
        batcher.remains = dump.remains;
        batcher.timers = timers(&dump.timers);
        batcher.encoder = dump.encoder;
        batcher.turns = dump.turns;
        batcher.unseen = dump.unseen.into();
        batcher.seen = dump.seen;
        batcher.held = dump.held;
        batcher.gone = dump.gone;
        batcher.ended = dump.ended;
        batcher.counts = dump.counts;
        batcher.sum_up();
        batcher.check()?;
        Ok(batcher)
    }

    /// Works out what follows from the sequences.
    fn sum_up(&mut self) {
        let Batcher { sequences, order, config, .. } = self;
        let (mut queue, mut gates) = (Queue::new(config.patience_ticks.is_some()), Gates::new(config));
        for (slot, sequence) in sequences.iter() {
            match &sequence.state {
                State::Running(running) => {
                    gates.enter(Class { adapter: sequence.request.adapter, long: running.long });
                    self.promises += u32::from(running.promised);
                }
                State::Waiting(waiting) => {
                    self.waiting_tokens += u64::from(sequence.known_tokens);
                    match waiting.at {
                        At::Queue => queue.put(order, waiting.place, slot),
                        At::Aside(_) => drop(self.aside.insert(sequence.id, slot)),
                        At::Loading { .. } => {
                            self.aside.insert(sequence.id, slot);
                            self.promises += 1;
                        }
                        At::Loaded { .. } => self.promises += 1,
                    }
                }
            }
        }
        (self.queue, self.gates) = (queue, gates);
    }
}

fn timers(due: &[(Tick, RequestId)]) -> Timers {
    let mut timers = Timers::default();
    due.iter().for_each(|&(due, id)| timers.set(due, id));
    timers
}

//! Outputs that plans asked for and that have not come back yet.

use crate::error::Error;
use crate::id::RequestId;
use crate::request::Sampled;
use crate::sequence::{Sequences, Slot};

/// Who owes an output.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flight {
    /// In the order in which plans asked for it.
    awaited: Vec<Awaited>,
    /// Requests that ended before their output came. It is dropped if it comes, and not expected any more
    /// once an output of a later plan has come.
    departed: Vec<Awaited>,
    /// Where the outputs of one `land` belong; `None` for a departed one. Kept for its buffer.
    landed: Vec<Option<Slot>>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Awaited {
    pub(crate) id: RequestId,
    pub(crate) slot: Slot,
    /// The number of the plan that asked.
    plan: u64,
}

impl Flight {
    pub(crate) fn await_output(&mut self, id: RequestId, slot: Slot, plan: u64) {
        self.awaited.push(Awaited { id, slot, plan });
    }

    /// A request ends while its output is pending.
    pub(crate) fn depart(&mut self, id: RequestId) {
        let place = self.awaited.iter().position(|awaited| awaited.id == id);
        let place = place.expect("a pending output is awaited");
        self.departed.push(self.awaited.remove(place));
    }

    pub(crate) fn has_departed(&self, id: RequestId) -> bool {
        self.departed.iter().any(|departed| departed.id == id)
    }

    pub(crate) fn awaited(&self) -> &[Awaited] {
        &self.awaited
    }

    /// Finds where each output belongs, and notes that it is there. All or nothing.
    ///
    /// Outputs that come in the order of the plan cost one comparison each, others a search by id.
    pub(crate) fn land(&mut self, sampled: &[Sampled], sequences: &mut Sequences) -> Result<(), Error> {
        self.landed.clear();
        for (place, output) in sampled.iter().enumerate() {
            match self.expected(place, output.id, sequences) {
                Some(slot) => {
                    sequences.at_mut(slot).output_pending = false;
                    self.landed.push(Some(slot));
                }
                None if self.has_departed(output.id) => self.landed.push(None),
                None => {
                    self.landed
                        .iter()
                        .flatten()
                        .for_each(|&slot| sequences.at_mut(slot).output_pending = true);
                    return Err(Error::NotExpected { id: output.id });
                }
            }
        }
        self.forget_departed(sampled, sequences);
        self.forget_landed(sequences);
        Ok(())
    }

    /// The slot of the output at `place` of the last [`land`](Flight::land).
    pub(crate) fn landed(&self, place: usize) -> Option<Slot> {
        self.landed[place]
    }

    fn expected(&self, place: usize, id: RequestId, sequences: &Sequences) -> Option<Slot> {
        let slot = match self.awaited.get(place) {
            Some(awaited) if awaited.id == id => awaited.slot,
            _ => sequences.find(id)?,
        };
        sequences.at(slot).output_pending.then_some(slot)
    }

    fn forget_departed(&mut self, sampled: &[Sampled], sequences: &Sequences) {
        if self.departed.is_empty() {
            return;
        }
        let landed = self.awaited.iter().filter(|awaited| !sequences.at(awaited.slot).output_pending);
        let newest = landed.map(|awaited| awaited.plan).max().unwrap_or(0);
        self.departed.retain(|departed| {
            departed.plan >= newest && !sampled.iter().any(|output| output.id == departed.id)
        });
    }

    fn forget_landed(&mut self, sequences: &Sequences) {
        if self.landed.iter().flatten().count() == self.awaited.len() {
            self.awaited.clear();
        } else {
            self.awaited.retain(|awaited| sequences.at(awaited.slot).output_pending);
        }
    }
}

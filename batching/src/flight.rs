//! Outputs that plans asked for and that have not come back yet.

use crate::error::Error;
use crate::id::RequestId;
use crate::request::Sampled;
use crate::sequence::{Sequences, Slot};

/// Who owes an output, in the order in which plans asked for it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flight {
    awaited: Vec<(RequestId, Slot)>,
    /// Requests that ended before their output came. It is dropped when it comes.
    departed: Vec<RequestId>,
    /// Where the outputs of one `land` belong; `None` for a departed one. Kept for its buffer.
    landed: Vec<Option<Slot>>,
}

impl Flight {
    pub(crate) fn await_output(&mut self, id: RequestId, slot: Slot) {
        self.awaited.push((id, slot));
    }

    /// A request ends while its output is pending.
    pub(crate) fn depart(&mut self, id: RequestId) {
        self.awaited.retain(|&(awaited, _)| awaited != id);
        self.departed.push(id);
    }

    pub(crate) fn has_departed(&self, id: RequestId) -> bool {
        self.departed.contains(&id)
    }

    pub(crate) fn awaited(&self) -> &[(RequestId, Slot)] {
        &self.awaited
    }

    /// Finds where each output belongs, and notes that it is there: one slot for each of `sampled`. All or nothing.
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
        self.forget_landed(sequences);
        Ok(())
    }

    /// The slots that the last [`land`](Flight::land) found.
    pub(crate) fn landed(&self, place: usize) -> Option<Slot> {
        self.landed[place]
    }

    fn expected(&self, place: usize, id: RequestId, sequences: &Sequences) -> Option<Slot> {
        let slot = match self.awaited.get(place) {
            Some(&(awaited, slot)) if awaited == id => slot,
            _ => sequences.find(id)?,
        };
        sequences.at(slot).output_pending.then_some(slot)
    }

    fn forget_landed(&mut self, sequences: &Sequences) {
        if self.landed.iter().flatten().count() == self.awaited.len() {
            self.awaited.clear();
            self.departed.clear();
        } else {
            self.awaited.retain(|&(_, slot)| sequences.at(slot).output_pending);
        }
    }
}

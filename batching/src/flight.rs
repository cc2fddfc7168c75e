//! Plans that were made and whose outputs have not come back yet.

use std::collections::VecDeque;

use crate::error::Error;
use crate::id::{RequestId, StepId};
use crate::plan::Scheduled;
use crate::request::Sampled;
use crate::sequences::{Sequences, Slot};

/// Who computes what in each of the plans in flight.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flight {
    /// In the order in which they were planned.
    plans: VecDeque<Flown>,
    /// Ids of requests that left while an output of theirs was in flight, with the last step that has one,
    /// in the order of leaving. Few at a time.
    departed: Vec<(RequestId, StepId)>,
    /// Buffers of plans that have landed.
    spare: Vec<Vec<Scheduled>>,
    /// Outputs of a landing in the order of the plan. Kept for its buffer.
    sorted: Vec<Sampled>,
}

/// A plan in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Flown {
    pub(crate) step: StepId,
    pub(crate) parts: Vec<Scheduled>,
}

impl Flight {
    pub(crate) fn take_off(&mut self, step: StepId, scheduled: &[Scheduled]) {
        let mut parts = self.spare.pop().unwrap_or_default();
        parts.clear();
        parts.extend_from_slice(scheduled);
        self.plans.push_back(Flown { step, parts });
    }

    /// Takes a plan out of flight whose outputs fit to it. The outputs, in its order, are those of
    /// [`take_sorted`](Flight::take_sorted) if that is not empty, else `sampled`.
    ///
    /// Outputs in the order of the plan cost one comparison each, others a search.
    pub(crate) fn land(
        &mut self,
        step: StepId,
        sampled: &[Sampled],
        sequences: &Sequences,
    ) -> Result<Flown, Error> {
        let place = self.plans.binary_search_by_key(&step, |flown| flown.step);
        let place = place.map_err(|_| Error::NotInFlight { step })?;
        self.is_next(place, sequences)?;
        let parts = &self.plans[place].parts;
        self.sorted.clear();
        if fits(parts, sampled, sequences).is_err() {
            sort_like(parts, sampled, &mut self.sorted)?;
            if let Err(error) = fits(parts, &self.sorted, sequences) {
                self.sorted.clear();
                return Err(error);
            }
        }
        let flown = self.plans.remove(place).expect("the place was found");
        let first = self.first_in_flight();
        self.departed.retain(|&(_, last)| first.is_some_and(|first| last >= first));
        Ok(flown)
    }

    /// The outputs of the last landing in the order of its plan; empty if they came in it.
    pub(crate) fn take_sorted(&mut self) -> Vec<Sampled> {
        std::mem::take(&mut self.sorted)
    }

    /// Takes back the buffers of a plan that has landed.
    pub(crate) fn recycle(&mut self, flown: Flown, mut sorted: Vec<Sampled>) {
        self.spare.push(flown.parts);
        sorted.clear();
        self.sorted = sorted;
    }

    /// Whatever is in flight of one is in flight of the other, its copy, too.
    pub(crate) fn double(&mut self, slot: Slot, copy: Slot, id: RequestId) {
        for flown in &mut self.plans {
            if let Some(place) = flown.parts.iter().position(|part| part.slot == slot) {
                let part = Scheduled { id, slot: copy, ..flown.parts[place] };
                flown.parts.insert(place + 1, part);
            }
        }
    }

    /// A request leaves whose last step is this one.
    pub(crate) fn depart(&mut self, id: RequestId, last_step: StepId) {
        if self.contains(last_step) {
            self.departed.push((id, last_step));
        }
    }

    pub(crate) fn has_departed(&self, id: RequestId) -> bool {
        self.departed.iter().any(|&(departed, _)| departed == id)
    }

    /// True if a step is in flight, or an earlier one is.
    pub(crate) fn reaches(&self, step: StepId) -> bool {
        self.first_in_flight().is_some_and(|first| first <= step)
    }

    pub(crate) fn plans(&self) -> &VecDeque<Flown> {
        &self.plans
    }

    pub(crate) fn departed(&self) -> &[(RequestId, StepId)] {
        &self.departed
    }

    pub(crate) fn restore(plans: VecDeque<Flown>, departed: Vec<(RequestId, StepId)>) -> Flight {
        Flight { plans, departed, ..Flight::default() }
    }

    fn first_in_flight(&self) -> Option<StepId> {
        self.plans.front().map(|flown| flown.step)
    }

    fn contains(&self, step: StepId) -> bool {
        self.plans.binary_search_by_key(&step, |flown| flown.step).is_ok()
    }

    /// Plans may land in any order as long as the outputs of each request come in theirs.
    fn is_next(&self, place: usize, sequences: &Sequences) -> Result<(), Error> {
        for earlier in self.plans.range(..place) {
            for part in &self.plans[place].parts {
                let here = sequences.get(part.slot).is_some();
                if here && earlier.parts.iter().any(|other| other.slot == part.slot) {
                    return Err(Error::OutOfOrder { id: part.id, step: earlier.step });
                }
            }
        }
        Ok(())
    }
}

/// Whether the outputs are those that the parts ask for, one behind the other. Those of requests that have
/// left may be there or not.
fn fits(parts: &[Scheduled], sampled: &[Sampled], sequences: &Sequences) -> Result<(), Error> {
    let mut next = 0;
    for part in parts.iter().filter(|part| part.samples) {
        let tokens = burst(&sampled[next..], part.id);
        let here = || sequences.get(part.slot).is_some_and(|sequence| part.life >= sequence.lives_from);
        if tokens == 0 && here() {
            return Err(Error::Missing { id: part.id });
        }
        let tokens_max = part.outputs_max();
        if tokens > tokens_max as usize {
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            return Err(Error::TooMany { id: part.id, tokens, tokens_max });
        }
        next += tokens;
    }
    sampled.get(next).map_or(Ok(()), |extra| Err(Error::NotExpected { id: extra.id }))
}

/// How many of the outputs, from the first on, are of this request.
#[inline]
pub(crate) fn burst(sampled: &[Sampled], id: RequestId) -> usize {
    sampled.iter().take_while(|output| output.id == id).count()
}

/// Puts outputs into the order of the parts; each burst keeps its own.
fn sort_like(parts: &[Scheduled], sampled: &[Sampled], sorted: &mut Vec<Sampled>) -> Result<(), Error> {
    let samples = parts.iter().filter(|part| part.samples);
    let mut places: Vec<(RequestId, usize)> =
        samples.enumerate().map(|(place, part)| (part.id, place)).collect();
    places.sort_unstable();
    let place = |id| {
        let found = places.binary_search_by_key(&id, |&(id, _)| id);
        found.map(|found| places[found].1).map_err(|_| Error::NotExpected { id })
    };
    let mut ordered = Vec::with_capacity(sampled.len());
    for &output in sampled {
        ordered.push((place(output.id)?, output));
    }
    ordered.sort_by_key(|&(place, _)| place);
    sorted.extend(ordered.into_iter().map(|(_, output)| output));
    Ok(())
}

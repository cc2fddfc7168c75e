//! The façade: requests come in and go out. What happens between is in `step.rs`.

use crate::config::Config;
use crate::error::{ConfigError, Refusal, RefusalReason};
use crate::flight::Flight;
use crate::id::RequestId;
use crate::memory::Memory;
use crate::plan::Note;
use crate::queue::Queue;
use crate::request::Request;
use crate::sequence::{Sequence, Sequences, Slot, State};
use crate::standing::Counts;

/// Decides, step by step, which requests run and with how many tokens. See the [crate
/// documentation](crate).
#[derive(Debug, Clone)]
pub struct Batcher {
    pub(crate) config: Config,
    pub(crate) flow: Flow,
    pub(crate) sequences: Sequences,
    /// In the order of admission.
    pub(crate) running: Vec<Slot>,
    pub(crate) queue: Queue,
    pub(crate) flight: Flight,
    /// Who stood at the head of the queue at the end of the last step, and why.
    pub(crate) held: Option<Note>,
    pub(crate) counts: Counts,
}

/// What the caller lets through at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flow {
    /// Everything.
    #[default]
    Open,
    /// New requests are refused; all that are here run to their end.
    Draining,
    /// New requests queue up; nobody is admitted; the running run on.
    Holding,
    /// New requests queue up; nobody is scheduled. The running keep their room.
    Stopped,
}

impl Batcher {
    /// A batcher without requests.
    ///
    /// # Errors
    /// [`ConfigError`] when the limits contradict each other.
    pub fn new(config: Config) -> Result<Batcher, ConfigError> {
        config.validate()?;
        let queue = Queue::new(config.order);
        Ok(Batcher {
            config,
            flow: Flow::default(),
            sequences: Sequences::default(),
            running: Vec::new(),
            queue,
            flight: Flight::default(),
            held: None,
            counts: Counts::default(),
        })
    }

    /// The limits it works within.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Queues a request. Cost: O(log n).
    ///
    /// # Errors
    /// [`Refusal`], with the request in it, when it makes no sense, can never run, or the queue is full.
    /// Nothing changes then, but for the count of refusals.
    pub fn add(&mut self, request: Request) -> Result<(), Refusal> {
        if let Err(reason) = self.examine(&request) {
            self.counts.refused += 1;
            return Err(Refusal { request, reason });
        }
        let rank = self.queue.back(&request);
        let prompt_tokens = request.prompt_tokens;
        let slot = self.sequences.insert(Sequence::new(request, rank));
        self.queue.join(rank, slot, prompt_tokens);
        Ok(())
    }

    /// Ends a request that the caller found to be complete, by a stop string for example, and releases its
    /// memory. False if there is no such request (any more).
    pub fn finish(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        let found = self.remove(id, memory);
        self.counts.finished += u64::from(found);
        found
    }

    /// Ends a request that nobody wants any more, at any moment, and releases its memory. False if there is
    /// no such request (any more). An output that a plan has asked for is dropped when it comes.
    pub fn cancel(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        let found = self.remove(id, memory);
        self.counts.cancelled += u64::from(found);
        found
    }

    /// Opens, drains, holds or stops the flow.
    pub fn set_flow(&mut self, flow: Flow) {
        self.flow = flow;
    }

    /// What is let through at the moment.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// True if somebody runs or waits.
    pub fn has_work(&self) -> bool {
        self.sequences.len() > 0
    }

    fn examine(&self, request: &Request) -> Result<(), RefusalReason> {
        let Request { id, prompt_tokens, stop, .. } = request;
        let (id, prompt_tokens, model_tokens_max) = (*id, *prompt_tokens, self.config.model_tokens_max);
        if self.flow == Flow::Draining {
            return Err(RefusalReason::Draining);
        }
        if self.sequences.find(id).is_some() {
            return Err(RefusalReason::Duplicate);
        }
        if self.flight.has_departed(id) {
            return Err(RefusalReason::OutputPending);
        }
        if prompt_tokens == 0 {
            return Err(RefusalReason::EmptyPrompt);
        }
        if prompt_tokens >= model_tokens_max {
            return Err(RefusalReason::PromptTooLong { prompt_tokens, model_tokens_max });
        }
        let (new_tokens_min, new_tokens_max) = (stop.new_tokens_min, stop.new_tokens_max);
        if new_tokens_max == 0 {
            return Err(RefusalReason::NothingAsked);
        }
        if new_tokens_min > new_tokens_max {
            return Err(RefusalReason::MinimumAboveMaximum { new_tokens_min, new_tokens_max });
        }
        self.examine_queue(prompt_tokens)
    }

    fn examine_queue(&self, prompt_tokens: u32) -> Result<(), RefusalReason> {
        let queued = count(self.queue.len());
        if let Some(queued_requests_max) = self.config.queued_requests_max.filter(|&max| queued >= max) {
            return Err(RefusalReason::QueueFull { queued, queued_requests_max });
        }
        let queued_tokens = self.queue.tokens();
        let wanted = queued_tokens + u64::from(prompt_tokens);
        if let Some(queued_tokens_max) = self.config.queued_tokens_max.filter(|&max| wanted > max) {
            return Err(RefusalReason::QueueTokensFull { queued_tokens, prompt_tokens, queued_tokens_max });
        }
        Ok(())
    }

    fn remove(&mut self, id: RequestId, memory: &mut impl Memory) -> bool {
        let Some(slot) = self.sequences.find(id) else { return false };
        if self.sequences.at(slot).output_pending {
            self.flight.depart(id);
        }
        self.retire(slot, memory);
        self.running.retain(|&running| running != slot);
        true
    }

    /// Forgets a sequence and gives back what it holds. The caller takes it off the list of the running.
    pub(crate) fn retire(&mut self, slot: Slot, memory: &mut impl Memory) {
        let sequence = self.sequences.remove(slot);
        match sequence.state {
            State::Waiting { rank, .. } => self.queue.leave(rank, sequence.known_tokens),
            State::Running { .. } => memory.release(sequence.id()),
        }
    }
}

/// A length as the `u32` of our messages.
pub(crate) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

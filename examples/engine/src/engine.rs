//! The engine: add requests, step, take what came out.

use std::sync::Arc;

use crate::error::Refusal;
use crate::output::Output;
use crate::request::{Request, RequestId, Tick};
use crate::snapshot::Snapshot;
use crate::text::Text;

/// A model that answers many requests at once, one step at a time. It has no thread and no clock: the
/// caller calls [`step`](Engine::step) as long as there [is work](Engine::has_work).
#[derive(Debug)]
pub struct Engine {
    text: Arc<Text>,
}

impl Engine {
    /// The tokenizer and the chat template, to be used from any thread.
    #[must_use]
    pub fn text(&self) -> Arc<Text> {
        Arc::clone(&self.text)
    }

    /// Longest sequence, prompt and output together.
    #[must_use]
    pub fn model_tokens_max(&self) -> u32 {
        0
    }

    /// Queues a request.
    ///
    /// # Errors
    /// A [`Refusal`] with the reason; the engine is as it was.
    pub fn add(&mut self, request: Request) -> Result<(), Refusal> {
        Err(Refusal::Duplicate(request.id.0))
    }

    /// Runs one step and appends to `outputs` what it brought. Returns the number of tokens it processed;
    /// 0 when there was nothing to do.
    pub fn step(&mut self, _now: Tick, _outputs: &mut Vec<Output>) -> u32 {
        0
    }

    /// Forgets a request and frees its blocks. False when there is none by this id.
    pub fn cancel(&mut self, _id: RequestId) -> bool {
        false
    }

    /// Whether any request is queued or running.
    #[must_use]
    pub fn has_work(&self) -> bool {
        false
    }

    /// What is going on.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::default()
    }

    /// Drops all cached prefixes. False when requests still hold blocks.
    pub fn reset_prefix_cache(&mut self) -> bool {
        false
    }

    /// Audits every invariant of the engine, its cache and its batcher.
    ///
    /// # Errors
    /// A sentence about the first one that does not hold: a bug of ours.
    pub fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

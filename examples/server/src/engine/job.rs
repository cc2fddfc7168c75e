//! Work for the engine, and the ticket for what comes of it.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use quayline_engine::{Grammar, Load, Output, RequestId, Sampling};
use tokio::sync::{mpsc, oneshot};

use super::Command;
use crate::order::Turn;

/// What happened to one of the choices of a job in one step.
#[derive(Debug)]
pub(crate) struct Part {
    /// Which choice.
    pub(crate) choice: u32,
    /// What came.
    pub(crate) output: Output,
}

/// Prompts to be continued together, all or none.
#[derive(Debug)]
pub(crate) struct Job {
    /// The answer's id.
    pub(crate) name: String,
    /// One per choice: `n` for each prompt, one behind the other.
    pub(crate) prompts: Vec<(Arc<[u32]>, Sampling)>,
    /// What every answer must be.
    pub(crate) grammar: Wait,
    pub(crate) turn: Turn,
    pub(crate) cache_salt: Option<String>,
    /// Continuations per prompt.
    pub(crate) n: u32,
    /// Search for them with this length penalty, and draw nothing.
    pub(crate) beams: Option<f32>,
    /// When the server received it.
    pub(crate) arrived: Instant,
    /// Another server goes on, and fetches the blocks under this key.
    pub(crate) hands_over: Option<String>,
    /// Another server has the prompt's blocks: this one is told which are wanted.
    pub(crate) pulls: Option<oneshot::Sender<Load>>,
}

/// What every answer of a job must be.
#[derive(Debug)]
pub(crate) enum Wait {
    /// Anything.
    Free,
    /// Of this grammar.
    Ready(Grammar),
    /// Of one that is being compiled: [`Ticket::begin`] or [`Ticket::withdraw`] will follow.
    Compiling,
}

/// A job in the engine. Dropping it takes what is unfinished out of the engine and frees its blocks.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(super) parts: mpsc::Receiver<Vec<Part>>,
    pub(super) ids: Vec<RequestId>,
    pub(super) unfinished: usize,
    pub(super) commands: Sender<Command>,
}

impl Ticket {
    /// The grammar that the job waits for is there.
    pub(crate) fn begin(&self, grammar: Grammar) {
        // When the engine is gone, whoever asks for the answer is told so.
        let _ = self.commands.send(Command::Begin { ids: self.ids.clone(), grammar });
    }

    /// The job turned out to be none: it leaves the engine uncounted.
    pub(crate) fn withdraw(mut self) {
        self.unfinished = 0;
        let _ = self.commands.send(Command::Withdraw(std::mem::take(&mut self.ids)));
    }

    /// What the next step brought for this job; `None` when all choices have ended. `Err` when the engine
    /// gave the job up: it failed, the server is stopping, or nobody read for too long.
    pub(crate) async fn next(&mut self) -> Option<Result<Vec<Part>, GivenUp>> {
        if self.unfinished == 0 {
            return None;
        }
        let Some(parts) = self.parts.recv().await else { return Some(Err(GivenUp)) };
        self.unfinished -= parts.iter().filter(|part| part.output.finish.is_some()).count();
        Some(Ok(parts))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.unfinished > 0 {
            // When the engine is gone there is nothing to cancel.
            let _ = self.commands.send(Command::Cancel(std::mem::take(&mut self.ids)));
        }
    }
}

/// The engine let go of a job before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GivenUp;

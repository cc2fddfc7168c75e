//! SIGTERM: not ready any more, finish what runs, go. A second one: go now.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::App;

/// The signals that end a server.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes the signals over from the system, whose way is to kill.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Until one comes.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Every request finished.
    Complete,
    /// Time was up, or a second signal came, with so many unfinished.
    Cut(usize),
}

/// Refuses new requests and waits for the running ones, until `limit` or `now`.
pub(crate) async fn drain(app: &Arc<App>, limit: Duration, now: impl Future<Output = ()>) -> Drained {
    app.drain();
    let mut running = app.running();
    let left = *running.borrow();
    tracing::info!(running = left, limit_seconds = limit.as_secs(), "draining");
    let complete = tokio::select! {
        _ = running.wait_for(|running| *running == 0) => true,
        () = tokio::time::sleep(limit) => false,
        () = now => false,
    };
    if complete { Drained::Complete } else { Drained::Cut(*app.running().borrow()) }
}

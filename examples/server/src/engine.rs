//! The engine's thread: it owns the [`Engine`] and the clock, takes commands, runs steps, hands out what
//! came. While there is nothing to do it is blocked, and nothing that a client does can block it.

mod job;
mod thread;
mod view;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use quayline_engine::{Engine, Grammar, Parcel, Refusal, RequestId, RequestState, Tick};
use tokio::sync::{oneshot, watch};

pub(crate) use self::job::{GivenUp, Job, Part, Ticket, Wait};
use self::thread::EngineThread;
pub(crate) use self::view::View;
use crate::kv_events::Outlet;
use crate::metrics::EngineMetrics;
use crate::order::Turn;

/// Steps whose outputs may wait for a reader. A client that falls further behind is cut off, so that its
/// outputs do not fill the memory.
pub(crate) const STEPS_UNREAD_MAX: usize = 1024;

enum Command {
    Submit {
        job: Box<Job>,
        reply: oneshot::Sender<Result<Ticket, Refusal>>,
    },
    Cancel(Vec<RequestId>),
    Begin {
        ids: Vec<RequestId>,
        grammar: Grammar,
    },
    Withdraw(Vec<RequestId>),
    Explain {
        name: String,
        reply: oneshot::Sender<Vec<Explained>>,
    },
    ResetPrefixCache(oneshot::Sender<bool>),
    Fetch {
        key: String,
        start: u32,
        tokens: u32,
        reply: oneshot::Sender<Option<Parcel>>,
    },
    Kept {
        key: String,
        reply: oneshot::Sender<Option<Vec<u32>>>,
    },
    Release {
        key: String,
        reply: oneshot::Sender<bool>,
    },
    Deliver {
        id: RequestId,
        parcel: Option<Parcel>,
    },
    /// The disk behind host memory has done something.
    DiskDone,
    /// So many more steps, and then none; `None` is as many as there are.
    #[cfg(test)]
    Allow(Option<u32>),
    /// What the disk behind host memory is still to get, it gets until then.
    Stop {
        by: Instant,
    },
}

/// How one choice of a job stands, and what decides when it runs.
#[derive(Debug)]
pub(crate) struct Explained {
    pub(crate) choice: u32,
    pub(crate) state: RequestState,
    pub(crate) turn: Turn,
    /// What its tenant was served, in the fair order.
    pub(crate) served: Option<f64>,
}

/// The way to the engine's thread, shared by all connections.
#[derive(Debug)]
pub(crate) struct Handle {
    commands: Sender<Command>,
    view: watch::Receiver<View>,
    alive: watch::Receiver<bool>,
    origin: Instant,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Submit { .. } => "Submit",
            Self::Cancel(_) => "Cancel",
            Self::Begin { .. } => "Begin",
            Self::Withdraw(_) => "Withdraw",
            Self::Explain { .. } => "Explain",
            Self::ResetPrefixCache(_) => "ResetPrefixCache",
            Self::Fetch { .. } => "Fetch",
            Self::Kept { .. } => "Kept",
            Self::Release { .. } => "Release",
            Self::Deliver { .. } => "Deliver",
            Self::DiskDone => "DiskDone",
            #[cfg(test)]
            Self::Allow(_) => "Allow",
            Self::Stop { .. } => "Stop",
        })
    }
}

impl Handle {
    /// Queues a job.
    ///
    /// # Errors
    /// `Ok(Err)` is the engine's refusal, `Err` says that there is no engine any more.
    pub(crate) async fn submit(&self, job: Job) -> Result<Result<Ticket, Refusal>, GivenUp> {
        // Should the caller go away while it waits, the ticket is dropped in the channel and cancels.
        self.ask(|reply| Command::Submit { job: Box::new(job), reply }).await
    }

    /// How the choices of a job stand that have not ended; none if there is no such job.
    pub(crate) async fn explain(&self, name: String) -> Result<Vec<Explained>, GivenUp> {
        self.ask(|reply| Command::Explain { name, reply }).await
    }

    /// Drops all cached prefixes; false when requests still hold blocks.
    pub(crate) async fn reset_prefix_cache(&self) -> Result<bool, GivenUp> {
        self.ask(Command::ResetPrefixCache).await
    }

    /// Blocks that are kept under a key for another server; `None` if they are not.
    pub(crate) async fn fetch(
        &self,
        key: String,
        start: u32,
        tokens: u32,
    ) -> Result<Option<Parcel>, GivenUp> {
        self.ask(|reply| Command::Fetch { key, start, tokens, reply }).await
    }

    /// The numbers of the blocks that are kept under a key.
    pub(crate) async fn kept(&self, key: String) -> Result<Option<Vec<u32>>, GivenUp> {
        self.ask(|reply| Command::Kept { key, reply }).await
    }

    /// Frees what is kept under a key; false if nothing is.
    pub(crate) async fn release(&self, key: String) -> Result<bool, GivenUp> {
        self.ask(|reply| Command::Release { key, reply }).await
    }

    /// Brings a request the blocks that it waits for; `None` is the news that they will not come.
    pub(crate) fn deliver(&self, id: RequestId, parcel: Option<Parcel>) {
        // When the engine is gone, nobody waits.
        let _ = self.commands.send(Command::Deliver { id, parcel });
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, GivenUp> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| GivenUp)?;
        answer.await.map_err(|_| GivenUp)
    }

    /// Ends the thread after its current step, and after what host memory holds is on the disk, but not later than
    /// `by`. Jobs are given up.
    pub(crate) fn stop(&self, by: Instant) {
        let _ = self.commands.send(Command::Stop { by });
    }

    /// Lets the engine do so many more steps, and then none; `None` is as many as there are.
    #[cfg(test)]
    pub(crate) fn allow(&self, steps: Option<u32>) {
        let _ = self.commands.send(Command::Allow(steps));
    }

    /// The engine as of its last steps; at most one step and a few milliseconds old.
    pub(crate) fn view(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// True from the start, while loading too, until the engine fails or stops.
    pub(crate) fn is_alive(&self) -> bool {
        *self.alive.borrow()
    }

    /// Until the thread has done its work.
    pub(crate) async fn ended(&self) {
        // The sender gone is the end, too.
        let _ = self.alive.clone().wait_for(|alive| !alive).await;
    }

    /// Time since the engine's thread started.
    pub(crate) fn now(&self) -> Tick {
        tick(self.origin, Instant::now())
    }
}

/// Starts the engine's thread. `load` runs on it first; `loaded` is told what else it made, or why there is
/// no engine. What its cache does is told to `events`. With `audit`, every invariant is checked whenever the engine
/// falls idle.
///
/// # Panics
/// When the system cannot start a thread.
pub(crate) fn spawn<T, E>(
    load: impl FnOnce(&watch::Receiver<View>) -> Result<(Engine, EngineMetrics, T), E> + Send + 'static,
    events: Option<Outlet>,
    loaded: oneshot::Sender<Result<T, E>>,
    audit: bool,
) -> (Handle, JoinHandle<()>)
where
    T: Send + 'static,
    E: Send + 'static,
{
    let (commands, receiver) = channel();
    let (alive_sender, alive) = watch::channel(true);
    let (view_sender, view) = watch::channel(View::default());
    let origin = Instant::now();
    let handle = Handle { commands: commands.clone(), view: view.clone(), alive, origin };
    let work = move || match load(&view) {
        Ok((engine, metrics, rest)) => {
            let mut thread = EngineThread::new(engine, metrics, origin, commands, view_sender, audit);
            thread.tell_to(events);
            thread.publish();
            let _ = loaded.send(Ok(rest));
            if catch_unwind(AssertUnwindSafe(|| thread.run(&receiver))).is_err() {
                tracing::error!("the engine failed; no request can be answered any more");
            }
            alive_sender.send_replace(false);
        }
        Err(error) => {
            alive_sender.send_replace(false);
            let _ = loaded.send(Err(error));
        }
    };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(work);
    (handle, thread.expect("the system can start one thread"))
}

fn tick(origin: Instant, now: Instant) -> Tick {
    Tick(u64::try_from((now - origin).as_micros()).unwrap_or(u64::MAX))
}

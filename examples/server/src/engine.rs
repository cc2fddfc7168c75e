//! The engine's thread: it owns the [`Engine`] and the clock, takes commands, runs steps, hands out what
//! came. While there is nothing to do it is blocked, and nothing that a client does can block it.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use quayline_engine::{
    Beams, Engine, Grammar, Output, Refusal, Request, RequestId, RequestState, Sampling, Snapshot, Tick,
};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};

use crate::metrics::{EngineMetrics, Timeline};
use crate::offloading::Speedometer;

/// Steps whose outputs may wait for a reader. A client that falls further behind is cut off, so that its
/// outputs do not fill the memory.
pub(crate) const STEPS_UNREAD_MAX: usize = 1024;

/// Least time between two snapshots while the engine is busy.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(50);

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
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<String>,
    /// Continuations per prompt.
    pub(crate) n: u32,
    /// Search for them with this length penalty, and draw nothing.
    pub(crate) beams: Option<f32>,
    /// When the server received it.
    pub(crate) arrived: Instant,
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
    parts: mpsc::Receiver<Vec<Part>>,
    ids: Vec<RequestId>,
    unfinished: usize,
    commands: Sender<Command>,
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

/// The engine at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    pub(crate) snapshot: Arc<Snapshot>,
    /// When it was taken.
    pub(crate) at: Tick,
    pub(crate) output_tokens_per_second: f64,
    pub(crate) prompt_tokens_per_second: f64,
}

enum Command {
    Submit { job: Job, reply: oneshot::Sender<Result<Ticket, Refusal>> },
    Cancel(Vec<RequestId>),
    Begin { ids: Vec<RequestId>, grammar: Grammar },
    Withdraw(Vec<RequestId>),
    Explain { name: String, reply: oneshot::Sender<Vec<(u32, RequestState)>> },
    ResetPrefixCache(oneshot::Sender<bool>),
    Stop,
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
            Self::Stop => "Stop",
        })
    }
}

impl Handle {
    /// Queues a job.
    ///
    /// # Errors
    /// `Ok(Err)` is the engine's refusal, `Err` says that there is no engine any more.
    pub(crate) async fn submit(&self, job: Job) -> Result<Result<Ticket, Refusal>, GivenUp> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Submit { job, reply }).map_err(|_| GivenUp)?;
        // Should the caller go away while it waits, the ticket is dropped in the channel and cancels.
        answer.await.map_err(|_| GivenUp)
    }

    /// How the choices of a job stand that have not ended; none if there is no such job.
    pub(crate) async fn explain(&self, name: String) -> Result<Vec<(u32, RequestState)>, GivenUp> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Explain { name, reply }).map_err(|_| GivenUp)?;
        answer.await.map_err(|_| GivenUp)
    }

    /// Drops all cached prefixes; false when requests still hold blocks.
    pub(crate) async fn reset_prefix_cache(&self) -> Result<bool, GivenUp> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::ResetPrefixCache(reply)).map_err(|_| GivenUp)?;
        answer.await.map_err(|_| GivenUp)
    }

    /// Ends the thread after its current step. Jobs are given up.
    pub(crate) fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }

    /// The engine as of its last steps; at most one step and a few milliseconds old.
    pub(crate) fn view(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// True from the start, while loading too, until the engine fails or stops.
    pub(crate) fn is_alive(&self) -> bool {
        *self.alive.borrow()
    }

    /// Until the thread has ended.
    #[cfg(test)]
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
/// no engine. With `audit`, every invariant is checked whenever the engine falls idle.
///
/// # Panics
/// When the system cannot start a thread.
pub(crate) fn spawn<T, E>(
    load: impl FnOnce(&watch::Receiver<View>) -> Result<(Engine, EngineMetrics, T), E> + Send + 'static,
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
    let thread = thread::Builder::new().name("engine".into()).spawn(work);
    (handle, thread.expect("the system can start one thread"))
}

struct EngineThread {
    engine: Engine,
    metrics: EngineMetrics,
    origin: Instant,
    commands: Sender<Command>,
    view: watch::Sender<View>,
    audit: bool,
    requests: BTreeMap<RequestId, Live>,
    jobs: BTreeMap<u64, Open>,
    ids: u64,
    published: Instant,
    rates: Rates,
    speed: Option<Speedometer>,
}

/// One request in the engine.
struct Live {
    job: u64,
    choice: u32,
    timeline: Timeline,
}

/// One job in the engine: where its parts go, and those of the step under way.
struct Open {
    name: String,
    sender: mpsc::Sender<Vec<Part>>,
    ids: Vec<RequestId>,
    parts: Vec<Part>,
    unfinished: usize,
    longest: u32,
}

impl EngineThread {
    fn new(
        mut engine: Engine,
        metrics: EngineMetrics,
        origin: Instant,
        commands: Sender<Command>,
        view: watch::Sender<View>,
        audit: bool,
    ) -> Self {
        let speed = Speedometer::new(&mut engine);
        Self {
            engine,
            metrics,
            origin,
            commands,
            view,
            audit,
            requests: BTreeMap::new(),
            jobs: BTreeMap::new(),
            ids: 0,
            published: origin,
            rates: Rates::default(),
            speed,
        }
    }

    fn run(&mut self, commands: &Receiver<Command>) {
        let mut outputs = Vec::new();
        loop {
            if !self.engine.can_step() {
                self.publish();
                if !self.engine.has_work() {
                    self.audit();
                }
                match commands.recv() {
                    Ok(Command::Stop) | Err(_) => return,
                    Ok(command) => self.obey(command),
                }
            }
            while let Ok(command) = commands.try_recv() {
                match command {
                    Command::Stop => return,
                    command => self.obey(command),
                }
            }
            if self.engine.can_step() {
                self.step(&mut outputs);
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { job, reply } => {
                let was_idle = !self.engine.has_work();
                let answer = self.submit(job);
                if was_idle {
                    self.publish();
                }
                // A reply that nobody awaits any more drops its ticket, which cancels.
                let _ = reply.send(answer);
            }
            Command::Cancel(ids) => ids.into_iter().for_each(|id| self.cancel(id)),
            Command::Begin { ids, grammar } => {
                for id in ids {
                    let begun = self.engine.set_grammar(id, &grammar);
                    begun.expect("a grammar of the server is of the server's model");
                }
            }
            Command::Withdraw(ids) => ids.into_iter().for_each(|id| self.withdraw(id)),
            Command::Explain { name, reply } => {
                let _ = reply.send(self.explain(&name));
            }
            Command::ResetPrefixCache(reply) => {
                let done = self.engine.reset_prefix_cache();
                self.publish();
                let _ = reply.send(done);
            }
            Command::Stop => unreachable!("the loop ends before"),
        }
    }

    fn submit(&mut self, job: Job) -> Result<Ticket, Refusal> {
        let key = self.ids;
        let now = Instant::now();
        let mut ids = Vec::with_capacity(job.prompts.len());
        for (choice, (prompt, sampling)) in job.prompts.iter().enumerate() {
            let id = RequestId(self.ids);
            let first = choice - choice % job.n.max(1) as usize;
            // A search answers under the ids of all its choices, which follow each other.
            let others = || (1..u64::from(job.n)).map(|place| RequestId(id.0 + place)).collect();
            let search = |length_penalty| Beams { others: others(), length_penalty };
            let request = Request {
                sampling: sampling.clone(),
                grammar: match &job.grammar {
                    Wait::Ready(grammar) => Some(grammar.clone()),
                    Wait::Free | Wait::Compiling => None,
                },
                priority: job.priority,
                cache_salt: job.cache_salt.clone(),
                sample_of: ids.get(first).copied(),
                beams: job.beams.map(search),
                arrival: tick(self.origin, now),
                ..Request::new(id, Arc::clone(prompt))
            };
            let is_part = job.beams.is_some() && choice > first;
            let added = match job.grammar {
                _ if is_part => Ok(()),
                Wait::Compiling => self.engine.add_before_grammar(request),
                Wait::Free | Wait::Ready(_) => self.engine.add(request),
            };
            if let Err(refusal) = added {
                for id in ids {
                    self.engine.cancel(id);
                }
                if refusal.is_temporary() {
                    self.metrics.refused();
                }
                return Err(refusal);
            }
            self.ids += 1;
            ids.push(id);
        }
        Ok(self.open(key, job, ids))
    }

    fn open(&mut self, key: u64, job: Job, ids: Vec<RequestId>) -> Ticket {
        let (sender, parts) = mpsc::channel(STEPS_UNREAD_MAX);
        for ((choice, id), (prompt, sampling)) in (0..).zip(&ids).zip(&job.prompts) {
            let timeline = Timeline {
                arrived: job.arrived,
                started: None,
                first: None,
                last: job.arrived,
                prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                cached_tokens: 0,
                loaded_tokens: 0,
                preemptions: 0,
                output_tokens: 0,
                max_tokens: sampling.max_tokens,
                n: job.n,
            };
            self.requests.insert(*id, Live { job: key, choice, timeline });
        }
        let unfinished = ids.len();
        let open =
            Open { name: job.name, sender, ids: ids.clone(), parts: Vec::new(), unfinished, longest: 0 };
        self.jobs.insert(key, open);
        Ticket { parts, ids, unfinished, commands: self.commands.clone() }
    }

    fn explain(&self, name: &str) -> Vec<(u32, RequestState)> {
        let ids = self.jobs.values().filter(|open| open.name == name).flat_map(|open| &open.ids);
        let state = |id: &RequestId| Some((self.requests.get(id)?.choice, self.engine.request(*id)?));
        ids.filter_map(state).collect()
    }

    fn cancel(&mut self, id: RequestId) {
        let Some(mut live) = self.requests.remove(&id) else { return };
        self.engine.cancel(id);
        live.timeline.last = Instant::now();
        self.metrics.ended(&live.timeline, None);
        self.close_choice(live.job, live.timeline.output_tokens);
    }

    fn withdraw(&mut self, id: RequestId) {
        let Some(live) = self.requests.remove(&id) else { return };
        self.engine.cancel(id);
        let Some(open) = self.jobs.get_mut(&live.job) else { return };
        open.unfinished -= 1;
        if open.unfinished == 0 {
            self.jobs.remove(&live.job);
        }
    }

    /// One choice of a job has ended; with the last one, the job.
    fn close_choice(&mut self, job: u64, output_tokens: u32) {
        let Some(open) = self.jobs.get_mut(&job) else { return };
        open.unfinished -= 1;
        open.longest = open.longest.max(output_tokens);
        if open.unfinished == 0 {
            self.metrics.job_ended(open.longest);
            self.jobs.remove(&job);
        }
    }

    fn step(&mut self, outputs: &mut Vec<Output>) {
        let begun = Instant::now();
        let tokens = self.engine.step(tick(self.origin, begun), outputs);
        let now = Instant::now();
        if tokens > 0 {
            self.metrics.step(tokens);
            if let Some(speed) = &mut self.speed {
                speed.note(&mut self.engine, now - begun);
            }
        }
        let mut touched = Vec::new();
        for output in outputs.drain(..) {
            touched.extend(self.note(output, now));
        }
        touched.dedup();
        touched.into_iter().for_each(|job| self.send(job));
        if now - self.published >= SNAPSHOT_EVERY {
            self.publish();
        }
    }

    /// Files an output with its job, which it returns.
    fn note(&mut self, output: Output, now: Instant) -> Option<u64> {
        let live = self.requests.get_mut(&output.id)?;
        let (job, choice) = (live.job, live.choice);
        live.timeline.cached_tokens = output.cached_tokens;
        live.timeline.loaded_tokens = output.loaded_tokens;
        live.timeline.preemptions = output.preemptions;
        live.timeline.started = output.started.map(|at| self.origin + Duration::from_micros(at.0));
        if !output.tokens.is_empty() {
            let count = u32::try_from(output.tokens.len()).unwrap_or(u32::MAX);
            self.metrics.tokens(&live.timeline, now, count);
            live.timeline.first.get_or_insert(now);
        }
        live.timeline.last = now;
        live.timeline.output_tokens = output.output_tokens;
        let (id, finish, output_tokens) = (output.id, output.finish.clone(), output.output_tokens);
        self.jobs.get_mut(&job)?.parts.push(Part { choice, output });
        if let Some(finish) = finish {
            self.metrics.ended(&live.timeline, Some(finish.reason));
            self.requests.remove(&id);
            if let Some(open) = self.jobs.get_mut(&job) {
                open.unfinished -= 1;
                open.longest = open.longest.max(output_tokens);
            }
        }
        Some(job)
    }

    /// Sends what a step brought for a job. One whose client has stopped reading, or has left, is given up.
    fn send(&mut self, key: u64) {
        let Some(open) = self.jobs.get_mut(&key) else { return };
        let parts = std::mem::take(&mut open.parts);
        let sent = if parts.is_empty() { Ok(()) } else { open.sender.try_send(parts) };
        if open.unfinished == 0 {
            self.metrics.job_ended(open.longest);
            self.jobs.remove(&key);
        } else if let Err(error) = sent {
            if matches!(error, TrySendError::Full(_)) {
                tracing::warn!(job = key, "a client does not read its answer; the request is cancelled");
            }
            let ids = std::mem::take(&mut open.ids);
            ids.into_iter().for_each(|id| self.cancel(id));
        }
    }

    fn publish(&mut self) {
        let snapshot = Arc::new(self.engine.snapshot());
        let now = Instant::now();
        let totals = snapshot.totals;
        let (output, prompt) = self.rates.update(now, totals.output_tokens, totals.prompt_tokens);
        self.view.send_replace(View {
            snapshot,
            at: tick(self.origin, now),
            output_tokens_per_second: output,
            prompt_tokens_per_second: prompt,
        });
        self.published = now;
    }

    fn audit(&self) {
        if !self.audit {
            return;
        }
        assert!(self.requests.is_empty() && self.jobs.is_empty(), "an idle engine has no requests");
        let blocks = self.engine.snapshot().blocks;
        assert_eq!(blocks.used, 0, "an idle engine holds no blocks");
        let audit = self.engine.check();
        assert!(audit.is_ok(), "the engine's own audit failed: {audit:?}");
    }
}

/// Tokens per second over about the last second.
#[derive(Debug, Default)]
struct Rates {
    samples: VecDeque<(Instant, u64, u64)>,
}

impl Rates {
    fn update(&mut self, now: Instant, output: u64, prompt: u64) -> (f64, f64) {
        while self.samples.len() > 1 && now - self.samples[0].0 > Duration::from_secs(1) {
            self.samples.pop_front();
        }
        let (since, output_then, prompt_then) =
            self.samples.front().copied().unwrap_or((now, output, prompt));
        self.samples.push_back((now, output, prompt));
        let seconds = (now - since).as_secs_f64().max(SNAPSHOT_EVERY.as_secs_f64());
        let per_second = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        (per_second(output, output_then), per_second(prompt, prompt_then))
    }
}

fn tick(origin: Instant, now: Instant) -> Tick {
    Tick(u64::try_from((now - origin).as_micros()).unwrap_or(u64::MAX))
}

//! The thread itself: commands in, steps, outputs out.

mod intake;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use quayline_engine::{DeliveryError, DiskBacklog, Engine, Load, Output, Parcel, RequestId};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};

use super::job::Part;
use super::view::{Rates, SNAPSHOT_EVERY, View};
use super::{Command, Explained, tick};
use crate::kv_events::{Outlet, Teller};
use crate::metrics::{EngineMetrics, Timeline};
use crate::offloading::Speedometer;
use crate::order::Turn;

/// How often an idle engine looks whether leases are over.
const LEASES_EVERY: Duration = Duration::from_millis(200);

/// What an idle engine waited for.
enum Next {
    Command(Command),
    Time,
    /// Nobody can say anything any more.
    Nobody,
}

/// Owns the engine and all that is in it.
pub(super) struct EngineThread {
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
    /// Whose blocks other servers may fetch, by their keys.
    kept: BTreeMap<String, RequestId>,
    /// Who tells others what the cache does.
    teller: Option<Teller>,
    #[cfg(test)]
    steps_allowed: Option<u32>,
}

/// One request in the engine.
struct Live {
    job: u64,
    choice: u32,
    timeline: Timeline,
    /// Who brings its blocks from another server.
    pulls: Option<oneshot::Sender<Load>>,
}

/// One job in the engine: where its parts go, and those of the step under way.
struct Open {
    name: String,
    turn: Turn,
    sender: mpsc::Sender<Vec<Part>>,
    ids: Vec<RequestId>,
    parts: Vec<Part>,
    unfinished: usize,
    longest: u32,
}

impl EngineThread {
    pub(super) fn new(
        mut engine: Engine,
        metrics: EngineMetrics,
        origin: Instant,
        commands: Sender<Command>,
        view: watch::Sender<View>,
        audit: bool,
    ) -> Self {
        let speed = Speedometer::new(&mut engine);
        engine.time_copies(Instant::now);
        let wake = commands.clone();
        // When this thread has ended, nobody needs to know.
        engine.wake_for_disk(move || drop(wake.send(Command::DiskDone)));
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
            kept: BTreeMap::new(),
            teller: None,
            #[cfg(test)]
            steps_allowed: None,
        }
    }

    /// From now on what the cache does is told to others.
    pub(super) fn tell_to(&mut self, events: Option<Outlet>) {
        self.teller = events.and_then(|outlet| outlet.of(&self.engine));
        self.tell();
    }

    fn tell(&mut self) {
        if let Some(teller) = &mut self.teller {
            teller.tell(&mut self.engine);
        }
    }

    /// Until somebody says stop, or nobody can say anything any more.
    pub(super) fn run(&mut self, commands: &Receiver<Command>) {
        let mut outputs = Vec::new();
        loop {
            if !self.can_step() {
                self.publish();
                if !self.engine.has_work() {
                    self.audit();
                }
                match self.next_command(commands) {
                    Next::Command(Command::Stop { by }) => return self.flush(commands, by),
                    Next::Nobody => return,
                    Next::Command(command) => self.obey(command),
                    // A step without work looks at the time: leases may be over, and requests due.
                    Next::Time => self.step(&mut outputs),
                }
            }
            while let Ok(command) = commands.try_recv() {
                match command {
                    Command::Stop { by } => return self.flush(commands, by),
                    command => self.obey(command),
                }
            }
            if self.can_step() {
                self.step(&mut outputs);
            }
            self.tell();
        }
    }

    /// Writes to the disk what host memory has for it, until `by` at most.
    fn flush(&mut self, commands: &Receiver<Command>, mut by: Instant) {
        loop {
            let DiskBacklog { due_blocks, writing_blocks } = self.engine.flush_to_disk();
            if due_blocks + writing_blocks == 0 {
                return;
            }
            let left = by.saturating_duration_since(Instant::now());
            if writing_blocks == 0 || left.is_zero() {
                tracing::warn!(due_blocks, writing_blocks, "blocks of host memory do not get to the disk");
                return;
            }
            match commands.recv_timeout(left) {
                Ok(Command::Stop { by: earlier }) => by = by.min(earlier),
                // Whoever asks something hears from the closed channel that there is no engine any more.
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Waits for a command; not for ever while blocks are kept for other servers, or a request waits for the disk.
    fn next_command(&mut self, commands: &Receiver<Command>) -> Next {
        self.kept.retain(|_, id| self.requests.contains_key(id) || self.engine.is_handing_over(*id));
        let lease = (!self.kept.is_empty()).then_some(LEASES_EVERY);
        let now = tick(self.origin, Instant::now());
        let due = self.engine.steps_at().map(|at| Duration::from_micros(at.0.saturating_sub(now.0)));
        let Some(patience) = lease.into_iter().chain(due).min() else {
            return commands.recv().map_or(Next::Nobody, Next::Command);
        };
        match commands.recv_timeout(patience) {
            Ok(command) => Next::Command(command),
            Err(RecvTimeoutError::Timeout) => Next::Time,
            Err(RecvTimeoutError::Disconnected) => Next::Nobody,
        }
    }

    fn can_step(&self) -> bool {
        #[cfg(test)]
        if self.steps_allowed == Some(0) {
            return false;
        }
        self.engine.can_step()
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit { job, reply } => {
                let was_idle = !self.engine.has_work();
                let answer = self.submit(*job);
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
            Command::Fetch { key, start, tokens, reply } => {
                let id = self.kept.get(&key);
                let _ = reply.send(id.and_then(|&id| self.engine.fetch(id, start, tokens)));
            }
            Command::Kept { key, reply } => {
                let _ = reply.send(self.kept.get(&key).and_then(|&id| self.engine.handed_blocks(id)));
            }
            Command::Release { key, reply } => {
                let id = self.kept.remove(&key);
                let released = id.is_some_and(|id| self.engine.handed_over(id));
                self.publish();
                let _ = reply.send(released);
            }
            Command::Deliver { id, parcel } => self.deliver(id, parcel),
            Command::DiskDone => self.engine.take_in_disk(),
            #[cfg(test)]
            Command::Allow(steps) => self.steps_allowed = steps,
            Command::Stop { .. } => unreachable!("the loop ends before"),
        }
    }

    /// Blocks came from another server, or will not come.
    fn deliver(&mut self, id: RequestId, parcel: Option<Parcel>) {
        let taken = parcel.map(|parcel| self.engine.deliver(id, &parcel));
        match taken {
            Some(Ok(())) | Some(Err(DeliveryError::NotAwaited(_))) => {}
            Some(Err(error)) => {
                tracing::warn!(%error, "blocks of another server do not fit");
                self.go_without(id);
            }
            None => self.go_without(id),
        }
    }

    fn go_without(&mut self, id: RequestId) {
        let mut outputs = Vec::new();
        // One that was cancelled meanwhile goes on nowhere.
        let _ = self.engine.not_delivered(id, &mut outputs);
        let now = Instant::now();
        for output in outputs {
            self.note(output, now).into_iter().for_each(|job| self.send(job));
        }
    }

    fn explain(&self, name: &str) -> Vec<Explained> {
        let open = self.jobs.values().filter(|open| open.name == name);
        let ids = open.flat_map(|open| open.ids.iter().map(move |id| (id, &open.turn)));
        let state = |(id, turn): (&RequestId, &Turn)| {
            Some(Explained {
                choice: self.requests.get(id)?.choice,
                state: self.engine.request(*id)?,
                turn: turn.clone(),
                served: self.engine.served(turn.tenant_id()),
            })
        };
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
        #[cfg(test)]
        if let Some(left) = &mut self.steps_allowed {
            *left -= 1;
        }
        let begun = Instant::now();
        let tokens = self.engine.step(tick(self.origin, begun), outputs);
        let now = Instant::now();
        if tokens > 0 {
            self.metrics.step(tokens);
            if let Some(speed) = &mut self.speed {
                speed.note(&mut self.engine, now - begun);
            }
        }
        for load in self.engine.loads() {
            let pulls = self.requests.get_mut(&load.id).and_then(|live| live.pulls.take());
            if pulls.is_none_or(|pulls| pulls.send(load).is_err()) {
                self.go_without(load.id);
            }
        }
        if let Some(error) = self.engine.failure()
            && !outputs.is_empty()
        {
            tracing::error!(%error, "the machine failed: who was here ended with an error");
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

    pub(super) fn publish(&mut self) {
        self.engine.drain_residency().for_each(|residency| self.metrics.block_lost(&residency));
        self.engine.drain_copies().for_each(|copied| self.metrics.copied(&copied));
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
        assert!(
            blocks.used == 0 || !self.kept.is_empty(),
            "an idle engine holds blocks for other servers only"
        );
        let audit = self.engine.check();
        assert!(audit.is_ok(), "the engine's own audit failed: {audit:?}");
    }
}

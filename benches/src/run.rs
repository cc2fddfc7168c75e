//! Who sends when: a closed loop of workers, or arrivals that wait for nobody.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::client::{Answer, Client, Failure, Outcome, Target};
use crate::machine::own_cpu_seconds;
use crate::random::Random;
use crate::workload::{Source, Workload};

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// So many workers, each sending its next request when the one before has ended.
    Closed {
        /// The workers.
        workers: usize,
    },
    /// As a Poisson process.
    Poisson {
        /// Mean arrivals per second.
        per_second: f64,
        /// Requests in flight at most; an arrival beyond waits, and its wait is reported as lag.
        in_flight_max: usize,
    },
    /// When the trace says.
    Recorded {
        /// The trace is played so many times faster.
        speedup: f64,
        /// As for [`Pace::Poisson`].
        in_flight_max: usize,
    },
}

/// Limits of a run; the first one reached ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Requests sent.
    pub requests: u64,
    /// Time from the first request. What is in flight then is cut off.
    pub duration: Duration,
    /// Time for one request.
    pub request: Duration,
}

/// Everything measured in a run.
#[derive(Debug, Default)]
pub struct Measurement {
    /// Answers in the order in which they ended.
    pub answers: Vec<Answer>,
    /// Microseconds between pieces of text, of all streams.
    pub gaps: Vec<u32>,
    /// Seconds by which requests were sent later than they arrived.
    pub lags: Vec<f64>,
    /// Requests that failed, by kind.
    pub failures: BTreeMap<Failure, u64>,
    /// Wrong requests refused as they should.
    pub refused: u64,
    /// Requests that the client left on purpose.
    pub left: u64,
    /// From the first request sent to the last end.
    pub wall: Duration,
    /// CPU seconds of this process over that time.
    pub client_cpu_seconds: Option<f64>,
}

impl Measurement {
    fn take(&mut self, result: Result<Outcome, Failure>, gaps: &[u32]) {
        match result {
            Ok(Outcome::Answered(answer)) => {
                self.answers.push(answer);
                self.gaps.extend_from_slice(gaps);
            }
            Ok(Outcome::Refused) => self.refused += 1,
            Ok(Outcome::Left) => self.left += 1,
            Err(failure) => *self.failures.entry(failure).or_default() += 1,
        }
    }

    /// How many requests ended as they should not have.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

/// Sends requests `first_index..` of `workload` to `target` at `pace` within `bounds`.
/// Must run inside a [`tokio::task::LocalSet`]: one thread does it all, so that the client's cost stays small
/// and is measured whole.
pub async fn run(
    target: &Target,
    workload: Workload,
    first_index: u64,
    pace: Pace,
    bounds: Bounds,
) -> Measurement {
    let shared = Rc::new(Shared {
        target: target.clone(),
        workload,
        first_index,
        bounds,
        start: Instant::now(),
        next: Cell::new(0),
        measurement: RefCell::default(),
        idle: RefCell::default(),
    });
    let cpu_before = own_cpu_seconds();
    match pace {
        Pace::Closed { workers } => closed(&shared, workers).await,
        Pace::Poisson { per_second, in_flight_max } => {
            let mut random = Random::new(shared.workload.seed, 0);
            let mut at = 0.0;
            open(&shared, in_flight_max, |_| {
                let now = at;
                at += random.exponential() / per_second;
                Some(Duration::from_secs_f64(now))
            })
            .await;
        }
        Pace::Recorded { speedup, in_flight_max } => {
            open(&shared, in_flight_max, |index| recorded(&shared.workload.source, index, speedup)).await;
        }
    }
    let mut measurement = shared.measurement.take();
    measurement.wall = shared.start.elapsed();
    measurement.client_cpu_seconds = own_cpu_seconds().zip(cpu_before).map(|(after, before)| after - before);
    measurement
}

/// When request `index` of a recorded source arrives; `None` after its end.
fn recorded(source: &Source, index: u64, speedup: f64) -> Option<Duration> {
    let Source::Trace { arrivals, .. } = source else { return None };
    Some(arrivals.get(usize::try_from(index).ok()?)?.at.div_f64(speedup))
}

struct Shared {
    target: Target,
    workload: Workload,
    first_index: u64,
    bounds: Bounds,
    start: Instant,
    next: Cell<u64>,
    measurement: RefCell<Measurement>,
    idle: RefCell<Vec<Client>>,
}

impl Shared {
    /// The next request's number, while the bounds allow one.
    fn next(&self) -> Option<u64> {
        let index = self.next.get();
        let allowed = index < self.bounds.requests && self.start.elapsed() < self.bounds.duration;
        allowed.then(|| {
            self.next.set(index + 1);
            index
        })
    }

    async fn one(&self, client: &mut Client, index: u64, gaps: &mut Vec<u32>) {
        let work = self.workload.request(self.first_index + index);
        let left = self.bounds.duration.saturating_sub(self.start.elapsed());
        gaps.clear();
        let result = client.send(work, self.bounds.request.min(left), gaps).await;
        let result = match result {
            Err(Failure::Timeout) if left < self.bounds.request => Err(Failure::CutOff),
            other => other,
        };
        self.measurement.borrow_mut().take(result, gaps);
    }
}

async fn closed(shared: &Rc<Shared>, workers: usize) {
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let shared = Rc::clone(shared);
        running.spawn_local(async move {
            let mut client = Client::new(shared.target.clone());
            let mut gaps = Vec::new();
            while let Some(index) = shared.next() {
                shared.one(&mut client, index, &mut gaps).await;
            }
        });
    }
    running.join_all().await;
}

async fn open(shared: &Rc<Shared>, in_flight_max: usize, mut arrival: impl FnMut(u64) -> Option<Duration>) {
    let mut running = JoinSet::new();
    while let Some(index) = shared.next() {
        let Some(at) = arrival(index).filter(|&at| at < shared.bounds.duration) else { break };
        tokio::time::sleep_until((shared.start + at).into()).await;
        while running.try_join_next().is_some() {}
        while running.len() >= in_flight_max.max(1) {
            running.join_next().await;
        }
        let lag = shared.start.elapsed().saturating_sub(at).as_secs_f64();
        shared.measurement.borrow_mut().lags.push(lag);
        let shared = Rc::clone(shared);
        running.spawn_local(async move {
            let kept = shared.idle.borrow_mut().pop();
            let mut client = kept.unwrap_or_else(|| Client::new(shared.target.clone()));
            shared.one(&mut client, index, &mut Vec::new()).await;
            shared.idle.borrow_mut().push(client);
        });
    }
    running.join_all().await;
}

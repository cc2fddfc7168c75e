//! Threads that share a region of tasks.
//!
//! A decode step of a small model is dozens of regions of some ten microseconds each, so what counts is the time to
//! start and to end one. The caller works too. Tasks are handed out one by one off a counter, so a thread that the
//! machine holds up takes fewer. A worker that has not arrived by the time the tasks are gone is not waited for. Idle
//! workers spin for a moment, then sleep.

use std::cell::UnsafeCell;
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::scratch::Scratch;
use crate::Error;

/// How long an idle worker looks for work before it sleeps. Longer than what lies between the regions of a step.
const SPIN: Duration = Duration::from_micros(100);

/// The work of one task: its number, and the scratch memory of the thread that runs it.
type Task<'a> = dyn Fn(usize, &mut Scratch) + Sync + 'a;

/// A task, and those before and after it on the same thread.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub(crate) index: usize,
    /// The thread had none before.
    pub(crate) first: bool,
    pub(crate) next: Option<usize>,
}

/// The caller's thread and its helpers: the threads of a [`Cpu`](crate::Cpu), or some for other work.
pub struct Workers {
    shared: Arc<Shared>,
    helpers: Vec<Thread>,
    joins: Vec<JoinHandle<()>>,
    /// Scratch of the calling thread; holding it is the right to open a region.
    caller: Mutex<Scratch>,
}

struct Shared {
    /// `region number << 32 | OPEN | helpers inside`.
    state: AtomicU64,
    /// Written only while the region is closed and nobody is inside.
    region: UnsafeCell<Option<Region>>,
    next: AtomicUsize,
    panicked: AtomicBool,
    sleeping: Vec<AtomicBool>,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct Region {
    task: *const Task<'static>,
    tasks: usize,
}

// SAFETY: `region` is written by the one caller while nobody else may look (see `state`), and what it points
// to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 32;

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workers({})", self.threads())
    }
}

impl Workers {
    /// So many threads, the caller's included; `None`: as many as the process may use. They sleep while there is
    /// nothing to do.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(threads: Option<NonZeroUsize>) -> Result<Self, Error> {
        let threads = threads.or_else(|| thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
        let helpers = threads.get() - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            region: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            sleeping: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut workers =
            Self { shared, helpers: Vec::new(), joins: Vec::new(), caller: Mutex::new(Scratch::default()) };
        for worker in 0..helpers {
            let shared = Arc::clone(&workers.shared);
            let join = thread::Builder::new()
                .name(format!("quayline-{}", worker + 1))
                .spawn(move || shared.work(worker))
                .map_err(|error| Error::Threads { worker, workers: helpers, reason: error.to_string() })?;
            workers.helpers.push(join.thread().clone());
            workers.joins.push(join);
        }
        Ok(workers)
    }

    /// Threads that share the work, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `task(0)`, …, `task(tasks - 1)`, each once, on any thread, and returns when all are done.
    pub(crate) fn run(&self, tasks: usize, task: &Task<'_>) {
        let mut scratch = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks <= 1 || self.helpers.is_empty() {
            (0..tasks).for_each(|index| task(index, &mut scratch));
            return;
        }
        let region = self.open(tasks, task, &scratch);
        self.shared.take_tasks(Region { task: erase(task), tasks }, &mut scratch);
        drop(region);
        assert!(!self.shared.panicked.swap(false, Ordering::Relaxed), "a task of a parallel region panicked");
    }

    /// The same, of which every thread claims its next task before it begins one.
    pub(crate) fn run_in_sight(&self, tasks: usize, task: &(dyn Fn(Turn, &mut Scratch) + Sync)) {
        let claims = AtomicUsize::new(0);
        let claim = || Some(claims.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < tasks);
        self.run(self.threads().min(tasks), &|_, scratch| {
            let (mut now, mut first) = (claim(), true);
            while let Some(index) = now {
                let next = claim();
                task(Turn { index, first, next }, scratch);
                (now, first) = (next, false);
            }
        });
    }

    /// Runs `each` on every item, on all threads: each with one of the `states`, of which there will be one for each
    /// thread. Returns when all are done. Cost: about a microsecond where threads have just worked, and the time that
    /// the system takes to wake them where they sleep.
    ///
    /// # Panics
    /// When `each` does.
    pub fn each<T: Send, S: Default + Send>(
        &self,
        items: &mut [T],
        states: &mut Vec<S>,
        each: impl Fn(&mut T, &mut S) + Sync,
    ) {
        let threads = self.threads().min(items.len());
        states.resize_with(states.len().max(self.threads()), S::default);
        let states: Vec<_> = states.iter_mut().map(Mutex::new).collect();
        let items: Vec<_> = items.iter_mut().map(Mutex::new).collect();
        let next = AtomicUsize::new(0);
        let claim = || items.get(next.fetch_add(1, Ordering::Relaxed));
        self.run(threads, &|thread, _| {
            let mut state = states[thread].lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(item) = claim() {
                each(&mut item.lock().unwrap_or_else(PoisonError::into_inner), &mut state);
            }
        });
    }

    /// Runs `piece(from, to)` over all of `rows`, in pieces worth handing out when a row is `cols` cheap elements.
    pub(crate) fn rows(&self, rows: usize, cols: usize, piece: &(dyn Fn(usize, usize) + Sync)) {
        /// Below this a piece takes less time than waking somebody for it.
        const ELEMENTS_MIN: usize = 8192;
        let step = rows.div_ceil(4 * self.threads()).max(ELEMENTS_MIN.div_ceil(cols.max(1)));
        if step >= rows {
            return piece(0, rows);
        }
        self.run(rows.div_ceil(step), &|index, _| piece(index * step, ((index + 1) * step).min(rows)));
    }

    /// Makes a region visible and wakes who sleeps. Dropping the answer closes it and waits for those inside.
    fn open(&self, tasks: usize, task: &Task<'_>, _right: &MutexGuard<'_, Scratch>) -> Closing<'_> {
        let shared = &*self.shared;
        // SAFETY: we hold the right to open, and the last region was closed with nobody inside.
        unsafe { *shared.region.get() = Some(Region { task: erase(task), tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        shared.panicked.store(false, Ordering::Relaxed);
        let number = shared.state.load(Ordering::Relaxed) & !(NUMBER - 1);
        shared.state.store(number.wrapping_add(NUMBER) | OPEN, Ordering::SeqCst);
        for (helper, sleeping) in self.helpers.iter().zip(&shared.sleeping).take(tasks - 1) {
            if sleeping.load(Ordering::SeqCst) {
                helper.unpark();
            }
        }
        Closing(shared)
    }
}

/// Forgets how long a task lives; [`Closing`] keeps the promise that nobody uses it for longer.
fn erase(task: &Task<'_>) -> *const Task<'static> {
    let task: *const Task<'_> = task;
    // SAFETY: only the lifetime changes.
    unsafe { std::mem::transmute(task) }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.helpers.iter().for_each(Thread::unpark);
        for join in self.joins.drain(..) {
            // A helper catches the panics of tasks, so it ends well; there is nothing to add if not.
            let _ = join.join();
        }
    }
}

/// Ends a region on every way out of it.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let state = &self.0.state;
        let mut inside = state.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE;
        let mut turns = 0_u32;
        while inside > 0 {
            turns += 1;
            // Soon we may be waiting for a thread that the machine has taken off the core we spin on.
            if turns.is_multiple_of(256) {
                thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            inside = state.load(Ordering::Acquire) & INSIDE;
        }
    }
}

impl Shared {
    fn take_tasks(&self, region: Region, scratch: &mut Scratch) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= region.tasks {
                return;
            }
            // SAFETY: the region stays open, and its task alive, while any thread is inside.
            let task = unsafe { &*region.task };
            task(index, scratch);
        }
    }

    /// The life of a helper.
    fn work(&self, me: usize) {
        let mut scratch = Scratch::default();
        let mut seen = 0;
        while let Some(number) = self.wait_for_region(me, seen) {
            seen = number;
            if self.enter(number) {
                // SAFETY: we are inside an open region, so nobody writes it.
                let region = unsafe { *self.region.get() };
                let region = region.expect("an open region has been written");
                if catch_unwind(AssertUnwindSafe(|| self.take_tasks(region, &mut scratch))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// The number of an open region that is not `seen`; `None` when the workers are to stop.
    fn wait_for_region(&self, me: usize, seen: u64) -> Option<u64> {
        let fresh = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & OPEN != 0 && state / NUMBER != seen).then_some(state / NUMBER)
        };
        let idle_since = Instant::now();
        while idle_since.elapsed() < SPIN {
            for _ in 0..32 {
                if let Some(number) = fresh() {
                    return Some(number);
                }
                std::hint::spin_loop();
            }
        }
        self.sleeping[me].store(true, Ordering::SeqCst);
        // Whoever opened a region before seeing that we sleep is seen here; whoever opens later wakes us.
        let found = loop {
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            if let Some(number) = fresh() {
                break number;
            }
            thread::park();
        };
        self.sleeping[me].store(false, Ordering::SeqCst);
        Some(found)
    }

    /// Counts this thread in, unless the region has closed meanwhile.
    fn enter(&self, number: u64) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        while state & OPEN != 0 && state / NUMBER == number {
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(threads: usize) -> Workers {
        Workers::new(NonZeroUsize::new(threads)).unwrap()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            let workers = workers(threads);
            for tasks in [0, 1, 2, 3, 17, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                workers.run(tasks, &|index, _| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn each_item_is_seen_once_with_a_state_of_its_thread() {
        let workers = workers(3);
        let mut states: Vec<usize> = Vec::new();
        for count in [0, 1, 2, 3, 100] {
            let mut items: Vec<usize> = (0..count).collect();
            states.clear();
            workers.each(&mut items, &mut states, |item, seen| {
                *item += 1;
                *seen += 1;
            });
            assert!(items.into_iter().eq(1..=count));
            assert_eq!((states.len(), states.iter().sum::<usize>()), (3, count));
        }
    }

    #[test]
    fn regions_follow_each_other_without_mixing() {
        let workers = workers(3);
        for round in 0..20_000_usize {
            let sum = AtomicUsize::new(0);
            workers.run(4, &|index, _| {
                sum.fetch_add(round + index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4 * round + 6);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_workers_live_on() {
        let workers = workers(2);
        let boom = catch_unwind(AssertUnwindSafe(|| {
            workers.run(64, &|index, _| assert!(index != 40, "boom"));
        }));
        assert!(boom.is_err());
        let count = AtomicUsize::new(0);
        workers.run(64, &|_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 64);
    }

    #[test]
    fn threads_may_share_the_workers() {
        let workers = workers(2);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let count = AtomicUsize::new(0);
                        workers.run(8, &|_, _| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                        assert_eq!(count.into_inner(), 8);
                    }
                });
            }
        });
    }
}

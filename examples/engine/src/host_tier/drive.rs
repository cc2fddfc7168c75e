//! The thread that reads and writes the file, so that no step waits for a disk: tasks go in, what came of them comes
//! out.
//!
//! A request may wait for what is read, and nobody for what is written: reads overtake writes, block by block. Neither
//! touches a slot that another is at work on, the tiers see to that.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use quayline_kv_cache::tier::JobId;

use crate::block_file::{BlockFile, Key};

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Drive {
    /// None when no more tasks will come.
    tasks: Option<Sender<Task>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<Worker>>,
    under_way: u32,
}

/// What is to be done. Slots are those of the file.
pub(super) enum Task {
    Read {
        job: JobId,
        blocks: Vec<(u32, Key)>,
    },
    Write {
        job: JobId,
        blocks: Vec<(u32, Key, Arc<[u8]>)>,
    },
    Clear,
    /// Whom to call, from now on, when something is done.
    Wake(Box<dyn Fn() + Send>),
}

/// What came of a task.
#[derive(Debug)]
pub(super) enum Done {
    /// Block by block; none where the file does not have what it should.
    Read {
        job: JobId,
        blocks: Vec<Option<Arc<[u8]>>>,
    },
    /// The first so many of these blocks; the next one could not be written.
    Written {
        job: JobId,
        written: u32,
        blocks: u32,
    },
    Cleared {
        well: bool,
    },
}

/// What the thread has: the file and the line of tasks.
pub(super) struct Worker {
    file: BlockFile,
    tasks: Receiver<Task>,
    done: Sender<Done>,
    wake: Box<dyn Fn() + Send>,
    reads: VecDeque<(JobId, Vec<(u32, Key)>)>,
    writes: VecDeque<Writing>,
}

/// A task behind the reads.
enum Writing {
    Blocks { job: JobId, blocks: Vec<(u32, Key, Arc<[u8]>)>, written: u32 },
    Clear,
}

impl Drive {
    /// # Panics
    /// When the system cannot start a thread.
    pub(super) fn start(file: BlockFile) -> Self {
        let (mut drive, worker) = Self::idle(file);
        let thread = Builder::new().name("kv-disk".into()).spawn(|| worker.run());
        drive.thread = Some(thread.expect("the system can start one thread"));
        drive
    }

    fn idle(file: BlockFile) -> (Self, Worker) {
        let (tasks, taken) = channel();
        let (finish, done) = channel();
        let (reads, writes, wake) = (VecDeque::new(), VecDeque::new(), Box::new(|| ()));
        let worker = Worker { file, tasks: taken, done: finish, wake, reads, writes };
        (Self { tasks: Some(tasks), done, thread: None, under_way: 0 }, worker)
    }

    pub(super) fn give(&mut self, task: Task) {
        self.under_way += u32::from(!matches!(task, Task::Wake(_)));
        self.tasks.as_ref().expect(LIVES).send(task).expect(LIVES);
    }

    /// Tasks that are not done.
    pub(super) fn under_way(&self) -> u32 {
        self.under_way
    }

    /// What has been done since this was last asked.
    pub(super) fn take_done(&mut self) -> Option<Done> {
        let done = self.done.try_recv().ok();
        self.under_way -= u32::from(done.is_some());
        done
    }

    /// Blocks until something is done; none if nothing is under way.
    pub(super) fn wait(&mut self) -> Option<Done> {
        if self.under_way == 0 {
            return None;
        }
        self.under_way -= 1;
        Some(self.done.recv().expect(LIVES))
    }

    /// What is under way is done first.
    fn stop(&mut self) -> Option<Worker> {
        self.tasks = None;
        self.thread.take()?.join().ok()
    }

    /// From now on somebody else works, and when it likes.
    #[cfg(test)]
    pub(super) fn by_hand(&mut self) -> Worker {
        let Worker { file, .. } = self.stop().expect(LIVES);
        let (drive, worker) = Self::idle(file);
        *self = drive;
        worker
    }
}

const LIVES: &str = "the disk's thread lives as long as its tier";

impl Drop for Drive {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Worker {
    fn run(mut self) -> Self {
        loop {
            if self.work() {
                continue;
            }
            let Ok(task) = self.tasks.recv() else { return self };
            self.line_up(task);
        }
    }

    /// Does the next piece of work: what is read for a job, or one block that is written. False if there is none.
    pub(super) fn work(&mut self) -> bool {
        while let Ok(task) = self.tasks.try_recv() {
            self.line_up(task);
        }
        if let Some((job, blocks)) = self.reads.pop_front() {
            let blocks = blocks.iter().map(|(slot, key)| self.file.read(*slot, key)).collect();
            self.finish(Done::Read { job, blocks });
            return true;
        }
        match self.writes.pop_front() {
            None => return false,
            Some(Writing::Clear) => {
                let well = self.file.clear().is_ok();
                self.finish(Done::Cleared { well });
            }
            Some(Writing::Blocks { job, blocks, written }) => self.write(job, blocks, written),
        }
        true
    }

    fn line_up(&mut self, task: Task) {
        match task {
            Task::Read { job, blocks } => self.reads.push_back((job, blocks)),
            Task::Write { job, blocks } => {
                self.writes.push_back(Writing::Blocks { job, blocks, written: 0 });
            }
            Task::Clear => self.writes.push_back(Writing::Clear),
            Task::Wake(wake) => self.wake = wake,
        }
    }

    /// Writes the next block of a job, which ends with its last block or the first that cannot be written.
    fn write(&mut self, job: JobId, blocks: Vec<(u32, Key, Arc<[u8]>)>, written: u32) {
        let next = blocks.get(written as usize);
        let went_well = next.is_some_and(|(slot, key, bytes)| self.file.write(*slot, key, bytes).is_ok());
        let written = written + u32::from(went_well);
        let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
        if went_well && written < count {
            self.writes.push_front(Writing::Blocks { job, blocks, written });
        } else {
            // Whoever hears of it may overwrite the bytes.
            drop(blocks);
            self.finish(Done::Written { job, written, blocks: count });
        }
    }

    fn finish(&mut self, done: Done) {
        // Nobody hears it when the tier is being dropped.
        let _ = self.done.send(done);
        (self.wake)();
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, reads, writes, .. } = self;
        let (reads, writes) = (reads.len(), writes.len());
        f.debug_struct("Worker").field("file", file).field("reads", &reads).field("writes", &writes).finish()
    }
}

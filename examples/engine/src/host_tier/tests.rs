//! The disk works when the test says so: what the engine does meanwhile, and what of it when the disk is late.

use std::fs;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::mpsc::channel;

use super::drive::Worker;
use super::moves::{Move, runs};
use crate::block_file::HEADER;
use crate::{
    DiskBacklog, DiskUse, Engine, KvSize, ModelFiles, Offloading, OffloadingDisk, Options, Output, Request,
    RequestId, Sampling, Targets, Tick,
};

/// K and V of a block of 8 tokens of the bundled model: 6 layers, 2 heads of 32 numbers of 2 bytes.
const BLOCK_BYTES: u64 = 8 * 6 * 2 * 2 * 32 * 2;

/// A directory of its own for each test, gone when the test is over.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quayline-disk-{}-{name}", std::process::id()));
        let _absent = fs::remove_dir_all(&path);
        Self(path)
    }

    /// Room for 16 blocks on the device, 12 in host memory, 100 in the file.
    fn engine(&self) -> Engine {
        let options = Options {
            block_size: NonZeroU32::new(8).unwrap(),
            kv: KvSize::Blocks(16),
            offloading: Some(Offloading::new(12 * BLOCK_BYTES)),
            offloading_disk: Some(OffloadingDisk {
                directory: self.0.clone(),
                bytes: 100 * (BLOCK_BYTES + HEADER as u64),
            }),
            ..Options::default()
        };
        Engine::load(&ModelFiles::bundled(), &options).unwrap()
    }

    /// An engine whose disk works by hand, and has prompt 1.
    fn engine_and_worker(&self) -> (Engine, Worker) {
        let mut before = self.engine();
        before.add(prompt(1, 1)).unwrap();
        while before.has_work() {
            step(&mut before);
        }
        // What the disk has been given, it finishes.
        drop(before);
        let mut engine = self.engine();
        let worker = engine.memory.host.as_mut().unwrap().disk.as_mut().unwrap().by_hand();
        (engine, worker)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _absent = fs::remove_dir_all(&self.0);
    }
}

/// Fifty tokens that begin like no other prompt's.
fn prompt(id: u64, begin: u32) -> Request {
    let prompt: Vec<u32> = (0..50).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect();
    let sampling = Sampling { max_tokens: Some(6), ignore_eos: true, ..Sampling::greedy() };
    Request { sampling, ..Request::new(RequestId(id), prompt) }
}

fn step(engine: &mut Engine) -> Vec<Output> {
    let mut outputs = Vec::new();
    engine.step(Tick(0), &mut outputs);
    engine.check().unwrap();
    outputs
}

/// Steps as long as a step can bring anything.
fn run(engine: &mut Engine) -> Vec<Output> {
    let mut outputs = Vec::new();
    while engine.can_step() {
        outputs.extend(step(engine));
    }
    outputs
}

/// The tokens of a request, and what of its prompt was loaded.
fn answer(outputs: &[Output], id: u64) -> (Vec<u32>, u32) {
    let mut of = outputs.iter().filter(|output| output.id == RequestId(id)).peekable();
    let loaded = of.peek().unwrap().loaded_tokens;
    (of.flat_map(|output| output.tokens.iter().map(|token| token.id)).collect(), loaded)
}

/// What an engine without any tier answers.
fn expected(begin: u32) -> Vec<u32> {
    let options =
        Options { block_size: NonZeroU32::new(8).unwrap(), kv: KvSize::Blocks(16), ..Options::default() };
    let mut engine = Engine::load(&ModelFiles::bundled(), &options).unwrap();
    engine.add(prompt(1, begin)).unwrap();
    answer(&run(&mut engine), 1).0
}

fn disk(engine: &Engine) -> DiskUse {
    engine.snapshot().disk.unwrap()
}

#[test]
fn copies_of_one_kind_go_together_as_long_as_nothing_is_written_twice() {
    let save = |block, slot| Move::Save { block, slot };
    let load = |slot, block| Move::Load { slot, block };
    let moves = [save(1, 0), save(2, 1), load(0, 5), load(1, 6), load(0, 5), save(5, 0), save(6, 0)];
    let lengths: Vec<usize> = runs(&moves).iter().map(|run| run.len()).collect();
    assert_eq!(lengths, [2, 2, 1, 1, 1]);
}

#[test]
fn a_step_does_not_wait_for_the_disk() {
    let directory = Directory::new("step");
    let (mut engine, mut worker) = directory.engine_and_worker();
    engine.add(prompt(7, 1)).unwrap();
    engine.add(prompt(8, 2)).unwrap();
    // The disk does nothing, and who does not need it is answered.
    let outputs = run(&mut engine);
    assert_eq!(answer(&outputs, 8), (expected(2), 0));
    assert!(outputs.iter().all(|output| output.id == RequestId(8)));
    assert!(engine.has_work() && !engine.can_step());
    let now = disk(&engine);
    assert!(now.pending_blocks >= 12 && now.loaded_blocks == 0, "{now:?}");
    // It reads first, and writes then.
    assert!(worker.work());
    engine.take_in_disk();
    let now = disk(&engine);
    assert_eq!((now.loaded_blocks, now.saved_blocks), (6, 0));
    assert_eq!(answer(&run(&mut engine), 7), (expected(1), 48));
    while worker.work() {
        engine.take_in_disk();
    }
    let now = disk(&engine);
    assert!(now.pending_blocks == 0 && now.saved_blocks >= 6 && now.failed_blocks == 0, "{now:?}");
}

#[test]
fn a_prompt_that_two_ask_for_is_read_once() {
    let directory = Directory::new("once");
    let (mut engine, mut worker) = directory.engine_and_worker();
    engine.add(prompt(7, 1)).unwrap();
    engine.add(prompt(8, 1)).unwrap();
    assert_eq!(run(&mut engine), []);
    assert!(worker.work() && !worker.work());
    engine.take_in_disk();
    let outputs = run(&mut engine);
    assert_eq!((answer(&outputs, 7).0, answer(&outputs, 8).0), (expected(1), expected(1)));
    assert_eq!(disk(&engine).loaded_blocks, 6);
}

#[test]
fn who_waits_for_one_that_waits_for_the_disk_needs_no_steps() {
    let directory = Directory::new("sibling");
    let (mut engine, mut worker) = directory.engine_and_worker();
    engine.add(prompt(7, 1)).unwrap();
    engine.add(Request { sample_of: Some(RequestId(7)), ..prompt(8, 1) }).unwrap();
    assert_eq!(run(&mut engine), []);
    assert!(worker.work());
    engine.take_in_disk();
    assert!(engine.can_step());
    let outputs = run(&mut engine);
    assert_eq!((answer(&outputs, 7).0, answer(&outputs, 8).0), (expected(1), expected(1)));
}

#[test]
fn blocks_that_are_being_written_keep_their_place_in_host_memory() {
    let directory = Directory::new("slow");
    let (mut engine, mut worker) = directory.engine_and_worker();
    // Room for twelve: what the disk has not written is not given up, and later prompts find no room there.
    for begin in 2..8 {
        engine.add(prompt(u64::from(begin), begin)).unwrap();
        assert_eq!(answer(&run(&mut engine), u64::from(begin)).0, expected(begin));
    }
    assert_eq!((engine.snapshot().host.unwrap().evictions, disk(&engine).saved_blocks), (0, 0));
    let pending = disk(&engine).pending_blocks;
    assert!(pending >= 6, "{pending}");
    (0..pending).for_each(|block| assert!(worker.work(), "block {block}"));
    engine.take_in_disk();
    assert_eq!(disk(&engine).saved_blocks, u64::from(pending));
    engine.add(prompt(20, 8)).unwrap();
    assert_eq!(answer(&run(&mut engine), 20).0, expected(8));
    assert!(engine.snapshot().host.unwrap().evictions > 0);
}

#[test]
fn what_is_read_for_nobody_changes_nothing_but_host_memory() {
    let directory = Directory::new("cancel");
    let (mut engine, mut worker) = directory.engine_and_worker();
    engine.add(prompt(7, 1)).unwrap();
    assert_eq!(run(&mut engine), []);
    assert!(engine.cancel(RequestId(7)));
    assert!(!engine.has_work());
    assert!(worker.work());
    engine.take_in_disk();
    engine.check().unwrap();
    engine.add(prompt(8, 1)).unwrap();
    assert_eq!(answer(&run(&mut engine), 8), (expected(1), 48), "it lies there now");
}

#[test]
fn what_is_read_after_a_reset_is_not_used() {
    let directory = Directory::new("late");
    let (mut engine, mut worker) = directory.engine_and_worker();
    engine.add(prompt(7, 1)).unwrap();
    assert_eq!(run(&mut engine), []);
    assert!(engine.reset_prefix_cache());
    while worker.work() {}
    engine.take_in_disk();
    assert_eq!(answer(&run(&mut engine), 7), (expected(1), 0));
    assert_eq!(disk(&engine).failed_blocks, 0);
}

#[test]
fn a_sequence_goes_on_from_what_was_sound() {
    let directory = Directory::new("damage");
    let (mut engine, mut worker) = directory.engine_and_worker();
    let third = 2 * (HEADER as u64 + BLOCK_BYTES);
    fs::OpenOptions::new()
        .write(true)
        .open(directory.0.join("blocks.quayline"))
        .unwrap()
        .set_len(third)
        .unwrap();
    engine.add(prompt(7, 1)).unwrap();
    assert_eq!(run(&mut engine), []);
    assert!(worker.work());
    engine.take_in_disk();
    assert_eq!(answer(&run(&mut engine), 7), (expected(1), 16));
    assert_eq!((disk(&engine).loaded_blocks, disk(&engine).failed_blocks), (2, 4));
}

#[test]
fn whoever_has_nothing_to_step_is_woken() {
    let directory = Directory::new("wake");
    drop(directory.engine_and_worker());
    let mut engine = directory.engine();
    let (sender, woken) = channel();
    engine.wake_for_disk(move || sender.send(()).unwrap());
    engine.add(prompt(7, 1)).unwrap();
    let mut outputs = Vec::new();
    while engine.has_work() {
        if !engine.can_step() {
            woken.recv().unwrap();
            engine.take_in_disk();
        }
        outputs.extend(step(&mut engine));
    }
    assert_eq!(answer(&outputs, 7), (expected(1), 48));
}

#[test]
fn who_waits_for_the_disk_computes_when_it_is_due() {
    let directory = Directory::new("due");
    let (mut engine, mut worker) = directory.engine_and_worker();
    let targets = Some(Targets { first_token_ticks: 5000, token_ticks: 1 });
    engine.add(Request { targets, arrival: Tick(10), ..prompt(7, 1) }).unwrap();
    engine.add(prompt(8, 1)).unwrap();
    assert_eq!(run(&mut engine), []);
    assert_eq!(engine.steps_at(), Some(Tick(5010)));
    let mut outputs = Vec::new();
    engine.step(Tick(5009), &mut outputs);
    assert_eq!((outputs.len(), engine.steps_at()), (0, Some(Tick(5010))));
    engine.step(Tick(5010), &mut outputs);
    assert_eq!(engine.steps_at(), None, "the other one has no targets");
    outputs.extend(run(&mut engine));
    assert_eq!(answer(&outputs, 7), (expected(1), 0));
    while worker.work() {}
    engine.take_in_disk();
    outputs.extend(run(&mut engine));
    assert_eq!(answer(&outputs, 8).0, expected(1));
    assert!(!engine.has_work());
}

#[test]
fn what_is_due_is_written_before_the_end() {
    let directory = Directory::new("flush");
    let (mut engine, mut worker) = directory.engine_and_worker();
    engine.add(prompt(7, 2)).unwrap();
    let outputs = run(&mut engine);
    assert_eq!(answer(&outputs, 7).0, expected(2));
    // The last step's blocks are not even in host memory yet.
    let backlog = engine.flush_to_disk();
    assert!(backlog.writing_blocks >= 6 && backlog.due_blocks == 0, "{backlog:?}");
    for left in (0..backlog.writing_blocks).rev() {
        assert!(worker.work(), "{left}");
    }
    assert_eq!(engine.flush_to_disk(), DiskBacklog::default());
    assert_eq!(disk(&engine).saved_blocks, u64::from(backlog.writing_blocks));
    engine.check().unwrap();
    drop((engine, worker));
    let mut engine = directory.engine();
    engine.add(prompt(7, 2)).unwrap();
    let mut outputs = Vec::new();
    while engine.has_work() {
        engine.wait_for_disk();
        outputs.extend(run(&mut engine));
    }
    assert_eq!(answer(&outputs, 7), (expected(2), 48));
}

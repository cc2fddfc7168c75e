//! While the same requests go on generating, a step and its outputs are planned and applied without one
//! allocation. This file holds a single test: the counter counts whatever happens in the process.

#![expect(unsafe_code, reason = "counting allocations takes an allocator, and that trait is unsafe")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use quayline_batching::{
    Batcher, Config, Memory, Need, Plan, Request, RequestId, Room, Sampled, StopRules, Tick, TokenId,
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `alloc`, which are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the promises of `dealloc`, and the block is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Blocks of 16 tokens without end.
struct Endless;

impl Memory for Endless {
    fn cached_tokens(&mut self, _: RequestId) -> u32 {
        0
    }
    fn allocate(&mut self, _: RequestId, need: Need) -> Room {
        Room::Granted { covered_tokens: need.held_tokens().next_multiple_of(16) }
    }
    fn withdraw(&mut self, _: RequestId) {}
    fn release(&mut self, _: RequestId) {}
}

#[test]
fn steady_steps_do_not_allocate() {
    let mut batcher = Batcher::new(Config { running_max: 64, ..Config::new(4096) }).unwrap();
    for id in 0..80 {
        let stop = StopRules { eos: Some(TokenId(2)), ..StopRules::after(2000) };
        batcher.add(Request::new(RequestId(id), 30, stop)).unwrap();
    }
    let (mut plan, mut sampled, mut finished) = (Plan::new(), Vec::with_capacity(64), Vec::new());
    let mut step = |batcher: &mut Batcher| {
        batcher.step(Tick(0), &mut Endless, &mut plan);
        sampled.clear();
        let samples = plan.scheduled.iter().filter(|scheduled| scheduled.samples);
        sampled.extend(samples.map(|scheduled| Sampled { id: scheduled.id, token: TokenId(5) }));
        batcher.apply(plan.step, &sampled, &mut Endless, &mut finished).unwrap();
        plan.tokens
    };
    step(&mut batcher);
    step(&mut batcher);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let tokens: u32 = (0..1000).map(|_| step(&mut batcher)).sum();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(tokens, 64 * 1000, "64 requests generate, 16 wait");
    assert_eq!(allocations, 0);
}

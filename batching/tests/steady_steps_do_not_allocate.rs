//! While the same requests go on generating, a step and its outputs are planned and applied without one
//! allocation. The counter counts what happens on the test's thread.

#![expect(unsafe_code, reason = "counting allocations takes an allocator, and that trait is unsafe")]
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use quayline_batching::{
    Batcher, Config, Drafts, Memory, Need, Plan, Policy, Request, RequestId, Room, Sampled, StopRules,
    TenantId, Tick, TokenId,
};

struct Counting;

thread_local! {
    /// Of this thread alone: the test harness has another, which allocates when it likes.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

/// 64 requests of eight tenants generate, 16 wait; steps and outputs until 1000 are counted.
fn allocations_in_steady_steps(config: Config, order: Policy) -> u64 {
    let name = format!("{order:?} {config:?}");
    let mut batcher = Batcher::with_order(Config { running_max: 64, ..config }, order).unwrap();
    for id in 0..80 {
        let stop = StopRules { eos: Some(TokenId(2)), ..StopRules::after(3000) };
        let request = Request { tenant: TenantId(id % 8), ..Request::new(RequestId(id), 30, stop) };
        batcher.add(request).unwrap();
    }
    let (mut plan, mut sampled, mut finished) = (Plan::new(), Vec::with_capacity(256), Vec::new());
    let mut step = |batcher: &mut Batcher| {
        batcher.step(Tick(0), &mut Endless, &mut plan);
        sampled.clear();
        for scheduled in plan.scheduled.iter().filter(|scheduled| scheduled.samples) {
            let tokens = 1 + scheduled.drafts / 2;
            sampled.extend((0..tokens).map(|_| Sampled { id: scheduled.id, token: TokenId(5) }));
        }
        batcher.apply(plan.step, &sampled, &mut Endless, &mut finished).unwrap();
        for id in 0..64 {
            batcher.propose(RequestId(id), 3);
        }
        assert!(plan.tokens >= 64, "64 requests generate");
    };
    (0..20).for_each(|_| step(&mut batcher));
    let before = ALLOCATIONS.get();
    (0..1000).for_each(|_| step(&mut batcher));
    let allocations = ALLOCATIONS.get() - before;
    assert_eq!(batcher.stats().running, 64, "{name}");
    allocations
}

#[test]
fn steady_steps_do_not_allocate() {
    let orders = [
        Policy::FirstCome,
        Policy::Priority,
        Policy::Deadline,
        Policy::ShortestJob,
        Policy::LongestPrefix { lookups_max: 8 },
        Policy::fair(),
    ];
    for order in orders {
        let allocations = allocations_in_steady_steps(Config::new(4096), order.clone());
        assert_eq!(allocations, 0, "{order:?}");
    }
    let drafts = Config { drafts: Drafts { adaptive: true, ..Drafts::up_to(3) }, ..Config::new(4096) };
    assert_eq!(allocations_in_steady_steps(drafts, Policy::FirstCome), 0, "with drafts");
}

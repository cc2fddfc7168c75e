//! What the cache allocates: at most 64 bytes a block when it is made; and nothing while sequences are opened, share,
//! grow, fork, slide their windows, go back and are closed, once their buffers have been used before.

#![expect(unsafe_code, reason = "counting allocations takes an allocator, and that trait is unsafe")]
#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Range;

use quayline_kv_cache::kind::{Recurrent, SlidingWindow};
use quayline_kv_cache::*;

struct Counting;

thread_local! {
    /// Of this thread alone: the test harness has another, which allocates when it likes.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + layout.size());
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

fn claim(cache: &mut KvCache, sequence: SequenceId, computed: u32, new_tokens: u32) {
    let claim =
        Claim { computed: TokenCount(computed), new_tokens: TokenCount(new_tokens), ..Claim::default() };
    match cache.reserve(sequence, claim).unwrap() {
        Admission::Admit(room) => drop(room.commit()),
        no => unreachable!("there is room: {no:?}"),
    }
}

/// A life of a sequence and of a fork of it, in 100 steps.
fn life(cache: &mut KvCache, round: u32) {
    let [parent, child] = [0, 1].map(|n| SequenceId(u64::from(2 * round + n)));
    let mut prompt = [0; 200];
    (100..).zip(&mut prompt[100..]).for_each(|(index, token)| *token = index * (round % 7));
    cache.open(parent, SequenceKey::default(), &prompt, Reuse::ReadWrite).unwrap();
    let hit = cache.lookup(parent).unwrap().tokens.get();
    claim(cache, parent, hit, 200 - hit);
    cache.fork(parent, child).unwrap();
    for step in 0..100 {
        for sequence in [parent, child] {
            cache.settle(sequence, TokenCount(200 + step)).unwrap();
            cache.push(sequence, &[step]).unwrap();
            claim(cache, sequence, 200 + step, 1);
        }
        cache.end_step();
    }
    cache.release(child).unwrap();
    cache.rollback(child, TokenCount(10)).unwrap();
    cache.close(child).unwrap();
    cache.close(parent).unwrap();
}

#[test]
fn a_block_costs_fifty_six_bytes() {
    const BLOCKS: u32 = 100_000;
    let config = Config::new(BlockSize::new(16).unwrap(), BlockCount(BLOCKS));
    let before = BYTES.get();
    let cache = KvCache::new(config).unwrap();
    let bytes = BYTES.get() - before;
    assert!(bytes < 56 * BLOCKS as usize + 4096, "{bytes} bytes for {BLOCKS} blocks");
    drop(cache);
}

#[test]
fn steady_calls_do_not_allocate() {
    let config = || Config::new(BlockSize::new(16).unwrap(), BlockCount(500));
    let mut hybrid = config();
    hybrid.groups.push(Group::new(SlidingWindow::new(TokenCount(40)).unwrap()));
    let mut states = config();
    states.groups.push(Group::new(Recurrent));
    let parts = Config { match_unit: Some(BlockSize::new(4).unwrap()), ..config() };
    let ahead = Config { events_max: 10_000, hash_lookahead: TokenCount(2), ..config() };
    let told = Config { events_max: 10_000, ..hybrid.clone() };
    for (name, config) in [
        ("one group", config()),
        ("window", hybrid),
        ("state", states),
        ("parts", parts),
        ("events", told),
        ("events and lookahead", ahead),
    ] {
        let mut cache = KvCache::new(config).unwrap();
        let mut heard = 0;
        let mut lives = |cache: &mut KvCache, rounds: Range<u32>| {
            for round in rounds {
                life(cache, round);
                cache.drain_events(|number, _| heard = number);
            }
        };
        lives(&mut cache, 0..60);
        let before = ALLOCATIONS.get();
        lives(&mut cache, 60..160);
        assert_eq!(ALLOCATIONS.get() - before, 0, "{name}");
        assert_eq!(heard > 0, cache.config().events_max > 0, "{name}: {heard} events");
        assert!(cache.stats().evictions > 0, "{name}: the pool was used up and used again");
    }
}

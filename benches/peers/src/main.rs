//! The same work, done by `quayline-kv-cache`, `kvbm-logical` and `dynamo-tokens`, one after the other in one run.
//!
//! ```sh
//! cd benches/peers && cargo run --release                # pools of 1 k and 100 k blocks
//! cd benches/peers && cargo run --release -- 4000000     # the pools named
//! ```
//!
//! Prompts are 64 blocks of 16 random tokens. Each figure is the median of 15 rounds, in nanoseconds per block, on
//! one thread. In a pool of 1 k blocks everything stays in the processor's cache. In larger ones each call meets
//! another of
//! as many prompts as fill the pool, in random order, so that it finds its part of the index in memory.
//! Everything is asserted: how many blocks were given, found and freed, and that both name them alike.

mod hashes;
mod kvbm;
mod ours;

use std::time::{Duration, Instant};

const BLOCK: usize = 16;
const PROMPT_BLOCKS: usize = 64;
const ROUNDS: usize = 15;

type Prompt = Vec<u32>;

fn main() {
    let named: Vec<usize> =
        std::env::args().skip(1).map(|word| word.parse().expect("a pool size is a number of blocks")).collect();
    let pools = if named.is_empty() { vec![1_000, 100_000] } else { named };
    hashes::agree();
    println!("{:<38} {:>8} {:>8} {:>7}", "ns per block", "ours", "peer", "ratio");
    hashes::compare();
    for pool in pools {
        let prompts = prompts(pool);
        report(pool, "get + free, 1 block", ours::get_and_free(pool, 1), kvbm::get_and_free(pool, 1));
        report(pool, "get + free, 100 blocks", ours::get_and_free(pool, 100), kvbm::get_and_free(pool, 100));
        let (ours, theirs) = (ours::prompts(pool, &prompts), kvbm::prompts(pool, &prompts));
        report(pool, "get + publish", ours.publish, theirs.publish);
        report(pool, "match + free, held by others", ours.shared, theirs.shared);
        report(pool, "match + free, held by nobody", ours.revived, theirs.revived);
    }
}

/// What a prompt's 64 blocks cost, in nanoseconds per block.
struct PerBlock {
    /// From known hashes to blocks that can be found.
    publish: f64,
    /// To find and take blocks that somebody else holds too, and to give them back.
    shared: f64,
    /// The same for blocks that nobody holds.
    revived: f64,
}

/// Prompts that fill nine tenths of a pool.
fn prompts(pool: usize) -> Vec<Prompt> {
    let mut random = Random(pool as u64);
    (0..pool * 9 / 10 / PROMPT_BLOCKS)
        .map(|_| (0..PROMPT_BLOCKS * BLOCK).map(|_| random.below(128_000) as u32).collect())
        .collect()
}

fn report(pool: usize, what: &str, ours: f64, peer: f64) {
    let pool = match pool {
        1_000_000.. => format!("{} M", pool / 1_000_000),
        _ => format!("{} k", pool / 1_000),
    };
    line(&format!("{what}, {pool}"), ours, peer);
}

fn line(what: &str, ours: f64, peer: f64) {
    println!("{what:<38} {ours:>8.1} {peer:>8.1} {:>6.1}x", peer / ours);
}

/// The median of rounds, each of which says how long it took and for how many blocks.
fn median(mut round: impl FnMut() -> (Duration, usize)) -> f64 {
    let mut all: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let (spent, blocks) = round();
            spent.as_nanos() as f64 / blocks as f64
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all[ROUNDS / 2]
}

/// How long `work` takes.
fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// xorshift64*, as good as needed to draw tokens and shuffle.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        let state = if self.0 == 0 { 1 } else { self.0 };
        let state = state ^ state >> 12;
        let state = state ^ state << 25;
        self.0 = state ^ state >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % end
    }

    fn shuffled(&mut self, length: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..length).collect();
        for place in (1..length).rev() {
            order.swap(place, self.below(place as u64 + 1) as usize);
        }
        order
    }
}

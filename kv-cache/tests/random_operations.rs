//! Random calls against a memory that remembers what was written: the same as `fuzz/fuzz_targets/operations.rs`, with
//! bytes from a generator in place of those a fuzzer finds.

#![expect(clippy::panic, clippy::cast_possible_truncation, reason = "a test may fail where it stands")]

mod operations;

use std::ops::RangeInclusive;
use std::panic::catch_unwind;

#[test]
fn whatever_is_called_a_sequence_reads_what_it_would_have_written() {
    run(1..=50);
}

/// About a million calls.
#[test]
#[ignore = "takes a minute and a half"]
fn whatever_is_called_a_million_times() {
    run(51..=1500);
}

fn run(seeds: RangeInclusive<u64>) {
    for seed in seeds {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let bytes: Vec<u8> = (0..4000)
            .map(|_| {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8
            })
            .collect();
        if catch_unwind(|| operations::run(&bytes)).is_err() {
            panic!("seed {seed}");
        }
    }
}

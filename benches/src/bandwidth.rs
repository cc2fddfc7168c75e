//! How fast this machine reads memory: the limit of every decode step.

use std::hint::black_box;
use std::time::{Duration, Instant};

/// Streams that one thread reads at once; one stream alone does not fill the memory's pipes.
const STREAMS: usize = 4;

/// Bytes that a thread reads between two looks at the clock, at least: fewer are read again and again.
const READ_MIN: usize = 64 << 20;

/// Gigabytes (1e9) per second that `threads` threads read together: each walks four far-apart streams through its own
/// `bytes`, seven times; the median counts. From memory if that is far more than the caches hold, else from these.
#[must_use]
pub fn read_gigabytes_per_second(threads: usize, bytes: usize) -> f64 {
    let words = (bytes / 8 / STREAMS / 8 * 8).max(8);
    let buffers: Vec<Vec<u64>> =
        (0..threads.max(1)).map(|_| (0..(words * STREAMS) as u64).collect()).collect();
    let rounds = READ_MIN.div_ceil(words * STREAMS * 8);
    let mut times: Vec<Duration> = (0..7).map(|_| read_all(&buffers, words, rounds)).collect();
    times.sort();
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 bytes are read")]
    let total = (rounds * buffers.len() * words * STREAMS * 8) as f64;
    total / times[times.len() / 2].as_secs_f64() / 1e9
}

fn read_all(buffers: &[Vec<u64>], words: usize, rounds: usize) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for buffer in buffers {
            scope.spawn(move || {
                for _ in 0..rounds {
                    black_box(sum(black_box(buffer), words));
                }
            });
        }
    });
    start.elapsed()
}

/// Adds up all words, a cache line of each stream at a time.
fn sum(buffer: &[u64], words: usize) -> u64 {
    let (first, rest) = buffer.split_at(words);
    let (second, rest) = rest.split_at(words);
    let (third, fourth) = rest.split_at(words);
    let lines = first.as_chunks::<8>().0.iter().zip(second.as_chunks::<8>().0);
    let lines = lines.zip(third.as_chunks::<8>().0.iter().zip(fourth.as_chunks::<8>().0));
    let mut sums = [0_u64; 8];
    for ((a, b), (c, d)) in lines {
        for lane in 0..8 {
            let line = a[lane].wrapping_add(b[lane]).wrapping_add(c[lane]).wrapping_add(d[lane]);
            sums[lane] = sums[lane].wrapping_add(line);
        }
    }
    sums.iter().fold(0, |all, &lane| all.wrapping_add(lane))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        let buffer: Vec<u64> = (0..4 * 64).collect();
        assert_eq!(sum(&buffer, 64), buffer.iter().sum::<u64>());
        assert!(read_gigabytes_per_second(2, 1 << 12) > 0.0);
    }
}

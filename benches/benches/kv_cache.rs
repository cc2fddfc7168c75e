//! The block manager: the cases of vLLM's and nano-vllm's block managers, re-created (blocks of 16 tokens, a pool of
//! 40,000, prompts of 1,024 random tokens below 32,000).
#![expect(clippy::unwrap_used, reason = "a bench whose setup fails has no figure")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quayline_benches::beside::beside;
use quayline_benches::random::Random;
use quayline_kv_cache::{
    Admission, BlockCount, BlockSize, Claim, Config, KvCache, Reuse, SequenceId, SequenceKey, TokenCount,
    TokenId,
};

const BLOCKS: u32 = 40_000;
const PROMPT: u32 = 1024;

fn cache(prefix_caching: bool) -> KvCache {
    let config = Config::new(BlockSize::new(16).unwrap(), BlockCount(BLOCKS));
    KvCache::new(Config { prefix_caching, ..config }).unwrap()
}

fn tokens(random: &mut Random, count: u32) -> Vec<TokenId> {
    (0..count).map(|_| TokenId::try_from(random.below(32_000)).unwrap()).collect()
}

fn open(cache: &mut KvCache, id: u64, prompt: &[TokenId]) -> SequenceId {
    let sequence = SequenceId(id);
    cache.open(sequence, SequenceKey::default(), prompt, Reuse::ReadWrite).unwrap();
    sequence
}

/// Claims the rest of a sequence and gives back how many blocks were new.
fn claim(cache: &mut KvCache, sequence: SequenceId, computed: TokenCount, known: u32) -> usize {
    let claim = Claim { computed, new_tokens: TokenCount(known - computed.get()), ..Claim::default() };
    match cache.reserve(sequence, claim).unwrap() {
        Admission::Admit(reservation) => reservation.commit().new_blocks.len(),
        other => unreachable!("the pool has room: {other:?}"),
    }
}

/// Pools of 1 k, 100 k and 4 M blocks, with as many prompts of 64 blocks as fill nine tenths of one.
const POOLS: [u32; 3] = [1_000, 100_000, 4_000_000];
const PROMPT_BLOCKS: u32 = PROMPT / 16;

/// Whose turn it is: always the same, whose part of the index stays in the processor's cache, or any of all.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Warm,
    Cold,
}

impl Turn {
    /// Which of `all` comes next.
    fn next(self, random: &mut Random, all: usize) -> usize {
        match self {
            Self::Warm => all / 2,
            Self::Cold => usize::try_from(random.below(all as u64)).unwrap(),
        }
    }
}

fn pool(blocks: u32, prefix_caching: bool) -> KvCache {
    let config = Config::new(BlockSize::new(16).unwrap(), BlockCount(blocks + 1));
    KvCache::new(Config { prefix_caching, ..config }).unwrap()
}

/// The sum of what `work` says it took.
fn timed(iterations: u64, mut work: impl FnMut() -> Duration) -> Duration {
    (0..iterations).map(|_| work()).sum()
}

/// Nanoseconds for a line of memory out of `bytes`, when sixteen are asked for at once.
fn line_nanoseconds(bytes: usize) -> f64 {
    let table = vec![1_u64; (bytes / 8).next_power_of_two()];
    let (mut place, mut sum) = (1_usize, 0);
    let start = Instant::now();
    for _ in 0..1 << 16 {
        for _ in 0..16 {
            place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            sum += table[(place >> 20) & (table.len() - 1)];
        }
    }
    let spent = start.elapsed();
    assert_eq!(sum, 1 << 20);
    spent.as_secs_f64() * 1e9 / f64::from(1 << 20)
}

fn hash(criterion: &mut Criterion) {
    beside(
        "kv-cache/hash, per block of 16 tokens (goal 15 ns)",
        "80 bytes through XXH3, about 5 ns",
        "dynamo-tokens 66 ns (benches/peers); vLLM 2.15 us (sha256) or 1.60 us (xxhash)",
    );
    let mut group = criterion.benchmark_group("kv-cache/hash");
    group.throughput(Throughput::Elements(u64::from(PROMPT_BLOCKS)));
    let mut cache = pool(1_000, true);
    let prompt = tokens(&mut Random::new(0, 0), PROMPT);
    group.bench_function("open-1024-tokens", |bencher| {
        bencher.iter(|| {
            let sequence = open(&mut cache, 1, black_box(&prompt));
            assert_eq!(cache.hashes(sequence).unwrap().len(), 64);
            cache.close(sequence).unwrap();
        });
    });
    group.finish();
}

fn get_and_free(criterion: &mut Criterion) {
    for blocks in POOLS {
        let line = line_nanoseconds(blocks as usize * 36);
        beside(
            &format!("kv-cache/get+free in {blocks} blocks, per block (goal 10 ns for 100)"),
            &format!("36 bytes read and written; a cold line takes {line:.1} ns"),
            "kvbm-logical 67 ns (100 blocks), 169 ns (1); vLLM 1.25 us (1 block), 33.8 us (64 blocks)",
        );
        let mut group = criterion.benchmark_group(format!("kv-cache/get+free/{blocks}"));
        for (count, turn) in [(1, Turn::Warm), (100, Turn::Warm), (100, Turn::Cold)] {
            let mut cache = pool(blocks, false);
            let all: Vec<SequenceId> = (0..u64::from(blocks / count).min(40_000))
                .map(|id| open(&mut cache, id, &vec![7; count as usize * 16]))
                .collect();
            // Cold: everybody holds blocks, and whoever gives some back waits for all others before he has new ones.
            let held = match turn {
                Turn::Warm => 0,
                Turn::Cold => all.len() - 1,
            };
            for &sequence in &all[..held] {
                claim(&mut cache, sequence, TokenCount(0), count * 16);
            }
            let mut next = held;
            group.throughput(Throughput::Elements(u64::from(count)));
            group.bench_function(format!("{count}-{turn:?}").to_lowercase(), |bencher| {
                bencher.iter(|| {
                    assert_eq!(claim(&mut cache, all[next], TokenCount(0), count * 16), count as usize);
                    cache.release(all[(next + all.len() - held) % all.len()]).unwrap();
                    next = (next + usize::from(held > 0)) % all.len();
                });
            });
            cache.check().unwrap();
        }
        group.finish();
    }
}

/// Finding and publishing, in pools whose prompts are all cached.
fn index(criterion: &mut Criterion) {
    for blocks in POOLS {
        let line = line_nanoseconds(blocks as usize * 40);
        beside(
            &format!(
                "kv-cache/index of {blocks} blocks, per block (goals: match 15 ns, cold 30; publish 40)"
            ),
            &format!("a match reads 2 lines, publishing 1: {:.1} and {line:.1} ns when cold", 2.0 * line),
            "kvbm-logical 92 to 310 ns (match and free), 516 to 936 ns (get and publish), see benches/peers",
        );
        let mut random = Random::new(5, u64::from(blocks));
        let prompts: Vec<Vec<TokenId>> =
            (0..blocks / 10 * 9 / PROMPT_BLOCKS).map(|_| tokens(&mut random, PROMPT + 1)).collect();
        let mut group = criterion.benchmark_group(format!("kv-cache/index/{blocks}"));
        group.throughput(Throughput::Elements(u64::from(PROMPT_BLOCKS)));
        let mut cache = pool(blocks, true);
        let (mut id, mut turn) = (0, 0);
        group.bench_function("get+publish", |bencher| {
            bencher.iter_custom(|iterations| {
                timed(iterations, || {
                    if turn % prompts.len() == 0 {
                        assert!(cache.reset());
                    }
                    let prompt = &prompts[turn % prompts.len()];
                    (id, turn) = (id + 1, turn + 1);
                    let sequence = open(&mut cache, id, prompt);
                    assert_eq!(cache.lookup(sequence).unwrap().tokens, TokenCount(0));
                    let start = Instant::now();
                    let new = claim(&mut cache, sequence, TokenCount(0), PROMPT);
                    let spent = start.elapsed();
                    assert_eq!(new, PROMPT_BLOCKS as usize);
                    cache.close(sequence).unwrap();
                    spent
                })
            });
        });
        assert!(cache.reset());
        for (prompt, id) in prompts.iter().zip(1 << 40..) {
            let sequence = open(&mut cache, id, prompt);
            claim(&mut cache, sequence, TokenCount(0), PROMPT);
            cache.close(sequence).unwrap();
        }
        for turn in [Turn::Warm, Turn::Cold] {
            group.bench_function(format!("match-{turn:?}").to_lowercase(), |bencher| {
                bencher.iter_custom(|iterations| {
                    timed(iterations, || {
                        id += 1;
                        let sequence = open(&mut cache, id, &prompts[turn.next(&mut random, prompts.len())]);
                        let start = Instant::now();
                        let hit = cache.lookup(sequence).unwrap();
                        let spent = start.elapsed();
                        assert_eq!(hit.tokens.get(), PROMPT);
                        cache.close(sequence).unwrap();
                        spent
                    })
                });
            });
        }
        cache.check().unwrap();
        group.finish();
    }
}

/// A request of 128 k tokens of which nine tenths are cached, from its arrival to its room.
fn long_request(criterion: &mut Criterion) {
    const LONG: u32 = 128 * 1024;
    const CACHED: u32 = LONG / 160 * 9 * 16;
    beside(
        "kv-cache/request-128k, nine tenths cached (goal 0.5 ms)",
        "8,192 hashes, 7,371 matches, 821 publications: about 0.1 ms of hashing",
        "-",
    );
    let mut group = criterion.benchmark_group("kv-cache/request-128k");
    for blocks in [100_000, 4_000_000] {
        let mut cache = pool(blocks, true);
        let mut random = Random::new(6, 6);
        for id in 0..u64::from(blocks / 10 * 9 / PROMPT_BLOCKS) {
            let sequence = open(&mut cache, id, &tokens(&mut random, PROMPT));
            claim(&mut cache, sequence, TokenCount(0), PROMPT);
            cache.close(sequence).unwrap();
        }
        let mut prompt = tokens(&mut random, LONG);
        let first = open(&mut cache, 0, &prompt[..CACHED as usize]);
        claim(&mut cache, first, TokenCount(0), CACHED);
        cache.close(first).unwrap();
        group.bench_function(format!("{blocks}"), |bencher| {
            bencher.iter_custom(|iterations| {
                timed(iterations, || {
                    prompt[CACHED as usize] = prompt[CACHED as usize].wrapping_add(1);
                    let start = Instant::now();
                    let sequence = open(&mut cache, 1, black_box(&prompt));
                    let hit = cache.lookup(sequence).unwrap();
                    let new = claim(&mut cache, sequence, hit.tokens, LONG);
                    let spent = start.elapsed();
                    assert_eq!((hit.tokens.get(), new), (CACHED, ((LONG - CACHED) / 16) as usize));
                    cache.close(sequence).unwrap();
                    spent
                })
            });
        });
        cache.check().unwrap();
    }
    group.finish();
}

/// What of a prompt the cache has seen before.
#[derive(Clone, Copy, PartialEq)]
enum Prompts {
    Cold,
    Same,
    HalfShared,
}

impl Prompts {
    /// More prompts than the pool holds at once (625), so that a cold one is cold again when its turn comes.
    fn make(self) -> Vec<Vec<TokenId>> {
        let mut random = Random::new(2, self as u64);
        let shared = tokens(&mut Random::new(1, 1), PROMPT);
        let mut make = || match self {
            Self::Cold => tokens(&mut random, PROMPT),
            Self::Same => shared.clone(),
            Self::HalfShared => [&shared[..512], &tokens(&mut random, 512)].concat(),
        };
        (0..1300).map(|_| make()).collect()
    }

    const fn hit_tokens(self) -> u32 {
        match self {
            Self::Cold => 0,
            Self::Same => PROMPT - 16,
            Self::HalfShared => PROMPT / 2,
        }
    }
}

/// One prompt from arrival to end, and the time when each of its four calls returned.
fn cycle(cache: &mut KvCache, id: u64, prompt: &[TokenId], hit_tokens: u32) -> [Instant; 5] {
    let mut marks = [Instant::now(); 5];
    let sequence = open(cache, id, black_box(prompt));
    marks[1] = Instant::now();
    let hit = cache.lookup(sequence).unwrap();
    marks[2] = Instant::now();
    black_box(claim(cache, sequence, hit.tokens, PROMPT));
    marks[3] = Instant::now();
    cache.close(sequence).unwrap();
    marks[4] = Instant::now();
    assert_eq!(hit.tokens.get(), hit_tokens);
    marks
}

#[expect(clippy::print_stdout, reason = "a bench prints")]
fn prompts(criterion: &mut Criterion) {
    beside(
        "kv-cache/prompt-1024 (open and hash, look up, claim, close)",
        "one or two cache lines per block, some 3 us for 64, and the hashes",
        "vLLM without its hashes (64 x 2.15 us): cold 163 us, same 106 us, half-shared 134 us; nano-vllm cold 173 us",
    );
    let mut group = criterion.benchmark_group("kv-cache/prompt-1024");
    for (case, prompts) in
        [("cold", Prompts::Cold), ("same", Prompts::Same), ("half-shared", Prompts::HalfShared)]
    {
        let mut cache = cache(true);
        // Fill the pool with cached blocks, so that each new one evicts an old one; the shared prompt comes last.
        for (id, prompt) in Prompts::Cold.make().iter().enumerate() {
            cycle(&mut cache, id as u64, prompt, 0);
        }
        cycle(&mut cache, 0, &tokens(&mut Random::new(1, 1), PROMPT), 0);
        let all = prompts.make();
        let mut turn = all.iter().cycle();
        let mut next = |cache: &mut KvCache| {
            turn.next().map(|prompt| cycle(cache, 1, prompt, prompts.hit_tokens())).unwrap()
        };
        let mut phases = [Duration::ZERO; 4];
        for _ in 0..1300 {
            let marks = next(&mut cache);
            (0..4).for_each(|phase| phases[phase] += marks[phase + 1] - marks[phase]);
        }
        println!(
            "kv-cache/prompt-1024/{case}: open, lookup, claim, close = {:?}",
            phases.map(|spent| spent / 1300)
        );
        group.bench_function(case, |bencher| bencher.iter(|| next(&mut cache)));
        cache.check().unwrap();
    }
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    beside(
        "kv-cache/push+claim/256-sequences",
        "one cache line per request, about 5 ns; a new block and its hash in 1 of 16",
        "vLLM 6.95 us (append one token and allocate_slots(1), mean over 32 tokens)",
    );
    let mut group = criterion.benchmark_group("kv-cache/push+claim");
    group.throughput(Throughput::Elements(256));
    let mut random = Random::new(3, 3);
    let mut cache = cache(true);
    group.bench_function("256-sequences", |bencher| {
        bencher.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for first in (0..iterations).step_by(32) {
                let steps = u32::try_from((iterations - first).min(32)).unwrap();
                let all: Vec<SequenceId> =
                    (0..256).map(|id| open(&mut cache, id, &tokens(&mut random, 128))).collect();
                for &sequence in &all {
                    claim(&mut cache, sequence, TokenCount(0), 128);
                }
                let start = Instant::now();
                for step in 0..steps {
                    for &sequence in &all {
                        cache.push(sequence, &[7]).unwrap();
                        black_box(claim(&mut cache, sequence, TokenCount(128 + step), 129 + step));
                    }
                }
                spent += start.elapsed();
                assert_eq!(cache.known(all[0]).unwrap().get(), 128 + steps);
                for &sequence in &all {
                    cache.close(sequence).unwrap();
                }
            }
            spent
        });
    });
    cache.check().unwrap();
    group.finish();
}

criterion_group!(benches, hash, get_and_free, index, long_request, prompts, decode);
criterion_main!(benches);

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

fn hash(criterion: &mut Criterion) {
    beside(
        "kv-cache/open/1024-tokens",
        "4 KiB of tokens read once, about 0.1 us",
        "64 blocks x vLLM 2.15 us (sha256) or 1.60 us (xxhash), nano-vllm 2.5 us = 102 to 160 us",
    );
    let mut group = criterion.benchmark_group("kv-cache/open");
    group.throughput(Throughput::Elements(u64::from(PROMPT)));
    let mut cache = cache(true);
    let prompt = tokens(&mut Random::new(0, 0), PROMPT);
    group.bench_function("1024-tokens", |bencher| {
        bencher.iter(|| {
            let sequence = open(&mut cache, 1, black_box(&prompt));
            assert_eq!(cache.hashes(sequence).unwrap().len(), 64);
            cache.close(sequence).unwrap();
        });
    });
    group.finish();
}

fn get_and_free(criterion: &mut Criterion) {
    beside(
        "kv-cache/get+free",
        "two cache lines per block, about 10 ns",
        "vLLM 1.25 us (1 block), 33.8 us (64 blocks)",
    );
    let mut group = criterion.benchmark_group("kv-cache/get+free");
    for blocks in [1_u32, 64] {
        let mut cache = cache(false);
        let sequence = open(&mut cache, 1, &vec![7; blocks as usize * 16]);
        group.throughput(Throughput::Elements(u64::from(blocks)));
        group.bench_function(format!("{blocks}-blocks"), |bencher| {
            bencher.iter(|| {
                assert_eq!(claim(&mut cache, sequence, TokenCount(0), blocks * 16), blocks as usize);
                black_box(cache.table(sequence).unwrap().blocks());
                cache.release(sequence).unwrap();
            });
        });
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

criterion_group!(benches, hash, get_and_free, prompts, decode);
criterion_main!(benches);

//! The whole engine on the bundled model: a prompt computed, and a step in which N requests generate.
#![expect(clippy::unwrap_used, reason = "a bench whose setup fails has no figure")]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quayline_benches::bandwidth::read_gigabytes_per_second;
use quayline_benches::beside::beside;
use quayline_benches::random::Random;
use quayline_engine::{Engine, ModelFiles, Options, Output, Request, RequestId, Sampling, Tick};

/// Tokens generated before the requests start over.
const NEW_TOKENS: u32 = 256;

fn engine() -> Engine {
    let options = Options { prefix_caching: false, ..Options::default() };
    Engine::load(&ModelFiles::bundled(), &options).unwrap()
}

fn request(id: u64, prompt_tokens: usize, new_tokens: u32) -> Request {
    let mut random = Random::new(9, id);
    let prompt: Vec<u32> =
        (0..prompt_tokens).map(|_| 300 + u32::try_from(random.below(700)).unwrap()).collect();
    let sampling = Sampling { max_tokens: Some(new_tokens), ignore_eos: true, ..Sampling::greedy() };
    Request { sampling, ..Request::new(RequestId(id), prompt) }
}

/// Runs all to their end and gives back the tokens of request `id`.
fn tokens_of(engine: &mut Engine, id: u64) -> Vec<u32> {
    let mut outputs: Vec<Output> = Vec::new();
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
    }
    let own = outputs.iter().filter(|output| output.id == RequestId(id));
    own.flat_map(|output| output.tokens.iter().map(|token| token.id)).collect()
}

fn prefill(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine/prefill");
    for tokens in [128, 512] {
        let mut engine = engine();
        group.throughput(Throughput::Elements(tokens as u64));
        let mut id = 0;
        group.bench_function(format!("1x{tokens}"), |bencher| {
            bencher.iter(|| {
                id += 1;
                engine.add(request(id, tokens, 1)).unwrap();
                assert_eq!(tokens_of(&mut engine, id).len(), 1);
            });
        });
        engine.check().unwrap();
    }
    group.finish();
}

/// Time of so many steps in which `count` requests generate.
fn decode_steps(engine: &mut Engine, count: u64, iterations: u64) -> Duration {
    let mut spent = Duration::ZERO;
    let mut outputs = Vec::new();
    for first in (0..iterations).step_by(NEW_TOKENS as usize) {
        for id in 0..count {
            engine.add(request(id, 32, NEW_TOKENS + 1)).unwrap();
        }
        while engine.snapshot().running.iter().filter(|one| one.output_tokens > 0).count()
            < usize::try_from(count).unwrap()
        {
            engine.step(Tick(0), &mut outputs);
        }
        outputs.clear();
        let start = Instant::now();
        for _ in first..iterations.min(first + u64::from(NEW_TOKENS)) {
            engine.step(Tick(0), &mut outputs);
        }
        spent += start.elapsed();
        outputs.clear();
        for id in 0..count {
            engine.cancel(RequestId(id));
        }
    }
    spent
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine/decode");
    let mut engine = engine();
    beside(
        "engine/decode/1",
        &format!(
            "{:.0} tokens/s at the {:.1} GB/s just read, if the weights did not fit a cache (they do: it may be more)",
            read_gigabytes_per_second(2, 128 << 20) * 1e9 / engine.weight_bytes() as f64,
            read_gigabytes_per_second(2, 128 << 20),
        ),
        "none has this model; the bench `model` takes any checkpoint",
    );
    engine.add(request(0, 32, 20)).unwrap();
    let alone = tokens_of(&mut engine, 0);
    for count in [1_u64, 8, 32] {
        for id in 0..count {
            engine.add(request(id, 32, 20)).unwrap();
        }
        assert_eq!(tokens_of(&mut engine, 0), alone, "{count} together");
        group.throughput(Throughput::Elements(count));
        group.bench_function(count.to_string(), |bencher| {
            bencher.iter_custom(|iterations| decode_steps(&mut engine, count, iterations));
        });
    }
    engine.check().unwrap();
    group.finish();
}

criterion_group!(benches, prefill, decode);
criterion_main!(benches);

//! How near the operators are to what the machine can do: `cargo run --release -p quayline-gpu-kernels --example speed
//! [-- PART...]`, where a part is a word of the names printed. Every figure stands beside a limit measured in the same
//! second, because neighbours on a shared machine change both.

#![expect(unsafe_code, reason = "asks the system for this thread's processor time")]
#![expect(clippy::print_stdout, reason = "a program that reports")]
#![expect(clippy::cast_possible_truncation, reason = "small counts")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Instant;

use half::bf16;
use quayline_gpu_kernels::{
    Attention, BatchInput, Cpu, Dtype, Heads, Isa, KvOrder, KvShape, KvStorage, Ops, Projection, Rounding,
    Span, WeightBytes, WeightSource,
};

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| parts.iter().all(|part| name.contains(part.as_str()));
    for isa in Isa::ALL.iter().copied().filter(|isa| isa.available()) {
        for threads in [1, 2] {
            let cpu =
                Cpu::new(NonZeroUsize::new(threads), Some(isa)).expect("the instruction set is available");
            for rounding in [None, Some(Rounding::Int8), Some(Rounding::Fp8), Some(Rounding::Int4)] {
                linear(&cpu, rounding, &wanted);
            }
            for (cache, storage, order) in [
                ("", KvStorage::Same, KvOrder::Hnd),
                ("nhd-", KvStorage::Same, KvOrder::Nhd),
                ("e4m3-", KvStorage::Fp8PerHead, KvOrder::Hnd),
                ("int8-", KvStorage::Int8PerHead, KvOrder::Hnd),
            ] {
                attention(&cpu, (cache, storage, order), &wanted);
            }
        }
    }
}

/// Seconds of processor time of the fastest of several runs on one thread; wall time where there are more.
fn best(threads: usize, mut run: impl FnMut()) -> f64 {
    let now = || if threads == 1 { thread_seconds() } else { began().elapsed().as_secs_f64() };
    run();
    let start = now();
    let mut fastest = f64::INFINITY;
    while now() - start < 0.15 {
        let start = now();
        run();
        fastest = fastest.min(now() - start);
    }
    fastest
}

fn began() -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    *BEGAN.get_or_init(Instant::now)
}

/// Processor time of this thread.
fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to write into.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// GB/s of reading a buffer in four streams on this many threads.
fn bandwidth(threads: usize, buffer: &[u8]) -> f64 {
    let one = |part: &[u8]| {
        let quarter = part.len() / 4 / 256 * 256;
        let mut sum = 0_u64;
        for i in (0..quarter).step_by(64) {
            for stream in 0..4 {
                // Touching one word brings the line; the machine reads lines.
                sum = sum.wrapping_add(u64::from(part[stream * quarter + i]));
            }
        }
        black_box(sum);
    };
    let seconds = best(threads, || {
        if threads == 1 {
            return one(buffer);
        }
        std::thread::scope(|scope| {
            for part in buffer.chunks(buffer.len() / threads) {
                scope.spawn(move || one(part));
            }
        });
    });
    buffer.len() as f64 / seconds / 1e9
}

/// GFLOP/s of multiply-adds in registers on all threads, as they are with such weights.
fn peak(cpu: &Cpu, weights: Dtype) -> f64 {
    let mut operations = 0;
    let seconds = best(cpu.threads(), || operations = black_box(cpu.multiply_add(weights, 100_000)));
    operations as f64 / seconds / 1e9
}

/// The `i`th of numbers that are spread like those of a trained matrix.
fn normal(i: usize) -> bf16 {
    // Four times sixteen bits of a counter that is well mixed (SplitMix64) are nearly a normal distribution.
    let mut bits = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    let sum: f32 = (0..4).map(|part| f32::from((bits >> (16 * part)) as u16) / 65536.0 - 0.5).sum();
    bf16::from_f32(0.03 * sum)
}

fn linear(cpu: &Cpu, rounding: Option<Rounding>, wanted: &dyn Fn(&str) -> bool) {
    let stored = match rounding {
        None => "bf16",
        Some(Rounding::Int8) => "int8",
        Some(Rounding::Fp8) => "fp8",
        Some(Rounding::Int4) => "int4",
    };
    for (k, n, copies) in [(288, 768, 1), (768, 2048, 40), (2048, 5632, 8), (5632, 2048, 8), (896, 4864, 20)]
    {
        let name = |m: usize| format!("linear/{k}x{n}/m={m}/{stored}/{}-{}t", cpu.isa(), cpu.threads());
        let sizes = [1, 2, 3, 4, 8, 16, 32, 128, 512].into_iter().filter(|&m| wanted(&name(m)));
        if sizes.clone().count() == 0 {
            continue;
        }
        let limit = bandwidth(cpu.threads(), &vec![1; 512 << 20]);
        let numbers: Vec<bf16> = (0..k * n * copies).map(normal).collect();
        let shared: WeightBytes = Arc::new(bytemuck::cast_slice::<bf16, u8>(&numbers).to_vec());
        let weights: Vec<_> = (0..copies)
            .map(|copy| {
                let range = copy * k * n * 2..(copy + 1) * k * n * 2;
                let source =
                    WeightSource { bytes: Arc::clone(&shared), range, dtype: Dtype::Bf16, shape: vec![n, k] };
                match rounding {
                    None => cpu.weight(source).expect("the range fits"),
                    Some(rounding) => cpu.weight_rounded(source, rounding).expect("the range fits"),
                }
            })
            .collect();
        for m in sizes {
            let mut x = cpu.tensor(m, k).expect("memory");
            cpu.write(&mut x, &vec![0.5; m * k]).expect("fits");
            let mut out = cpu.tensor(m, n).expect("memory");
            let mut copy = 0;
            let seconds = best(cpu.threads(), || {
                copy = (copy + 1) % copies;
                let mut projections = [Projection { weight: &weights[copy], bias: None, out: &mut out }];
                cpu.linear(&x, &mut projections).expect("shapes agree");
            });
            let gb = weights[copy].bytes() as f64 / seconds / 1e9;
            let gf = (2 * m * k * n) as f64 / seconds / 1e9;
            let peak = peak(cpu, Dtype::Bf16);
            println!(
                "{:41} {:9.1} us {gb:6.2} GB/s of {limit:4.1} {gf:8.1} GFLOP/s of {peak:5.1}",
                name(m),
                seconds * 1e6
            );
        }
    }
}

fn attention(cpu: &Cpu, (cache, storage, order): (&str, KvStorage, KvOrder), wanted: &dyn Fn(&str) -> bool) {
    // (sequences, queries of each, context of each)
    let steps = [(1, 1, 4096), (8, 1, 1024), (32, 1, 256), (1, 512, 512), (1, 256, 4096)];
    let all_heads = [(6, 6, 48), (12, 12, 64), (14, 2, 64), (32, 8, 128)];
    let dtype = Dtype::Bf16;
    for (query, kv, dim) in all_heads {
        for (sequences, queries, context) in steps {
            let name = format!(
                "attention/{query}x{kv}x{dim}/{sequences}x{queries}of{context}/{cache}{}-{}t",
                cpu.isa(),
                cpu.threads()
            );
            if !wanted(&name) {
                continue;
            }
            let heads = Heads { query, kv, dim };
            let (block_size, layers) = (16, 16);
            let per = context / block_size;
            let shape =
                KvShape { layers, blocks: sequences * per, block_size, kv_heads: kv, head_dim: dim, dtype };
            let mut pool = cpu.kv_pool_ordered(shape, storage, order).expect("memory");
            let tokens = sequences * context;
            let slots: Vec<i64> = (0..tokens as i64).collect();
            let positions = vec![0; tokens];
            let all = BatchInput {
                positions: &positions,
                slots: &slots,
                spans: &[],
                block_tables: &[],
                block_size,
            };
            let all = cpu.batch(all).expect("in range");
            let mut x = cpu.tensor(tokens, kv * dim).expect("memory");
            cpu.write(&mut x, &vec![0.25; tokens * kv * dim]).expect("fits");
            for layer in 0..layers {
                cpu.append(&mut pool, layer, &all, &x, &x).expect("fits");
            }
            let rows = sequences * queries;
            let spans: Vec<Span> = (0..sequences)
                .map(|i| Span {
                    query_start: (i * queries) as u32,
                    query_len: queries as u32,
                    context_len: context as u32,
                })
                .collect();
            let mut q = cpu.tensor(rows, query * dim).expect("memory");
            cpu.write(&mut q, &vec![0.1; rows * query * dim]).expect("fits");
            let mut out = cpu.tensor(rows, query * dim).expect("memory");
            // Many times what a cache shared with other guests may hold.
            let limit = bandwidth(cpu.threads(), &vec![1; 512 << 20]);
            let mut seconds_over = |tables: &[u32]| {
                let batch = BatchInput {
                    positions: &vec![0; rows],
                    slots: &vec![-1; rows],
                    spans: &spans,
                    block_tables: tables,
                    block_size,
                };
                let batch = cpu.batch(batch).expect("in range");
                let mut layer = 0;
                best(cpu.threads(), || {
                    layer = (layer + 1) % layers;
                    let attention = Attention { heads, scale: 0.1, window: None };
                    cpu.attention(&pool, layer, &batch, &q, attention, &mut out).expect("shapes agree");
                })
            };
            let mut tables: Vec<u32> = (0..(sequences * per) as u32).collect();
            let following = seconds_over(&tables);
            tables.reverse();
            let seconds = seconds_over(&tables);
            let seen = rows * context - sequences * queries * (queries - 1) / 2;
            let bytes = if storage == KvStorage::Same { 2 } else { 1 };
            let gb = (sequences * context * kv * dim * 2 * bytes) as f64 / 1e9;
            let (gb, gb_following) = (gb / seconds, gb / following);
            let gf = (seen * query * dim * 4) as f64 / seconds / 1e9;
            let peak = peak(cpu, Dtype::F32);
            println!(
                "{name:44} {:9.1} us {gb:6.2} GB/s of {limit:4.1} {gf:8.1} GFLOP/s of {peak:5.1}; where blocks follow \
                 each other {gb_following:.2} GB/s",
                seconds * 1e6
            );
        }
    }
}

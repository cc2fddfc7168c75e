//! How near the operators are to what the machine can do: `cargo run --release -p quayline-gpu-kernels --example speed
//! [-- PART...]`, where a part is a word of the names printed. Every figure stands beside a limit measured in the same
//! second, because neighbours on a shared machine change both.

#![expect(unsafe_code, reason = "asks the system for this thread's processor time")]
#![expect(clippy::print_stdout, reason = "a program that reports")]
#![expect(clippy::cast_precision_loss, reason = "counts of bytes and operations, for people")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Instant;

use quayline_gpu_kernels::{Cpu, Dtype, Isa, Ops, Projection, WeightBytes, WeightSource};

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| parts.iter().all(|part| name.contains(part.as_str()));
    for isa in Isa::ALL.iter().copied().filter(|isa| isa.available()) {
        for threads in [1, 2] {
            let cpu =
                Cpu::new(NonZeroUsize::new(threads), Some(isa)).expect("the instruction set is available");
            linear(&cpu, &wanted);
        }
    }
}

/// Seconds of processor time of the fastest of several runs on one thread; wall time where there are more.
fn best(threads: usize, mut run: impl FnMut()) -> f64 {
    let now = || if threads == 1 { thread_seconds() } else { began().elapsed().as_secs_f64() };
    run();
    let start = now();
    let mut fastest = f64::INFINITY;
    while now() - start < 0.3 {
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

fn linear(cpu: &Cpu, wanted: &dyn Fn(&str) -> bool) {
    for (k, n, copies) in [(288, 768, 1), (768, 2048, 40), (2048, 5632, 8), (5632, 2048, 8), (896, 4864, 20)]
    {
        let name = |m: usize| format!("linear/{k}x{n}/m={m}/{}-{}t", cpu.isa(), cpu.threads());
        let sizes = [1, 2, 3, 4, 8, 16, 32, 128, 512].into_iter().filter(|&m| wanted(&name(m)));
        if sizes.clone().count() == 0 {
            continue;
        }
        let bytes: Vec<u64> = vec![0x3c10_bc01_3b80_3c00; k * n * copies / 4];
        let limit = bandwidth(cpu.threads(), bytemuck::cast_slice(&bytes));
        let shared: WeightBytes = Arc::new(bytemuck::cast_slice::<u64, u8>(&bytes).to_vec());
        let weights: Vec<_> = (0..copies)
            .map(|copy| {
                let range = copy * k * n * 2..(copy + 1) * k * n * 2;
                let source =
                    WeightSource { bytes: Arc::clone(&shared), range, dtype: Dtype::Bf16, shape: vec![n, k] };
                cpu.weight(source).expect("the range fits")
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
            let gb = (k * n * 2) as f64 / seconds / 1e9;
            let gf = (2 * m * k * n) as f64 / seconds / 1e9;
            println!("{:36} {:9.1} us {gb:6.2} GB/s of {limit:4.1} {gf:8.1} GFLOP/s", name(m), seconds * 1e6);
        }
    }
}

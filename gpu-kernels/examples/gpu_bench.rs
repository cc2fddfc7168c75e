//! What the CUDA operators reach on a GPU:
//! `cargo run --release -p quayline-gpu-kernels --example gpu_bench [-- dry] [ID...]`.
//! The shapes are those of `scripts/targets.tsv`; `scripts/gpu_peers.py` runs the same with other libraries, and
//! `scripts/gpu-check bench` puts both into one table.
//!
//! One line for each: id, what moves or is computed, and the microseconds of one run, tabs between; for products a
//! second one of cuBLASLt (in the machine, or at `QUAYLINE_CUBLASLT`), with its name before the time, and for chains of
//! launches one of launches that wait for the end of the one before ("serial"). Runs are
//! recorded and replayed; the fastest of five rounds counts. Caches hold random numbers in shuffled pages. What
//! fails is `-`, with the reason on the standard error. `dry` needs no GPU: all times are `-`.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports")]
#![expect(clippy::cast_possible_truncation, reason = "shapes are small numbers")]

use std::error::Error;
use std::time::Instant;

#[cfg(feature = "cuda")]
use quayline_gpu_kernels::cuda::CublasLt;
use quayline_gpu_kernels::cuda::{KvPool, Tensor, Weight};
use quayline_gpu_kernels::{
    Attention, BatchInput, Cuda, Draw, Dtype, Heads, KvShape, KvStorage, Ops, Projection, Sampling, Scores,
    Span, WeightSource,
};

/// Launches of a chain, each of which reads what the one before wrote.
const LINKS: usize = 64;

/// A line of `targets.tsv`.
#[derive(Debug)]
struct Target {
    id: &'static str,
    kernel: &'static str,
    heads: Heads,
    page: usize,
    storage: KvStorage,
    /// Queries and contexts of each request.
    lengths: Vec<(usize, usize)>,
    unit: &'static str,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let dry = arguments.iter().any(|argument| argument == "dry");
    let ids: Vec<&String> = arguments.iter().filter(|argument| *argument != "dry").collect();
    let cuda = if dry { None } else { Some(detect()?.with_fast_prompts(true)) };
    let library = if dry { None } else { with_library().map_err(|absent| eprintln!("{absent}")).ok() };
    let serial = if dry { None } else { Some(detect()?.with_early_launches(false)) };
    let lines = include_str!("../scripts/targets.tsv").lines().filter(|line| !line.starts_with('#'));
    for target in lines.map(Target::read) {
        let target = target?;
        if !ids.is_empty() && ids.iter().all(|id| *id != target.id) {
            continue;
        }
        let (id, work) = (target.id, target.work());
        println!("{id}\t{work}\t{}", target.time(cuda.as_ref()));
        // With few rows it is our kernels that compute.
        if target.kernel == "linear" && target.rows() > 16 {
            println!("{id}\t{work}\tcublaslt\t{}", target.time(library.as_ref()));
        }
        if target.kernel == "chain" {
            println!("{id}\t{work}\tserial\t{}", target.time(serial.as_ref()));
        }
    }
    Ok(())
}

/// Products by cuBLASLt.
#[cfg(feature = "cuda")]
fn with_library() -> Result<Cuda, Box<dyn Error>> {
    let named = std::env::var_os("QUAYLINE_CUBLASLT").filter(|path| !path.is_empty());
    let library = named.map_or_else(CublasLt::find, |path| CublasLt::open(path.as_ref()))?;
    Ok(detect()?.with_cublaslt(library)?)
}

#[cfg(not(feature = "cuda"))]
fn with_library() -> Result<Cuda, Box<dyn Error>> {
    detect()
}

#[cfg(feature = "cuda")]
fn detect() -> Result<Cuda, Box<dyn Error>> {
    Ok(Cuda::detect(Dtype::Bf16)?)
}

#[cfg(not(feature = "cuda"))]
fn detect() -> Result<Cuda, Box<dyn Error>> {
    Err("built without the feature cuda: only `dry` can run".into())
}

impl Target {
    fn read(line: &'static str) -> Result<Self, Box<dyn Error>> {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[id, kernel, query, kv, dim, page, cache, queries, contexts, unit, _floor, _goal] = &fields[..]
        else {
            return Err(format!("twelve fields, found {}: {line}", fields.len()).into());
        };
        let storage = match cache {
            "bf16" => KvStorage::Same,
            "e4m3" => KvStorage::Fp8 { key_scale: 0.01, value_scale: 0.01 },
            other => return Err(format!("{id}: no cache of {other}").into()),
        };
        let (queries, contexts) = (lengths(queries)?, lengths(contexts)?);
        if queries.len() != contexts.len() {
            return Err(format!("{id}: {} queries, {} contexts", queries.len(), contexts.len()).into());
        }
        let heads = Heads { query: query.parse()?, kv: kv.parse()?, dim: dim.parse()? };
        let lengths = queries.into_iter().zip(contexts).collect();
        Ok(Self { id, kernel, heads, page: page.parse()?, storage, lengths, unit })
    }

    fn rows(&self) -> usize {
        self.lengths.iter().map(|&(queries, _)| queries).sum()
    }

    /// Floating-point operations where the unit counts them (half of the scores where a query sees those before it),
    /// else bytes that must move.
    fn work(&self) -> u64 {
        let &Self { heads: Heads { query, kv, dim }, kernel, .. } = self;
        let causal = kernel != "full";
        if (kernel, self.unit) == ("linear", "TFLOP/s") {
            return (2 * self.rows() * dim * query) as u64;
        }
        if self.unit == "TFLOP/s" {
            let seen = |&(queries, context): &(usize, usize)| {
                let all = queries * context;
                if causal { all - queries * (queries - 1) / 2 } else { all }
            };
            return (4 * self.lengths.iter().map(seen).sum::<usize>() * query * dim) as u64;
        }
        if kernel == "linear" {
            return (2 * (dim * query + self.rows() * (dim + query))) as u64;
        }
        let element = if self.storage == KvStorage::Same { 2 } else { 1 };
        let contexts: usize = self.lengths.iter().map(|&(_, context)| context).sum();
        (match kernel {
            "norm" => 2 * 2 * self.rows() * dim,
            "chain" => LINKS * 2 * 2 * self.rows() * dim,
            "sample" => 2 * self.rows() * dim,
            _ => 2 * element * contexts * kv * dim + 2 * 2 * self.rows() * query * dim,
        }) as u64
    }

    /// Microseconds in words, or `-`.
    fn time(&self, cuda: Option<&Cuda>) -> String {
        match cuda.map(|cuda| self.microseconds(cuda)) {
            Some(Ok(time)) => format!("{time:.2}"),
            Some(Err(error)) => {
                eprintln!("{}: {error}", self.id);
                "-".to_owned()
            }
            None => "-".to_owned(),
        }
    }

    fn microseconds(&self, cuda: &Cuda) -> Result<f64, Box<dyn Error>> {
        match self.kernel {
            "norm" => self.norm(cuda),
            "chain" => self.chain(cuda),
            "sample" => self.sample(cuda),
            "linear" => self.linear(cuda),
            _ => self.attention(cuda),
        }
    }

    fn attention(&self, cuda: &Cuda) -> Result<f64, Box<dyn Error>> {
        let Self { heads, page, .. } = *self;
        let blocks_of = |context: usize| context.div_ceil(page);
        let blocks: usize = self.lengths.iter().map(|&(_, context)| blocks_of(context)).sum();
        let shape = KvShape {
            layers: 1,
            blocks,
            block_size: page,
            kv_heads: heads.kv,
            head_dim: heads.dim,
            dtype: Dtype::Bf16,
        };
        let mut pool = cuda.kv_pool_stored(shape, self.storage)?;
        fill(cuda, &mut pool, shape)?;
        let blocks_max = self.lengths.iter().map(|&(_, context)| blocks_of(context)).max().unwrap_or(0);
        let mut tables = vec![0; self.lengths.len() * blocks_max];
        let (mut spans, mut row, mut dealt) = (Vec::new(), 0, 0);
        for (table, &(queries, context)) in tables.chunks_mut(blocks_max).zip(&self.lengths) {
            // A prime steps through all pages in an order of its own.
            let page = |n: usize| ((dealt + n) * 1_000_003 % blocks) as u32;
            table[..blocks_of(context)].iter_mut().enumerate().for_each(|(n, to)| *to = page(n));
            dealt += blocks_of(context);
            let span = Span { query_start: row, query_len: queries as u32, context_len: context as u32 };
            spans.push(span);
            row += queries as u32;
        }
        let (positions, slots) = (vec![0; self.rows()], vec![-1; self.rows()]);
        let batch = cuda.batch(BatchInput {
            positions: &positions,
            slots: &slots,
            spans: &spans,
            block_tables: &tables,
            block_size: page,
        })?;
        let width = heads.query * heads.dim;
        let mut q = cuda.tensor(self.rows(), width)?;
        cuda.write(&mut q, &numbers(self.rows() * width))?;
        let mut out = cuda.tensor(self.rows(), width)?;
        let attention = Attention { heads, scale: 1.0 / (heads.dim as f32).sqrt(), window: None };
        let scores = Scores { causal: self.kernel != "full", ..Scores::default() };
        // P1 is of the kernel that runs everywhere.
        let plain;
        let cuda = if self.kernel == "prefill" {
            plain = detect()?;
            &plain
        } else {
            cuda
        };
        recorded(cuda, |cuda| Ok(cuda.attend(&pool, 0, &batch, &q, attention, scores, &mut out, None)?))
    }

    fn norm(&self, cuda: &Cuda) -> Result<f64, Box<dyn Error>> {
        let (weight, x, mut out) = self.to_norm(cuda)?;
        recorded(cuda, |cuda| Ok(cuda.rms_norm(&x, &weight, 1e-5, &mut out)?))
    }

    fn chain(&self, cuda: &Cuda) -> Result<f64, Box<dyn Error>> {
        let (weight, mut x, mut out) = self.to_norm(cuda)?;
        recorded(cuda, |cuda| {
            for _ in 0..LINKS / 2 {
                cuda.rms_norm(&x, &weight, 1e-5, &mut out)?;
                cuda.rms_norm(&out, &weight, 1e-5, &mut x)?;
            }
            Ok(())
        })
    }

    /// A weight, rows to normalise, and room for what comes out.
    fn to_norm(&self, cuda: &Cuda) -> Result<(Weight, Tensor, Tensor), Box<dyn Error>> {
        let (rows, dim) = (self.rows(), self.heads.dim);
        let bytes: Vec<u8> = numbers(dim).iter().flat_map(|x| x.to_le_bytes()).collect();
        let range = 0..bytes.len();
        let source =
            WeightSource { bytes: std::sync::Arc::new(bytes), range, dtype: Dtype::F32, shape: vec![dim] };
        let weight = cuda.weight(source)?;
        let (mut x, out) = (cuda.tensor(rows, dim)?, cuda.tensor(rows, dim)?);
        cuda.write(&mut x, &numbers(rows * dim))?;
        Ok((weight, x, out))
    }

    fn linear(&self, cuda: &Cuda) -> Result<f64, Box<dyn Error>> {
        let (rows, inner, outer) = (self.rows(), self.heads.dim, self.heads.query);
        let bytes: Vec<u8> = numbers(outer * inner).iter().flat_map(|x| x.to_le_bytes()).collect();
        let range = 0..bytes.len();
        let shape = vec![outer, inner];
        let source = WeightSource { bytes: std::sync::Arc::new(bytes), range, dtype: Dtype::F32, shape };
        let weight = cuda.weight(source)?;
        let (mut x, mut out) = (cuda.tensor(rows, inner)?, cuda.tensor(rows, outer)?);
        cuda.write(&mut x, &numbers(rows * inner))?;
        recorded(cuda, |cuda| {
            Ok(cuda.linear(&x, &mut [Projection { weight: &weight, bias: None, out: &mut out }])?)
        })
    }

    /// With the copies there and back that every call makes.
    fn sample(&self, cuda: &Cuda) -> Result<f64, Box<dyn Error>> {
        let (rows, vocabulary) = (self.rows(), self.heads.dim);
        let mut logits = cuda.tensor(rows, vocabulary)?;
        cuda.write(&mut logits, &numbers(rows * vocabulary))?;
        let draw = |row: u64| Draw {
            temperature: 0.8,
            top_k: 50,
            top_p: 0.9,
            random: row.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            ..Draw::default()
        };
        let draws: Vec<Draw<'_>> = (0..rows as u64).map(draw).collect();
        let mut fastest = f64::INFINITY;
        for _ in 0..20 {
            let begun = Instant::now();
            cuda.sample(&logits, &draws, &[])?;
            fastest = fastest.min(begun.elapsed().as_secs_f64() * 1e6);
        }
        Ok(fastest)
    }
}

/// `64x4096` is 64 times 4096; commas join.
fn lengths(text: &str) -> Result<Vec<usize>, Box<dyn Error>> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let (times, length) = part.split_once('x').ok_or_else(|| format!("no TIMESxLENGTH: {part}"))?;
        all.resize(all.len() + times.parse::<usize>()?, length.parse()?);
    }
    Ok(all)
}

/// Random numbers of -1..1: zeros would be read faster.
fn numbers(n: usize) -> Vec<f32> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Writes every slot of a pool.
fn fill(cuda: &Cuda, pool: &mut KvPool, shape: KvShape) -> Result<(), Box<dyn Error>> {
    let (slots, width) = (shape.blocks * shape.block_size, shape.kv_heads * shape.head_dim);
    let together = slots.min(4096);
    let mut k = cuda.tensor(together, width)?;
    cuda.write(&mut k, &numbers(together * width))?;
    for start in (0..slots).step_by(together) {
        let slots: Vec<i64> = (0..together).map(|n| ((start + n) % slots) as i64).collect();
        let positions = vec![0; together];
        let (spans, block_tables, block_size) = (&[][..], &[][..], shape.block_size);
        let batch =
            cuda.batch(BatchInput { positions: &positions, slots: &slots, spans, block_tables, block_size })?;
        cuda.append(pool, 0, &batch, &k, &k)?;
    }
    Ok(())
}

/// Microseconds of a step without the host: so many replays of it take at least 20 ms.
fn recorded(
    cuda: &Cuda,
    mut step: impl FnMut(&Cuda) -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut mark = cuda.tensor(1, 1)?;
    cuda.write(&mut mark, &[0.0])?;
    step(cuda)?;
    let mut failed = None;
    let graph = cuda.capture(|cuda| {
        failed = step(cuda).err();
        Ok(())
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    let run = |times: u32| {
        cuda.read(&mark)?;
        let begun = Instant::now();
        (0..times).try_for_each(|_| graph.replay())?;
        // Waits for all of them.
        cuda.read(&mark)?;
        Ok::<_, Box<dyn Error>>(begun.elapsed().as_secs_f64() * 1e6)
    };
    let one = run(3)? / 3.0;
    let times = (20_000.0 / one).clamp(3.0, 2000.0) as u32;
    let mut fastest = f64::INFINITY;
    for _ in 0..5 {
        fastest = fastest.min(run(times)? / f64::from(times));
    }
    Ok(fastest)
}

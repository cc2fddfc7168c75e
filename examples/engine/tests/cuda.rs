//! The engine with CUDA's operators. Without a GPU they run in the emulator that the tests of `gpu-kernels` bring; with
//! `QUAYLINE_GPU` set, on this machine's GPU.
//!
//! Activations have 16 bits there: numbers are compared with the reference's and the CPU's within a bound. Every
//! other way to compute the same tokens (in chunks, beside others, recorded and replayed, after a hit) must then give
//! the very same bits.
#![cfg(unix)]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test; the emulator is a library of C++"
)]

#[path = "../../../gpu-kernels/tests/common/mod.rs"]
mod common;
#[path = "../../../gpu-kernels/tests/common/emulator.rs"]
mod emulator;
#[cfg(feature = "cuda")]
#[path = "../../../gpu-kernels/tests/common/fake_cublaslt.rs"]
mod fake_cublaslt;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use emulator::Emulator;
#[cfg(feature = "cuda")]
use quayline_engine::CublasLtPlace;
use quayline_engine::{
    Constraint, Device, Engine, FinishReason, Grammar, KvDtype, KvSize, LoadError, Model, ModelFiles,
    Options, Output, Request, RequestId, Rounding, Sampling, Speculation, StepArrays, StepLimits, Tick,
};
use quayline_gpu_kernels::Dtype;
use safetensors::SafeTensors;

/// Largest difference from the f32 reference of any logit (their standard deviation is 1.2): activations, keys and
/// values are rounded to 8 bits of bf16, or to 11 of f16, about ten times a layer.
const TOLERANCE_BF16: f32 = 2e-1;
const TOLERANCE_F16: f32 = 2e-2;
/// The same for log-probabilities of one layer in bf16, from the CPU's.
const TOLERANCE_LOGPROB: f32 = 1e-1;

/// What the reference computed: `tests/parity/README.md`.
struct Golden {
    tokens: Vec<u32>,
    rows: Vec<usize>,
    logits: Vec<f32>,
}

fn directory(variant: &str) -> PathBuf {
    emulator::in_workspace("examples/engine/tests/parity").join(variant)
}

impl Golden {
    fn read(variant: &str) -> Self {
        let bytes = std::fs::read(directory(variant).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words =
            |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec() };
        let ids = |name: &str| -> Vec<u32> { words(name).into_iter().map(u32::from_le_bytes).collect() };
        let tokens = [ids("prompt"), ids("greedy")].concat();
        let rows = ids("rows").into_iter().map(|row| row as usize).collect();
        Self { tokens, rows, logits: words("logits").into_iter().map(f32::from_le_bytes).collect() }
    }
}

/// Logits of a sequence of a checkpoint of `tests/parity`, in chunks of some length.
fn logits(variant: &str, dtype: Dtype, tokens: &[u32], chunk: usize) -> Option<Vec<f32>> {
    let (cuda, _) = emulator::cuda(dtype, false)?;
    let limits = StepLimits { tokens: 128, logits_rows: 128, positions: 128 };
    let mut model = Model::load(cuda, &ModelFiles::open(directory(variant)).unwrap(), limits).unwrap();
    let mut pool = model.kv_pool(9, 16, dtype).unwrap();
    let mut found = Vec::new();
    for (part, start) in tokens.chunks(chunk).zip((0..).step_by(chunk)) {
        let mut arrays = StepArrays::new(16);
        arrays.push(start, [part, &[]], [3, 7, 1, 8, 2, 6].into_iter());
        (0..part.len() as u32).for_each(|row| assert_eq!(arrays.want_logits(row), row));
        model.run(&mut pool, &arrays.input()).unwrap();
        found.extend_from_slice(&model.logits(0..part.len() as u32).unwrap());
    }
    Some(found)
}

#[test]
fn logits_are_the_reference_s_and_chunks_do_not_change_a_bit() {
    for (variant, dtype, tolerance) in [
        ("llama-f16", Dtype::F16, TOLERANCE_F16),
        ("llama-f32", Dtype::F16, TOLERANCE_F16),
        ("llama-biases", Dtype::Bf16, TOLERANCE_BF16),
        ("llama-yarn", Dtype::Bf16, TOLERANCE_BF16),
        ("mistral", Dtype::Bf16, TOLERANCE_BF16),
        ("qwen2", Dtype::Bf16, TOLERANCE_BF16),
        ("qwen3", Dtype::Bf16, TOLERANCE_BF16),
    ] {
        let golden = Golden::read(variant);
        let Some(whole) = logits(variant, dtype, &golden.tokens, usize::MAX) else { return };
        let vocab = whole.len() / golden.tokens.len();
        let rows = golden.rows.iter().flat_map(|&row| &whole[row * vocab..(row + 1) * vocab]);
        let apart = rows.zip(&golden.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{variant}: largest difference {apart:e}");
        assert!(apart <= tolerance, "{variant}: {apart} is above {tolerance}");
        assert!(logits(variant, dtype, &golden.tokens, 7).unwrap() == whole, "{variant} in chunks");
    }
}

/// The first layer of the bundled model alone: an emulator takes its time.
fn one_layer() -> ModelFiles {
    let (bundled, directory) = (ModelFiles::bundled(), emulator::scratch().join("one-layer"));
    let _ = std::fs::create_dir_all(&directory);
    let write = |name: &str, bytes: &[u8]| {
        // Another test may read the file: the finished one takes its place at once.
        let unfinished = directory.join(format!("{name}.{:?}", std::thread::current().id()));
        std::fs::write(&unfinished, bytes).unwrap();
        std::fs::rename(&unfinished, directory.join(name)).unwrap();
    };
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        write(name, &bundled.read(name).unwrap().unwrap());
    }
    let mut config = bundled.json("config.json").unwrap().unwrap();
    config.insert("num_hidden_layers".into(), 1.into());
    write("config.json", &serde_json::to_vec(&config).unwrap());
    let weights = bundled.read("model.safetensors").unwrap().unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let first = |name: &str| !name.starts_with("model.layers.") || name.starts_with("model.layers.0.");
    let kept = weights.iter().filter(|(name, _)| first(name));
    write("model.safetensors", &safetensors::serialize(kept, None).unwrap());
    ModelFiles::open(directory).unwrap()
}

/// That model on the GPU or in the emulator; `None` and a line in the log where there is neither.
fn load(options: &Options) -> Option<(Engine, Arc<Emulator>)> {
    let files = one_layer();
    if emulator::on_gpu() {
        let engine = Engine::load(&files, &Options { device: Device::Cuda, ..options.clone() });
        return Some((engine.expect("a GPU that works"), Arc::new(Emulator::idle(false))));
    }
    let emulator = Arc::new(Emulator::new(false)?);
    let engine = Engine::load_on(Arc::clone(&emulator) as _, &files, options);
    Some((engine.unwrap(), emulator))
}

fn options() -> Options {
    Options { kv: KvSize::Blocks(40), max_model_len: Some(128), max_num_seqs: 8, ..Options::default() }
}

/// An answer's tokens, their log-probabilities, and by how much each was likelier than the next likely.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    leads: Vec<f32>,
}

/// Two that begin alike, one that draws, and a short one.
fn requests(engine: &Engine) -> Vec<Request> {
    let texts = [
        ("ROMEO:\nBut, soft! what light through yonder window breaks? It is", 0.0),
        ("ROMEO:\nBut, soft! what light through yonder window breaks? And", 0.8),
        ("JULIET:\nO", 0.0),
    ];
    let request = |(id, (text, temperature)): (u64, (&str, f32))| {
        let sampling = Sampling {
            temperature,
            seed: Some(5),
            max_tokens: Some(5),
            ignore_eos: true,
            logprobs: Some(2),
            ..Sampling::default()
        };
        Request { sampling, ..Request::new(RequestId(id), engine.text().encode(text, true).unwrap()) }
    };
    (0..).zip(texts).map(request).collect()
}

/// Answers to some of the requests, all at once.
fn answers(engine: &mut Engine, asked: &[usize]) -> Vec<Answer> {
    let all = requests(engine);
    asked.iter().for_each(|&n| engine.add(all[n].clone()).unwrap());
    let mut outputs: Vec<Output> = Vec::new();
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
        engine.check().unwrap();
    }
    let of = |&n: &usize| {
        let tokens =
            outputs.iter().filter(|output| output.id.0 == n as u64).flat_map(|output| &output.tokens);
        tokens.fold(Answer::default(), |mut answer, token| {
            let logprobs = token.logprobs.as_ref().unwrap();
            answer.tokens.push(token.id);
            answer.logprobs.push(logprobs.chosen.logprob);
            answer.leads.push(logprobs.top[0].logprob - logprobs.top[1].logprob);
            answer
        })
    };
    asked.iter().map(of).collect()
}

/// A greedy answer beside the CPU's. From a choice on that was as good as a tie, both go on with texts of their own.
fn compare(found: &Answer, exact: &Answer) {
    let context = format!("{found:?}, the CPU's {exact:?}");
    let same = (0..5).take_while(|&at| found.tokens[at] == exact.tokens[at]).count();
    assert!(same == 5 || (same > 0 && exact.leads[same] < TOLERANCE_LOGPROB), "{context}");
    for at in 0..same {
        assert!((found.logprobs[at] - exact.logprobs[at]).abs() < TOLERANCE_LOGPROB, "{context}");
    }
}

#[test]
fn answers_are_the_cpu_s_and_the_same_whatever_else_runs() {
    let Some((mut engine, emulator)) = load(&Options { prefix_caching: false, ..options() }) else { return };
    assert_eq!(engine.device(), Device::Cuda);
    let alone: Vec<Answer> = (0..3).flat_map(|n| answers(&mut engine, &[n])).collect();
    if !emulator::on_gpu() {
        // Five tokens each: one after the prompt, one in a step that is then recorded, and that again.
        assert_eq!(emulator.replays.load(Ordering::Relaxed), 3 + 4 + 4);
    }

    let mut cpu = Engine::load(&one_layer(), &options()).unwrap();
    for n in [0, 2] {
        compare(&alone[n], &answers(&mut cpu, &[n])[0]);
    }

    assert!(answers(&mut engine, &[0, 1, 2]) == alone, "together");
    let chunked = Options { long_prefill_token_threshold: 5, block_size: 8.try_into().unwrap(), ..options() };
    let Some((mut engine, _)) = load(&chunked) else { return };
    assert!(answers(&mut engine, &[2, 0, 1]) == [2, 0, 1].map(|n| alone[n].clone()), "in chunks of five");
    let before = engine.snapshot().prefix.hits;
    assert!(answers(&mut engine, &[1]) == [alone[1].clone()], "from the cache");
    assert!(engine.snapshot().prefix.hits > before);
}

#[test]
fn warming_up_records_a_step_and_changes_nothing_that_can_be_seen() {
    let [Some((mut cold, of_cold)), Some((mut warm, of_warm))] = [load(&options()), load(&options())] else {
        return;
    };
    for first in [true, false] {
        warm.warm_up().unwrap();
        assert_eq!(format!("{:?}", warm.snapshot()), format!("{:?}", cold.snapshot()));
        // The second time the prompt is found in the cache, where it was before.
        assert!(answers(&mut warm, &[0]) == answers(&mut cold, &[0]));
        let ahead = if first { 1 } else { 2 };
        let replays = [&of_cold, &of_warm].map(|emulator| emulator.replays.load(Ordering::Relaxed));
        // The step of one row was recorded before anybody came; warming up again replayed it.
        assert!(emulator::on_gpu() || replays[1] == replays[0] + ahead, "{replays:?}");
    }
}

/// Tokens of answers, all at once.
fn tokens(engine: &mut Engine, asked: &[(u64, Sampling)], grammar: Option<&Grammar>) -> Vec<Vec<u32>> {
    let prompt = engine.text().encode("ROMEO:\nBut, soft! what light", true).unwrap();
    for (id, sampling) in asked {
        let (sampling, grammar) = (sampling.clone(), grammar.cloned());
        engine.add(Request { sampling, grammar, ..Request::new(RequestId(*id), prompt.clone()) }).unwrap();
    }
    let mut outputs: Vec<Output> = Vec::new();
    while engine.has_work() {
        engine.step(Tick(0), &mut outputs);
        engine.check().unwrap();
    }
    let of = |id: u64| outputs.iter().filter(move |output| output.id.0 == id);
    let ids = |id| of(id).flat_map(|output| output.tokens.iter().map(|token| token.id)).collect();
    asked.iter().map(|&(id, _)| ids(id)).collect()
}

/// Ways to choose that a GPU does itself.
fn drawn() -> Vec<(u64, Sampling)> {
    let base = Sampling { seed: Some(5), max_tokens: Some(6), ignore_eos: true, ..Sampling::default() };
    let greedy = Sampling { temperature: 0.0, ..base.clone() };
    let penalties =
        Sampling { repetition_penalty: 2.5, presence_penalty: 1.4, frequency_penalty: 1.7, ..greedy.clone() };
    let cut = Sampling { temperature: 0.8, top_k: 40, top_p: 0.9, min_p: 0.01, ..base.clone() };
    let ruled = Sampling {
        allowed_token_ids: Some((200..900).collect()),
        bad_words: vec!["is".to_owned()],
        stop_token_ids: vec![353],
        min_tokens: 3,
        ..greedy.clone()
    };
    (0..).zip([greedy, penalties, base, cut, ruled]).collect()
}

#[test]
fn tokens_are_drawn_where_the_logits_are_and_are_the_hosts() {
    let Some((mut engine, emulator)) = load(&Options { prefix_caching: false, ..options() }) else { return };
    let asked = drawn();
    let found = tokens(&mut engine, &asked, None);
    assert_ne!(found[0], found[1], "penalties count");
    assert_ne!(found[0], found[4], "rules count");
    if !emulator::on_gpu() {
        let rows = asked.iter().map(|(_, sampling)| u64::from(sampling.max_tokens.unwrap())).sum::<u64>();
        let downloaded = emulator.downloaded.load(Ordering::Relaxed);
        assert!(downloaded <= rows * 16, "{downloaded} bytes for {rows} tokens: logits were brought over");
    }
    // A request that wants log-probabilities is the host's.
    let told = |(id, sampling): &(u64, Sampling)| (*id, Sampling { logprobs: Some(0), ..sampling.clone() });
    let told: Vec<_> = asked.iter().map(told).collect();
    assert_eq!(tokens(&mut engine, &told, None), found, "by the host");
    // Beside others that are the host's, and alone.
    let others = told.iter().map(|(id, sampling)| (id + 10, sampling.clone()));
    let mixed: Vec<_> = others.chain(asked.iter().cloned()).collect();
    assert_eq!(tokens(&mut engine, &mixed, None)[asked.len()..], found, "beside others");
    assert_eq!(tokens(&mut engine, &asked[3..], None)[0], found[3], "alone");
    // Under a grammar, whose mask goes to the device.
    let grammar = engine.grammars().compile(&Constraint::Regex("( [a-z]+){3}[.]".into())).unwrap();
    let before = emulator.downloaded.load(Ordering::Relaxed);
    let guided = tokens(&mut engine, &asked[..4], Some(&grammar));
    assert_ne!(guided, found[..4]);
    let downloaded = emulator.downloaded.load(Ordering::Relaxed) - before;
    assert!(downloaded <= 24 * 16, "{downloaded} bytes: logits were brought over");
    assert_eq!(tokens(&mut engine, &told[..4], Some(&grammar)), guided, "under a grammar, by the host");
    // With drafts, some of which are verified in a step.
    let [one, three] = [1, 3].map(|n| NonZeroU32::new(n).unwrap());
    let speculation = Speculation {
        num_speculative_tokens: three,
        prompt_lookup_max: three,
        prompt_lookup_min: one,
        disable_by_batch_size: None,
    };
    let speculation = Some(speculation);
    let Some((mut engine, _)) = load(&Options { speculation, ..options() }) else { return };
    assert_eq!(tokens(&mut engine, &asked, None), found, "with drafts");
    assert_eq!(tokens(&mut engine, &asked[..4], Some(&grammar)), guided, "with drafts under a grammar");
    let Some((mut engine, _)) = load(&Options { async_scheduling: true, ..options() }) else { return };
    assert_eq!(tokens(&mut engine, &asked, None), found, "planned ahead");
}

#[test]
fn a_device_that_fails_ends_everybody_with_an_error_and_no_more() {
    for async_scheduling in [false, true] {
        let Some((mut engine, emulator)) = load(&Options { async_scheduling, ..options() }) else { return };
        if emulator::on_gpu() {
            eprintln!("skipped: a GPU does not fail when told to");
            return;
        }
        let expected = answers(&mut engine, &[0, 1, 2]);
        for launches in [0, 30] {
            let all = requests(&engine);
            all.iter().for_each(|request| engine.add(request.clone()).unwrap());
            emulator.launches_left.store(launches, Ordering::Relaxed);
            let mut outputs: Vec<Output> = Vec::new();
            while engine.has_work() {
                engine.step(Tick(0), &mut outputs);
                engine.check().unwrap();
            }
            for request in &all {
                let mut ends = outputs.iter().filter(|output| output.id == request.id);
                let end = ends.next_back().and_then(|output| output.finish.as_ref());
                assert_eq!(end.map(|finish| finish.reason), Some(FinishReason::Error), "{launches} launches");
            }
            assert!(engine.failure().unwrap().to_string().contains("was told to fail"));
            emulator.launches_left.store(u64::MAX, Ordering::Relaxed);
            assert_eq!(answers(&mut engine, &[0, 1, 2]), expected, "after {launches} launches");
            assert!(engine.failure().is_none());
        }
    }
}

#[test]
fn rounded_matrices_answer_as_on_the_cpu() {
    for rounding in [Rounding::Int8, Rounding::Int4, Rounding::Fp8] {
        let options = Options { quantization: Some(rounding), ..options() };
        let Some((mut engine, _)) = load(&options) else { return };
        let found = answers(&mut engine, &[2]).remove(0);
        let mut cpu = Engine::load(&one_layer(), &options).unwrap();
        compare(&found, &answers(&mut cpu, &[2])[0]);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_library_multiplies_where_it_is_asked_for() {
    let refused = |device, place| {
        let options = Options { device, cublaslt: Some(place), ..options() };
        let loaded = match Emulator::new(false) {
            Some(emulator) if device == Device::Cuda => {
                Engine::load_on(Arc::new(emulator), &one_layer(), &options)
            }
            _ => Engine::load(&one_layer(), &options),
        };
        match loaded.unwrap_err() {
            LoadError::Options { option: "cublaslt", problem } => problem,
            other => panic!("{other}"),
        }
    };
    let problem = refused(Device::Cpu, CublasLtPlace::Installed);
    assert!(problem.ends_with("the device is the CPU"), "{problem}");
    if emulator::on_gpu() {
        eprintln!("skipped: the stand-in computes on the host's memory");
        return;
    }
    let flags = ["-DFAKE_VERSION=130000"];
    let Some(fake) = fake_cublaslt::Fake::build("engine", &flags) else { return };
    let problem = refused(Device::Cuda, CublasLtPlace::File("nowhere/libcublasLt.so".into()));
    assert!(problem.contains("nowhere/libcublasLt.so"), "{problem}");

    let options = Options {
        cublaslt: Some(CublasLtPlace::File(fake.path.clone())),
        prefix_caching: false,
        ..options()
    };
    let Some((mut engine, _)) = load(&options) else { return };
    let mut cpu = Engine::load(&one_layer(), &Options { cublaslt: None, ..options }).unwrap();
    // Our kernels keep steps of few rows, as one has that reads the short prompt.
    let products = [2, 0].map(|n| {
        let before = fake.counted("fake_products");
        compare(&answers(&mut engine, &[n])[0], &answers(&mut cpu, &[n])[0]);
        fake.counted("fake_products") - before
    });
    assert!(products[0] == 0 && products[1] > 0, "{products:?}");
}

#[test]
fn without_a_gpu_there_is_an_error_or_the_cpu() {
    let ask = |device| Engine::load(&ModelFiles::bundled(), &Options { device, ..options() });
    let auto = ask(Device::Auto).unwrap();
    match ask(Device::Cuda) {
        Ok(engine) => {
            eprintln!("skipped: this machine has a GPU");
            assert_eq!((engine.device(), auto.device()), (Device::Cuda, Device::Cuda));
        }
        Err(LoadError::Options { option: "device", problem }) => {
            assert!(problem.starts_with("no CUDA: "), "{problem}");
            assert_eq!(auto.device(), Device::Cpu);
            assert!(problem.ends_with(&auto.no_gpu().unwrap().to_string()));
        }
        Err(other) => panic!("{other}"),
    }
    assert_eq!(ask(Device::Cpu).unwrap().no_gpu(), None);
}

#[test]
fn the_cache_takes_what_a_gpu_has_left() {
    // Of so many bytes others have some, and the engine may have a share.
    let load_of = |total: u64, taken: u64, gpu_memory_utilization| {
        let emulator = Emulator::new(false)?;
        emulator.total_bytes.store(total, Ordering::Relaxed);
        emulator.taken_bytes.store(taken, Ordering::Relaxed);
        let max_model_len = Some(128);
        let options = Options { kv: KvSize::Auto, max_model_len, gpu_memory_utilization, ..options() };
        Some(Engine::load_on(Arc::new(emulator), &one_layer(), &options))
    };
    let load = |total: u64| load_of(total, 0, 0.9);
    let blocks_of =
        |total, taken, share| Some(load_of(total, taken, share)?.unwrap().snapshot().blocks.total);
    let blocks = |total| blocks_of(total, 0, 0.9);
    const MIB: u64 = 1 << 20;
    let Some(all) = blocks_of(128 * MIB, 0, 1.0) else { return };
    assert!(all > 100, "{all}: as many as there is room for, not as many as eight sequences need");
    let (half, without) = (blocks_of(128 * MIB, 0, 0.5).unwrap(), blocks_of(64 * MIB, 0, 1.0).unwrap());
    assert!(half < all && half == without, "{half} of {all}, and {without}");
    assert_eq!(blocks_of(128 * MIB, 64 * MIB, 0.9), Some(half), "what others have cannot be used");
    let refused = load(MIB).unwrap().unwrap_err().to_string();
    assert!(refused.contains("8 blocks") && refused.contains("the GPU's 1048576 bytes"), "{refused}");
    for share in [0.0, 1.01, f64::NAN] {
        let refused = load_of(MIB, 0, share).unwrap().unwrap_err().to_string();
        assert!(refused.contains("gpu_memory_utilization"), "{refused}");
    }
    // Between them there is a memory that holds some of the blocks.
    let (mut few, mut many) = (1 << 20, 1 << 26);
    while many - few > 1 << 12 {
        let between = u64::midpoint(few, many);
        match load(between).unwrap() {
            Ok(_) => many = between,
            Err(_) => few = between,
        }
    }
    assert_eq!(blocks(many), Some(8), "one sequence");
}

#[test]
fn a_cache_of_another_format_is_refused() {
    let Some(device) = Emulator::new(false) else { return };
    let options = Options { kv_dtype: KvDtype::F32, ..options() };
    let refused = Engine::load_on(Arc::new(device), &ModelFiles::bundled(), &options).unwrap_err();
    assert!(
        matches!(&refused, LoadError::Options { option: "kv_cache_dtype", problem } if problem.contains("bf16")),
        "{refused}"
    );
}

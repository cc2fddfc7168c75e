//! The forward pass against the reference implementation: `tests/parity/README.md` says what the files hold.
//!
//! The comparison of numbers with a tolerance is made once per checkpoint, for a whole prefill. Every other way to
//! compute the same sequence (in chunks, beside others, over shuffled blocks, after a hit, after a preemption) must
//! then give the very same bits.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use quayline_engine::{Model, ModelConfig, ModelFiles, Rope, StepInput, StepLimits};
use quayline_gpu_kernels::{BatchInput, Cpu, Dtype, Isa, Ops, Span};
use safetensors::SafeTensors;

const VARIANTS: &[&str] = &[
    "llama-awq",
    "llama-biases",
    "llama-f16",
    "llama-f32",
    "llama-fp8-channels",
    "llama-gptq",
    "llama-gptq-v2",
    "llama-linear",
    "llama-mixed",
    "llama-sharded",
    "llama-yarn",
    "llama2",
    "llama3",
    "mistral",
    "mistral-fp8-tensor",
    "qwen2",
    "qwen2-awq-128",
    "qwen2-fp8-tensor",
    "qwen2-gptq-asymmetric",
    "qwen2-window",
    "qwen3",
    "qwen3-fp8-blocks",
    "qwen3-gptq-rows",
];

/// Largest difference from the f32 reference of any logit (their standard deviation is 1.2), with keys and values
/// cached as f32.
const TOLERANCE: f32 = 5e-5;
/// The same with 16-bit caches: bf16 keeps 8 bits of each key and value, f16 keeps 11.
const TOLERANCE_BF16: f32 = 1e-1;
const TOLERANCE_F16: f32 = 1e-2;
/// The same where products round activations to bf16 too. transformers itself is up to 0.118 off in bf16
/// (`qwen2-window`).
const TOLERANCE_ROUNDED: f32 = 0.118;

const BLOCKS: u32 = 64;
const LIMITS: StepLimits = StepLimits { tokens: 256, logits_rows: 32, positions: usize::MAX };

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity")
}

/// What the reference computed.
struct Golden {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    rows: Vec<usize>,
    logits: Vec<Vec<f32>>,
}

impl Golden {
    fn read(variant: &str) -> Self {
        let bytes = std::fs::read(directory().join(variant).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words =
            |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec() };
        let ids = |name: &str| -> Vec<u32> { words(name).into_iter().map(u32::from_le_bytes).collect() };
        let logits: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
        let rows: Vec<usize> = ids("rows").into_iter().map(|row| row as usize).collect();
        let width = logits.len() / rows.len();
        let logits = logits.chunks(width).map(<[f32]>::to_vec).collect();
        Self { prompt: ids("prompt"), greedy: ids("greedy"), rows, logits }
    }

    fn whole(&self) -> Vec<u32> {
        [self.prompt.as_slice(), &self.greedy].concat()
    }
}

/// A sequence and where its keys and values lie.
struct Sequence {
    tokens: Vec<u32>,
    table: Vec<u32>,
    computed: usize,
}

/// A model with its cache, and blocks dealt out in an order of our choice.
struct Bench {
    model: Model<Cpu>,
    pool: <Cpu as Ops>::KvPool,
    block_size: usize,
    free: Vec<u32>,
}

impl Bench {
    fn new(variant: &str, block_size: usize, dtype: Dtype) -> Self {
        Self::on(Cpu::detect().unwrap(), variant, block_size, dtype)
    }

    fn on(cpu: Cpu, variant: &str, block_size: usize, dtype: Dtype) -> Self {
        Self::within(LIMITS, cpu, variant, block_size, dtype)
    }

    fn within(limits: StepLimits, cpu: Cpu, variant: &str, block_size: usize, dtype: Dtype) -> Self {
        let files = ModelFiles::open(directory().join(variant)).unwrap();
        let model = Model::load(cpu, &files, limits).unwrap();
        let pool = model.kv_pool(BLOCKS as usize * 16 / block_size.min(16), block_size, dtype).unwrap();
        let blocks = BLOCKS * 16 / u32::try_from(block_size.min(16)).unwrap();
        // A fixed shuffle: 7 is prime to the number of blocks, so every block occurs once.
        let free = (0..blocks).map(|index| (index * 7 + 3) % blocks).filter(|&block| block != 0).collect();
        Self { model, pool, block_size, free }
    }

    fn sequence(&mut self, tokens: &[u32]) -> Sequence {
        let blocks = 128_usize.div_ceil(self.block_size);
        let table = self.free.split_off(self.free.len() - blocks);
        Sequence { tokens: tokens.to_vec(), table, computed: 0 }
    }

    /// Gives a sequence's blocks back, full of numbers that nobody may read.
    fn take_blocks(&mut self, sequence: &mut Sequence) {
        self.free.splice(0..0, sequence.table.drain(..));
        let mut other = self.sequence(&[9; 100]);
        self.step(&mut [(&mut other, 100)]);
        self.free.splice(0..0, other.table);
        sequence.computed = 0;
        sequence.table = self.sequence(&[]).table;
    }

    /// Computes the next tokens of several sequences in one step and gives the logits of all of them, per sequence.
    fn step(&mut self, work: &mut [(&mut Sequence, usize)]) -> Vec<Vec<Vec<f32>>> {
        let blocks_max = work.iter().map(|(sequence, _)| sequence.table.len()).max().unwrap();
        let (mut tokens, mut positions, mut slots, mut spans) = (vec![], vec![], vec![], vec![]);
        let mut block_tables = vec![0; work.len() * blocks_max];
        for ((sequence, count), table) in work.iter_mut().zip(block_tables.chunks_mut(blocks_max)) {
            let range = sequence.computed..sequence.computed + *count;
            let query_start = u32::try_from(tokens.len()).unwrap();
            let (query_len, context_len) =
                (u32::try_from(*count).unwrap(), u32::try_from(range.end).unwrap());
            spans.push(Span { query_start, query_len, context_len });
            tokens.extend_from_slice(&sequence.tokens[range.clone()]);
            for position in range.clone() {
                let block = sequence.table[position / self.block_size] as usize;
                positions.push(u32::try_from(position).unwrap());
                slots.push(i64::try_from(block * self.block_size + position % self.block_size).unwrap());
            }
            table[..sequence.table.len()].copy_from_slice(&sequence.table);
            sequence.computed = range.end;
        }
        let batch = BatchInput {
            positions: &positions,
            slots: &slots,
            spans: &spans,
            block_tables: &block_tables,
            block_size: self.block_size,
        };
        let all: Vec<u32> = (0..u32::try_from(tokens.len()).unwrap()).collect();
        self.model.run(&mut self.pool, &StepInput { tokens: &tokens, batch, logits_rows: &all }).unwrap();
        let mut rows = self.all_logits(tokens.len()).into_iter();
        work.iter().map(|(_, count)| rows.by_ref().take(*count).collect()).collect()
    }

    /// Rows of logits in as many calls as the limit asks for.
    fn all_logits(&mut self, rows: usize) -> Vec<Vec<f32>> {
        let vocab = self.model.config().vocab;
        let mut found = Vec::new();
        let rows_max = self.model.limits().logits_rows;
        for start in (0..rows).step_by(rows_max) {
            let end = rows.min(start + rows_max);
            let range = u32::try_from(start).unwrap()..u32::try_from(end).unwrap();
            found.extend(self.model.logits(range).unwrap().chunks(vocab).map(<[f32]>::to_vec));
        }
        found
    }

    /// Logits at every position of `sequence`, computed in chunks of at most `chunk`.
    fn prefill(&mut self, sequence: &mut Sequence, chunk: usize) -> Vec<Vec<f32>> {
        let mut rows = Vec::new();
        while sequence.computed < sequence.tokens.len() {
            let count = chunk.min(sequence.tokens.len() - sequence.computed);
            rows.extend(self.step(&mut [(sequence, count)]).remove(0));
        }
        rows
    }
}

fn largest_difference(found: &[Vec<f32>], golden: &Golden) -> f32 {
    let pairs =
        golden.rows.iter().zip(&golden.logits).flat_map(|(&row, logits)| found[row].iter().zip(logits));
    pairs.map(|(found, reference)| (found - reference).abs()).fold(0.0, f32::max)
}

fn best(row: &[f32]) -> u32 {
    let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    u32::try_from(best).unwrap()
}

/// Logits of the whole golden sequence in one step: what every other way is compared with.
fn in_one_step(variant: &str, golden: &Golden) -> Vec<Vec<f32>> {
    let mut bench = Bench::new(variant, 16, Dtype::F32);
    let mut sequence = bench.sequence(&golden.whole());
    bench.prefill(&mut sequence, usize::MAX)
}

#[test]
fn logits_match_the_reference() {
    for &isa in Isa::ALL.iter().filter(|isa| isa.available()) {
        for (dtype, tolerance) in
            [(Dtype::F32, TOLERANCE), (Dtype::F16, TOLERANCE_F16), (Dtype::Bf16, TOLERANCE_BF16)]
        {
            // Matrix tiles and dot products multiply bf16 by bf16: activations are rounded as a bf16 cache rounds keys
            // and values.
            let tolerance = if isa.rounds_activations() { TOLERANCE_ROUNDED } else { tolerance };
            for variant in VARIANTS {
                let golden = Golden::read(variant);
                let mut bench = Bench::on(Cpu::new(None, Some(isa)).unwrap(), variant, 16, dtype);
                let mut sequence = bench.sequence(&golden.whole());
                let difference = largest_difference(&bench.prefill(&mut sequence, usize::MAX), &golden);
                println!("{isa}, {variant}, cache {dtype}: largest difference {difference:e}");
                assert!(
                    difference <= tolerance,
                    "{isa}, {variant}, cache {dtype}: {difference} is above {tolerance}"
                );
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    for variant in VARIANTS {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        for threads in [1, 3] {
            let cpu = Cpu::new(NonZeroUsize::new(threads), None).unwrap();
            let mut bench = Bench::on(cpu, variant, 16, Dtype::F32);
            let mut sequence = bench.sequence(&golden.whole());
            assert!(bench.prefill(&mut sequence, usize::MAX) == whole, "{variant}: {threads} threads");
        }
    }
}

#[test]
fn greedy_tokens_match_the_reference() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for variant in VARIANTS {
            let golden = Golden::read(variant);
            let mut bench = Bench::new(variant, 16, dtype);
            let mut sequence = bench.sequence(&golden.prompt);
            while sequence.tokens.len() < golden.prompt.len() + golden.greedy.len() {
                let rows = bench.prefill(&mut sequence, usize::MAX);
                sequence.tokens.push(best(rows.last().unwrap()));
            }
            assert_eq!(sequence.tokens, golden.whole(), "{variant}, cache {dtype}");
        }
    }
}

#[test]
fn chunks_and_block_sizes_do_not_change_a_bit() {
    for variant in VARIANTS {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        for (chunk, block_size) in [(1, 16), (3, 1), (7, 4), (16, 16), (17, 32), (33, 5), (64, 8)] {
            let mut bench = Bench::new(variant, block_size, Dtype::F32);
            let mut sequence = bench.sequence(&golden.whole());
            let found = bench.prefill(&mut sequence, chunk);
            assert!(found == whole, "{variant}: chunks of {chunk}, blocks of {block_size}");
        }
    }
}

#[test]
fn company_in_the_batch_does_not_change_a_bit() {
    for variant in VARIANTS {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        let mut bench = Bench::new(variant, 16, Dtype::F32);
        let mut ours = bench.sequence(&golden.whole());
        let mut long = bench.sequence(&[11; 90]);
        let mut short = bench.sequence(&[5, 250, 17]);
        let mut found = Vec::new();
        // Ours in a prefill beside two prefills, then in chunks beside a decode, then as a decode between others.
        found.extend(bench.step(&mut [(&mut long, 31), (&mut ours, 20), (&mut short, 2)]).remove(1));
        found.extend(bench.step(&mut [(&mut ours, 13), (&mut short, 1)]).remove(0));
        while ours.computed < ours.tokens.len() {
            found.extend(bench.step(&mut [(&mut long, 1), (&mut ours, 1)]).remove(1));
        }
        assert!(found == whole, "{variant}");
    }
}

#[test]
fn a_step_larger_than_the_room_is_computed_in_pieces_with_the_same_bits() {
    for variant in VARIANTS {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        for tokens in [1, 7, 20] {
            let limits = StepLimits { tokens, ..LIMITS };
            let mut bench = Bench::within(limits, Cpu::detect().unwrap(), variant, 16, Dtype::F32);
            let mut before = bench.sequence(&[11; 30]);
            let mut ours = bench.sequence(&golden.whole());
            let mut after = bench.sequence(&[5, 250, 17]);
            let found = bench.step(&mut [(&mut before, 30), (&mut ours, 65), (&mut after, 3)]).remove(1);
            assert!(found == whole, "{variant}: pieces of {tokens}");
        }
    }
}

#[test]
fn a_prefix_hit_does_not_change_a_bit() {
    for variant in VARIANTS {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        let mut bench = Bench::new(variant, 16, Dtype::F32);
        let mut first = bench.sequence(&golden.prompt[..40]);
        bench.prefill(&mut first, usize::MAX);
        let mut second = bench.sequence(&golden.whole());
        // Two whole blocks of 16 are the first sequence's, the rest is computed.
        second.table[..2].copy_from_slice(&first.table[..2]);
        second.computed = 32;
        let found = bench.prefill(&mut second, usize::MAX);
        assert!(found == whole[32..], "{variant}");
    }
}

#[test]
fn a_preempted_sequence_goes_on_with_the_same_bits() {
    for variant in VARIANTS {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        let mut bench = Bench::new(variant, 16, Dtype::F32);
        let mut sequence = bench.sequence(&golden.prompt);
        let generate = |bench: &mut Bench, sequence: &mut Sequence, until: usize, chunk: usize| {
            while sequence.tokens.len() < until {
                let rows = bench.prefill(sequence, chunk);
                sequence.tokens.push(best(rows.last().unwrap()));
            }
        };
        generate(&mut bench, &mut sequence, golden.prompt.len() + 9, usize::MAX);
        bench.take_blocks(&mut sequence);
        // Prompt and generated tokens are computed again, in chunks that cut across both.
        generate(&mut bench, &mut sequence, golden.whole().len(), 12);
        assert_eq!(sequence.tokens, golden.whole(), "{variant}");
        let last = bench.prefill(&mut sequence, usize::MAX);
        assert!(last.last() == whole.last(), "{variant}");
    }
}

#[test]
fn only_the_wanted_logits_are_computed_and_they_are_the_same() {
    for variant in ["llama2", "qwen3"] {
        let golden = Golden::read(variant);
        let whole = in_one_step(variant, &golden);
        let wishes = [vec![], vec![64], vec![3, 0, 64, 3], (0..64).collect::<Vec<u32>>()];
        for (wanted, tokens) in wishes.iter().flat_map(|wanted| [(wanted, 65), (wanted, 30)]) {
            let limits = StepLimits { tokens, ..LIMITS };
            let mut bench = Bench::within(limits, Cpu::detect().unwrap(), variant, 16, Dtype::F32);
            let table = bench.sequence(&[]).table;
            let positions: Vec<u32> = (0..65).collect();
            let slot = |position: &u32| i64::from(table[*position as usize / 16] * 16 + position % 16);
            let slots: Vec<i64> = positions.iter().map(slot).collect();
            let batch = BatchInput {
                positions: &positions,
                slots: &slots,
                spans: &[Span { query_start: 0, query_len: 65, context_len: 65 }],
                block_tables: &table,
                block_size: 16,
            };
            let input = StepInput { tokens: &golden.whole(), batch, logits_rows: wanted };
            bench.model.run(&mut bench.pool, &input).unwrap();
            let found = bench.all_logits(wanted.len());
            let expected: Vec<_> = wanted.iter().map(|&row| whole[row as usize].clone()).collect();
            assert!(found == expected, "{variant}: rows {wanted:?}, pieces of {tokens}");
            let past = u32::try_from(wanted.len()).unwrap();
            assert!(bench.model.logits(past..past + 1).is_err(), "{variant}: rows {wanted:?}");
        }
    }
}

#[test]
fn a_step_beyond_the_limits_is_refused_with_the_numbers() {
    let mut bench = Bench::new("llama2", 16, Dtype::F32);
    let batch = BatchInput { positions: &[128], slots: &[16], spans: &[], block_tables: &[], block_size: 16 };
    let input = StepInput { tokens: &[5], batch, logits_rows: &[] };
    let error = bench.model.run(&mut bench.pool, &input).unwrap_err().to_string();
    assert!(error.contains("position is 128") && error.contains("127"), "{error}");
    let batch = BatchInput { positions: &[0], ..batch };
    let input = StepInput { tokens: &[300], batch, logits_rows: &[] };
    let error = bench.model.run(&mut bench.pool, &input).unwrap_err().to_string();
    assert!(error.contains("token is 300"), "{error}");
    // A wish for a row that is not there, in a step of one piece and of two.
    for tokens in [2, 1] {
        let limits = StepLimits { tokens, ..LIMITS };
        let mut bench = Bench::within(limits, Cpu::detect().unwrap(), "llama2", 16, Dtype::F32);
        let batch = BatchInput { positions: &[0, 1], slots: &[16, 17], ..batch };
        let input = StepInput { tokens: &[5, 6], batch, logits_rows: &[2] };
        let error = bench.model.run(&mut bench.pool, &input).unwrap_err().to_string();
        assert!(error.contains("row") && error.contains("is 2"), "{error}");
    }
}

#[test]
fn rotary_tables_match_the_reference_at_the_last_position() {
    let text = std::fs::read(directory().join("rope.json")).unwrap();
    let cases: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text).unwrap();
    assert_eq!(cases.len(), 7);
    for (name, case) in cases {
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 9,
            "intermediate_size": 64, "num_attention_heads": 4, "head_dim": case["head_dim"],
            "max_position_embeddings": case["max_position_embeddings"], "rope_parameters": case["rope_parameters"],
        });
        let config = ModelConfig::from_json(config.as_object().unwrap()).unwrap();
        let last = usize::try_from(case["max_position_embeddings"].as_u64().unwrap()).unwrap() - 1;
        let row = Rope::new(&config.rope, config.head_dim).table(last..last + 1);
        for (found, key) in [(row.cos, "cos"), (row.sin, "sin")] {
            let expected = case[key].as_array().unwrap();
            assert_eq!(found.len(), expected.len(), "{name}");
            let differences = found
                .iter()
                .zip(expected)
                .map(|(&found, expected)| (f64::from(found) - expected.as_f64().unwrap()).abs());
            let largest = differences.fold(0.0, f64::max);
            println!("{name}: largest difference of a {key} at position {last}: {largest:e}");
            // One unit in the last place of a frequency turns the angle by up to 6e-8 of it.
            assert!(largest < 0.005, "{name}: {key} differs by {largest}");
        }
    }
}

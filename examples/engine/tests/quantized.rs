//! Matrices of small integers: checkpoints of AWQ and GPTQ, made here from the bundled model, against the same
//! numbers in floats; what rounding at load costs on text that the model has not seen; and the promise that a
//! sequence's bits do not depend on the batch.
#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "small numbers"
)]

#[path = "common/directory.rs"]
mod directory;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;

use directory::Directory;
use half::{bf16, f16};
use quayline_engine::{
    Engine, Model, ModelFiles, Options, QuantizationMethod, Rounding, StepInput, StepLimits, Text,
};
use quayline_gpu_kernels::{BatchInput, Cpu, Dtype, Isa, Span};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const WINDOW: usize = 256;
const LIMITS: StepLimits = StepLimits { tokens: WINDOW, logits_rows: WINDOW, positions: WINDOW };
const GROUP: usize = 32;

/// Type, shape and bytes of a tensor.
type Tensor = (safetensors::Dtype, Vec<usize>, Vec<u8>);

/// The bundled model with these tensors and this field in its configuration.
fn checkpoint(
    name: &str,
    tensors: &BTreeMap<String, Tensor>,
    quantization: Value,
) -> (Directory, ModelFiles) {
    let directory = Directory::new(name);
    let mut config: Value = serde_json::from_str(include_str!("../bundled/config.json")).unwrap();
    config["quantization_config"] = quantization;
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let write = |file: &str, bytes: &[u8]| fs::write(directory.0.join(file), bytes).unwrap();
    write("model.safetensors", &safetensors::serialize(views, None).unwrap());
    write("config.json", config.to_string().as_bytes());
    write("tokenizer.json", include_bytes!("../bundled/tokenizer.json"));
    write("tokenizer_config.json", include_bytes!("../bundled/tokenizer_config.json"));
    let files = ModelFiles::open(&directory.0).unwrap();
    (directory, files)
}

/// A matrix `[rows, cols]` in four bits: `[rows, cols]` values, and for each group of a row its zero point and scale.
struct Four {
    rows: usize,
    cols: usize,
    values: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f16>,
}

impl Four {
    fn round(matrix: &[f32], (rows, cols): (usize, usize)) -> Self {
        let mut four = Self { rows, cols, values: vec![], zeros: vec![], scales: vec![] };
        for group in matrix.chunks(GROUP) {
            let (low, high) = group.iter().fold((0.0_f32, 0.0_f32), |(a, b), &x| (a.min(x), b.max(x)));
            let scale = f16::from_f32((high - low) / 15.0);
            // A zero point of 1 at least: GPTQ's first version stores one less.
            let zero = (-low / scale.to_f32()).round().clamp(1.0, 15.0);
            four.values
                .extend(group.iter().map(|x| (x / scale.to_f32() + zero).round().clamp(0.0, 15.0) as u32));
            four.zeros.push(zero as u32);
            four.scales.push(scale);
        }
        four
    }

    fn worth(&self) -> Vec<f32> {
        let of = |(at, &value): (usize, &u32)| {
            (value as f32 - self.zeros[at / GROUP] as f32) * self.scales[at / GROUP].to_f32()
        };
        self.values.iter().enumerate().map(of).collect()
    }

    /// The tensors that a checkpoint has in its place.
    fn tensors(&self, method: &str) -> [(&'static str, Tensor); 3] {
        let groups = self.cols / GROUP;
        let value = |row: usize, col: usize| self.values[row * self.cols + col];
        let less = u32::from(method == "gptq");
        let order = if method == "awq" { [0, 2, 4, 6, 1, 3, 5, 7] } else { [0, 1, 2, 3, 4, 5, 6, 7] };
        let outputs = |of: &dyn Fn(usize) -> u32, first: usize| {
            (0..8).map(|place| of(first + order[place]) << (4 * place)).sum::<u32>()
        };
        let firsts = || (0..self.rows).step_by(8);
        let (shape, words): (_, Vec<u32>) = if method == "awq" {
            let line = |col: usize| firsts().map(move |first| outputs(&|row| value(row, col), first));
            ([self.cols, self.rows / 8], (0..self.cols).flat_map(line).collect())
        } else {
            let word = |row: usize, col: usize| (0..8).map(|i| value(row, col + i) << (4 * i)).sum();
            let line = |col: usize| (0..self.rows).map(move |row| word(row, col));
            ([self.cols / 8, self.rows], (0..self.cols).step_by(8).flat_map(line).collect())
        };
        let zero = |row: usize, group: usize| self.zeros[row * groups + group] - less;
        let zeros = |group: usize| firsts().map(move |first| outputs(&|row| zero(row, group), first));
        let zeros: Vec<u32> = (0..groups).flat_map(zeros).collect();
        let scales = |group: usize| (0..self.rows).map(move |row| self.scales[row * groups + group]);
        let scales: Vec<f16> = (0..groups).flat_map(scales).collect();
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        [
            ("qweight", (safetensors::Dtype::I32, shape.to_vec(), bytes(&words))),
            ("qzeros", (safetensors::Dtype::I32, vec![groups, self.rows / 8], bytes(&zeros))),
            (
                "scales",
                (
                    safetensors::Dtype::F16,
                    vec![groups, self.rows],
                    scales.iter().flat_map(|x| x.to_le_bytes()).collect(),
                ),
            ),
        ]
    }
}

/// Which input is at each place of a matrix of `cols` whose groups are filled in another order than inputs come in.
fn reordered(cols: usize) -> impl Iterator<Item = usize> {
    // 37 has no factor in common with the widths of the bundled model.
    (0..cols).map(move |place| place * 37 % cols)
}

/// The columns of a matrix, from the order of their places into that of the inputs.
fn by_input<T: Copy>(matrix: &[T], cols: usize) -> Vec<T> {
    let mut found = matrix.to_vec();
    for (to, from) in found.chunks_mut(cols).zip(matrix.chunks(cols)) {
        reordered(cols).zip(from).for_each(|(input, &x)| to[input] = x);
    }
    found
}

/// The bundled model in integers as `method` stores them, and in the floats that these are worth.
fn pair(method: &str) -> [BTreeMap<String, Tensor>; 2] {
    let bytes = include_bytes!("../bundled/model.safetensors");
    let (mut integers, mut floats) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in SafeTensors::deserialize(bytes).unwrap().tensors() {
        let as_it_is = || (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
        let Some(prefix) = name.strip_suffix("_proj.weight").map(|prefix| format!("{prefix}_proj")) else {
            integers.insert(name.clone(), as_it_is());
            floats.insert(name, as_it_is());
            continue;
        };
        let pairs = tensor.data().as_chunks::<2>().0;
        let (rows, cols) = (tensor.shape()[0], tensor.shape()[1]);
        let mut matrix: Vec<f32> = pairs.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect();
        let mut groups: Vec<i32> = (0..cols).map(|place| (place / GROUP) as i32).collect();
        let act_order = method == "gptq_act_order";
        if act_order {
            let places = matrix.chunks(cols).flat_map(|row| reordered(cols).map(|input| row[input]));
            matrix = places.collect();
            groups = by_input(&groups, cols);
        }
        let mut four = Four::round(&matrix, (rows, cols));
        let mut worth = four.worth();
        if act_order {
            four.values = by_input(&four.values, cols);
            worth = by_input(&worth, cols);
        }
        for (part, tensor) in four.tensors(if act_order { "gptq" } else { method }) {
            integers.insert(format!("{prefix}.{part}"), tensor);
        }
        if method != "awq" {
            let order = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
            integers.insert(format!("{prefix}.g_idx"), (safetensors::Dtype::I32, vec![cols], order));
        }
        let worth = worth.iter().flat_map(|x| x.to_le_bytes()).collect();
        floats.insert(name, (safetensors::Dtype::F32, tensor.shape().to_vec(), worth));
    }
    [integers, floats]
}

/// Logits after each of `tokens`, computed in steps of `chunk` tokens.
fn logits(model: &mut Model<Cpu>, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let mut pool = model.kv_pool(tokens.len().div_ceil(16), 16, Dtype::F32).unwrap();
    let tables: Vec<u32> = (0..tokens.len().div_ceil(16) as u32).collect();
    let mut all = Vec::new();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let first = (index * chunk) as u32;
        let count = part.len() as u32;
        let positions: Vec<u32> = (first..first + count).collect();
        let slots: Vec<i64> = positions.iter().map(|&position| i64::from(position)).collect();
        let span = [Span { query_start: 0, query_len: count, context_len: first + count }];
        let batch = BatchInput {
            positions: &positions,
            slots: &slots,
            spans: &span,
            block_tables: &tables,
            block_size: 16,
        };
        let rows: Vec<u32> = (0..count).collect();
        model.run(&mut pool, &StepInput { tokens: part, batch, logits_rows: &rows }).unwrap();
        all.extend_from_slice(&model.logits(0..count).unwrap());
    }
    all
}

/// Text that the bundled model has not seen (`bundled/training/README.md`).
fn held_out(tokens: usize) -> Vec<u32> {
    let packed: &[u8] = include_bytes!("../bundled/training/tinyshakespeare.txt.gz");
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    let rest = &text[text.len() / 10 * 9..];
    let rest = &rest[rest.find("\n\n").unwrap() + 2..];
    let mut ids = Text::load(&ModelFiles::bundled()).unwrap().encode(&rest[..tokens * 8], false).unwrap();
    ids.truncate(tokens);
    ids
}

#[test]
fn checkpoints_of_awq_and_gptq_compute_what_their_integers_are_worth() {
    let tokens = held_out(100);
    // Floats and integers both meet activations in f32.
    let cpu = || Cpu::new(None, Some(Isa::best_in_f32())).unwrap();
    for method in ["awq", "gptq", "gptq_v2", "gptq_act_order"] {
        let [integers, floats] = pair(method);
        let mut how = json!({"quant_method": &method[..method.len().min(4)], "bits": 4, "group_size": GROUP});
        if method == "gptq_v2" {
            how["checkpoint_format"] = json!("gptq_v2");
        }
        how["desc_act"] = json!(method == "gptq_act_order");
        let found = {
            let (_directory, files) = checkpoint(&format!("{method}-integers"), &integers, how);
            let mut model = Model::load(cpu(), &files, LIMITS).unwrap();
            let whole = logits(&mut model, &tokens, WINDOW);
            let piecewise = logits(&mut model, &tokens, 7);
            assert!(
                whole.iter().map(|x| x.to_bits()).eq(piecewise.iter().map(|x| x.to_bits())),
                "{method}: chunks"
            );
            whole
        };
        let (_directory, files) = checkpoint(&format!("{method}-floats"), &floats, Value::Null);
        let exact = logits(&mut Model::load(cpu(), &files, LIMITS).unwrap(), &tokens, WINDOW);
        let apart = found.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-3, "{method}: logits are up to {apart} apart");
    }
}

#[test]
fn groups_of_too_many_inputs_are_refused_by_name() {
    let [mut integers, _] = pair("gptq");
    let name = "model.layers.0.mlp.down_proj.g_idx";
    let mut says = |input: usize, group: i32| {
        let tensor = integers.get_mut(name).unwrap();
        tensor.2[4 * input..][..4].copy_from_slice(&group.to_le_bytes());
        let how = json!({"quant_method": "gptq", "bits": 4, "group_size": GROUP});
        let (_directory, files) = checkpoint("groups", &integers, how);
        Model::load(Cpu::detect().unwrap(), &files, LIMITS).unwrap_err().to_string()
    };
    let message = says(2, 3);
    assert!(message.contains(&format!("tensor {name} puts 31 inputs into group 0, not 32")), "{message}");
    let message = says(2, -1);
    assert!(message.contains(&format!("tensor {name} puts 1 inputs into group -1, not 0")), "{message}");
}

#[test]
fn what_is_asked_of_a_checkpoint_must_be_so() {
    let how = json!({"quant_method": "awq", "bits": 4, "group_size": GROUP});
    let (_directory, awq) = checkpoint("asked", &pair("awq")[0], how);
    let says = |files: &ModelFiles, options| match Engine::load(files, &options) {
        Ok(_) => "loaded".to_owned(),
        Err(error) => error.to_string(),
    };
    let method = |method| Options { quantization_method: Some(method), ..Options::default() };
    let rounded = |to| Options { quantization: Some(to), ..Options::default() };
    assert_eq!(says(&awq, method(QuantizationMethod::Awq)), "loaded");
    assert_eq!(
        says(&awq, method(QuantizationMethod::Gptq)),
        "option quantization: gptq is asked for, the checkpoint is awq"
    );
    assert_eq!(
        says(&awq, rounded(Rounding::Fp8)),
        "option quantization: fp8 is asked for, the checkpoint is awq"
    );
    let bundled = ModelFiles::bundled();
    assert_eq!(says(&bundled, rounded(Rounding::Fp8)), "loaded");
    assert_eq!(
        says(&bundled, method(QuantizationMethod::CompressedTensors)),
        "option quantization: compressed-tensors is asked for, the checkpoint is not quantised"
    );
    let dtype = |dtype| Options { dtype: Some(dtype), ..Options::default() };
    assert_eq!(says(&bundled, dtype(Dtype::Bf16)), "loaded");
    assert_eq!(says(&bundled, dtype(Dtype::F32)), "loaded");
    assert_eq!(
        says(&bundled, dtype(Dtype::F16)),
        "option dtype: f16 is asked for, the weights are bf16 and computed with in f32"
    );
}

/// Nats per token over windows, of which the second half is scored.
fn nats_per_token(rounding: Option<Rounding>, tokens: &[u32]) -> f64 {
    let files = ModelFiles::bundled();
    let mut model = Model::load_rounded(Cpu::detect().unwrap(), &files, LIMITS, rounding).unwrap();
    let (mut sum, mut count) = (0.0, 0.0);
    for start in (0..tokens.len() - WINDOW).step_by(WINDOW / 2) {
        let window = &tokens[start..start + WINDOW];
        let all = logits(&mut model, window, WINDOW);
        let rows = all.chunks(all.len() / WINDOW).zip(&window[1..]).skip(WINDOW / 2 - 1);
        for (row, &next) in rows {
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
            sum += total.ln() - f64::from(row[next as usize] - most);
            count += 1.0;
        }
    }
    sum / count
}

#[test]
fn rounding_costs_little_on_held_out_text() {
    let tokens = held_out(4096);
    let floats = nats_per_token(None, &tokens);
    println!("nats per token: bf16 {floats:.4}");
    assert!((floats - 3.680).abs() < 0.01, "the model is as good as its page says: {floats}");
    for (rounding, most) in [(Rounding::Int8, 0.01), (Rounding::Fp8, 0.01), (Rounding::Int4, 0.06)] {
        let rounded = nats_per_token(Some(rounding), &tokens);
        println!("nats per token: {rounding:?} {rounded:.4}");
        assert!((rounded - floats).abs() < most, "{rounding:?} {rounded}, bf16 {floats}");
    }
}

#[test]
fn a_rounded_model_gives_the_same_bits_in_pieces_and_on_any_number_of_threads() {
    let tokens = held_out(90);
    for rounding in [Rounding::Int8, Rounding::Int4, Rounding::Fp8] {
        let load = |threads| {
            let cpu = Cpu::new(std::num::NonZeroUsize::new(threads), None).unwrap();
            Model::load_rounded(cpu, &ModelFiles::bundled(), LIMITS, Some(rounding)).unwrap()
        };
        let whole = logits(&mut load(1), &tokens, WINDOW);
        for (threads, chunk) in [(1, 1), (2, 13), (3, 64)] {
            let found = logits(&mut load(threads), &tokens, chunk);
            assert!(
                whole.iter().map(|x| x.to_bits()).eq(found.iter().map(|x| x.to_bits())),
                "{rounding:?}, {threads} threads, steps of {chunk}"
            );
        }
    }
}

//! Damaged, hostile and mistaken checkpoints: each is refused before anything runs, in one line that names what is
//! wrong. Every directory is made here, from a small good one.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

#[path = "common/directory.rs"]
mod directory;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use directory::Directory;
use quayline_engine::{Model, ModelFiles, StepLimits};
use quayline_gpu_kernels::Cpu;
use serde_json::{Map, Value, json};

const LIMITS: StepLimits = StepLimits { tokens: 8, logits_rows: 1, positions: 64 };

impl Directory {
    fn write(&self, file: &str, content: impl AsRef<[u8]>) {
        fs::write(self.0.join(file), content).unwrap();
    }

    /// What loading says, on one line.
    fn refusal(&self) -> String {
        let model = ModelFiles::open(&self.0).and_then(|files| Model::load(Cpu::detect()?, &files, LIMITS));
        let message = model.expect_err("this checkpoint must not load").to_string();
        assert!(!message.contains('\n'), "more than one line: {message}");
        assert!(message.len() < 400, "too long to read: {message}");
        message
    }
}

/// `name -> (dtype, shape, bytes)`; written in the order of names.
type Tensors = BTreeMap<String, (&'static str, Vec<usize>, Vec<u8>)>;

fn config() -> Map<String, Value> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    });
    config.as_object().unwrap().clone()
}

fn tensors() -> Tensors {
    let shapes: [(&str, &[usize]); 12] = [
        ("model.embed_tokens.weight", &[10, 8]),
        ("model.layers.0.input_layernorm.weight", &[8]),
        ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
        ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
        ("model.layers.0.post_attention_layernorm.weight", &[8]),
        ("model.layers.0.mlp.gate_proj.weight", &[12, 8]),
        ("model.layers.0.mlp.up_proj.weight", &[12, 8]),
        ("model.layers.0.mlp.down_proj.weight", &[8, 12]),
        ("model.norm.weight", &[8]),
        ("lm_head.weight", &[10, 8]),
    ];
    shapes.into_iter().map(|(name, shape)| (name.to_owned(), zeros("BF16", shape))).collect()
}

fn zeros(dtype: &'static str, shape: &[usize]) -> (&'static str, Vec<usize>, Vec<u8>) {
    let width = if dtype == "F32" { 4 } else { 2 };
    (dtype, shape.to_vec(), vec![0; shape.iter().product::<usize>() * width])
}

/// The header as pairs, so that a test can say the impossible, and the data.
fn header_and_data(tensors: &Tensors) -> (Vec<(String, Value)>, Vec<u8>) {
    let (mut header, mut data) = (Vec::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.push((name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets})));
        data.extend_from_slice(bytes);
    }
    (header, data)
}

fn join(header: &[(String, Value)], data: &[u8]) -> Vec<u8> {
    let entries: Vec<String> =
        header.iter().map(|(name, entry)| format!("{}:{entry}", json!(name))).collect();
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let (header, data) = header_and_data(tensors);
    join(&header, &data)
}

fn write_config(directory: &Directory, config: &Map<String, Value>) {
    directory.write("config.json", serde_json::to_vec(config).unwrap());
}

/// A good checkpoint with one field of its configuration changed (null removes nothing, it is written).
fn refusal_with_config(test: &str, field: &str, value: Value) -> String {
    let directory = Directory::new(test);
    let mut config = config();
    config.insert(field.into(), value);
    write_config(&directory, &config);
    directory.write("model.safetensors", safetensors(&tensors()));
    directory.refusal()
}

fn refusal_with_tensors(test: &str, edit: impl FnOnce(&mut Tensors)) -> String {
    let mut tensors = tensors();
    edit(&mut tensors);
    refusal_with_file(test, &safetensors(&tensors))
}

fn refusal_with_file(test: &str, file: &[u8]) -> String {
    let directory = Directory::new(test);
    write_config(&directory, &config());
    directory.write("model.safetensors", file);
    directory.refusal()
}

fn refusal_with_header(test: &str, edit: impl FnOnce(&mut Vec<(String, Value)>)) -> String {
    let (mut header, data) = header_and_data(&tensors());
    edit(&mut header);
    refusal_with_file(test, &join(&header, &data))
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "the message lacks {part:?}: {message}");
    }
}

#[test]
fn the_good_one_loads() {
    let directory = Directory::new("good");
    write_config(&directory, &config());
    let mut tensors = tensors();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), zeros("F32", &[2]));
    directory.write("model.safetensors", safetensors(&tensors));
    let files = ModelFiles::open(&directory.0).unwrap();
    let model = Model::load(Cpu::detect().unwrap(), &files, LIMITS).unwrap();
    assert_eq!(model.config().vocab, 10);
    assert!(!model.config().tied_embeddings);
}

#[test]
fn a_tied_head_may_be_stored_or_not() {
    let directory = Directory::new("tied");
    let mut config = config();
    config.insert("tie_word_embeddings".into(), json!(true));
    write_config(&directory, &config);
    let mut tensors = tensors();
    for stored in [true, false] {
        directory.write("model.safetensors", safetensors(&tensors));
        let files = ModelFiles::open(&directory.0).unwrap();
        let model = Model::load(Cpu::detect().unwrap(), &files, LIMITS);
        assert!(model.is_ok(), "head stored: {stored}: {:?}", model.err());
        tensors.remove("lm_head.weight");
    }
}

#[test]
fn a_directory_must_exist_and_be_one() {
    let nowhere = ModelFiles::open("/nonexistent/model").unwrap_err().to_string();
    assert_names(&nowhere, &["/nonexistent/model"]);
    let file =
        ModelFiles::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap_err().to_string();
    assert_names(&file, &["Cargo.toml", "a model is a directory"]);
    let gguf = Directory::new("gguf");
    gguf.write("model.gguf", "GGUF");
    let file = ModelFiles::open(gguf.0.join("model.gguf")).unwrap_err().to_string();
    assert_names(&file, &["model.gguf", "GGUF files are not read", "a directory with config.json"]);
    assert_names(&gguf.refusal(), &["config.json", "no such file", "GGUF files like model.gguf"]);
    assert_names(&Directory::new("empty").refusal(), &["config.json", "no such file"]);
    let adapter = Directory::new("adapter");
    adapter.write("adapter_config.json", "{}");
    assert_names(&adapter.refusal(), &["config.json", "no such file", "LoRA adapter"]);
    let hub = Directory::new("hub");
    std::fs::create_dir_all(hub.0.join("snapshots/0a1b")).unwrap();
    hub.write("snapshots/0a1b/config.json", "{}");
    assert_names(&hub.refusal(), &["no such file", "there is one in ", "snapshots/0a1b"]);
}

#[test]
fn weights_must_be_there_in_the_right_format() {
    let directory = Directory::new("no-weights");
    write_config(&directory, &config());
    assert_names(&directory.refusal(), &["model.safetensors", "no such file"]);
    directory.write("pytorch_model.bin", "");
    assert_names(
        &directory.refusal(),
        &["model.safetensors", "pytorch_model.bin is a format that is not read"],
    );
}

#[test]
fn config_must_be_a_json_object() {
    let directory = Directory::new("json");
    for (text, said) in [("{\"a\": ", "not valid JSON"), ("[1]", "not a JSON object"), ("", "not valid JSON")]
    {
        directory.write("config.json", text);
        assert_names(&directory.refusal(), &["config.json", said]);
    }
    directory.write("config.json", [b'[', 0xff, 0xfe]);
    assert_names(&directory.refusal(), &["config.json", "not valid JSON"]);
    directory.write("config.json", "[".repeat(100_000));
    assert_names(&directory.refusal(), &["config.json", "recursion limit"]);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let cases = [
        ("architectures", json!(["GPTNeoXForCausalLM"]), "GPTNeoXForCausalLM is not supported"),
        ("architectures", json!("LlamaForCausalLM"), "architecture LlamaForCausalLM"),
        ("quantization_config", json!({"quant_method": "mxfp4"}), "a quantised checkpoint"),
        (
            "quantization_config",
            json!({"quant_method": "fp8", "fmt": "e5m2"}),
            "quantization_config.fmt is e5m2: a form of eight-bit floats other than e4m3",
        ),
        (
            "quantization_config",
            json!({"quant_method": "fp8", "weight_block_size": [128, 0]}),
            "quantization_config.weight_block_size is [128,0], expected",
        ),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "quantization_config.format is pack-quantized",
        ),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups":
                {"group_0": {"weights": {"type": "float", "num_bits": 4, "strategy": "tensor"}}}}),
            "quantization_config.config_groups.group_0.weights.num_bits is 4",
        ),
        ("quantization_config", json!({"quant_method": "awq", "bits": 3}), "quantization_config.bits is 3"),
        (
            "quantization_config",
            json!({"quant_method": "awq", "bits": 4, "version": "gemv"}),
            "version is gemv",
        ),
        (
            "quantization_config",
            json!({"quant_method": "awq", "bits": 4, "desc_act": true}),
            "desc_act is true",
        ),
        (
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4, "group_size": 12}),
            "group_size is 12",
        ),
        (
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
            "checkpoint_format is marlin",
        ),
        ("num_local_experts", json!(8), "a mixture of experts"),
        ("attn_logit_softcapping", json!(50.0), "soft-capping of attention scores"),
        ("final_logit_softcapping", json!(30.0), "soft-capping of logits"),
        ("hidden_act", json!("gelu"), "an activation other than silu"),
        ("partial_rotary_factor", json!(0.5), "rotating a part of each head"),
        ("is_causal", json!(false), "attention that sees later tokens"),
        ("rope_scaling", json!({"type": "longrope", "factor": 4.0}), "longrope"),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": [1, 1, 2]}), "mrope"),
        ("logit_scale", json!(0.0625), "scaling of logits"),
        ("clip_qkv", json!(8.0), "clipping of q, k and v"),
    ];
    for (field, value, said) in cases {
        assert_names(
            &refusal_with_config(&format!("computed-{field}"), field, value),
            &["config.json", said],
        );
    }
}

#[test]
fn absurd_sizes_are_refused_with_the_field_and_the_value() {
    let cases = [
        ("hidden_size", json!(0), "from 1 to"),
        ("hidden_size", json!(7), "a multiple of num_attention_heads 2"),
        ("hidden_size", json!(-8), "from 1 to"),
        ("hidden_size", json!(1e300), "from 1 to"),
        ("hidden_size", json!("8"), "from 1 to"),
        ("hidden_size", Value::Null, "missing"),
        ("num_attention_heads", json!(u64::MAX), "from 1 to"),
        ("num_key_value_heads", json!(3), "a divisor of num_attention_heads 2"),
        ("num_hidden_layers", json!(4_000_000_000_u64), "from 1 to"),
        ("vocab_size", json!(1_u64 << 40), "from 1 to"),
        ("intermediate_size", json!(8.5), "from 1 to"),
        ("max_position_embeddings", json!(u64::MAX), "from 1 to"),
        ("head_dim", json!(3), "an even number"),
        ("head_dim", json!(100_000), "from 1 to 256"),
        ("rms_norm_eps", json!(-1.0), "between 0 and 1"),
        ("rope_theta", json!(0), "between 1 and 1e15"),
        ("rope_scaling", json!("linear"), "an object"),
        ("tie_word_embeddings", json!("yes"), "true or false"),
        ("eos_token_id", json!(["a"]), "a token id"),
    ];
    for (field, value, said) in cases {
        let message = refusal_with_config(&format!("absurd-{field}"), field, value);
        assert_names(&message, &["config.json", field, said]);
    }
    let nested = [
        ("factor", json!({"rope_type": "linear"}), "rope_scaling.factor is missing"),
        ("factor", json!({"rope_type": "linear", "factor": 0.0}), "rope_scaling.factor"),
        ("factor", json!({"rope_type": "yarn", "factor": 1e99}), "rope_scaling.factor"),
        ("low", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor is missing"),
        ("type", json!({"rope_type": 3}), "rope_scaling.rope_type"),
    ];
    for (name, value, said) in nested {
        assert_names(&refusal_with_config(&format!("rope-{name}"), "rope_scaling", value), &[said]);
    }
}

#[test]
fn every_tensor_is_there_with_its_shape_and_type_and_no_other() {
    let missing = refusal_with_tensors("missing", |tensors| {
        tensors.remove("model.layers.0.mlp.up_proj.weight").unwrap();
    });
    assert_names(&missing, &["model.layers.0.mlp.up_proj.weight is missing", "[12, 8]"]);
    let untied = refusal_with_tensors("head", |tensors| {
        tensors.remove("lm_head.weight").unwrap();
    });
    assert_names(&untied, &["lm_head.weight is missing"]);
    let shape = refusal_with_tensors("shape", |tensors| {
        tensors.insert("model.layers.0.self_attn.k_proj.weight".into(), zeros("BF16", &[8, 8]));
    });
    assert_names(&shape, &["model.layers.0.self_attn.k_proj.weight", "[8, 8]", "[4, 8]"]);
    let transposed = refusal_with_tensors("transposed", |tensors| {
        tensors.insert("model.layers.0.mlp.down_proj.weight".into(), zeros("BF16", &[12, 8]));
    });
    assert_names(&transposed, &["model.layers.0.mlp.down_proj.weight", "[12, 8]", "[8, 12]"]);
    let dtype = refusal_with_tensors("dtype", |tensors| {
        tensors.insert("model.norm.weight".into(), zeros("I16", &[8]));
    });
    assert_names(&dtype, &["model.norm.weight is stored as I16", "BF16, F16 and F32"]);
    let extra = refusal_with_tensors("extra", |tensors| {
        tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), zeros("BF16", &[8]));
        tensors.insert("model.layers.1.input_layernorm.weight".into(), zeros("BF16", &[8]));
    });
    assert_names(&extra, &["2 of the tensors", "model.layers.0.self_attn.q_proj.bias"]);
}

#[test]
fn damaged_files_are_refused() {
    let good = safetensors(&tensors());
    assert_names(&refusal_with_file("nothing", &[]), &["model.safetensors", "0 bytes are too few"]);
    assert_names(&refusal_with_file("seven", &good[..7]), &["model.safetensors", "7 bytes are too few"]);
    assert_names(
        &refusal_with_file("in-header", &good[..100]),
        &["claims a header of", "the file has 100 bytes"],
    );
    let cut = refusal_with_file("cut", &good[..good.len() - 1]);
    assert_names(&cut, &["model.safetensors", "truncated", "model.norm.weight"]);
    let longer = refusal_with_file("longer", &[good.as_slice(), &[0; 5]].concat());
    assert_names(&longer, &["5 bytes after the last tensor"]);
    for length in [u64::MAX, 1 << 40, 100_000_001, 50_000_000] {
        let file = [&length.to_le_bytes(), &good[8..]].concat();
        assert_names(&refusal_with_file("length", &file), &["claims a header of", &length.to_string()]);
    }
    let no_json = [&4_u64.to_le_bytes()[..], b"\xff{}{"].concat();
    assert_names(&refusal_with_file("no-json", &no_json), &["model.safetensors", "header"]);
    let two = [&4_u64.to_le_bytes()[..], b"{}{}"].concat();
    assert_names(
        &refusal_with_file("two-objects", &two),
        &["model.safetensors", "header", "trailing characters"],
    );
    // Every prefix of a good file is refused, and none of them panics.
    for length in (0..good.len()).step_by(17) {
        refusal_with_file("prefix", &good[..length]);
    }
}

#[test]
fn hostile_headers_are_refused_with_the_tensor() {
    let entry = |dtype: &str, shape: Value, offsets: Value| json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
    let overlap = refusal_with_header("overlap", |header| {
        header[1].1["data_offsets"] = header[0].1["data_offsets"].clone();
        header[1].1["shape"] = header[0].1["shape"].clone();
    });
    assert_names(&overlap, &["begins at byte 0, inside the tensor that ends at 160"]);
    let gap = refusal_with_header("gap", |header| {
        header.remove(1);
    });
    assert_names(&gap, &["bytes 160..320 before tensor", "belong to no tensor"]);
    let beyond = refusal_with_header("beyond", |header| {
        header[11].1["data_offsets"][1] = json!(1_u64 << 60);
    });
    assert_names(&beyond, &["truncated", &header_and_data(&tensors()).0[11].0]);
    let backwards = refusal_with_header("backwards", |header| header[0].1["data_offsets"] = json!([160, 0]));
    assert_names(&backwards, &["lm_head.weight"]);
    let product = refusal_with_header("product", |header| {
        header[0].1 = entry("BF16", json!([1_u64 << 33, 1_u64 << 33]), json!([0, 160]));
    });
    assert_names(&product, &["tensor lm_head.weight of shape", "cannot be 160 bytes"]);
    let short =
        refusal_with_header("short", |header| header[0].1 = entry("F32", json!([10, 8]), json!([0, 160])));
    assert_names(&short, &["tensor lm_head.weight of shape [10, 8] in F32 cannot be 160 bytes"]);
    let unknown = refusal_with_header("unknown", |header| header[0].1["dtype"] = json!("Q4_0"));
    assert_names(&unknown, &["tensor lm_head.weight", "Q4_0"]);
    let negative = refusal_with_header("negative", |header| header[0].1["shape"] = json!([-10, -8]));
    assert_names(&negative, &["tensor lm_head.weight"]);
    let nameless = refusal_with_header("no-shape", |header| header[0].1 = json!({"dtype": "BF16"}));
    assert_names(&nameless, &["tensor lm_head.weight"]);
    let twice = refusal_with_header("twice", |header| header.push(header[3].clone()));
    assert_names(&twice, &[&header_and_data(&tensors()).0[3].0, "occurs twice"]);
}

/// The good checkpoint in two files with an index, before `edit` changes a file or the index.
fn refusal_with_shards(
    test: &str,
    edit: impl FnOnce(&Directory, &mut Map<String, Value>, &mut [Tensors; 2]),
) -> String {
    let directory = Directory::new(test);
    write_config(&directory, &config());
    let mut second = tensors();
    let mut first = second.split_off("model.layers.0.mlp.up_proj.weight");
    std::mem::swap(&mut first, &mut second);
    let mut shards = [first, second];
    let named = |shard: &Tensors, file: &str| {
        shard.keys().map(|name| (name.clone(), json!(file))).collect::<Vec<_>>()
    };
    let mut map: Map<String, Value> = named(&shards[0], "a.safetensors").into_iter().collect();
    map.extend(named(&shards[1], "b.safetensors"));
    edit(&directory, &mut map, &mut shards);
    directory.write("a.safetensors", safetensors(&shards[0]));
    if map.values().any(|file| file == "b.safetensors") {
        directory.write("b.safetensors", safetensors(&shards[1]));
    }
    directory.write("model.safetensors.index.json", json!({"weight_map": map}).to_string());
    directory.refusal()
}

#[test]
fn an_index_and_its_shards_must_agree() {
    const NORM: &str = "model.norm.weight";
    let gone = refusal_with_shards("shard-gone", |_, map, _| {
        for file in map.values_mut().filter(|file| **file == "b.safetensors") {
            *file = json!("model-00002-of-00002.safetensors");
        }
    });
    assert_names(
        &gone,
        &["model.safetensors.index.json", "model-00002-of-00002.safetensors, which is not there"],
    );
    let twice = refusal_with_shards("shard-twice", |_, _, shards| {
        shards[0].insert(NORM.into(), zeros("BF16", &[8]));
    });
    assert_names(&twice, &["model.norm.weight occurs twice", "a.safetensors", "b.safetensors"]);
    let elsewhere = refusal_with_shards("shard-elsewhere", |_, map, _| {
        map.insert(NORM.into(), json!("a.safetensors"));
    });
    assert_names(&elsewhere, &["model.norm.weight is in a.safetensors, it is in b.safetensors"]);
    let absent = refusal_with_shards("shard-absent", |_, _, shards| {
        shards[1].remove(NORM);
    });
    assert_names(&absent, &["index", "model.norm.weight is in b.safetensors, it is not"]);
    let unnamed = refusal_with_shards("shard-unnamed", |_, map, _| {
        map.remove(NORM);
    });
    assert_names(&unnamed, &["does not name tensor model.norm.weight of b.safetensors"]);
    for outside in ["../b.safetensors", "/etc/passwd", "b.bin", ""] {
        let outside = refusal_with_shards("shard-outside", |_, map, _| {
            map.insert(NORM.into(), json!(outside));
        });
        assert_names(&outside, &["index", "model.norm.weight", "no file name"]);
    }
    let directory = Directory::new("shard-no-map");
    write_config(&directory, &config());
    directory.write("model.safetensors.index.json", "{\"metadata\": {}}");
    assert_names(&directory.refusal(), &["model.safetensors.index.json", "no weight_map"]);
}

/// Bytes changed at random: our reader must never panic, and never accept what the format's own library refuses.
#[test]
fn changed_bytes_never_pass_unless_the_format_allows_them() {
    let good = safetensors(&tensors());
    let header_end = 8 + usize::try_from(u64::from_le_bytes(*good.first_chunk().unwrap())).unwrap();
    let directory = Directory::new("fuzz");
    write_config(&directory, &config());
    let mut accepted = 0;
    for seed in 0..600_u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            usize::try_from(random % below as u64).unwrap()
        };
        let mut file = good.clone();
        for _ in 0..=next(3) {
            // Mostly characters that keep the JSON valid: digits, and what stands around them.
            let at = next(header_end);
            file[at] =
                if next(4) == 0 { u8::try_from(next(256)).unwrap() } else { b"0123456789,[]"[next(13)] };
        }
        directory.write("model.safetensors", &file);
        let ours = ModelFiles::open(&directory.0).unwrap().weights();
        let theirs = safetensors::SafeTensors::deserialize(&file);
        match ours {
            Ok(_) => {
                accepted += 1;
                assert!(theirs.is_ok(), "seed {seed}: accepted, although {:?}", theirs.err());
            }
            Err(error) => assert!(!error.to_string().contains('\n'), "seed {seed}: {error}"),
        }
    }
    assert!((1..300).contains(&accepted), "{accepted} of 600 changed files were accepted");
}

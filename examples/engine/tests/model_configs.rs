//! Published `config.json` files: each either loads, with the sizes that its model has, or is refused by name of
//! what is missing here. The files are not part of the repository; without them the test says so and passes.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::path::Path;

use quayline_engine::{ConfigError, ModelConfig, ModelFiles, RopeScaling};
use serde_json::json;

/// File, and either `architecture layers/hidden/heads/kv heads/head width/vocabulary positions scaling` or the
/// refusal (without the list of what would load, which every message about an architecture ends with).
const VERDICTS: &[(&str, &str)] = &[
    ("baichuan2_7b.json", "architecture BaichuanForCausalLM is not supported"),
    ("bge_large.json", "architecture BertModel is not supported"),
    ("chatglm3_6b.json", "architecture ChatGLMModel is not supported"),
    ("clip_vision_model.json", "architecture CLIPVisionModelWithProjection is not supported"),
    ("command_r_35b.json", "architecture CohereForCausalLM is not supported"),
    ("dbrx_132b.json", "architecture DbrxForCausalLM is not supported"),
    ("deepseek_v3.json", "architecture DeepseekV3ForCausalLM is not supported"),
    ("e5_mistral_7b.json", "architecture MistralModel is not supported"),
    ("gemma_2_2b.json", "architecture Gemma2ForCausalLM is not supported"),
    ("gemma_2_9b.json", "architecture Gemma2ForCausalLM is not supported"),
    ("gemma_7b.json", "architecture GemmaForCausalLM is not supported"),
    ("gpt_oss_120b.json", "architecture GptOssForCausalLM is not supported"),
    ("gte_qwen2_7b.json", "is_causal is false: attention that sees later tokens is not supported"),
    ("internlm2_reward.json", "architecture InternLM2ForRewardModel is not supported"),
    ("janus_1.3b.json", "architecture of model_type multi_modality is not supported"),
    ("llama3.json", "Llama 80/8192/64/8/128/128256 8192 None"),
    ("llama3_1.json", "Llama 80/8192/64/8/128/128256 131072 Llama3"),
    ("llama3_1_405b.json", "quantization_config is fbgemm_fp8: a quantised checkpoint is not supported"),
    ("llama3_2_11b_vision.json", "architecture MllamaForConditionalGeneration is not supported"),
    ("llama3_2_3b.json", "Llama 28/3072/24/8/128/128256 131072 Llama3 tied"),
    ("llama3_2_90b_vision.json", "architecture MllamaForConditionalGeneration is not supported"),
    ("llava_1.5_7b_hf.json", "architecture LlavaForConditionalGeneration is not supported"),
    ("llava_v1.5_7b.json", "architecture LlavaLlamaForCausalLM is not supported"),
    ("mistral.json", "Mistral 32/4096/32/8/128/32000 32768 None window 4096"),
    ("mistral_7b_instruct.json", "Mistral 32/4096/32/8/128/32000 32768 None"),
    ("mixtral.json", "architecture MixtralForCausalLM is not supported"),
    ("phi3.json", "architecture Phi3ForCausalLM is not supported"),
    ("phi3_v.json", "architecture Phi3VForCausalLM is not supported"),
    ("qwen2.5_0.5b.json", "Qwen2 24/896/14/2/64/151936 32768 None tied"),
    ("qwen2.5_1.5b.json", "Qwen2 28/1536/12/2/128/151936 131072 None tied"),
    ("qwen2.5_14b.json", "Qwen2 48/5120/40/8/128/152064 131072 None"),
    ("qwen2.5_72b.json", "Qwen2 80/8192/64/8/128/152064 131072 None"),
    ("qwen2.5_7b.json", "Qwen2 28/3584/28/4/128/152064 131072 None"),
    ("qwen2.5_vl_7b.json", "architecture Qwen2_5_VLForConditionalGeneration is not supported"),
    ("qwen2_7b.json", "Qwen2 28/3584/28/4/128/152064 131072 None"),
    ("qwen2_vl_2b.json", "architecture Qwen2VLForConditionalGeneration is not supported"),
    ("qwen3_4b.json", "Qwen3 36/2560/32/8/128/151936 40960 None tied"),
    ("qwen3_5_27b.json", "architecture Qwen3_5ForConditionalGeneration is not supported"),
    ("qwen3_8b_fp8.json", "Qwen3 36/4096/32/8/128/151936 40960 None"),
    ("qwen3_embedding_8b.json", "Qwen3 36/4096/32/8/128/151665 40960 None"),
    ("qwen3_vl_235b.json", "architecture Qwen3VLMoeForConditionalGeneration is not supported"),
    ("qwen3_vl_2b_instruct.json", "architecture Qwen3VLForConditionalGeneration is not supported"),
    ("qwen3_vl_30b_a3b_instruct.json", "architecture Qwen3VLMoeForConditionalGeneration is not supported"),
    ("qwen_7b.json", "architecture QWenLMHeadModel is not supported"),
    ("skywork_reward_llama.json", "architecture LlamaForSequenceClassification is not supported"),
    ("stablelm_3b.json", "architecture StableLmForCausalLM is not supported"),
];

fn summary(config: &ModelConfig) -> String {
    let ModelConfig { architecture, layers, hidden, heads, kv_heads, head_dim, vocab, positions_max, .. } =
        config;
    let window = config.windows[0].map_or_else(String::new, |window| format!(" window {window}"));
    let tied = if config.tied_embeddings { " tied" } else { "" };
    let scaling = format!("{:?}", config.rope.scaling);
    let scaling = scaling.split([' ', '{']).next().unwrap_or_default();
    format!(
        "{architecture:?} {layers}/{hidden}/{heads}/{kv_heads}/{head_dim}/{vocab} {positions_max} {scaling}{window}{tied}"
    )
}

#[test]
fn published_configurations_load_or_are_refused_by_name() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/model-configs");
    if !directory.is_dir() {
        eprintln!("skipped: {} is not there", directory.display());
        return;
    }
    let mut names: Vec<String> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".json"))
        .collect();
    names.sort();
    let found: Vec<(String, String)> = names
        .into_iter()
        .map(|name| {
            let fields = serde_json::from_slice(&fs::read(directory.join(&name)).unwrap()).unwrap();
            let verdict = match ModelConfig::from_json(&fields) {
                Ok(config) => summary(&config),
                Err(error) => error.to_string().split(" (supported: ").next().unwrap_or_default().to_owned(),
            };
            (name, verdict)
        })
        .collect();
    let expected: Vec<(String, String)> =
        VERDICTS.iter().map(|&(name, verdict)| (name.to_owned(), verdict.to_owned())).collect();
    assert_eq!(found.len(), 46);
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len());
}

/// What `fields` says on top of a small Llama.
fn with(fields: serde_json::Value) -> Result<ModelConfig, ConfigError> {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 9,
        "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096,
    });
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    ModelConfig::from_json(config.as_object().unwrap())
}

#[test]
fn older_and_newer_forms_of_rope_mean_the_same() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024});
    let older = with(json!({"rope_theta": 5e5, "rope_scaling": llama3})).unwrap();
    let mut parameters = llama3.clone();
    parameters["rope_theta"] = json!(5e5);
    let newer = with(json!({"rope_parameters": parameters})).unwrap();
    assert_eq!(older, newer);
    assert_eq!(older.rope.theta, 5e5);
    let oldest = with(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
    assert_eq!(oldest.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(oldest.rope.theta, 10_000.0);
    assert_eq!(with(json!({"rope_scaling": null})).unwrap().rope.scaling, RopeScaling::None);
}

#[test]
fn yarn_reaches_as_far_as_it_stretches() {
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096});
    let config = with(json!({"rope_scaling": yarn})).unwrap();
    assert_eq!(config.positions_max, 16384);
    let RopeScaling::Yarn { attention_factor, original_positions, truncate, .. } = config.rope.scaling else {
        panic!("{:?}", config.rope.scaling)
    };
    assert_eq!((original_positions, truncate), (4096, true));
    assert!((attention_factor - (0.1 * 4_f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn token_ids_may_be_one_or_many() {
    assert_eq!(with(json!({"eos_token_id": 2})).unwrap().eos_token_ids, [2]);
    assert_eq!(with(json!({"eos_token_id": [2, 5], "bos_token_id": 1})).unwrap().eos_token_ids, [2, 5]);
    assert_eq!(with(json!({"eos_token_id": null})).unwrap().eos_token_ids, [] as [u32; 0]);
}

#[test]
fn windows_follow_each_familys_own_fields() {
    let windows = |fields| with(fields).unwrap().windows;
    assert_eq!(windows(json!({"sliding_window": 8})), [None; 4], "Llama has none");
    let mistral = json!(["MistralForCausalLM"]);
    assert_eq!(windows(json!({"architectures": mistral, "sliding_window": 8})), [Some(8); 4]);
    assert_eq!(windows(json!({"architectures": mistral, "sliding_window": null})), [None; 4]);
    assert_eq!(windows(json!({"architectures": mistral})), [Some(4096); 4], "as transformers reads it");
    let qwen = |fields: serde_json::Value| {
        let mut all = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        with(all)
    };
    assert_eq!(qwen(json!({"use_sliding_window": false})).unwrap().windows, [None; 4]);
    let upper = qwen(json!({"use_sliding_window": true, "max_window_layers": 3})).unwrap().windows;
    assert_eq!(upper, [None, None, None, Some(8)]);
    let types = json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"]);
    let listed = qwen(json!({"use_sliding_window": true, "layer_types": types})).unwrap().windows;
    assert_eq!(listed, [None, Some(8), None, Some(8)]);
    let unset = qwen(json!({"layer_types": types})).unwrap_err().to_string();
    assert!(unset.contains("sliding_window") && unset.contains("layer_types"), "{unset}");
    let short = qwen(json!({"layer_types": ["full_attention"]})).unwrap_err().to_string();
    assert!(short.contains("layer_types") && short.contains("a list of 4"), "{short}");
}

#[test]
fn biases_follow_each_familys_own_fields() {
    let biases = |fields| {
        let config = with(fields).unwrap();
        (config.qkv_bias, config.output_bias, config.mlp_bias)
    };
    assert_eq!(biases(json!({})), (false, false, false));
    assert_eq!(biases(json!({"attention_bias": true, "mlp_bias": true})), (true, true, true));
    assert_eq!(biases(json!({"architectures": ["Qwen2ForCausalLM"]})), (true, false, false));
    let qwen3 = json!({"architectures": ["Qwen3ForCausalLM"], "attention_bias": true});
    assert_eq!(biases(qwen3), (true, true, false));
    assert_eq!(biases(json!({"architectures": ["MistralForCausalLM"]})), (false, false, false));
}

#[test]
fn generation_settings_are_read() {
    let files = |text: &'static [u8]| {
        let list: &'static [(&str, &[u8])] = Box::leak(Box::new([("generation_config.json", text)]));
        ModelFiles::from_memory("test", list).generation_config()
    };
    let settings =
        files(br#"{"eos_token_id": [2, 3], "temperature": 0.6, "top_k": 20, "do_sample": true}"#).unwrap();
    assert_eq!(settings.eos_token_ids, [2, 3]);
    assert_eq!((settings.temperature, settings.top_k), (Some(0.6), Some(20)));
    assert_eq!(settings.top_p, None);
    let wrong = files(br#"{"temperature": "hot"}"#).unwrap_err().to_string();
    assert!(wrong.contains("generation_config.json: temperature is hot, expected a number"), "{wrong}");
    let absent = ModelFiles::from_memory("test", &[]).generation_config().unwrap();
    assert_eq!(absent, quayline_engine::GenerationConfig::default());
}

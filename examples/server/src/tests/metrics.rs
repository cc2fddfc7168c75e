//! What `/metrics` shows: vLLM's names, kinds, labels and buckets, and real values.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{Request, header};
use serde_json::json;

use super::support::{Server, chat, completion, post};

const CHAT: &str = "/v1/chat/completions";

/// Samples by series, after checking the text as Prometheus' parser would.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut kinds = BTreeMap::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix).filter(|family| kinds.contains_key(*family)))
                .unwrap_or(name);
            assert!(kinds.contains_key(family), "{line} has no family");
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
        }
    }
    samples
}

#[tokio::test]
async fn metrics_have_vllm_s_names_and_real_values() {
    let server = Server::start("").await;
    server.ok(CHAT, chat(5)).await;
    server.ok(CHAT, chat(5)).await;
    server.idle().await;
    let answer = server.get("/metrics").await;
    assert_eq!(answer.headers[header::CONTENT_TYPE], "text/plain; version=0.0.4; charset=utf-8");
    let samples = parse(&answer.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let sample = |name: &str, more: &str| {
        let series = format!("{name}{{{labels}{more}}}");
        *samples.get(&series).unwrap_or_else(|| panic!("{series} is missing:\n{}", answer.text))
    };
    assert_eq!(sample("vllm:num_requests_running", ""), 0.0);
    assert_eq!(sample("vllm:num_requests_waiting", ""), 0.0);
    assert_eq!(sample("vllm:kv_cache_usage_perc", ""), 0.0);
    assert_eq!(sample("vllm:generation_tokens_total", ""), 10.0);
    assert!(sample("vllm:prompt_tokens_total", "") > 2.0);
    assert_eq!(sample("vllm:request_success_total", ",finished_reason=\"length\""), 2.0);
    assert_eq!(sample("vllm:num_preemptions_total", ""), 0.0);
    assert!(sample("vllm:prefix_cache_queries_total", "") >= sample("vllm:prefix_cache_hits_total", ""));
    for (name, count) in [
        ("time_to_first_token_seconds", 2.0),
        ("inter_token_latency_seconds", 8.0),
        ("request_time_per_output_token_seconds", 2.0),
        ("e2e_request_latency_seconds", 2.0),
        ("request_queue_time_seconds", 2.0),
        ("request_inference_time_seconds", 2.0),
        ("request_prefill_time_seconds", 2.0),
        ("request_decode_time_seconds", 2.0),
        ("request_prompt_tokens", 2.0),
        ("request_generation_tokens", 2.0),
        ("request_params_n", 2.0),
        ("request_params_max_tokens", 2.0),
        ("request_num_preemptions", 2.0),
        ("iteration_tokens_total", 10.0),
    ] {
        assert_eq!(sample(&format!("vllm:{name}_count"), ""), count, "{name}");
    }
    assert!(answer.text.contains("le=\"2560.0\"") && answer.text.contains("le=\"7680.0\""));
    assert!(answer.text.contains("vllm:cache_config_info{") && answer.text.contains("block_size=\"16\""));
    assert!(samples["process_resident_memory_bytes"] > 1e6);
    assert!(samples.keys().any(|series| series.starts_with("http_requests_total{") && series.contains(CHAT)));
    server.stop();
}

#[tokio::test]
async fn drafts_are_counted_under_vllm_s_names() {
    let config =
        r#"{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_min":1,"prompt_lookup_max":3}"#;
    let server = Server::start(&format!("--speculative-config {config}")).await;
    let plain = Server::start("").await;
    let again = completion(json!("I will go, I will go, I will go, I will go, I"), 40);
    let with = server.ok("/v1/completions", again.clone()).await;
    let without = plain.ok("/v1/completions", again).await;
    assert_eq!(with["choices"], without["choices"], "drafts change no answer");
    server.idle().await;
    let samples = parse(&server.get("/metrics").await.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let sample =
        |name: &str, more: &str| samples[&format!("vllm:spec_decode_{name}_total{{{labels}{more}}}")];
    let accepted = sample("num_accepted_tokens", "");
    assert!(accepted > 0.0 && accepted <= sample("num_draft_tokens", ""));
    assert!(sample("num_drafts", "") <= sample("num_draft_tokens", ""));
    let by_place = |place| sample("num_accepted_tokens_per_pos", &format!(",position=\"{place}\""));
    assert_eq!(by_place(0) + by_place(1) + by_place(2), accepted);
    assert!(!plain.get("/metrics").await.text.contains("spec_decode"), "what is off is not shown");
    server.stop();
    plain.stop();
}

#[tokio::test]
async fn open_metrics_come_when_asked_for() {
    let server = Server::start("").await;
    let request = Request::get("/metrics").header(
        header::ACCEPT,
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4",
    );
    let answer = server.answer(request.body(Body::empty()).unwrap()).await;
    assert_eq!(
        answer.headers[header::CONTENT_TYPE],
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    assert!(answer.text.ends_with("# EOF\n"));
    assert!(answer.text.contains("# TYPE vllm:prompt_tokens counter\n"));
    assert!(answer.text.contains("\nvllm:prompt_tokens_total{"));
    server.stop();
}

#[tokio::test]
async fn routes_that_do_not_exist_are_one_label() {
    let server = Server::start("").await;
    for path in ["/a", "/b", "/c?d=1"] {
        server.get(path).await;
    }
    let metrics = server.get("/metrics").await.text;
    assert!(
        metrics.contains("http_requests_total{handler=\"none\",method=\"GET\",status=\"4xx\"} 3"),
        "{metrics}"
    );
    server.stop();
}

const TIME_TO_FIRST_TOKEN: &str =
    "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560";
const BETWEEN_TOKENS: &str = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80";
const END_TO_END: &str = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680";
const RESIDENCY: &str =
    "0.001 0.002 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1 2 5 10 20 30 60 120 300 600 1200 1800";
const COPIES: &str =
    "1000000 5000000 10000000 20000000 40000000 60000000 80000000 100000000 150000000 200000000";
/// Up to the bundled model's context of 1024.
const TOKENS: &str = "1 2 5 10 20 50 100 200 500 1000";

/// vLLM 0.33's series that have a meaning here, by name; of histograms the bounds of the buckets.
const SERIES: [(&str, &str); 45] = [
    ("cache_config_info", "gauge"),
    ("engine_sleep_state", "gauge"),
    ("lora_requests_info", "gauge"),
    ("kv_cache_usage_perc", "gauge"),
    ("num_requests_running", "gauge"),
    ("num_requests_waiting", "gauge"),
    ("num_requests_waiting_by_reason", "gauge"),
    ("admission_rejections_total", "counter"),
    ("external_prefix_cache_hits_total", "counter"),
    ("external_prefix_cache_queries_total", "counter"),
    ("kv_offload_cpu_cache_usage_perc", "gauge"),
    ("kv_offload_load_bytes_total", "counter"),
    ("kv_offload_load_time_total", "counter"),
    ("kv_offload_load_size", COPIES),
    ("kv_offload_store_bytes_total", "counter"),
    ("kv_offload_store_time_total", "counter"),
    ("kv_offload_store_size", COPIES),
    ("generation_tokens_total", "counter"),
    ("num_preemptions_total", "counter"),
    ("prefix_cache_hits_total", "counter"),
    ("prefix_cache_queries_total", "counter"),
    ("prompt_tokens_by_source_total", "counter"),
    ("prompt_tokens_cached_by_source_total", "counter"),
    ("prompt_tokens_cached_total", "counter"),
    ("prompt_tokens_total", "counter"),
    ("request_success_total", "counter"),
    ("e2e_request_latency_seconds", END_TO_END),
    ("inter_token_latency_seconds", BETWEEN_TOKENS),
    ("kv_block_idle_before_evict_seconds", RESIDENCY),
    ("kv_block_lifetime_seconds", RESIDENCY),
    ("kv_block_reuse_gap_seconds", RESIDENCY),
    ("iteration_tokens_total", "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"),
    ("request_decode_time_seconds", END_TO_END),
    ("request_generation_tokens", TOKENS),
    ("request_inference_time_seconds", END_TO_END),
    ("request_max_num_generation_tokens", TOKENS),
    ("request_num_preemptions", "1 2 3 4 5 10 20"),
    ("request_params_max_tokens", TOKENS),
    ("request_params_n", "1 2 5 10 20"),
    ("request_prefill_kv_computed_tokens", TOKENS),
    ("request_prefill_time_seconds", END_TO_END),
    ("request_prompt_tokens", TOKENS),
    ("request_queue_time_seconds", END_TO_END),
    ("request_time_per_output_token_seconds", BETWEEN_TOKENS),
    ("time_to_first_token_seconds", TIME_TO_FIRST_TOKEN),
];

#[tokio::test]
async fn every_name_kind_and_bucket_is_vllm_s() {
    let server = Server::start("--kv-cache-metrics").await;
    server.ok(CHAT, chat(2)).await;
    server.idle().await;
    let text = server.get("/metrics").await.text;
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE vllm:")?.split_once(' '));
    let bounds = |name: &str| {
        let buckets = text.lines().filter(|line| line.starts_with(&format!("vllm:{name}_bucket{{")));
        let bounds = buckets.filter_map(|line| line.split("le=\"").nth(1)?.split('"').next());
        let numbers: Vec<String> = bounds.map(|bound| bound.parse::<f64>().unwrap().to_string()).collect();
        let (last, rest) = numbers.split_last().unwrap();
        assert_eq!(last, "inf", "{name}");
        rest.join(" ")
    };
    let shown: BTreeMap<&str, String> = types
        .map(|(name, kind)| (name, if kind == "histogram" { bounds(name) } else { kind.to_owned() }))
        .collect();
    let expected: BTreeMap<&str, String> =
        SERIES.iter().map(|&(name, kind)| (name, kind.to_owned())).collect();
    assert_eq!(shown, expected);
    server.stop();
}

#[tokio::test]
async fn who_waits_is_counted_by_reason() {
    let server = Server::start("--max-num-seqs 1").await;
    let mut body = completion(json!("long"), 900);
    body["stream"] = json!(true);
    server.app.engine.allow(Some(1));
    let running = server.send(post("/v1/completions", body.to_string())).await;
    server.busy().await;
    body["n"] = json!(3);
    let waiting = server.send(post("/v1/completions", body.to_string())).await;
    let mut view = server.app.engine.view();
    view.wait_for(|view| view.snapshot.waiting_requests == 3).await.unwrap();
    let samples = parse(&server.get("/metrics").await.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let waiting_by = |reason: &str| {
        samples[&format!("vllm:num_requests_waiting_by_reason{{{labels},reason=\"{reason}\"}}")]
    };
    // The first waits for a place, the other two for it to read their prompt.
    assert_eq!((waiting_by("capacity"), waiting_by("deferred")), (1.0, 2.0));
    assert_eq!(samples[&format!("vllm:num_requests_waiting{{{labels}}}")], 3.0);
    drop((running, waiting));
    server.app.engine.allow(None);
    server.idle().await;
    server.stop();
}

#[tokio::test]
async fn a_preempted_request_is_counted_when_it_ends() {
    // Twelve blocks of 16 tokens: two answers of 100 tokens start together, and only one can end undisturbed.
    let server = Server::start("--num-gpu-blocks-override 12 --max-model-len 192").await;
    let mut body = completion(json!("twice"), 100);
    body["n"] = json!(2);
    server.ok("/v1/completions", body).await;
    server.idle().await;
    let samples = parse(&server.get("/metrics").await.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let sample = |name: &str| samples[&format!("vllm:{name}{{{labels}}}")];
    let preemptions = sample("num_preemptions_total");
    assert!(preemptions > 0.0);
    assert_eq!(sample("request_num_preemptions_sum"), preemptions);
    assert_eq!(sample("request_num_preemptions_count"), 2.0);
    server.stop();
}

#[tokio::test]
async fn what_comes_back_from_host_memory_is_counted() {
    // Room for 12 blocks of 16 tokens, and for 170 behind them.
    let line = "--num-gpu-blocks-override 12 --max-model-len 192 --kv-offloading-size 0.004";
    let server = Server::start(line).await;
    let prompt =
        |begin: u32| json!((0..100).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect::<Vec<u32>>());
    for begin in [1, 2, 3, 4, 1] {
        server.ok("/v1/completions", completion(prompt(begin), 4)).await;
    }
    server.idle().await;
    let samples = parse(&server.get("/metrics").await.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let sample = |name: &str, more: &str| samples[&format!("{name}{{{labels}{more}}}")];
    assert_eq!(sample("vllm:external_prefix_cache_hits_total", ""), 96.0);
    assert_eq!(sample("vllm:external_prefix_cache_queries_total", ""), 500.0);
    assert_eq!(sample("vllm:prompt_tokens_by_source_total", ",source=\"external_kv_transfer\""), 96.0);
    assert_eq!(sample("vllm:prompt_tokens_cached_by_source_total", ",source=\"cpu\""), 96.0);
    assert_eq!(sample("vllm:kv_offload_load_bytes_total", ""), 96.0 * 1536.0);
    assert_eq!(sample("vllm:kv_offload_load_size_sum", ""), 96.0 * 1536.0);
    assert_eq!(sample("vllm:kv_offload_load_size_count", ""), 1.0, "one prompt came back");
    for direction in ["load", "store"] {
        let of = |what: &str| sample(&format!("vllm:kv_offload_{direction}_{what}"), "");
        assert_eq!(of("size_sum"), of("bytes_total"));
        assert!(of("time_total") > 0.0);
    }
    assert!(sample("vllm:kv_offload_store_bytes_total", "") >= 4.0 * 96.0 * 1536.0);
    assert!(sample("vllm:kv_offload_cpu_cache_usage_perc", "") > 0.1);
    server.stop();
}

#[tokio::test]
async fn what_the_disk_does_is_counted() {
    // Room for 12 blocks of 16 tokens, for 170 behind them, and for 41 on the disk.
    let path = std::env::temp_dir().join(format!("quayline-server-disk-{}", std::process::id()));
    let line = format!(
        "--num-gpu-blocks-override 12 --max-model-len 192 --kv-offloading-size 0.004 \
         --kv-offloading-disk-path {} --kv-offloading-disk-size 0.00094",
        path.display()
    );
    let prompt =
        |begin: u32| json!((0..100).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect::<Vec<u32>>());
    let server = Server::start(&line).await;
    let mut answers = Vec::new();
    for begin in [1, 2] {
        answers.push(server.ok("/v1/completions", completion(prompt(begin), 4)).await["choices"].clone());
    }
    let mut view = server.app.engine.view();
    let all_is_written = |view: &crate::engine::View| {
        let disk = view.snapshot.disk.unwrap();
        disk.saved_blocks >= 12 && disk.pending_blocks == 0
    };
    view.wait_for(all_is_written).await.unwrap();
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let told = |text: &str, name: &str| parse(text)[&format!("quayline:kv_offload_disk_{name}{{{labels}}}")];
    let text = server.get("/metrics").await.text;
    let stored = told(&text, "stored_blocks_total");
    assert!(stored >= 12.0);
    assert_eq!(told(&text, "store_bytes_total"), stored * 16.0 * 1536.0);
    let slots = (0.00094_f64 * f64::from(1 << 30) / (16.0 * 1536.0 + 56.0)).floor();
    assert_eq!(told(&text, "cache_usage_perc"), stored / slots);
    assert_eq!((told(&text, "loaded_blocks_total"), told(&text, "pending_blocks")), (0.0, 0.0));
    server.stop();

    // Another server reads them.
    let server = Server::start(&line).await;
    let again = server.ok("/v1/completions", completion(prompt(1), 4)).await["choices"].clone();
    assert_eq!(again, answers[0]);
    server.idle().await;
    let text = server.get("/metrics").await.text;
    assert_eq!((told(&text, "loaded_blocks_total"), told(&text, "load_bytes_total")), (6.0, 96.0 * 1536.0));
    assert_eq!((told(&text, "failed_blocks_total"), told(&text, "evictions_total")), (0.0, 0.0));
    server.stop();
    std::fs::remove_dir_all(path).unwrap();
}

#[tokio::test]
async fn how_long_blocks_keep_their_contents_is_told_when_asked_for() {
    // Twelve blocks of 16 tokens, all of them watched. Each prompt of 100 tokens fills six that can be found, the
    // second finds those of the first, and all of these are lost to the others.
    let line =
        "--num-gpu-blocks-override 12 --max-model-len 192 --kv-cache-metrics --kv-cache-metrics-sample 1";
    let began = std::time::Instant::now();
    let server = Server::start(line).await;
    let prompt =
        |begin: u32| json!((0..100).map(|at| 100 + (begin * 131 + at * 7) % 1000).collect::<Vec<u32>>());
    for begin in [1, 1, 2, 3, 4, 5] {
        server.ok("/v1/completions", completion(prompt(begin), 4)).await;
    }
    server.idle().await;
    let samples = parse(&server.get("/metrics").await.text);
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let sample =
        |name: &str, part: &str| samples[&format!("vllm:kv_block_{name}_seconds_{part}{{{labels}}}")];
    let kept = f64::from(server.app.engine.view().borrow().snapshot.blocks.cached);
    assert_eq!(samples[&format!("vllm:prefix_cache_hits_total{{{labels}}}")], 96.0);
    assert_eq!(sample("lifetime", "count"), 30.0 - kept);
    assert_eq!(sample("idle_before_evict", "count"), 30.0 - kept);
    assert_eq!(sample("reuse_gap", "count"), 6.0);
    let longest = began.elapsed().as_secs_f64() * sample("lifetime", "count");
    assert!(sample("lifetime", "sum") > 0.0 && sample("lifetime", "sum") < longest);
    let parts = sample("idle_before_evict", "sum") + sample("reuse_gap", "sum");
    assert!((parts - sample("lifetime", "sum")).abs() < 1e-9, "gaps and idle make a lifetime");
    server.stop();

    let server = Server::start("").await;
    assert!(!server.get("/metrics").await.text.contains("kv_block"));
    server.stop();
}

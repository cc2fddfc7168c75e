//! Prometheus metrics under vLLM's names, labels and buckets.

use std::borrow::Cow;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use axum::response::IntoResponse;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use quayline_engine::{DraftTotals, FinishReason, HostUse, Options, ReasonCount, Snapshot, WaitReason};
use tokio::sync::watch;

use crate::engine::View;
use crate::process;

/// Everything `/metrics` shows.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    requests: Family<Labels<3>, Counter>,
    durations: Family<Labels<2>, Histogram, fn() -> Histogram>,
}

/// Labels whose values come from requests.
type Labels<const N: usize> = [(&'static str, String); N];

/// One label whose values are ours.
type Label = [(&'static str, &'static str); 1];

impl Metrics {
    /// Requests and the process; the engine's own join with [`Metrics::add_engine`].
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let requests = Family::default();
        let durations: Family<_, _, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new([0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0]));
        registry.register("http_requests", "HTTP requests by route and class of status", requests.clone());
        registry.register(
            "http_request_duration_seconds",
            "Seconds from the head of a request to the last byte of its answer",
            durations.clone(),
        );
        registry.register_collector(Box::new(ProcessCollector));
        Self { registry: Mutex::new(registry), requests, durations }
    }

    /// Registers the engine's metrics.
    pub(crate) fn add_engine(&self, model: &str, context: u32, engine: EngineCollector) -> EngineMetrics {
        let mut registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let labels = [("model_name", model.to_owned()), ("engine", "0".to_owned())];
        let labels = labels.map(|(name, value)| (Cow::Borrowed(name), Cow::Owned(escape(&value))));
        let registry = registry.sub_registry_with_labels(labels.into_iter());
        registry.register_collector(Box::new(engine));
        EngineMetrics::new(registry, context)
    }

    /// Counts one answered (or abandoned) HTTP request.
    pub(crate) fn answered(&self, handler: &str, method: &str, status: u16, duration: Duration) {
        let status = format!("{}xx", status / 100);
        let [handler, method] = [handler, method].map(ToOwned::to_owned);
        let labels = [("handler", handler.clone()), ("method", method.clone()), ("status", status)];
        self.requests.get_or_create(&labels).inc();
        let labels = [("handler", handler), ("method", method)];
        self.durations.get_or_create(&labels).observe(duration.as_secs_f64());
    }

    /// The exposition: OpenMetrics for who asks for it, else the older text format, where a counter's
    /// family has the name of its samples.
    pub(crate) fn expose(&self, asked: &HeaderMap) -> impl IntoResponse + use<> {
        const OPEN: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let written = encode(&mut text, &registry);
        debug_assert!(written.is_ok(), "writing to a string cannot fail");
        let accept = asked.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
        if accept.contains("application/openmetrics-text") {
            ([(header::CONTENT_TYPE, OPEN)], text)
        } else {
            ([(header::CONTENT_TYPE, TEXT)], plain(&text))
        }
    }
}

/// OpenMetrics to text format 0.0.4: counter families get their suffix, the end mark goes.
fn plain(open: &str) -> String {
    let mut text = String::with_capacity(open.len() + 256);
    let mut help = None;
    for line in open.lines() {
        if line == "# EOF" {
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let about = help.take().map_or("", |(_, about)| about);
            text.push_str(&format!("# HELP {name}{suffix} {about}\n# TYPE {name}{suffix} {kind}\n"));
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// A label value as the text formats want it; the registry writes constant labels as they are.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// What the engine's thread counts itself.
#[derive(Debug, Clone)]
pub(crate) struct EngineMetrics {
    prompt_tokens: Counter,
    prompt_tokens_cached: Counter,
    prompt_tokens_cached_by_source: Family<Label, Counter>,
    prompt_tokens_by_source: Family<Label, Counter>,
    generation_tokens: Counter,
    request_success: Family<Label, Counter>,
    admission_rejections: Family<Label, Counter>,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_num_generation_tokens: Histogram,
    request_params_n: Histogram,
    request_params_max_tokens: Histogram,
    request_num_preemptions: Histogram,
    request_prefill_kv_computed_tokens: Histogram,
    iteration_tokens: Histogram,
}

/// When what happened to one request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeline {
    /// The server received it.
    pub(crate) arrived: Instant,
    /// It first took part in a step.
    pub(crate) started: Option<Instant>,
    /// Its first token came.
    pub(crate) first: Option<Instant>,
    /// Its latest token came.
    pub(crate) last: Instant,
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    /// Of these, from host memory.
    pub(crate) loaded_tokens: u32,
    pub(crate) preemptions: u32,
    pub(crate) output_tokens: u32,
    /// As the request asked for it.
    pub(crate) max_tokens: Option<u32>,
    /// Continuations of its prompt.
    pub(crate) n: u32,
}

impl EngineMetrics {
    fn new(registry: &mut Registry, context: u32) -> Self {
        let lengths = || one_two_five(context);
        let mut to = Register(registry);
        Self {
            prompt_tokens: to.counter("prompt_tokens", "Prompt tokens processed, cached ones included"),
            prompt_tokens_cached: to.counter("prompt_tokens_cached", "Prompt tokens found in the cache"),
            prompt_tokens_cached_by_source: to.family(
                "prompt_tokens_cached_by_source",
                "Prompt tokens found in a cache, by where it is",
                ("source", &["device", "cpu"]),
            ),
            prompt_tokens_by_source: to.family(
                "prompt_tokens_by_source",
                "Prompt tokens by where their keys and values came from",
                ("source", &["local_compute", "local_cache_hit", "external_kv_transfer"]),
            ),
            generation_tokens: to.counter("generation_tokens", "Tokens generated"),
            request_success: to.family(
                "request_success",
                "Requests that ended, by reason",
                ("finished_reason", &["stop", "length", "error", "abort"]),
            ),
            admission_rejections: to.family(
                "admission_rejections",
                "Requests refused because of load",
                ("reason", &["queue_full"]),
            ),
            time_to_first_token: to.histogram(
                "time_to_first_token_seconds",
                "Seconds from arrival to the first token",
                TIME_TO_FIRST_TOKEN,
            ),
            inter_token_latency: to.histogram(
                "inter_token_latency_seconds",
                "Seconds between tokens",
                BETWEEN_TOKENS,
            ),
            time_per_output_token: to.histogram(
                "request_time_per_output_token_seconds",
                "Mean seconds per token after the first, per request",
                BETWEEN_TOKENS,
            ),
            e2e: to.histogram(
                "e2e_request_latency_seconds",
                "Seconds from arrival to the last token",
                END_TO_END,
            ),
            queue: to.histogram("request_queue_time_seconds", "Seconds in the waiting line", END_TO_END),
            inference: to.histogram(
                "request_inference_time_seconds",
                "Seconds from the first step to the last token",
                END_TO_END,
            ),
            prefill: to.histogram(
                "request_prefill_time_seconds",
                "Seconds from the first step to the first token",
                END_TO_END,
            ),
            decode: to.histogram(
                "request_decode_time_seconds",
                "Seconds from the first to the last token",
                END_TO_END,
            ),
            request_prompt_tokens: to.histogram(
                "request_prompt_tokens",
                "Prompt tokens per request",
                lengths(),
            ),
            request_generation_tokens: to.histogram(
                "request_generation_tokens",
                "Generated tokens per request",
                lengths(),
            ),
            request_max_num_generation_tokens: to.histogram(
                "request_max_num_generation_tokens",
                "Generated tokens of the longest choice",
                lengths(),
            ),
            request_params_n: to.histogram("request_params_n", "The parameter n", [1., 2., 5., 10., 20.]),
            request_params_max_tokens: to.histogram(
                "request_params_max_tokens",
                "The parameter max_tokens",
                lengths(),
            ),
            request_num_preemptions: to.histogram(
                "request_num_preemptions",
                "How often a request lost its blocks",
                PREEMPTIONS,
            ),
            request_prefill_kv_computed_tokens: to.histogram(
                "request_prefill_kv_computed_tokens",
                "Prompt tokens per request that were not cached",
                lengths(),
            ),
            iteration_tokens: to.histogram("iteration_tokens_total", "Tokens per step", ITERATION),
        }
    }

    /// A step ran.
    pub(crate) fn step(&self, tokens: u32) {
        self.iteration_tokens.observe(f64::from(tokens));
    }

    /// A request brought tokens. The timeline is as it was before.
    pub(crate) fn tokens(&self, before: &Timeline, now: Instant, count: u32) {
        self.generation_tokens.inc_by(u64::from(count));
        if before.first.is_some() {
            self.inter_token_latency.observe((now - before.last).as_secs_f64());
        } else {
            self.prompt(before);
            self.time_to_first_token.observe((now - before.arrived).as_secs_f64());
        }
    }

    fn prompt(&self, of: &Timeline) {
        let computed = of.prompt_tokens.saturating_sub(of.cached_tokens);
        self.prompt_tokens.inc_by(u64::from(of.prompt_tokens));
        self.prompt_tokens_cached.inc_by(u64::from(of.cached_tokens));
        let (loaded, here) = (of.loaded_tokens, of.cached_tokens.saturating_sub(of.loaded_tokens));
        for (source, tokens) in [("device", here), ("cpu", loaded)] {
            let source = self.prompt_tokens_cached_by_source.get_or_create_owned(&[("source", source)]);
            source.inc_by(u64::from(tokens));
        }
        let sources =
            [("local_compute", computed), ("local_cache_hit", here), ("external_kv_transfer", loaded)];
        for (source, tokens) in sources {
            let source = self.prompt_tokens_by_source.get_or_create_owned(&[("source", source)]);
            source.inc_by(u64::from(tokens));
        }
        self.request_prefill_kv_computed_tokens.observe(f64::from(computed));
    }

    /// A request ended; `None` is a cancelled one.
    pub(crate) fn ended(&self, of: &Timeline, reason: Option<FinishReason>) {
        let reason = reason.map_or("abort", FinishReason::as_str);
        self.request_success.get_or_create(&[("finished_reason", reason)]).inc();
        self.e2e.observe((of.last - of.arrived).as_secs_f64());
        self.request_prompt_tokens.observe(f64::from(of.prompt_tokens));
        self.request_generation_tokens.observe(f64::from(of.output_tokens));
        self.request_params_n.observe(f64::from(of.n));
        self.request_num_preemptions.observe(f64::from(of.preemptions));
        if let Some(max) = of.max_tokens {
            self.request_params_max_tokens.observe(f64::from(max));
        }
        let (Some(started), Some(first)) = (of.started, of.first) else { return };
        self.queue.observe((started.saturating_duration_since(of.arrived)).as_secs_f64());
        self.prefill.observe(first.saturating_duration_since(started).as_secs_f64());
        self.inference.observe(of.last.saturating_duration_since(started).as_secs_f64());
        let decode = (of.last - first).as_secs_f64();
        self.decode.observe(decode);
        if of.output_tokens > 1 {
            self.time_per_output_token.observe(decode / f64::from(of.output_tokens - 1));
        }
    }

    /// All choices of a job ended.
    pub(crate) fn job_ended(&self, longest: u32) {
        self.request_max_num_generation_tokens.observe(f64::from(longest));
    }

    /// A job was refused because too many wait.
    pub(crate) fn refused(&self) {
        self.admission_rejections.get_or_create(&[("reason", "queue_full")]).inc();
    }
}

/// Puts metrics under `vllm:`.
struct Register<'a>(&'a mut Registry);

impl Register<'_> {
    fn counter(&mut self, name: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.0.register(format!("vllm:{name}"), help, counter.clone());
        counter
    }

    /// Every value of the label is there from the start: a counter that appears with its first event hides
    /// that event from whoever looks at growth.
    fn family(
        &mut self,
        name: &str,
        help: &str,
        (label, values): (&'static str, &[&'static str]),
    ) -> Family<Label, Counter> {
        let family = Family::<Label, Counter>::default();
        for value in values {
            drop(family.get_or_create(&[(label, *value)]));
        }
        self.0.register(format!("vllm:{name}"), help, family.clone());
        family
    }

    fn histogram(&mut self, name: &str, help: &str, buckets: impl IntoIterator<Item = f64>) -> Histogram {
        let histogram = Histogram::new(buckets);
        self.0.register(format!("vllm:{name}"), help, histogram.clone());
        histogram
    }
}

const TIME_TO_FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const END_TO_END: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const PREEMPTIONS: [f64; 7] = [1., 2., 3., 4., 5., 10., 20.];
const ITERATION: [f64; 13] = [1., 8., 16., 32., 64., 128., 256., 512., 1024., 2048., 4096., 8192., 16384.];

/// 1, 2, 5, 10, 20, 50, … up to the context.
fn one_two_five(context: u32) -> Vec<f64> {
    let powers = (0..).map(|power| 10_f64.powi(power));
    let all = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|mantissa| mantissa * power));
    all.take_while(|bucket| *bucket <= f64::from(context)).collect()
}

/// What is read off the engine's latest view at each scrape.
#[derive(Debug)]
pub(crate) struct EngineCollector {
    pub(crate) view: watch::Receiver<View>,
    pub(crate) options: Options,
}

impl Collector for EngineCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let snapshot = self.view.borrow().snapshot.clone();
        let mut write = Write(encoder);
        write.load(&snapshot)?;
        write.counter(
            "vllm:num_preemptions",
            "Requests that lost their blocks",
            snapshot.totals.preemptions,
        )?;
        write.counter(
            "vllm:prefix_cache_queries",
            "Tokens looked up in the cache",
            snapshot.prefix.queries,
        )?;
        write.counter("vllm:prefix_cache_hits", "Tokens found in the cache", snapshot.prefix.hits)?;
        if let Some(speculation) = self.options.speculation {
            write.drafts(&snapshot.totals.drafts, speculation.num_speculative_tokens.get())?;
        }
        write.host_memory(&snapshot.host.unwrap_or_default())?;
        write.reasons(&snapshot.reasons)?;
        self.cache_config(&mut write, &snapshot)
    }
}

impl EngineCollector {
    fn cache_config(&self, write: &mut Write<'_>, snapshot: &Snapshot) -> fmt::Result {
        let blocks = snapshot.blocks;
        let labels = [
            ("block_size", blocks.size.to_string()),
            ("num_gpu_blocks", blocks.total.to_string()),
            ("cache_dtype", format!("{:?}", self.options.kv_dtype).to_lowercase()),
            ("enable_prefix_caching", if self.options.prefix_caching { "True" } else { "False" }.to_owned()),
            ("kv_cache_memory_bytes", blocks.bytes.to_string()),
        ];
        let help = "How the cache is set up";
        let gauge = ConstGauge::new(1_u64);
        let mut metric =
            write.0.encode_descriptor("vllm:cache_config_info", help, None, gauge.metric_type())?;
        gauge.encode(metric.encode_family(&labels)?)
    }
}

/// Whether a request is passed over for a reason of its own, and not for lack of room, tokens or places.
fn is_deferral(reason: &WaitReason) -> bool {
    matches!(
        reason,
        WaitReason::OutputPending
            | WaitReason::Paused
            | WaitReason::GrammarPending
            | WaitReason::LeaderReads { .. }
            | WaitReason::Loading { .. }
            | WaitReason::RemoteUnknown
    )
}

/// Writes single values into an exposition.
struct Write<'a>(DescriptorEncoder<'a>);

impl Write<'_> {
    fn load(&mut self, snapshot: &Snapshot) -> fmt::Result {
        let (running, waiting) = (snapshot.running.len(), snapshot.waiting_requests);
        let usage = f64::from(snapshot.blocks.used) / f64::from(snapshot.blocks.total.max(1));
        self.gauge("vllm:num_requests_running", "Requests that take part in steps", running as f64)?;
        self.gauge("vllm:num_requests_waiting", "Requests in the waiting line", waiting.into())?;
        self.gauge("vllm:kv_cache_usage_perc", "Share of blocks held by requests; 1 is all", usage)?;
        let reasons = snapshot.waiting.iter().filter_map(|request| request.waits_for.as_ref());
        let deferred = reasons.filter(|reason| is_deferral(reason)).count() as u64;
        let help = "Requests in the waiting line, by what they wait for";
        let name = "vllm:num_requests_waiting_by_reason";
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (reason, count) in [("capacity", u64::from(waiting) - deferred), ("deferred", deferred)] {
            ConstGauge::new(count).encode(metric.encode_family(&[("reason", reason)])?)?;
        }
        Ok(())
    }

    fn drafts(&mut self, drafts: &DraftTotals, places: u32) -> fmt::Result {
        self.counter("vllm:spec_decode_num_drafts", "Times that drafts were verified", drafts.drafts)?;
        let tokens = drafts.draft_tokens;
        self.counter("vllm:spec_decode_num_draft_tokens", "Tokens that were drafted", tokens)?;
        let (help, tokens) = ("Drafted tokens that were accepted", drafts.accepted_tokens);
        self.counter("vllm:spec_decode_num_accepted_tokens", help, tokens)?;
        let name = "vllm:spec_decode_num_accepted_tokens_per_pos";
        let help = "Drafted tokens that were accepted, by their place in the draft";
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (place, &count) in drafts.accepted_by_place.iter().enumerate().take(places as usize) {
            let labels = [("position", place.to_string())];
            ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// All zero where there is none.
    fn host_memory(&mut self, host: &HostUse) -> fmt::Result {
        let used = f64::from(host.used) / f64::from(host.blocks.max(1));
        self.gauge("vllm:kv_offload_cpu_cache_usage_perc", "Share of host memory for blocks in use", used)?;
        for (name, help, value) in [
            ("vllm:external_prefix_cache_queries", "Tokens looked up in host memory", host.queries),
            ("vllm:external_prefix_cache_hits", "Tokens found in host memory", host.hits),
            ("vllm:kv_offload_store_bytes", "Bytes copied to host memory", host.saved_bytes),
            ("vllm:kv_offload_load_bytes", "Bytes copied back from host memory", host.loaded_bytes),
            (
                "quayline:kv_offload_swapped_tokens",
                "Tokens of preempted requests moved to host memory",
                host.swapped_tokens,
            ),
            ("quayline:kv_offload_evictions", "Blocks that host memory gave up for others", host.evictions),
        ] {
            self.counter(name, help, value)?;
        }
        Ok(())
    }

    /// One series for each outcome and reason that came up. They are ours: vLLM counts none.
    fn reasons(&mut self, counts: &[ReasonCount]) -> fmt::Result {
        let help = "Requests that got less than they wanted, by what happened and why; once for each step";
        let mut metric =
            self.0.encode_descriptor("quayline:requests_held_back", help, None, MetricType::Counter)?;
        for &ReasonCount { outcome, code, count } in counts {
            let labels = [("outcome", outcome.as_str()), ("reason", code)];
            ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, gauge.metric_type())?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, counter.metric_type())?)
    }
}

/// What the operating system knows about this process.
#[derive(Debug)]
struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(process) = process::read() else { return Ok(()) };
        let mut write = Write(encoder);
        write.gauge(
            "process_resident_memory_bytes",
            "Memory in use in bytes",
            process.resident_bytes as f64,
        )?;
        write.gauge(
            "process_virtual_memory_bytes",
            "Address space in bytes",
            process.virtual_bytes as f64,
        )?;
        write.gauge("process_open_fds", "Open files and sockets", process.open_files as f64)?;
        write.gauge("process_max_fds", "Most files and sockets", process.files_max as f64)?;
        let seconds = ConstCounter::new(process.cpu_seconds);
        let help = "Seconds of processor time";
        seconds.encode(write.0.encode_descriptor("process_cpu_seconds", help, None, seconds.metric_type())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_in_ones_twos_and_fives() {
        assert_eq!(one_two_five(120), [1., 2., 5., 10., 20., 50., 100.]);
    }

    #[test]
    fn plain_text_names_counters_by_their_samples() {
        let open = "# HELP a Help.\n# TYPE a counter\na_total 1\n# HELP b B.\n# TYPE b gauge\nb 2\n# EOF\n";
        let expected =
            "# HELP a_total Help.\n# TYPE a_total counter\na_total 1\n# HELP b B.\n# TYPE b gauge\nb 2\n";
        assert_eq!(plain(open), expected);
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}

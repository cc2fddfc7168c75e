//! What the engine's thread counts as it happens: tokens, requests, and how long everything took.

use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use quayline_engine::{Copied, Direction, FinishReason, Residency};

use super::Label;
use super::buckets::{
    BETWEEN_TOKENS, COPIES, END_TO_END, ITERATION, PREEMPTIONS, RESIDENCY, TIME_TO_FIRST_TOKEN, one_two_five,
};

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
    residency: Option<ResidencyMetrics>,
    loads: CopyMetrics,
    stores: CopyMetrics,
}

/// Copies in one direction between the cache and host memory. All zero where there is none.
#[derive(Debug, Clone)]
struct CopyMetrics {
    size: Histogram,
    time: Counter<f64, AtomicU64>,
}

/// How long blocks kept their contents.
#[derive(Debug, Clone)]
struct ResidencyMetrics {
    lifetime: Histogram,
    idle_before_evict: Histogram,
    reuse_gap: Histogram,
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
    /// `residency`: there is something to tell of how long blocks keep their contents.
    pub(super) fn new(registry: &mut Registry, context: u32, residency: bool) -> Self {
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
            residency: residency.then(|| ResidencyMetrics::new(&mut to)),
            loads: CopyMetrics::new(&mut to, "load", "from"),
            stores: CopyMetrics::new(&mut to, "store", "to"),
        }
    }

    /// A block lost its contents to others.
    pub(crate) fn block_lost(&self, residency: &Residency) {
        let Some(metrics) = &self.residency else { return };
        let seconds = |ticks: u64| Duration::from_micros(ticks).as_secs_f64();
        metrics.lifetime.observe(seconds(residency.lifetime_ticks));
        metrics.idle_before_evict.observe(seconds(residency.idle_ticks));
        residency.gaps().iter().for_each(|&gap| metrics.reuse_gap.observe(seconds(gap)));
    }

    /// Blocks went to host memory or came from there.
    pub(crate) fn copied(&self, copied: &Copied) {
        let metrics = match copied.direction {
            Direction::Load => &self.loads,
            Direction::Store => &self.stores,
        };
        metrics.size.observe(copied.bytes as f64);
        metrics.time.inc_by(copied.elapsed.as_secs_f64());
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

impl ResidencyMetrics {
    fn new(to: &mut Register<'_>) -> Self {
        Self {
            lifetime: to.histogram(
                "kv_block_lifetime_seconds",
                "Seconds from when a block's contents could be found until others took its place; of a sample",
                RESIDENCY,
            ),
            idle_before_evict: to.histogram(
                "kv_block_idle_before_evict_seconds",
                "Seconds from the last use of a block's contents until others took its place; of a sample",
                RESIDENCY,
            ),
            reuse_gap: to.histogram(
                "kv_block_reuse_gap_seconds",
                "Seconds between uses of a block's contents, the last few of each; of a sample",
                RESIDENCY,
            ),
        }
    }
}

impl CopyMetrics {
    fn new(to: &mut Register<'_>, name: &str, way: &str) -> Self {
        let size = format!("Bytes of blocks that were copied {way} host memory one after the other");
        let time = format!("Seconds of copying {way} host memory");
        Self {
            size: to.histogram(&format!("kv_offload_{name}_size"), &size, COPIES),
            time: to.seconds(&format!("kv_offload_{name}_time"), &time),
        }
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

    fn seconds(&mut self, name: &str, help: &str) -> Counter<f64, AtomicU64> {
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

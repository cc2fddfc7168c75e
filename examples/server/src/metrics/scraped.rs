//! What is read when somebody asks: off the engine's latest view, and off the operating system.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use quayline_engine::{DiskUse, DraftTotals, HostUse, Options, ReasonCount, Snapshot, WaitReason};
use tokio::sync::watch;

use crate::engine::View;
use crate::kv_events::Counts;
use crate::process;

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
        write.disk(&snapshot.disk.unwrap_or_default())?;
        write.reasons(&snapshot.reasons)?;
        write.constants()?;
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

    /// What vLLM's readers ask for and here never changes: this server does not sleep and has no adapters.
    fn constants(&mut self) -> fmt::Result {
        let help = "Whether the engine computes (awake) or has given memory away";
        let mut metric =
            self.0.encode_descriptor("vllm:engine_sleep_state", help, None, MetricType::Gauge)?;
        for (state, is_so) in [("awake", 1_u64), ("weights_offloaded", 0), ("discard_all", 0)] {
            ConstGauge::new(is_so).encode(metric.encode_family(&[("sleep_state", state)])?)?;
        }
        let help = "Adapters of requests that run and wait";
        let mut metric =
            self.0.encode_descriptor("vllm:lora_requests_info", help, None, MetricType::Gauge)?;
        let labels = [("max_lora", "0"), ("running_lora_adapters", ""), ("waiting_lora_adapters", "")];
        ConstGauge::new(1_u64).encode(metric.encode_family(&labels)?)
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
        self.counters([
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
        ])
    }

    /// Ours, after the pattern of vLLM's for host memory, which has none for a disk. All zero where there is none.
    fn disk(&mut self, disk: &DiskUse) -> fmt::Result {
        let used = f64::from(disk.used) / f64::from(disk.blocks.max(1));
        self.gauge("quayline:kv_offload_disk_cache_usage_perc", "Share of the disk's room in use", used)?;
        let pending = f64::from(disk.pending_blocks);
        self.gauge("quayline:kv_offload_disk_pending_blocks", "Blocks being written or read", pending)?;
        self.counters([
            ("quayline:kv_offload_disk_store_bytes", "Bytes written to the disk", disk.saved_bytes),
            ("quayline:kv_offload_disk_load_bytes", "Bytes read from the disk", disk.loaded_bytes),
            ("quayline:kv_offload_disk_stored_blocks", "Blocks written to the disk", disk.saved_blocks),
            ("quayline:kv_offload_disk_loaded_blocks", "Blocks read from the disk", disk.loaded_blocks),
            (
                "quayline:kv_offload_disk_failed_blocks",
                "Blocks that could not be written, or were not read as written",
                disk.failed_blocks,
            ),
            ("quayline:kv_offload_disk_evictions", "Blocks that the disk gave up for others", disk.evictions),
        ])
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

    fn counters<const N: usize>(&mut self, all: [(&str, &str, u64); N]) -> fmt::Result {
        all.into_iter().try_for_each(|(name, help, value)| self.counter(name, help, value))
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        counter.encode(self.0.encode_descriptor(name, help, None, counter.metric_type())?)
    }
}

/// What the cache told others. All ours: vLLM counts none of it.
#[derive(Debug)]
pub(super) struct EventsCollector(pub(super) Arc<Counts>);

impl Collector for EventsCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (Self(counts), mut write) = (self, Write(encoder));
        let subscribers = counts.subscribers.get() as f64;
        write.gauge(
            "quayline:kv_events_subscribers",
            "Connections that subscribed to events",
            subscribers,
        )?;
        write.counters([
            ("quayline:kv_events_batches", "Batches of events that were published", counts.batches.get()),
            ("quayline:kv_events_events", "Events in batches that were published", counts.events.get()),
            (
                "quayline:kv_events_unpublished_batches",
                "Batches that found no room in the publisher's queue; the next one tells everything",
                counts.unpublished_batches.get(),
            ),
            (
                "quayline:kv_events_dropped_batches",
                "Batches that found no room in a subscriber's queue, once for each subscriber",
                counts.missed_batches.get(),
            ),
            (
                "quayline:kv_events_replayed_batches",
                "Batches that were sent again",
                counts.replayed_batches.get(),
            ),
        ])
    }
}

/// What the operating system knows about this process.
#[derive(Debug)]
pub(super) struct ProcessCollector;

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

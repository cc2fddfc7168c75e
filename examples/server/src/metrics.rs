//! Prometheus metrics under vLLM's names, labels and buckets.

mod buckets;
mod counted;
mod scraped;

use std::borrow::Cow;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use axum::response::IntoResponse;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::kv_events::Counts;

pub(crate) use self::counted::{EngineMetrics, Timeline};
pub(crate) use self::scraped::EngineCollector;
use self::scraped::{EventsCollector, ProcessCollector};

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
        let registry = registry.sub_registry_with_labels(labels(model));
        let residency = engine.options.residency_every.is_some();
        registry.register_collector(Box::new(engine));
        EngineMetrics::new(registry, context, residency)
    }

    /// Registers those of what the cache tells others.
    pub(crate) fn add_kv_events(&self, model: &str, counts: Arc<Counts>) {
        let mut registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        registry
            .sub_registry_with_labels(labels(model))
            .register_collector(Box::new(EventsCollector(counts)));
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

/// The labels of everything that is one engine's.
fn labels(model: &str) -> impl Iterator<Item = (Cow<'static, str>, Cow<'static, str>)> {
    let labels = [("model_name", escape(model)), ("engine", "0".to_owned())];
    labels.into_iter().map(|(name, value)| (Cow::Borrowed(name), Cow::Owned(value)))
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

#[cfg(test)]
mod tests {
    use super::*;

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

//! What `/metrics` tells: figures of the engine and of HTTP, in Prometheus' text format.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use layer_streamer::{engine::EngineStats, plan::Part};

/// Paths that are counted by their names.
const PATHS: [&str; 6] = ["/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"];

/// What was asked by HTTP.
#[derive(Default)]
pub struct HttpCounts {
    /// Answers that began, by path and status.
    answered: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// Connections that are open.
    pub connections: AtomicUsize,
}

/// What the server takes.
#[derive(Debug)]
pub struct Memory {
    pub parts: Vec<Part>,
    /// Whether the device has a memory of its own.
    pub has_gpu: bool,
}

impl HttpCounts {
    pub fn note(&self, path: &str, status: u16) {
        let path = match path.strip_prefix("/v1/models/") {
            Some(_) => "/v1/models",
            None => PATHS.into_iter().find(|known| *known == path).unwrap_or("other"),
        };
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner).entry((path, status)).or_default() += 1;
    }

    /// All figures.
    pub fn text(&self, stats: &EngineStats, memory: &Memory, model: &str) -> String {
        let mut text = String::new();
        let mut put = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = writeln!(
                text,
                "# HELP layer_streamer_{name} {help}\n# TYPE layer_streamer_{name} {kind}\nlayer_streamer_{name} {value}"
            );
        };
        let connections = self.connections.load(Relaxed) as u64;
        put("requests_waiting", "gauge", "Sequences that wait for a row of the cache.", stats.waiting as u64);
        put("requests_running", "gauge", "Sequences that have a row of the cache.", stats.running as u64);
        put("connections", "gauge", "Connections that are open.", connections);
        for (name, help, value) in [
            ("requests_ended_total", "Sequences that ended, however.", stats.ended),
            ("passes_total", "Passes over the layers.", stats.passes),
            ("prompt_tokens_total", "Tokens of prompts that were computed.", stats.prompt_tokens),
            ("reused_tokens_total", "Tokens of prompts that were there already.", stats.reused_tokens),
            ("new_tokens_total", "Tokens that were chosen.", stats.new_tokens),
            ("put_back_total", "Times that a sequence gave back its place as the cache was full.", stats.put_back),
        ] {
            put(name, "counter", help, value);
        }
        text +=
            "# HELP layer_streamer_memory_bytes What the server takes, by purpose, of RAM and of the GPU's memory.\n";
        text += "# TYPE layer_streamer_memory_bytes gauge\n";
        for ((purpose, memory), bytes) in memory.by_purpose() {
            let purpose = escaped(&purpose);
            let _ = writeln!(text, "layer_streamer_memory_bytes{{purpose=\"{purpose}\",memory=\"{memory}\"}} {bytes}");
        }
        text += "# HELP layer_streamer_info The model that is served.\n# TYPE layer_streamer_info gauge\n";
        let _ = writeln!(text, "layer_streamer_info{{model=\"{}\"}} 1", escaped(model));
        text += "# HELP layer_streamer_http_requests_total Answers that began, by path and status.\n";
        text += "# TYPE layer_streamer_http_requests_total counter\n";
        for ((path, status), count) in self.answered.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = writeln!(text, "layer_streamer_http_requests_total{{path=\"{path}\",status=\"{status}\"}} {count}");
        }
        text
    }
}

impl Memory {
    /// What is taken for each purpose, by its name for programs, and of which memory.
    fn by_purpose(&self) -> BTreeMap<(String, &'static str), usize> {
        let mut all = BTreeMap::new();
        for part in &self.parts {
            let purpose =
                serde_json::to_value(part.purpose).ok().and_then(|value| Some(value["purpose"].as_str()?.to_owned()));
            let memory = if self.has_gpu && part.is_on_device() { "gpu" } else { "ram" };
            *all.entry((purpose.unwrap_or_default(), memory)).or_default() += part.bytes;
        }
        all
    }
}

/// A label's value as Prometheus reads it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use layer_streamer::plan::{Purpose, Tier};

    use super::*;

    #[test]
    fn figures_are_in_the_format_of_prometheus_and_unknown_paths_are_one() {
        let counts = HttpCounts::default();
        for (path, status) in [("/v1/completions", 200), ("/a", 404), ("/b", 404), ("/v1/models/x", 404)] {
            counts.note(path, status);
        }
        let part = |tier, bytes| Part { purpose: Purpose::Kept { tier, units: 1 }, bytes };
        let requests = Part { purpose: Purpose::Requests, bytes: 5 };
        let parts = vec![part(Tier::Ram, 3), part(Tier::Pinned, 1), part(Tier::Gpu, 8), requests];
        let mut memory = Memory { parts, has_gpu: false };
        let on_cpu = counts.text(&EngineStats::default(), &memory, "");
        assert!(on_cpu.contains("\nlayer_streamer_memory_bytes{purpose=\"kept\",memory=\"ram\"} 12\n"), "{on_cpu}");
        memory.has_gpu = true;
        let text = counts.text(&EngineStats::default(), &memory, "a\"b\\c");
        for line in [
            "layer_streamer_requests_running 0",
            "layer_streamer_memory_bytes{purpose=\"kept\",memory=\"gpu\"} 8",
            "layer_streamer_memory_bytes{purpose=\"kept\",memory=\"ram\"} 4",
            "layer_streamer_memory_bytes{purpose=\"requests\",memory=\"ram\"} 5",
            "# TYPE layer_streamer_passes_total counter",
            "layer_streamer_info{model=\"a\\\"b\\\\c\"} 1",
            "layer_streamer_http_requests_total{path=\"other\",status=\"404\"} 2",
            "layer_streamer_http_requests_total{path=\"/v1/models\",status=\"404\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.starts_with('#') || line.split(' ').count() == 2), "{text}");
    }
}

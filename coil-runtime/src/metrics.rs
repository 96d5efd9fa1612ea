//! The metric registry of a process, with what every process tells: its build and its use of resources.

use std::collections::HashMap;
use std::fs;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Encoder, Gauge, Opts, Registry, TextEncoder};

/// Kernel ticks per second as `/proc` shows them, on every architecture that we build for.
const TICKS: f64 = 100.0;

/// A registry that holds `coil_build_info` and `process_*`.
///
/// # Errors
/// A metric cannot be described; does not happen.
pub fn registry(program: &'static str) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    let labels: HashMap<_, _> = [("program", program), ("version", crate::cli::version())]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let build = Gauge::with_opts(
        Opts::new("coil_build_info", "Program and version; always 1.").const_labels(labels),
    )?;
    build.set(1.0);
    registry.register(Box::new(build))?;
    registry.register(Box::new(ProcessCollector::new()?))?;
    Ok(registry)
}

/// The text that `/metrics` answers with.
///
/// # Errors
/// A metric cannot be written, which means that its collector gave none.
pub fn render(registry: &Registry) -> prometheus::Result<Vec<u8>> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}

/// Use of resources, from `/proc/self`. What cannot be read is left out.
struct ProcessCollector {
    cpu: Counter,
    open_fds: Gauge,
    max_fds: Gauge,
    virtual_memory: Gauge,
    resident_memory: Gauge,
    start_time: Gauge,
    threads: Gauge,
}

impl ProcessCollector {
    fn new() -> prometheus::Result<Self> {
        let collector = Self {
            cpu: Counter::new("process_cpu_seconds_total", "Processor time spent, in seconds.")?,
            open_fds: Gauge::new("process_open_fds", "Open file descriptors.")?,
            max_fds: Gauge::new("process_max_fds", "Most file descriptors that may be open.")?,
            virtual_memory: Gauge::new("process_virtual_memory_bytes", "Size of virtual memory, in bytes.")?,
            resident_memory: Gauge::new(
                "process_resident_memory_bytes",
                "Size of resident memory, in bytes.",
            )?,
            start_time: Gauge::new(
                "process_start_time_seconds",
                "Start of the process, in seconds since 1970.",
            )?,
            threads: Gauge::new("process_threads", "Threads of the process.")?,
        };
        if let Some(start) = start_time() {
            collector.start_time.set(start);
        }
        Ok(collector)
    }

    fn read(&self) {
        if let Some(stat) = read_stat() {
            self.cpu.reset();
            self.cpu.inc_by(stat.cpu_ticks / TICKS);
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One of them is the folder that is being read.
            self.open_fds.set(count(entries.count().saturating_sub(1)));
        }
        if let Some(limit) = max_fds() {
            self.max_fds.set(limit);
        }
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            let field = |name: &str| number_after(&status, name);
            if let Some(kilobytes) = field("VmSize:") {
                self.virtual_memory.set(kilobytes * 1024.0);
            }
            if let Some(kilobytes) = field("VmRSS:") {
                self.resident_memory.set(kilobytes * 1024.0);
            }
            if let Some(threads) = field("Threads:") {
                self.threads.set(threads);
            }
        }
    }

    fn parts(&self) -> [&dyn Collector; 7] {
        [
            &self.cpu,
            &self.open_fds,
            &self.max_fds,
            &self.virtual_memory,
            &self.resident_memory,
            &self.start_time,
            &self.threads,
        ]
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}

struct Stat {
    cpu_ticks: f64,
    start_ticks: f64,
}

fn read_stat() -> Option<Stat> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything, so count from its end; the next field is the third.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some(Stat { cpu_ticks: field(14)? + field(15)?, start_ticks: field(22)? })
}

fn start_time() -> Option<f64> {
    let boot = number_after(&fs::read_to_string("/proc/stat").ok()?, "btime")?;
    Some(boot + read_stat()?.start_ticks / TICKS)
}

fn max_fds() -> Option<f64> {
    number_after(&fs::read_to_string("/proc/self/limits").ok()?, "Max open files")
}

/// The number that follows a word at the start of a line.
fn number_after(text: &str, word: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(word))?.split_whitespace().next()?.parse().ok()
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn every_process_tells_about_itself() {
        let text = String::from_utf8(render(&registry("test").unwrap()).unwrap()).unwrap();
        assert!(text.contains(r#"coil_build_info{program="test",version=""#), "{text}");
        for name in [
            "process_cpu_seconds_total",
            "process_open_fds",
            "process_max_fds",
            "process_virtual_memory_bytes",
            "process_resident_memory_bytes",
            "process_start_time_seconds",
            "process_threads",
        ] {
            let line = text.lines().find(|l| l.starts_with(&format!("{name} "))).unwrap_or_default();
            let value: f64 = line.rsplit(' ').next().unwrap_or_default().parse().unwrap();
            assert!(value > 0.0 || name.contains("cpu"), "{line}");
        }
    }
}

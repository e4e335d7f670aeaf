//! Load reports of engines (`SchedulerStats`, `vllm/v1/metrics/stats.py`).
//!
//! A dataclass, so a map, with other keys in almost every version. The five read here exist in
//! 0.11.0 to 0.33.0.

use serde::{Deserialize, Serialize};

use crate::error::DecodeError;
use crate::positional::{Kind, ScanError, Scanner};
use crate::write;

/// Load of one engine, as it last reported it (vLLM: `request_counts`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// `num_waiting_reqs`.
    pub waiting: u64,
    /// `num_running_reqs`.
    pub running: u64,
    /// `kv_cache_usage`, 0 to 1; filled in for the coordinator, and published to frontends, since 0.27.0.
    pub kv_cache_usage: f64,
}

impl Load {
    /// What is said about a rank that takes no requests: vLLM's balancing picks the rank with the
    /// least load, so everything goes elsewhere as long as there is an elsewhere.
    pub const STEER_AWAY: Self = Self { waiting: 100_000, running: 0, kv_cache_usage: 0.0 };
}

/// What the DP coordinator needs of `SchedulerStats`. Missing keys are zero, as in vLLM.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SchedulerStats {
    pub load: Load,
    /// Steps within the wave.
    pub step_counter: u64,
    /// The engine's wave; 0 from dense engines.
    pub current_wave: u64,
}

/// What an engine counts since its last report, for frontends to add up: the report of each goes to one of them.
const DIFFERENCES: [&str; 8] = [
    "connector_prefix_cache_stats",
    "cudagraph_stats",
    "ec_connector_stats",
    "kv_cache_eviction_events",
    "kv_connector_stats",
    "perf_stats",
    "prefix_cache_stats",
    "spec_decoding_stats",
];

/// An encoded `SchedulerStats` map with nothing in what must not be counted twice. No key is left out: vLLM's Rust
/// frontend wants `prefix_cache_stats`, which has a default in Python only.
pub fn gauges(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let fail = |error: ScanError| error.within("SchedulerStats", "gauges");
    let mut out = Vec::with_capacity(bytes.len());
    let mut scanner = Scanner::new(bytes);
    let pairs = scanner.map().map_err(fail)?;
    write::map(&mut out, pairs);
    for _ in 0..pairs {
        let mut inside = scanner.clone();
        let key = inside.str().map_err(fail)?;
        out.extend(scanner.raw().map_err(fail)?);
        if !DIFFERENCES.contains(&key) {
            out.extend(scanner.raw().map_err(fail)?);
        } else if key == "prefix_cache_stats" && scanner.kind().map_err(fail)? == Kind::Map {
            let counters = scanner.map().map_err(fail)?;
            write::map(&mut out, counters);
            for _ in 0..counters {
                out.extend(scanner.raw().map_err(fail)?);
                nothing(&mut scanner, &mut out).map_err(fail)?;
            }
        } else if scanner.kind().map_err(fail)? == Kind::Array {
            nothing(&mut scanner, &mut out).map_err(fail)?;
        } else {
            scanner.skip().map_err(fail)?;
            write::nil(&mut out);
        }
    }
    Ok(out)
}

/// Passes over a value, and writes the one of its type that counts nothing.
fn nothing(scanner: &mut Scanner<'_>, out: &mut Vec<u8>) -> Result<(), ScanError> {
    let kind = scanner.kind()?;
    scanner.skip()?;
    match kind {
        Kind::Bool => write::bool(out, false),
        Kind::Int => write::uint(out, 0),
        Kind::Float => write::float(out, 0.0),
        Kind::Map => write::map(out, 0),
        Kind::Array => write::array(out, 0),
        _ => write::nil(out),
    }
    Ok(())
}

impl SchedulerStats {
    /// Reads the map, as far as needed: the five come first, the rest is three quarters of it.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        const NAME: &str = "SchedulerStats";
        let mut stats = Self::default();
        let mut missing = 5;
        let mut scanner = Scanner::new(bytes);
        let pairs = scanner.map().map_err(|e| e.within(NAME, "top level"))?;
        for _ in 0..pairs {
            let key = scanner.str().map_err(|e| e.within(NAME, "key"))?;
            let found = stats.field(key, &mut scanner).map_err(|e| e.within(NAME, key))?;
            missing -= u8::from(found);
            if missing == 0 {
                break;
            }
        }
        Ok(stats)
    }

    /// Reads one value; true if it is one of the five.
    fn field(&mut self, key: &str, scanner: &mut Scanner<'_>) -> Result<bool, ScanError> {
        const NUMBER: &str = "int of 0 or more";
        match key {
            "num_running_reqs" => self.load.running = scanner.integer(NUMBER)?,
            "num_waiting_reqs" => self.load.waiting = scanner.integer(NUMBER)?,
            "step_counter" => self.step_counter = scanner.integer(NUMBER)?,
            "current_wave" => self.current_wave = scanner.integer(NUMBER)?,
            "kv_cache_usage" => self.load.kv_cache_usage = scanner.float()?,
            _ => {
                scanner.skip()?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A map with these keys only. A frontend takes the other fields' defaults.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(100);
        write::map(&mut out, 5);
        for (key, number) in [
            ("num_running_reqs", self.load.running),
            ("num_waiting_reqs", self.load.waiting),
            ("step_counter", self.step_counter),
            ("current_wave", self.current_wave),
        ] {
            write::str(&mut out, key);
            write::uint(&mut out, number);
        }
        write::str(&mut out, "kv_cache_usage");
        write::float(&mut out, self.load.kv_cache_usage);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_have_every_key_and_nothing_to_count_twice() {
        let whole = SchedulerStats { step_counter: 7, ..SchedulerStats::default() }.encode();
        assert_eq!(gauges(&whole).unwrap(), whole);
        let map = |pairs: &[(&str, rmpv::Value)]| {
            let pairs = pairs.iter().map(|(key, value)| (rmpv::Value::from(*key), value.clone()));
            rmpv::Value::Map(pairs.collect())
        };
        let list = |items: &[i64]| rmpv::Value::Array(items.iter().map(|item| (*item).into()).collect());
        let prefix = |reset: bool, count: i64, by: rmpv::Value| {
            map(&[("reset", reset.into()), ("requests", count.into()), ("hits_by_source", by)])
        };
        let report = |prefix: rmpv::Value, events, drafts: rmpv::Value, stages| {
            map(&[
                ("num_running_reqs", 5.into()),
                ("num_kv_fetch_reqs_by_stage", stages),
                ("prefix_cache_stats", prefix),
                ("connector_prefix_cache_stats", rmpv::Value::Nil),
                ("kv_cache_eviction_events", events),
                ("spec_decoding_stats", drafts),
                ("perf_stats", rmpv::Value::Nil),
            ])
        };
        let stages = map(&[("in_progress", 2.into())]);
        let drafts = map(&[("num_drafts", 3.into())]);
        let sent = report(prefix(true, 9, map(&[("gpu", 4.into())])), list(&[1, 2]), drafts, stages.clone());
        let empty = report(prefix(false, 0, map(&[])), list(&[]), rmpv::Value::Nil, stages);
        let bytes = |value: &rmpv::Value| {
            let mut out = Vec::new();
            write::value(&mut out, value);
            out
        };
        assert_eq!(crate::positional::value(&gauges(&bytes(&sent)).unwrap()).unwrap(), empty);
        assert!(gauges(&bytes(&sent)[..30]).is_err());
    }
}

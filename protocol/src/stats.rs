//! Load reports of engines (`SchedulerStats`, `vllm/v1/metrics/stats.py`).
//!
//! A dataclass, so a map, with other keys in almost every version. The five read here exist in
//! 0.11.0 to 0.33.0.

use serde::{Deserialize, Serialize};

use crate::error::DecodeError;
use crate::positional::{ScanError, Scanner};
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

/// An encoded `SchedulerStats` map without what must not be counted twice. All of these have defaults in vLLM.
pub fn gauges(bytes: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let fail = |error: ScanError| error.within("SchedulerStats", "gauges");
    let mut scanner = Scanner::new(bytes);
    let pairs = scanner.map().map_err(fail)?;
    let mut kept = Vec::with_capacity(bytes.len());
    let mut count = 0;
    for _ in 0..pairs {
        let mut inside = scanner.clone();
        let key = inside.str().map_err(fail)?;
        let pair = [scanner.raw().map_err(fail)?, scanner.raw().map_err(fail)?];
        if !DIFFERENCES.contains(&key) {
            count += 1;
            kept.extend(pair.concat());
        }
    }
    let mut out = Vec::with_capacity(kept.len() + 5);
    write::map(&mut out, count);
    out.extend(kept);
    Ok(out)
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
    fn gauges_have_everything_but_differences() {
        let whole = SchedulerStats { step_counter: 7, ..SchedulerStats::default() }.encode();
        assert_eq!(gauges(&whole).unwrap(), whole);
        let with = |key: &str| {
            let mut map = vec![0x82];
            write::str(&mut map, key);
            map.extend([0x93, 1, 2, 3]);
            write::str(&mut map, "num_running_reqs");
            map.push(5);
            map
        };
        for key in DIFFERENCES {
            let left = gauges(&with(key)).unwrap();
            assert_eq!(SchedulerStats::decode(&left).unwrap().load.running, 5);
            assert_eq!(left[0], 0x81, "{key}");
        }
        assert_eq!(gauges(&with("kv_cache_usage_by_pool")).unwrap(), with("kv_cache_usage_by_pool"));
        assert!(gauges(&with("x")[..5]).is_err());
    }
}

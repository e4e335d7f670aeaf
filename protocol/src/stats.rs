//! Load reports of engines (`SchedulerStats`, `vllm/v1/metrics/stats.py`).
//!
//! A dataclass, so a map, with other keys in almost every version. The five read here exist in
//! 0.11.0 to 0.33.0.

use crate::error::DecodeError;
use crate::handshake::read_map;
use crate::positional::Scanner;
use crate::write;

/// What the DP coordinator needs of `SchedulerStats`. Missing keys are zero, as in vLLM.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SchedulerStats {
    /// Requests being processed.
    pub num_running_reqs: u64,
    /// Requests in the queue.
    pub num_waiting_reqs: u64,
    /// Steps within the wave.
    pub step_counter: u64,
    /// The engine's wave; 0 from dense engines.
    pub current_wave: u64,
    /// Part of the KV cache in use, 0 to 1. Filled in for the coordinator since 0.27.0.
    pub kv_cache_usage: f64,
}

impl SchedulerStats {
    /// Reads the map.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut stats = Self::default();
        let number = |s: &mut Scanner<'_>| s.integer("int of 0 or more");
        read_map(bytes, "SchedulerStats", |key, scanner| {
            match key {
                "num_running_reqs" => stats.num_running_reqs = number(scanner)?,
                "num_waiting_reqs" => stats.num_waiting_reqs = number(scanner)?,
                "step_counter" => stats.step_counter = number(scanner)?,
                "current_wave" => stats.current_wave = number(scanner)?,
                "kv_cache_usage" => stats.kv_cache_usage = scanner.float()?,
                _ => scanner.skip()?,
            }
            Ok(())
        })?;
        Ok(stats)
    }

    /// A map with these keys only. A frontend takes the other fields' defaults.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(100);
        write::map(&mut out, 5);
        write::str(&mut out, "num_running_reqs");
        write::uint(&mut out, self.num_running_reqs);
        write::str(&mut out, "num_waiting_reqs");
        write::uint(&mut out, self.num_waiting_reqs);
        write::str(&mut out, "step_counter");
        write::uint(&mut out, self.step_counter);
        write::str(&mut out, "current_wave");
        write::uint(&mut out, self.current_wave);
        write::str(&mut out, "kv_cache_usage");
        write::float(&mut out, self.kv_cache_usage);
        out
    }
}

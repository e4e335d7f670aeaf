//! Sleep and wake-up of all engines.

use dp_sidecar_protocol::EngineIndex;
use serde::{Deserialize, Serialize};

/// Final word on a sleep or a wake-up: how every engine is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SleepReport {
    /// All ranks of all nodes.
    pub engines: Vec<EngineMemory>,
    /// The engines are paused: they compute nothing. Those of which a part sleeps are, always.
    pub paused: bool,
    /// Version of the weights; `unknown` after a sleep that has discarded them.
    pub version: String,
}

impl SleepReport {
    /// Whether every rank did what it was told.
    pub fn is_whole(&self) -> bool {
        self.engines.iter().all(|engine| engine.error.is_none())
    }
}

/// One engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineMemory {
    pub rank: EngineIndex,
    /// Parts of its memory that sleep: `weights`, `kv_cache`. After a failure: that may sleep.
    pub asleep: Vec<String>,
    /// Its weights were discarded and nothing was loaded since: new requests are held.
    pub without_weights: bool,
    /// Why it did not do what it was told.
    pub error: Option<String>,
}

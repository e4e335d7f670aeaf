//! Arguments of the utility methods around weights and pausing.
//!
//! `vllm/v1/engine/core.py`: `pause_scheduler` (0.17.0), `resume_scheduler` (0.16.0),
//! `reset_prefix_cache` (arguments since 0.12 / 0.13), `set_weight_version` (0.27.0),
//! `collective_rpc` (all).

use std::fmt;
use std::str::FromStr;

use rmpv::Value;
use serde::{Deserialize, Serialize};

use crate::ids::WeightVersion;
use crate::layout::Layout;

/// Name of a method and its positional arguments.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Method of the engine core.
    pub method: &'static str,
    /// Positional arguments.
    pub args: Vec<Value>,
}

/// What a pause does with the requests that are there (vLLM: `PauseMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PauseMode {
    /// Finish them with reason abort.
    Abort,
    /// Let them finish, queue new ones.
    #[default]
    Wait,
    /// Freeze them; they go on after resume, with whatever weights there are then.
    Keep,
}

impl PauseMode {
    /// vLLM's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Wait => "wait",
            Self::Keep => "keep",
        }
    }
}

impl fmt::Display for PauseMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PauseMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "abort" => Ok(Self::Abort),
            "wait" => Ok(Self::Wait),
            "keep" => Ok(Self::Keep),
            other => Err(format!("pause mode {other:?}, expected abort, wait or keep")),
        }
    }
}

/// `pause_scheduler(mode, clear_cache)`. The answer, nil, comes when the pause is complete. On
/// lockstep engines since 0.21 it comes only once all ranks have been asked.
pub fn pause_scheduler(mode: PauseMode, clear_cache: bool) -> Call {
    Call { method: "pause_scheduler", args: vec![mode.as_str().into(), clear_cache.into()] }
}

/// `resume_scheduler()`. To all lockstep ranks at once or to none.
pub const fn resume_scheduler() -> Call {
    plain("resume_scheduler")
}

/// `is_scheduler_paused()`, answers a bool.
pub const fn is_scheduler_paused() -> Call {
    plain("is_scheduler_paused")
}

/// `reset_prefix_cache(reset_running_requests, reset_connector)` with as many arguments as the
/// version takes. Answers false if blocks are still in use (nil in 0.11).
pub fn reset_prefix_cache(layout: &Layout, reset_running_requests: bool, reset_connector: bool) -> Call {
    let mut args = vec![reset_running_requests.into(), reset_connector.into()];
    args.truncate(layout.reset_prefix_cache_args());
    Call { method: "reset_prefix_cache", args }
}

/// `reset_mm_cache()`, answers nil.
pub const fn reset_mm_cache() -> Call {
    plain("reset_mm_cache")
}

/// `set_weight_version(version)`, answers nil.
pub fn set_weight_version(version: &WeightVersion) -> Call {
    Call { method: "set_weight_version", args: vec![version.0.as_str().into()] }
}

/// `get_weight_version()`, answers a str, `default` on a fresh engine.
pub const fn get_weight_version() -> Call {
    plain("get_weight_version")
}

/// `collective_rpc(method, None, args, kwargs)`: calls a worker method. Answers an array with one
/// entry per worker of this DP rank. No time limit is given: the caller keeps its own, and the
/// engine's would leave the call running.
pub fn collective_rpc(method: &str, args: Vec<Value>, kwargs: Vec<(String, Value)>) -> Call {
    let kwargs = kwargs.into_iter().map(|(key, value)| (Value::from(key), value)).collect();
    Call {
        method: "collective_rpc",
        args: vec![method.into(), Value::Nil, Value::Array(args), Value::Map(kwargs)],
    }
}

/// `reload_weights` of every worker from a directory on the engine's node (0.16.0 and later).
pub fn reload_weights(directory: &str) -> Call {
    collective_rpc("reload_weights", Vec::new(), vec![("weights_path".to_owned(), directory.into())])
}

const fn plain(method: &'static str) -> Call {
    Call { method, args: Vec::new() }
}

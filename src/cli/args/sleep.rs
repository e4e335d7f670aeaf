//! `sidecar sleep` and `sidecar wake`, as clap sees them.

use std::time::Duration;

use clap::Args;
use dp_sidecar_protocol::machine::weight_update::PauseMode;

use super::Target;
use crate::cli::values::pause_mode;
use crate::duration;

pub(super) const SLEEP: &str = "\
Free memory of the devices of all engines, on all nodes, until `sidecar wake`.

The engines are paused first. Level 1 moves the weights to the host's memory, level 2 discards them; the KV cache is \
given up by both. vLLM frees memory only when the engines run with --enable-sleep-mode.

After level 2 the version of the weights is unknown, new requests are held, and the engines serve only when \
other weights were loaded:

  sidecar sleep --level 2          the trainer has the devices
  sidecar wake --tag weights       memory for weights, without any in it
  sidecar update --path DIR        new weights, while the KV cache still sleeps
  sidecar wake --tag kv_cache      the engines serve

A frontend's own calls (`POST /sleep`, `POST /wake_up`) do the same, in the same order, over all ranks.

Exit code 0: all ranks sleep. 13: somebody else controls the engines. 15: refused before any rank was called, \
or a rank failed, which is named; the engines stay paused then: repeat it, or wake them up.";

pub(super) const WAKE: &str = "\
Wake up all engines, on all nodes, or parts of their memory, after a sleep.

Without --tag whatever sleeps is woken up. Engines that are fully awake are resumed, also when a frontend has put \
them to sleep. After a sleep of level 2 nothing is resumed before weights were loaded: wake up the tag `weights`, \
update, then wake up the rest; see `sidecar sleep --help`.

Exit code 0: all ranks did it, or slept not. 13: somebody else controls the engines. 15: refused before any rank was \
called, or a rank failed, which is named.";

/// `sidecar sleep`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SleepArgs {
    /// 1 keeps the weights in the host's memory, 2 discards them.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=2))]
    pub level: u8,
    /// What happens to running requests.
    #[arg(long, value_parser = pause_mode(), default_value_t)]
    pub mode: PauseMode,
    /// With `wait`: abort what still runs after this long. [default: as the sidecar was started]
    #[arg(long, value_parser = duration::parse, value_name = "TIME")]
    pub pause_deadline: Option<Duration>,
    /// How every engine is now, as one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

/// `sidecar wake`.
#[derive(Debug, Args)]
pub(in crate::cli) struct WakeArgs {
    /// A part of the memory. May be given several times. [default: all that sleeps]
    #[arg(long, value_parser = ["weights", "kv_cache"], value_name = "TAG")]
    pub tag: Vec<String>,
    /// How every engine is now, as one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub target: Target,
}

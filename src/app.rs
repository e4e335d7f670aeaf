//! Wires tasks and channels.

use crate::config::Config;
use crate::exit_code::{self, RunEnd};
use crate::state_dir::StateDir;

/// Runs the sidecar until it is told to stop, or cannot go on.
pub async fn run(config: Config, state: StateDir) -> RunEnd {
    let _ = (config, state);
    RunEnd::new(exit_code::INTERNAL, "not written yet")
}

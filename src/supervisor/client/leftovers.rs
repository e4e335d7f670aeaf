//! Removal of processes whose keeper is dead: found by the run marker, asked to end, then killed.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use crate::supervisor::procfs::{Process, Selector, roots};

/// Pause between two looks.
const PERIOD: Duration = Duration::from_millis(50);
/// How long SIGKILL may take.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Removed {
    /// Processes found at first.
    pub(super) found: usize,
    /// Processes that had to be killed.
    pub(super) killed: usize,
    /// Pids that could not be ended.
    pub(super) left: Vec<i32>,
}

/// Ends every process that is selected. First the outermost processes get SIGTERM, so that vLLM's launchers can stop
/// their own in order; after `grace` all get SIGKILL.
pub(super) async fn remove(selector: Selector, grace: Duration) -> io::Result<Removed> {
    let mut removed = Removed::default();
    let first = find(&selector).await?;
    removed.found = first.len();
    if first.is_empty() {
        return Ok(removed);
    }
    tracing::warn!(processes = first.len(), ?grace, "processes without a keeper are stopped");
    for process in roots(&first) {
        process.signal(Signal::TERM);
    }
    let kill_at = Instant::now() + grace;
    let give_up_at = kill_at + KILL_LIMIT;
    let mut killed = BTreeSet::new();
    loop {
        let left = find(&selector).await?;
        let now = Instant::now();
        if left.is_empty() || now >= give_up_at {
            removed.left = left.iter().map(|process| process.pid).collect();
            removed.killed = killed.len();
            return Ok(removed);
        }
        if now >= kill_at {
            for process in &left {
                if process.signal(Signal::KILL) {
                    killed.insert(process.pid);
                }
            }
        }
        sleep(PERIOD).await;
    }
}

/// Walks /proc on a thread that may block.
async fn find(selector: &Selector) -> io::Result<Vec<Process>> {
    let selector = selector.clone();
    tokio::task::spawn_blocking(move || selector.find()).await.map_err(io::Error::other)?
}

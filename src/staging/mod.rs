//! The staging area of a node: brings the bytes of a new checkpoint into shared memory of the node, checks
//! them and passes them on to the next node, while the engines go on generating. See
//! `protocol/docs/staging.md`.

mod adapters;
mod area;
mod check;
mod config;
mod digest;
mod error;
mod fill;
mod job;
mod journal;
mod layout;
mod mapping;
mod probe;
mod records;
mod reuse;
mod source;
mod task;
#[cfg(test)]
mod tests;
mod transfer;
pub mod upload;

use std::io;
use std::path::Path;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::driver::handles::{NodeEvent, StageHandle, queue};
use crate::tasks::{Task, named};
pub use config::StageConfig;
pub use layout::FileSize;
#[cfg(test)]
pub(crate) use transfer::testing::corpus as transfer_corpus;
#[cfg(any(test, feature = "test-support"))]
pub(crate) use transfer::testing::fuzz as fuzz_transfer;

/// Starts the staging task. It ends when `stop` is cancelled or all handles are gone; segments stay for a
/// successor with the same state directory, see [`crate::shared_memory::remove_segments`]. What a predecessor left is hashed before the
/// first command is answered.
///
/// # Errors
/// `segments.json` in the state directory cannot be read.
pub fn spawn(
    config: StageConfig,
    events: mpsc::Sender<NodeEvent>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> io::Result<StageHandle> {
    records::Records::read(&config.state_dir)?;
    let (handle, requests) = queue("staging");
    let tasks = tracker.clone();
    tracker
        .spawn(named(Task::Staging, async move { task::run(config, requests, events, tasks, stop).await }));
    Ok(handle)
}

/// Forgets the upload that was taken with this state directory, after the end of its segment.
///
/// # Errors
/// A file is there and cannot be removed.
pub fn forget_upload(state_dir: &Path) -> io::Result<()> {
    journal::Journal::remove(state_dir)
}

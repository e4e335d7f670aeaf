//! The staging area of a node: brings the bytes of a new checkpoint into shared memory of the node, checks
//! them and passes them on to the next node, while the engines go on generating. See
//! `protocol/docs/staging.md`.

mod config;
pub mod upload;

use std::io;
use std::path::Path;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::driver::handles::{HandleError, StageEvent, StageHandle, StageRequest, StageState};
pub use config::{CHUNK, HopAuth, HopSide, NoAuth, SHM_DIR, StageConfig};

/// Commands waiting for the task.
const COMMANDS: usize = 16;

/// Starts the staging task. It ends when `stop` is cancelled or all handles are gone; segments stay for a
/// successor with the same state directory, see [`remove_segments`].
///
/// # Errors
/// `segments.json` in the state directory cannot be read.
pub fn spawn(
    config: StageConfig,
    events: mpsc::Sender<StageEvent>,
    tracker: &TaskTracker,
    stop: CancellationToken,
) -> io::Result<StageHandle> {
    let (commands, mut requests) = mpsc::channel::<crate::driver::handles::StageCommand>(COMMANDS);
    tracker.spawn(async move {
        let _kept = (config, events);
        loop {
            let command = tokio::select! {
                () = stop.cancelled() => return,
                command = requests.recv() => command,
            };
            let Some(command) = command else { return };
            let answer = match command.request {
                StageRequest::State => Ok(StageState::default()),
                _ => Err(HandleError::failed("staging is not there yet")),
            };
            let _ = command.reply.send(answer);
        }
    });
    Ok(StageHandle { commands })
}

/// Removes the shared memory segments of a state directory's run id, after a planned end or when nobody is
/// left to use them. Gives the number of files removed.
///
/// # Errors
/// A file is there and cannot be removed.
pub fn remove_segments(shm_dir: &Path, run_id: &str) -> io::Result<usize> {
    let mut removed = 0;
    for name in ["a", "b"] {
        match std::fs::remove_file(shm_dir.join(format!("dp-sidecar-{run_id}-{name}"))) {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(removed)
}

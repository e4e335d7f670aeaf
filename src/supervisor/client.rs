//! The sidecar's side of the keeper socket.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;

use super::keeper::wire::{ChildInfo, KeeperEvent, SpawnSpec};

/// How to find or start the keeper.
#[derive(Clone, Debug)]
pub struct KeeperOptions {
    /// The state directory.
    pub state_dir: PathBuf,
    /// The `sidecar` binary.
    pub exe: PathBuf,
    /// How long the keeper keeps everything running without an owner.
    pub orphan_grace: Duration,
    /// Grace between SIGTERM and SIGKILL when leftovers are removed, and when the keeper stops
    /// everything on its own.
    pub kill_grace: Duration,
}

/// Something is wrong with the keeper, or it refused.
#[derive(Clone, Debug, Error)]
pub enum KeeperError {
    /// It could not be started.
    #[error("keeper of {}: start: {detail}", state_dir.display())]
    Start {
        /// Its state directory.
        state_dir: PathBuf,
        /// What went wrong.
        detail: String,
    },
    /// It refused or failed to do what it was asked for.
    #[error("keeper: {what}: {detail}")]
    Refused {
        /// What it was asked for.
        what: String,
        /// Its answer.
        detail: String,
    },
    /// It did not answer in time.
    #[error("keeper: {what}: no answer within {limit:?}")]
    Deadline {
        /// What it was asked for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// It died, or the client was shut down.
    #[error("keeper: {what}: the keeper is gone")]
    Gone {
        /// What it was asked for.
        what: String,
    },
}

/// Handle of the keeper client. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KeeperClient {}

impl KeeperClient {
    /// Connects to the keeper of the state directory, or starts one after removing what an earlier
    /// one left behind. Children that a living keeper still has are stopped first. Events come on
    /// the returned channel; read it always.
    pub async fn connect_or_start(
        options: KeeperOptions,
    ) -> Result<(Self, mpsc::Receiver<KeeperEvent>), KeeperError> {
        let _ = options;
        Err(KeeperError::Gone {
            what: "not written yet".to_owned(),
        })
    }

    /// Pid of the keeper.
    pub fn pid(&self) -> Option<u32> {
        None
    }

    /// Starts a child; returns the pid of its main process.
    pub async fn spawn(&self, spec: SpawnSpec) -> Result<u32, KeeperError> {
        let _ = spec;
        Ok(0)
    }

    /// Asks for a child's end: SIGTERM, after `grace` SIGKILL to all of it. Returns when the keeper
    /// has accepted; the end comes as [`KeeperEvent::Exited`].
    pub async fn stop(&self, name: &str, grace: Duration) -> Result<(), KeeperError> {
        let _ = (name, grace);
        Ok(())
    }

    /// Living children.
    pub async fn list(&self) -> Result<Vec<ChildInfo>, KeeperError> {
        Ok(Vec::new())
    }

    /// Stops all children in their order and ends the keeper. Returns when all are gone.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), KeeperError> {
        let _ = grace;
        Ok(())
    }
}

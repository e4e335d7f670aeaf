//! What can go wrong with staging.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::manifest::ManifestError;

/// Staging failed, or was refused. Which node this is about is said with [`StageError::on`].
#[derive(Debug, Error)]
pub(super) enum StageError {
    /// The checkpoint is not what the model needs, or cannot be read.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The files cannot be laid out in a segment.
    #[error("checkpoint: {0}")]
    Layout(String),
    /// The file system of the segments, in `dir`, is too small. Bytes.
    #[error("{}: {needed} more bytes of shared memory are needed, {free} are free", dir.display())]
    NoSpace { dir: PathBuf, needed: u64, free: u64 },
    /// An engine might be ended for want of memory. Bytes; `by` says what they are counted by.
    #[error("{needed} more bytes of shared memory are needed, {free} are free by {by}")]
    NoMemory { needed: u64, free: u64, by: String },
    /// More than the configured memory: bytes of all segments.
    #[error("{needed} bytes of shared memory are needed, at most {limit} are allowed (--max-shared-memory)")]
    Limit { needed: u64, limit: u64 },
    /// The system refused something: what was done with which file or address.
    #[error("{what}: {error}")]
    Io { what: String, error: io::Error },
    /// The connection from one node to the next failed, or was used wrongly.
    #[error("transfer {from} -> {to}: {reason}")]
    Transfer { from: String, to: String, reason: String },
    /// The bytes as a whole are not those that were announced.
    #[error("digest of the checkpoint is {actual}, expected {expected}")]
    Root { expected: String, actual: String },
    /// It cannot be done now.
    #[error("{0}")]
    Refused(String),
    /// It was called off.
    #[error("staging was cancelled")]
    Cancelled,
}

impl StageError {
    /// Its text, with the node on which it occurred. A transfer names its two nodes itself.
    pub(super) fn on(&self, node: &str) -> String {
        match self {
            Self::Transfer { .. } => self.to_string(),
            _ => format!("{node}: {self}"),
        }
    }
}

/// Adds to an error of the system what was being done.
pub(super) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, StageError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, StageError> {
        self.map_err(|error| StageError::Io { what: what(), error })
    }
}

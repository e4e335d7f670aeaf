//! What can go wrong with staging.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::digest::Digest;
use crate::manifest::ManifestError;

/// Staging failed, or was refused.
#[derive(Debug, Error)]
pub(super) enum StageError {
    /// The checkpoint is not what the model needs, or cannot be read.
    #[error("{node}: {error}")]
    Manifest {
        /// Which node found it.
        node: String,
        error: ManifestError,
    },
    /// The files cannot be laid out in a segment.
    #[error("{node}: checkpoint: {reason}")]
    Layout { node: String, reason: String },
    /// The file system of the segments is too small.
    #[error("{node}: {}: {needed} more bytes of shared memory are needed, {free} are free", dir.display())]
    NoSpace {
        node: String,
        /// Where segments are kept.
        dir: PathBuf,
        /// Bytes.
        needed: u64,
        /// Bytes.
        free: u64,
    },
    /// More than the configured memory.
    #[error("{node}: {needed} bytes of shared memory are needed, at most {limit} are allowed")]
    Limit {
        node: String,
        /// Bytes, of all segments.
        needed: u64,
        /// Bytes.
        limit: u64,
    },
    /// The system refused something.
    #[error("{node}: {what}: {error}")]
    Io {
        node: String,
        /// What was done with which file or address.
        what: String,
        error: io::Error,
    },
    /// The connection to a neighbour failed, or was used wrongly.
    #[error("transfer {from} -> {to}: {reason}")]
    Hop {
        /// The sending node.
        from: String,
        /// The receiving node.
        to: String,
        reason: String,
    },
    /// Nothing came over a hop for too long.
    #[error("transfer {from} -> {to}: no byte {what} for {limit:?}")]
    Silent {
        /// The sending node.
        from: String,
        /// The receiving node.
        to: String,
        /// `came` or `was taken`.
        what: &'static str,
        limit: Duration,
    },
    /// A chunk arrived damaged twice.
    #[error("transfer {from} -> {to}: {chunk} has digest {actual}, expected {expected}, twice")]
    BadChunk {
        /// The sending node.
        from: String,
        /// The receiving node.
        to: String,
        /// Number, file and bytes.
        chunk: String,
        /// As announced.
        expected: Digest,
        /// As arrived.
        actual: Digest,
    },
    /// The bytes as a whole are not those that were announced.
    #[error("{node}: digest of the checkpoint is {actual}, expected {expected}")]
    Root {
        node: String,
        /// As announced.
        expected: String,
        /// As found.
        actual: String,
    },
    /// It cannot be done now.
    #[error("{node}: {reason}")]
    Refused { node: String, reason: String },
    /// It was called off.
    #[error("{node}: staging was cancelled")]
    Cancelled { node: String },
}

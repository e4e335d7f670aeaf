//! What can go wrong on a socket.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

/// Longest path of a unix socket: `sun_path` has 108 bytes, the last one is the terminating zero.
pub(super) const SUN_PATH_LIMIT: usize = 107;

/// A socket did not do what it should. Each variant names the address.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The address is not one this transport can use.
    #[error("cannot use address {address}: {reason}")]
    Address { address: String, reason: String },
    /// A unix socket path does not fit into `sun_path`; length in bytes.
    #[error(
        "socket path {} has {length} bytes, the limit is {SUN_PATH_LIMIT}: choose a shorter state directory",
        path.display()
    )]
    PathTooLong { path: PathBuf, length: usize },
    /// A file or directory could not be prepared.
    #[error("cannot prepare {}: {source}", path.display())]
    Path { path: PathBuf, source: io::Error },
    /// Another process listens there.
    #[error("{address} is in use by a live process")]
    InUse { address: String },
    /// Binding failed.
    #[error("cannot listen on {address}: {reason}")]
    Bind { address: String, reason: String },
    /// Connecting failed.
    #[error("cannot connect to {address}: {reason}")]
    Connect { address: String, reason: String },
    /// The peer did not get through a stage (`connect`, `handshake` or `send`) in time.
    #[error("{stage} with {address} took longer than {limit:?}")]
    Timeout { address: String, stage: &'static str, limit: Duration },
    /// The peer breaks the ZMTP rules, or a limit.
    #[error("{address} breaks the protocol: {reason}")]
    Protocol { address: String, reason: String },
    /// The connection is closed.
    #[error("{address} is disconnected: {reason}")]
    Disconnected { address: String, reason: String },
}

impl TransportError {
    pub(super) fn address(address: impl Display, reason: impl Display) -> Self {
        Self::Address { address: address.to_string(), reason: reason.to_string() }
    }

    pub(super) fn bind(address: impl Display, error: impl Display) -> Self {
        Self::Bind { address: address.to_string(), reason: error.to_string() }
    }

    pub(super) fn disconnected(address: impl Display, reason: impl Display) -> Self {
        Self::Disconnected { address: address.to_string(), reason: reason.to_string() }
    }
}

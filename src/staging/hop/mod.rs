//! A hop: the connection over which a node passes a checkpoint to the next one. See
//! `protocol/docs/staging.md`.

pub(super) mod connect;
pub(super) mod receive;
pub(super) mod send;
pub(super) mod wire;

use std::sync::Arc;

/// The two nodes of a hop, for errors.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    /// The sending node.
    pub(super) from: Arc<str>,
    /// The receiving node.
    pub(super) to: Arc<str>,
}

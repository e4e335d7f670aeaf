//! A transfer: the connection over which a node passes a checkpoint to the next one of the chain. See
//! `protocol/docs/staging.md`.

pub(super) mod connect;
pub(super) mod receive;
pub(super) mod send;
#[cfg(any(test, feature = "test-support"))]
pub(super) mod testing;
pub(super) mod wire;

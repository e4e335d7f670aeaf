//! The link: how a process of the sidecar asks another one to do what the handles of
//! [`crate::driver::handles`] ask a task to do.
//!
//! Two links are made of it. The **relay link** is a unix socket between the sidecar and the relay process of
//! its node, which owns the data path (rank tasks, engine-facing sockets of the DP coordinator) and lives on
//! when the sidecar is killed. The **peer link** is a TCP connection between the leader and a follower; the
//! follower serves it out of its own tasks and its own relay link. See `protocol/docs/link.md`.

pub mod client;
pub mod codec;
mod mutation;
pub mod server;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
pub mod wire;

pub use codec::LinkStream;
#[cfg(any(test, feature = "test-support"))]
pub(crate) use codec::fuzz;

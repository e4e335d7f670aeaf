//! The peer link: how the sidecars of one deployment find each other, prove that they belong together, and agree
//! before anything is started. What travels afterwards is [`crate::link`]. See `protocol/docs/peer.md`.

pub mod auth;
pub mod epoch;
pub mod facts;
pub mod follower;
mod frame;
pub mod hello;
pub mod leader;
pub mod registry;
pub mod stream;
#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "test-support"))]
pub(crate) use frame::fuzz;

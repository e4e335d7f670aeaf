//! The peer link: how the sidecars of one deployment find each other, prove that they belong together, and agree
//! before anything is started. What travels afterwards is [`crate::link`]. See `protocol/docs/peer.md`.

pub mod auth;
pub mod introduction;
pub mod registry;
pub mod token;

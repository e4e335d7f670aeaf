//! One program of all tests of the public interface: linked once. A file of this folder is a module
//! here, `cargo test -p dp-sidecar-protocol --test protocol golden::` runs those of `golden.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attachment;
mod attachment_sim;
mod control;
mod coordinator_properties;
mod coordinator_trace;
mod datadriven;
mod golden;
mod golden_support;
mod handshake;
mod laws;
mod lifecycle;
mod lifecycle_sim;
mod properties;
mod sim;
mod sleep_sim;
mod virtual_engine;
mod weight_update;

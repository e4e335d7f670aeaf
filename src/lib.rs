//! dp-sidecar: hosts vLLM data-parallel engines on one node. See ARCHITECTURE.md.
//!
//! The program is [`cli::main`]. Everything else is private, so that what is used by tests alone shows as dead code in
//! an ordinary build; the feature `test-support` opens it to the tests and benchmarks of this repository.
#![deny(unsafe_code)]
#![cfg_attr(
    not(feature = "test-support"),
    allow(
        unreachable_pub,
        unused_imports,
        dead_code,
        reason = "`pub` says what a module offers to the others and to tests; a re-export may be for tests alone"
    )
)]

pub mod cli;
mod msgpack;

#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;

#[cfg(not(feature = "test-support"))]
mod admin;
#[cfg(not(feature = "test-support"))]
mod api;
#[cfg(not(feature = "test-support"))]
mod app;
#[cfg(not(feature = "test-support"))]
mod config;
#[cfg(not(feature = "test-support"))]
mod driver;
#[cfg(not(feature = "test-support"))]
mod exit_code;
#[cfg(not(feature = "test-support"))]
mod gpu;
#[cfg(not(feature = "test-support"))]
mod http;
#[cfg(not(feature = "test-support"))]
mod link;
#[cfg(not(feature = "test-support"))]
mod manifest;
#[cfg(not(feature = "test-support"))]
mod peer;
#[cfg(not(feature = "test-support"))]
mod relay;
#[cfg(not(feature = "test-support"))]
mod shared_memory;
#[cfg(not(feature = "test-support"))]
mod shutdown;
#[cfg(not(feature = "test-support"))]
mod staging;
#[cfg(not(feature = "test-support"))]
mod state_dir;
#[cfg(not(feature = "test-support"))]
mod supervisor;
#[cfg(not(feature = "test-support"))]
mod tasks;
#[cfg(not(feature = "test-support"))]
mod telemetry;
#[cfg(not(feature = "test-support"))]
mod token;
#[cfg(not(feature = "test-support"))]
mod transport;

#[cfg(feature = "test-support")]
pub mod admin;
#[cfg(feature = "test-support")]
pub mod api;
#[cfg(feature = "test-support")]
pub mod app;
#[cfg(feature = "test-support")]
pub mod config;
#[cfg(feature = "test-support")]
pub mod driver;
#[cfg(feature = "test-support")]
pub mod exit_code;
#[cfg(feature = "test-support")]
pub mod gpu;
#[cfg(feature = "test-support")]
pub mod http;
#[cfg(feature = "test-support")]
pub mod link;
#[cfg(feature = "test-support")]
pub mod manifest;
#[cfg(feature = "test-support")]
pub mod peer;
#[cfg(feature = "test-support")]
pub mod relay;
#[cfg(feature = "test-support")]
pub mod shared_memory;
#[cfg(feature = "test-support")]
pub mod shutdown;
#[cfg(feature = "test-support")]
pub mod staging;
#[cfg(feature = "test-support")]
pub mod state_dir;
#[cfg(feature = "test-support")]
pub mod supervisor;
#[cfg(feature = "test-support")]
pub mod tasks;
#[cfg(feature = "test-support")]
pub mod telemetry;
#[cfg(feature = "test-support")]
pub mod token;
#[cfg(feature = "test-support")]
pub mod transport;

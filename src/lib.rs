//! dp-sidecar: hosts vLLM data-parallel engines on one node. See ARCHITECTURE.md.
#![deny(unsafe_code)]

pub mod admin;
pub mod app;
pub mod bench;
pub mod cli;
pub mod config;
pub mod driver;
pub mod exit_code;
pub mod gpu;
pub mod http;
pub mod link;
pub mod manifest;
pub mod peer;
pub mod relay;
pub mod shutdown;
pub mod staging;
pub mod state_dir;
pub mod supervisor;
pub mod telemetry;
pub mod transport;

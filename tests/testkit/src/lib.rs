//! Fake vLLM engines and fake vLLM frontends over libzmq.
//!
//! They speak the same bytes as the real ones and die of the same mistakes, which is the point: a
//! test that makes the sidecar send a bad message sees the fake engine die, as the real one would.
//! Nothing here uses the sidecar's transport or its wire types, so that a misreading there is not
//! repeated here. What the fakes promise is taken from vLLM 0.32.0's `v1/engine/core.py`,
//! `v1/engine/core_client.py`, `v1/engine/utils.py` and `v1/engine/coordinator.py`.
//!
//! * [`engine`]: an engine core of a chosen vLLM version, dense or lockstep, with faults to order.
//! * [`frontend`]: handshake server, DP coordinator and API servers, driven by a test step by step.
//! * [`argv`]: the command line of `vllm serve`, as far as the fakes need it (binary `fake-vllm`).
#![forbid(unsafe_code)]

pub mod argv;
pub mod engine;
pub mod frontend;
pub mod launcher;
pub mod msg;
pub mod ports;
pub mod report;
pub mod sockets;
pub mod version;

pub use ports::free_port;
pub use report::Reporter;
pub use version::VllmVersion;

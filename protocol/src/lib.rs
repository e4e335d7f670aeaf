//! Wire types of vLLM's frontend <-> EngineCore protocol, and the pure state machines of dp-sidecar.
//!
//! Nothing in this crate does IO, reads a clock or starts a thread: frames come in as bytes, time
//! comes in as [`Time`], and everything to be done goes out as an action. The same input gives the
//! same output, always, which is what lets the tests replay a failure from a seed.
//!
//! * Wire types: [`frames`], [`handshake`], [`request`], [`output`], [`stats`], [`utility`],
//!   [`wave`]. Which position holds which field depends on the vLLM version: [`layout`].
//! * Machines: [`machine`].
#![forbid(unsafe_code)]

pub mod error;
pub mod frames;
pub mod handshake;
pub mod ids;
pub mod layout;
pub mod machine;
pub mod output;
pub mod positional;
pub mod registration;
pub mod request;
pub mod stats;
pub mod time;
pub mod utility;
pub mod wave;
mod write;

pub use error::DecodeError;
pub use frames::Frames;
pub use ids::{
    CallId, ClientIndex, EngineIdentity, EngineIndex, FrontendId, GroupKind, Incarnation, PausedBy, Slot,
    UpdateId, Wave, WeightVersion,
};
pub use time::Time;

//! The `sidecar` program against fake engines and fake frontends, over real sockets.
//!
//! Each test starts a sidecar of its own in a state directory of its own. Waiting is always for a
//! condition, see [`harness::until`].

mod bounds;
mod checkpoints;
mod control;
mod engines;
mod fakes;
mod frontends;
mod handshake;
pub(crate) mod harness;
mod hazards;
mod models;
mod nodes;
mod panics;
mod planned;
mod processes;
mod restart;
mod restarts;
mod sleep;
mod status;
mod survivors;
mod update;
mod uploads;

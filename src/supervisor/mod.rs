//! vLLM processes: their command lines, the keeper that owns them, and the client through which the
//! sidecar talks to the keeper.

pub mod client;
pub mod command;
pub mod environment;
pub mod flags;
pub(crate) mod identity;
pub mod init;
pub mod installed;
pub mod keeper;
pub mod procfs;

pub use client::{KeeperClient, KeeperOptions};
pub use keeper::wire::{ExitStatus, KeeperEvent, SpawnSpec};

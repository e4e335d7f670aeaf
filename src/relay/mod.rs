//! The relay process: owns the data path of a node and lives on when the sidecar is killed.
//!
//! It is a child of the keeper, started before the engines and stopped after them, and holds what engines and
//! frontends are connected to: the rank tasks and the edge task. It decides nothing; the sidecar tells it
//! what to do over the relay link (`relay.sock` in the state directory, see [`crate::link`]). [`process`] is the
//! process, [`host`] the sidecar's side: finding or starting it, and starting it again when it died.

pub mod host;
pub mod process;

use std::ops::Range;
use std::path::{Path, PathBuf};

use dp_sidecar_protocol::GroupKind;
use dp_sidecar_protocol::machine::virtual_engine::Limits;

use crate::supervisor::command::RELAY;

/// Name of the relay process among the keeper's children.
pub const CHILD: &str = RELAY;
/// Socket of the relay link inside the state directory.
pub const SOCKET: &str = "relay.sock";
/// Folder of the engines' sockets inside the state directory.
pub const IPC: &str = "ipc";

/// Where the relay process of a state directory listens.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join(SOCKET)
}

/// What a relay process is for. One that was started for something else is of no use to a new sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Purpose {
    /// The ranks of this node.
    pub ranks: Range<u16>,
    /// Slots of every engine for frontends.
    pub frontend_slots: u32,
    /// Whether the ranks step together.
    pub kind: GroupKind,
    /// Bounds of each rank at the start. A sidecar that takes the process over sends its own
    /// ([`SetLimits`](crate::driver::handles::SetLimits)), so that they are no part of the name.
    pub limits: Limits,
}

impl std::fmt::Display for Purpose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Range { start, end } = self.ranks;
        write!(f, "{} ranks {start}..{end}, {} frontend slots", self.kind, self.frontend_slots)
    }
}

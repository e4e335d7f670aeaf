//! What the staging area of a node is made of.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::upload::UploadRequests;
use crate::shared_memory::SHM_DIR;
use crate::token::Token;

/// Bytes of a chunk by default.
pub(super) const CHUNK: u32 = 4 << 20;

/// How a staging area is set up.
#[derive(Debug)]
pub struct StageConfig {
    /// Names this node in errors of its own and of its neighbours, for example `node of rank 2`.
    pub node: String,
    /// Where `segments.json` is kept.
    pub state_dir: PathBuf,
    /// Of the state directory; part of the segments' names.
    pub run_id: String,
    /// Where segments are kept; [`SHM_DIR`].
    pub shm_dir: PathBuf,
    /// Address on which the node before this one in the chain finds it. A port is taken while it is awaited.
    pub data_host: IpAddr,
    /// Bytes of a chunk, a multiple of 4096; 4 MiB by default. The sender's counts.
    pub chunk: u32,
    /// Refuse to use more shared memory than this, in bytes (`--max-shared-memory`).
    pub max_memory: Option<u64>,
    /// Where `/proc` and `/sys` are, which say how much memory there is.
    pub system: PathBuf,
    /// Take memory for two checkpoints of this one's size at the start.
    pub prefault: Option<PathBuf>,
    /// A transfer in which nothing moves for this long has failed.
    pub idle_limit: Duration,
    /// The node before must connect within this time.
    pub accept_limit: Duration,
    /// The secret that both ends of a transfer prove to know; none: everybody is let in, for a deployment on one node,
    /// where nothing is transferred.
    pub token: Option<Token>,
    /// Uploads of this node, see [`super::upload::channel`]; none on followers.
    pub uploads: Option<UploadRequests>,
}

impl StageConfig {
    /// With the usual limits, and without uploads.
    pub fn new(
        node: impl Into<String>,
        state_dir: impl Into<PathBuf>,
        run_id: impl Into<String>,
        data_host: IpAddr,
        token: Option<Token>,
    ) -> Self {
        Self {
            node: node.into(),
            state_dir: state_dir.into(),
            run_id: run_id.into(),
            shm_dir: PathBuf::from(SHM_DIR),
            data_host,
            chunk: CHUNK,
            max_memory: None,
            system: PathBuf::from("/"),
            prefault: None,
            idle_limit: Duration::from_secs(10),
            accept_limit: Duration::from_secs(60),
            token,
            uploads: None,
        }
    }
}
